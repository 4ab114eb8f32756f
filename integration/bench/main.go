// Command bench measures a libvirt-driver binary and the scripts of GitLab's
// documentation page side by side: whole jobs of both, in turns, on one libvirt
// host with one guest image, as GitLab Runner would run them. The driver's are
// made in several ways.
//
// It is started by integration/bench.sh, which builds it and the driver, starts a
// private libvirt host for them, and says what is measured.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"libvirt-driver/integration/runner"
)

func init() {
	// What calls leave behind becomes a child of the main thread. No other use is
	// made of that, so that no call is traced from it: see runner's trace.
	runtime.LockOSThread()
}

func main() {
	var o options
	ways := flag.String("ways", strings.Join(wayNames(), ","), "which `ways` of the driver to measure")
	many := flag.String("many", "", "how many tiny jobs to run at once, as `1,4,16`; none if empty")
	flag.StringVar(&o.driver, "driver", "", "the libvirt-driver `binary`")
	flag.StringVar(&o.scripts, "baseline", "", "the `folder` with prepare.sh, run.sh and cleanup.sh")
	flag.IntVar(&o.rounds, "n", 7, "how many `jobs` of each side count; 0 compares none")
	flag.IntVar(&o.tail, "tail", 0, "how many `jobs` more of each way, for percentiles")
	flag.StringVar(&o.virtType, "virt-type", "qemu", "how guests run: `kvm or qemu`")
	flag.StringVar(&o.markdown, "markdown", "", "write the report to this `file` too, as Markdown")
	flag.Parse()
	err := o.choose(*ways, *many)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	if err != nil || o.driver == "" || o.scripts == "" || o.rounds < 0 || o.tail < 0 || (o.virtType != "qemu" && o.virtType != "kvm") ||
		o.rounds == 0 && o.tail == 0 && len(o.many) == 0 || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends bench without cleaning up
	err = run(ctx, os.Stdout, os.Stderr, o)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "bench:", err)
	if ctx.Err() != nil {
		os.Exit(130)
	}
	os.Exit(1)
}

// options are the command line's.
type options struct {
	driver, scripts    string
	ways               []way
	many               []int
	rounds, tail       int
	virtType, markdown string
}

// choose reads --ways and --many.
func (o *options) choose(ways, many string) (err error) {
	for name := range strings.SplitSeq(ways, ",") {
		i := slices.Index(wayNames(), name)
		if i < 0 {
			return fmt.Errorf("--ways: no way is called %q: there are %s", name, strings.Join(wayNames(), ", "))
		}
		o.ways = append(o.ways, allWays[i])
	}
	if many != "" {
		if o.many, err = parseSizes(many); err != nil {
			return fmt.Errorf("--many: %w", err)
		}
	}
	return nil
}

// way is one in which the driver makes a job's machine.
type way struct {
	name string
	// settings are those of its image that are not the defaults.
	settings string
	// boots tells that prepare boots the guest.
	boots bool
	// beside is the service that it needs.
	beside *service
}

// allWays are those that there are. All have an image in one and the same file of
// settings: what is kept for one is not taken for unwanted by another's.
var allWays = []way{
	{name: "boot", boots: true},
	{name: "standby", settings: "standby = 1\n", beside: &standby},
	{name: "memory", settings: "start = \"memory\"\n"},
}

func wayNames() []string {
	var names []string
	for _, w := range allWays {
		names = append(names, w.name)
	}
	return names
}

// settings returns the driver's, with an image for each way. socket is libvirtd's,
// or "".
func (o *options) settings(socket string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "virt_type = %q\nsocket = %q\n[defaults]\nvolume = \"gitlab-runner-base.qcow2\"\nkey = \"/root/.ssh/id_ed25519\"\n", o.virtType, socket)
	for _, w := range o.ways {
		fmt.Fprintf(&b, "[images.%s]\n%s", w.name, w.settings)
	}
	if len(o.many) > 0 {
		fmt.Fprintf(&b, "[images.tiny]\n%s", tiny)
	}
	return b.String()
}

// libvirtd is where libvirtd listens.
const libvirtd = "/var/run/libvirt/libvirt-sock"

// run measures, tells progress of it, and writes the report to out.
func run(ctx context.Context, out, progress io.Writer, o options) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return fmt.Errorf("make a folder for the settings: %w", err)
	}
	defer os.RemoveAll(dir)
	between, err := newProxy(filepath.Join(dir, "libvirtd"), libvirtd)
	if err != nil {
		return err
	}
	defer between.close()
	command := func(name, socket string) ([]string, error) {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(o.settings(socket)), 0o600); err != nil {
			return nil, fmt.Errorf("write settings: %w", err)
		}
		return []string{o.driver, "--config", file}, nil
	}
	counted, err := command("config.toml", filepath.Join(dir, "libvirtd"))
	if err != nil {
		return err
	}
	direct, err := command("direct.toml", "")
	if err != nil {
		return err
	}
	host, err := connect(ctx, "default")
	if err != nil {
		return err
	}
	defer host.close()
	facts, err := host.facts(ctx, o)
	if err != nil {
		return err
	}
	if err := adoptAll(); err != nil {
		return err
	}

	b := &bench{
		watch:    host.watch,
		rpc:      between.take,
		rest:     2 * time.Second,
		settle:   5 * time.Second,
		env:      append(os.Environ(), "VIRT_TYPE="+o.virtType, "NO_COLOR=1"),
		dir:      dir,
		progress: progress,
	}
	r := &report{title: "The driver's jobs"}
	var m *measurements
	sides := []side{{name: "baseline", commands: runner.Scripts(o.scripts), boots: true}}
	for _, w := range o.ways {
		sides = append(sides, side{
			name: w.name, commands: runner.Driver(counted[0], counted[1:]...),
			image: w.name, boots: w.boots, command: direct, beside: w.beside,
		})
	}
	if o.rounds > 0 {
		if m, err = b.compare(ctx, o.rounds, sides); err != nil {
			return err
		}
		r = m.report()
	}
	var failed error // which takes nothing from what was measured before
	if o.tail > 0 {
		var t *measurements
		if t, failed = b.tail(ctx, o.tail, sides); failed == nil {
			t.addTail(r)
		}
	}
	if len(o.many) > 0 && failed == nil {
		var c *crowd
		if c, failed = b.crowds(ctx, tinySide(counted), o.many); failed == nil {
			r.add("Many jobs at once, of tiny guests that boot (1 vCPU, 256 MiB)", c.table())
		}
	}
	if m != nil {
		m.judge(r)
	}
	r.facts = append(r.facts, append(facts, loadAverage("at the end"))...)
	err = errors.Join(failed, r.text(out))
	if o.markdown != "" {
		err = errors.Join(err, writeFile(o.markdown, r.markdown))
	}
	return err
}

// writeFile writes a file by what writes it.
func writeFile(name string, write func(io.Writer) error) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}
