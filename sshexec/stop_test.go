package sshexec

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nap is a time to sleep that no other test run uses, in seconds, by which its
// processes are known without their environment.
var nap = strconv.Itoa(1_000_000 + os.Getpid())

func stopProcess(pid int) { syscall.Kill(pid, syscall.SIGSTOP) }

// cancelWhenReady runs a script, cancels it once it has written "ready", and
// returns what was written, how long the end took, and the error.
func cancelWhenReady(t *testing.T, c runs, script string) (said string, took time.Duration, err error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready := newSignal("ready")
	cancelled := make(chan time.Time, 1)
	go func() {
		<-ready.seen
		time.Sleep(300 * time.Millisecond) // the children's exec
		cancelled <- time.Now()
		cancel()
	}()
	err = c.Run(ctx, Command{Shell: "bash", Script: strings.NewReader(script), Stdout: ready, Stderr: ready})
	ready.give()
	return ready.buf.String(), time.Since(<-cancelled), err
}

// tree starts what scripts of all ages have tried to get away with.
var tree = strings.ReplaceAll(`
sleep 1000 &
setsid sleep 1000 &
nohup sleep 1000 >/dev/null 2>&1 &
(nohup setsid sleep 1000 >/dev/null 2>&1 </dev/null &)
(setsid bash -c "sleep 1000 & sleep 1000 & wait" >/dev/null 2>&1 &)
env -i sleep 1000 &
(cd /; exec -a "odd) R 1 name" sleep 1000) &
sleep 1000 | sleep 1000 | cat &
echo ready
sleep 1000
`, "1000", nap)

// stubborn is a tree of its own that does not listen to TERM.
var stubborn = strings.ReplaceAll(`
trap "" TERM
sleep 1000 &
(setsid bash -c "trap '' TERM; while :; do sleep 0.2; done" >/dev/null 2>&1 &)
(while :; do (sleep 0.1) & wait; done) &
nohup setsid sleep 1000 >/dev/null 2>&1 &
echo ready
while :; do sleep 1; done
`, "1000", nap)

func TestStop(t *testing.T) {
	s := startServer(t, nil)
	// A process from before, of the same user and the same server.
	if _, _, err := run(t, s.dial(t), "bash", "(LIBVIRT_DRIVER_RUN=another setsid sleep 100 >/dev/null 2>&1 </dev/null &)"); err != nil {
		t.Fatal(err)
	}
	before := s.commands()
	for end := time.Now().Add(5 * time.Second); len(before) != 1 && time.Now().Before(end); before = s.commands() {
		time.Sleep(20 * time.Millisecond) // in the middle of an exec it shows no environment
	}
	if len(before) != 1 {
		t.Fatalf("%d processes from before, want 1", len(before))
	}
	gone := func(t *testing.T) {
		t.Helper()
		var left []process
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if left = s.commands(); len(left) == 1 {
				break
			}
		}
		survived := false
		for _, p := range left {
			if p.pid == before[0].pid {
				survived = true
			} else {
				t.Errorf("process %d (%s) is left", p.pid, p.name)
			}
		}
		if !survived {
			t.Error("the process from before was ended too")
		}
		for _, p := range processes() {
			// What env -i started carries no tag, only its parent or its orphanage.
			if p.name == "sleep" && p.env == "" && p.state != "Z" && cmdline(p.pid) == "sleep "+nap+" " {
				t.Errorf("process %d without environment is left", p.pid)
			}
		}
	}
	for _, tt := range []struct {
		name, script string
		min, max     time.Duration
	}{
		{"obedient", "export TREE=1\n" + tree, 0, stopLimit},
		{"job", job("export TREE=1\n" + tree), 0, stopLimit},
		{"stubborn", stubborn, stopGrace, stopLimit},
		{"no shell any more", "echo ready; exec sleep 1000", 0, stopLimit},
		{"flood", "echo ready; yes", 0, stopLimit},
	} {
		t.Run(tt.name, func(t *testing.T) {
			said, took, err := cancelWhenReady(t, s.dial(t), tt.script)
			t.Logf("%v, %v", took.Round(time.Millisecond), err)
			var exit *ExitError
			if !errors.Is(err, context.Canceled) || errors.As(err, &exit) || errors.Is(err, ErrLost) {
				t.Errorf("error %v, want context.Canceled", err)
			}
			var left *leftError
			if errors.As(err, &left) {
				t.Errorf("error %v", err)
			}
			if took < tt.min || took > tt.max {
				t.Errorf("took %v, want %v to %v", took, tt.min, tt.max)
			}
			if !strings.HasPrefix(said, "ready\n") {
				t.Errorf("output %.80q", said)
			}
			gone(t)
			// The guest is as usable as before.
			if stdout, _, err := run(t, s.dial(t), "bash", job("echo after_script")); err != nil || stdout != "after_script\n" {
				t.Errorf("next script: stdout %q, error %v", stdout, err)
			}
		})
	}
}

func cmdline(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.ReplaceAll(string(text), "\x00", " ")
}

// TestStopOutput sees that what the script says while it is being ended still
// comes, and that its trap has its way.
func TestStopOutput(t *testing.T) {
	t.Parallel()
	c := startServer(t, nil).dial(t)
	said, took, _ := cancelWhenReady(t, c, "exec 2>/dev/null\ntrap 'echo; echo tidying up; sleep 1; echo done; exit 1' TERM\nprintf ready\nsleep 1000 & wait")
	if said != "ready\ntidying up\ndone\n" {
		t.Errorf("output %q", said)
	}
	if took < time.Second || took > stopLimit {
		t.Errorf("took %v", took)
	}
}

