// Command demo runs one sample job through a libvirt-driver binary as GitLab
// Runner does, shows the job log as GitLab shows it, and checks that the job has
// left nothing on the libvirt host.
//
// It is started by integration/demo.sh, which builds both programs and starts a
// private libvirt host for them.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"libvirt-driver/integration/runner"
)

// settings are the driver's: guests are emulated, so that the demo runs on hosts
// without hardware virtualisation too; everything else is as with no file.
const settings = "virt_type = \"qemu\"\n"

var job = runner.Job{
	Name: "hello",
	Script: []string{
		`echo "Hello from the guest $(hostname), made for this job alone"`,
		`uname -srm`,
		`id`,
		`sudo id --user --name`,
		`git --version`,
		`mkdir --parents out && date > out/when`,
	},
	AfterScript: []string{
		`echo "The job's status is $CI_JOB_STATUS"`,
	},
	// With these the job has every sub-stage that Runner knows.
	Cache:        []string{"vendor/"},
	Artifacts:    []string{"out/"},
	Dependencies: []string{"build"},
}

func main() {
	driver := flag.String("driver", "", "the libvirt-driver `binary`")
	flag.Parse()
	if *driver == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := demo(ctx, os.Stdout, *driver); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo runs the job and writes the job log, a table of the driver's calls, and
// what is left on the host. The error says what is not as it should be.
func demo(ctx context.Context, out io.Writer, driver string) error {
	dir, err := os.MkdirTemp("", "demo")
	if err != nil {
		return fmt.Errorf("make a folder for the settings: %w", err)
	}
	defer os.RemoveAll(dir)
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte(settings), 0o600); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}

	before, err := lookAround(ctx)
	if err != nil {
		return err
	}
	log := &renderer{out: out, plain: os.Getenv("NO_COLOR") != ""}
	outcome, err := runner.RunJob(ctx, runner.Config{Commands: runner.Driver(driver, "--config", config), Log: log}, job)
	if err != nil {
		return fmt.Errorf("run the job: %w", err)
	}
	log.flush()

	title(log, "The driver's calls")
	if err := summarise(log, outcome); err != nil {
		return fmt.Errorf("write summary: %w", err)
	}
	if len(outcome.RunnerLog) > 0 {
		title(log, "The runner's own log, where cleanup's output goes")
		fmt.Fprintf(log, "%s", outcome.RunnerLog)
	}
	// The host is looked at even when ctx has ended: that is when it matters.
	after, err := settle(context.WithoutCancel(ctx), before)
	if err != nil {
		return err
	}
	title(log, "What is on the libvirt host now")
	left := compare(log, before, after)
	log.flush()

	if !outcome.Green() {
		err = fmt.Errorf("the job has not succeeded (%s): %w", outcome.FailureReason, outcome.Err)
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("the job has left on the host: %s", strings.Join(left, ", ")))
	}
	return err
}

func title(w io.Writer, text string) { fmt.Fprintf(w, "\n%s%s%s\n", cyan, text, reset) }

// summarise writes one line per call.
func summarise(w io.Writer, o *runner.Outcome) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "exit\ttime\t  stage")
	for _, r := range o.Calls {
		exit := fmt.Sprint(r.ExitCode)
		if r.Signal != 0 {
			exit = r.Signal.String()
		}
		fmt.Fprintf(t, "%s\t%s\t  %s\n", exit, seconds(r.Duration()), r.Name())
	}
	fmt.Fprintf(t, "\t%s\t  whole job: %s\n", seconds(o.Duration), o.Status)
	if err := t.Flush(); err != nil {
		return err
	}
	if bytes.Contains(o.Log, []byte("Missing gitlab-runner")) {
		fmt.Fprintln(w, "Cache and artifacts are gitlab-runner's work in the guest; this guest image comes without it.")
	}
	return nil
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// sight is what one of virsh's lists shows, by kind.
type sight struct {
	kind, command string
	items         []string
}

// lookAround asks virsh, and not the driver, what there is.
func lookAround(ctx context.Context) ([]sight, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	sights := []sight{
		{kind: "domains", command: "list --all --name"},
		{kind: "volumes", command: "vol-list default"},
		{kind: "leases", command: "net-dhcp-leases default"},
	}
	for i, s := range sights {
		args := append([]string{"--quiet", "--connect", "qemu:///system"}, strings.Fields(s.command)...)
		text, err := exec.CommandContext(ctx, "virsh", args...).Output()
		if err != nil {
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
			}
			return nil, fmt.Errorf("virsh %s: %w", s.command, err)
		}
		for line := range strings.Lines(string(text)) {
			if item := describe(s.kind, strings.Fields(line)); item != "" {
				sights[i].items = append(sights[i].items, item)
			}
		}
	}
	return sights, nil
}

// settling is how long what cleanup leaves to a process of its own may take to be removed.
const settling = 30 * time.Second

// settle looks around until nothing is left that was not there before, for settling at most.
func settle(ctx context.Context, before []sight) ([]sight, error) {
	for deadline := time.Now().Add(settling); ; time.Sleep(50 * time.Millisecond) {
		after, err := lookAround(ctx)
		if err != nil || len(compare(io.Discard, before, after)) == 0 || time.Now().After(deadline) {
			return after, err
		}
	}
}

// describe names what a line of virsh's list is about.
func describe(kind string, fields []string) string {
	switch {
	case len(fields) == 0:
		return ""
	case kind == "leases" && len(fields) >= 6: // date, time, MAC, protocol, address, name, client
		return strings.Join([]string{fields[5], fields[2], fields[4]}, " ")
	default:
		return fields[0]
	}
}

// compare writes what there is now and returns what was not there before.
func compare(w io.Writer, before, after []sight) (left []string) {
	for i, s := range after {
		fmt.Fprintf(w, "%-8s  (virsh %s)\n", s.kind, s.command)
		if len(s.items) == 0 {
			fmt.Fprintln(w, "    none")
		}
		for _, item := range s.items {
			if slices.Contains(before[i].items, item) {
				fmt.Fprintf(w, "    %s, as before\n", item)
				continue
			}
			fmt.Fprintf(w, "    %s%s, left by the job%s\n", red, item, reset)
			left = append(left, strings.TrimSuffix(s.kind, "s")+" "+item)
		}
	}
	if len(left) == 0 {
		fmt.Fprintf(w, "%sThe job has left nothing.%s\n", green, reset)
	}
	return left
}
