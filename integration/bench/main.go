// Command bench measures a libvirt-driver binary and the scripts of GitLab's
// documentation page side by side: whole jobs of both, in turns, on one libvirt
// host with one guest image, as GitLab Runner would run them.
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
	"syscall"
	"time"

	"libvirt-driver/integration/runner"
)

func main() {
	var o options
	flag.StringVar(&o.driver, "driver", "", "the libvirt-driver `binary`")
	flag.StringVar(&o.scripts, "baseline", "", "the `folder` with prepare.sh, run.sh and cleanup.sh")
	flag.IntVar(&o.rounds, "n", 7, "how many `jobs` of each side count")
	flag.StringVar(&o.virtType, "virt-type", "qemu", "how guests run: `kvm or qemu`")
	flag.StringVar(&o.markdown, "markdown", "", "write the report to this `file` too, as Markdown")
	flag.Parse()
	if o.driver == "" || o.scripts == "" || o.rounds < 1 || (o.virtType != "qemu" && o.virtType != "kvm") || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends bench without cleaning up
	err := run(ctx, os.Stdout, os.Stderr, o)
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
	rounds             int
	virtType, markdown string
}

// run measures, tells progress of it, and writes the report to out.
func run(ctx context.Context, out, progress io.Writer, o options) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return fmt.Errorf("make a folder for the settings: %w", err)
	}
	defer os.RemoveAll(dir)
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "virt_type = %q\n", o.virtType), 0o600); err != nil {
		return fmt.Errorf("write settings: %w", err)
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

	b := &bench{
		watch:    host.watch,
		rest:     2 * time.Second,
		settle:   5 * time.Second,
		env:      append(os.Environ(), "VIRT_TYPE="+o.virtType, "NO_COLOR=1"),
		dir:      dir,
		progress: progress,
	}
	m, err := b.compare(ctx, o.rounds, [2]side{
		{"baseline", runner.Scripts(o.scripts)},
		{"driver", runner.Driver(o.driver, "--config", config)},
	})
	if err != nil {
		return err
	}
	facts = append(facts, loadAverage("at the end"))

	r := m.report(facts)
	err = r.text(out)
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