// TestStopAnyTime cancels at all moments of a script's first fifth of a second,
// which are those before the marker is where it is looked for.
func TestStopAnyTime(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	ran := t.TempDir() + "/ran"
	for delay := time.Duration(0); delay < 100*time.Millisecond; delay += 4 * time.Millisecond {
		c := s.dial(t)
		ctx, cancel := context.WithTimeout(t.Context(), delay)
		err := c.Run(ctx, Command{Shell: "bash", Script: strings.NewReader("sleep 30; echo >" + ran)})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", delay, err)
		}
		s.waitNoCommands(t)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a script went on after its end")
	}
}

// TestStopBlockedWriter sees that a log that takes nothing any more does not
// keep Run from its end.
func TestStopBlockedWriter(t *testing.T) {
	s := startServer(t, nil)
	c := s.dial(t)
	w := &blockedWriter{entered: make(chan struct{}), release: make(chan struct{})}
	defer close(w.release)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-w.entered
		cancel()
	}()
	begin := time.Now()
	err := c.Run(ctx, Command{Shell: "bash", Script: strings.NewReader("yes"), Stdout: w})
	if took := time.Since(begin); took > stopLimit+2*lastOutput {
		t.Errorf("took %v", took)
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	s.waitNoCommands(t)
}

type blockedWriter struct{ entered, release chan struct{} }

func (b *blockedWriter) Write(p []byte) (int, error) {
	close(b.entered) // a second Write panics
	<-b.release
	return len(p), nil
}

// TestStopDeadGuest sees that a guest that does not answer any more costs no
// more than the limit.
func TestStopDeadGuest(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	c := s.dial(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("the job was cancelled")
	ready := newSignal("ready")
	var cancelled time.Time
	go func() {
		<-ready.seen
		for _, pid := range s.connections() {
			stopProcess(pid)
		}
		cancelled = time.Now()
		cancel(cause)
	}()
	err := c.Run(ctx, Command{Shell: "bash", Script: strings.NewReader("printf ready; sleep 60"), Stdout: ready})
	if took := time.Since(cancelled); took > stopLimit+2*lastOutput {
		t.Errorf("took %v", took)
	}
	if !errors.Is(err, context.Canceled) || !errors.Is(err, cause) || !strings.Contains(err.Error(), "may still run") {
		t.Errorf("error %v, want the cause and that nothing is certain", err)
	}
}

// TestStopWithoutSecondSession sees that the signal request does what it can
// where no helper can be started.
func TestStopWithoutSecondSession(t *testing.T) {
	t.Parallel()
	s := startServer(t, []string{"MaxSessions 1"})
	_, took, err := cancelWhenReady(t, s.dial(t), "echo ready; sleep 1000")
	t.Logf("%v, %v", took, err)
	if !errors.Is(err, context.Canceled) || took > stopLimit+2*lastOutput {
		t.Errorf("took %v, error %v", took, err)
	}
	// OpenSSH serves the request only where it separates privileges: not for root.
	if os.Getuid() == 0 {
		if !strings.Contains(err.Error(), "may still run") {
			t.Errorf("error %v, want that nothing is certain", err)
		}
		return
	}
	s.waitNoCommands(t)
}

// TestStopWhileLingering sees that the end of the context while only processes
// from the background are left ends those.
func TestStopWhileLingering(t *testing.T) {
	s := startServer(t, nil)
	_, took, err := cancelWhenReady(t, s.dial(t), "sleep 1000 & setsid sleep 1000 & echo ready; exit 0")
	if !errors.Is(err, context.Canceled) || took > stopLimit {
		t.Errorf("took %v, error %v", took, err)
	}
	s.waitNoCommands(t)
}

// TestStopScript sees that the script for the guest survives its quotes and
// runs under the shells that are called sh.
func TestStopScript(t *testing.T) {
	if i := strings.IndexByte(stopScript, '\''); i >= 0 {
		t.Fatalf("single quote before %.40q", stopScript[i+1:])
	}
	for _, sh := range [][]string{{"dash"}, {"bash", "--posix"}} {
		marker := newMarker()
		victim := exec.Command("sleep", "1000")
		victim.Env = []string{"A=1", "LIBVIRT_DRIVER_RUN=" + marker, "B=line\nline"}
		bystander := exec.Command("sleep", "1000")
		bystander.Env = []string{"LIBVIRT_DRIVER_RUN=" + newMarker()}
		for _, p := range []*exec.Cmd{victim, bystander} {
			if err := p.Start(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(200 * time.Millisecond)
		for _, tt := range []struct{ input, want string }{
			{newMarker() + " 1000\nKILL\n", "alive 0\n"},
			{marker + " 10\nKILL\n", "alive 0\n"}, // it is older than that
			{marker + " 1000\ncount\nTERM\n", "alive 1\nalive 1\n"},
		} {
			helper := exec.Command(sh[0], append(sh[1:], "-c", stopScript)...)
			helper.Stdin = strings.NewReader(tt.input)
			if out, err := helper.CombinedOutput(); err != nil || string(out) != tt.want {
				t.Errorf("%v, %q: %q, error %v", sh, tt.input, out, err)
			}
		}
		done := make(chan struct{})
		go func() {
			victim.Wait()
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Errorf("%v: the process with the marker lives", sh)
			victim.Process.Kill()
		}
		if err := bystander.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("%v: the process with another marker: %v", sh, err)
		}
		bystander.Process.Kill()
		bystander.Wait()
	}
}
