//go:build integration

package integration

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// keeper returns the process ID of a machine's keeper, 0 when there is none.
func keeper(t *testing.T, machine string) int {
	return own(t, "keep", machine)
}

// own returns the process ID of one of the driver's own processes for a machine, 0 when there is none. It asks /proc,
// not the driver.
func own(t *testing.T, command, machine string) int {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		text, _ := os.ReadFile(process)
		args := strings.Split(string(text), "\x00")
		if args[0] == "libvirt-driver" && slices.Contains(args, command) && slices.Contains(args, machine) {
			var pid int
			fmt.Sscanf(process, "/proc/%d/", &pid)
			return pid
		}
	}
	return 0
}

func TestAJobsSubStagesShareTheConnectionOfPrepare(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	cfg := newSettings(t, tiny("")).runner(t)
	cfg.Env = append(cfg.Env, "CUSTOM_ENV_SECRET=not for a process that stays")
	ex := prepared(t, cfg, job)
	pid := keeper(t, machineOf(job))
	if pid == 0 {
		t.Fatal("no process keeps the connection")
	}
	connections := map[string]bool{}
	for range 3 {
		connections[output(t, ex, `echo "$SSH_CONNECTION"`)] = true
	}
	if len(connections) != 1 {
		t.Errorf("scripts came by %d connections: %v", len(connections), connections)
	}

	// Nothing of the runner's is in the keeper's hands.
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || string(env) != "GOMAXPROCS=1\x00" {
		t.Errorf("the keeper's environment: %q, %v", env, err)
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		target, _ := os.Readlink(file)
		if strings.HasPrefix(target, "pipe:") || strings.HasPrefix(target, cfg.TempDir) {
			t.Errorf("the keeper has %s open", target)
		}
	}
	if session, err := syscall.Getpgid(pid); err != nil || session != pid {
		t.Errorf("the keeper's process group is %d, %v", session, err)
	}

	sum := sha256.Sum256([]byte(machineOf(job)))
	socket := fmt.Sprintf("/run/libvirt-driver/%x.ssh", sum[:12])
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("its socket: %v, %v", info, err)
	}

	want(t, ex, ex.Cleanup(t.Context()), 0)
	if pid := keeper(t, machineOf(job)); pid != 0 {
		t.Errorf("the keeper outlives cleanup as process %d", pid)
	}
}

// A script's shell has been started when the sub-stage before was done with, and not when the script comes.
func TestTheShellOfTheNextSubStageWaits(t *testing.T) {
	t.Parallel()
	ex := prepared(t, newSettings(t, tiny("")).runner(t), newJob(runner.Job{}))
	const pause = 2 * time.Second
	for range 3 {
		time.Sleep(pause)
		var up, begun float64
		said := output(t, ex, `read -r up rest </proc/uptime; set -- $(cat /proc/$$/stat); echo "$up ${22}"`)
		if _, err := fmt.Sscanf(said, "%g %g", &up, &begun); err != nil {
			t.Fatalf("%q: %v", said, err)
		}
		if age := up - begun/100; age < pause.Seconds()-0.5 || age > 20 {
			t.Errorf("the shell is %.2f s old, and nothing was run for %v", age, pause)
		}
	}
	want(t, ex, ex.Cleanup(t.Context()), 0)
}

func TestAJobGoesOnWithoutItsKeeper(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny("")).runner(t), job)
	machine := machineOf(job)
	pid := keeper(t, machine)
	if pid == 0 {
		t.Fatal("no process keeps the connection")
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r := ex.Run(t.Context(), "step_look", "exit 7")
	want(t, ex, r, 1)
	wantWithin(t, r, 30*time.Second)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the keeper has ended", func() bool { return keeper(t, machine) == 0 })
	if got := output(t, ex, "echo alone"); got != "alone\n" {
		t.Errorf("output %q", got)
	}
	want(t, ex, ex.Cleanup(t.Context()), 0)
	wantGone(t, machine)
}

// A keeper that hangs in the middle of a script has the runner's pipes open: the sub-stage ends all the same, and so
// does the wait for the end of its output.
func TestAKeeperThatHangsDoesNotHoldTheJob(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny("")).runner(t), job)
	call := ex.StartRun("step_long", "echo begun; sleep 1000")
	if err := call.WaitFor(t.Context(), "begun"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(keeper(t, machineOf(job)), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r := call.Wait(t.Context())
	want(t, ex, r, 2, "does not answer")
	wantWithin(t, r, 90*time.Second)
	if got := output(t, ex, "echo on"); got != "on\n" {
		t.Errorf("output %q", got)
	}
	want(t, ex, ex.Cleanup(t.Context()), 0)
}

// A server gives so many sessions to a connection (MaxSessions) and no more, and a process that holds its output open
// holds its session.
func TestProcessesThatStayDoNotUseTheConnectionUp(t *testing.T) {
	t.Parallel()
	ex := prepared(t, newSettings(t, tiny("")).runner(t), newJob(runner.Job{}))
	for i := range 12 {
		r := ex.Run(t.Context(), "step_stay", fmt.Sprintf("sleep 1000 & echo %d; [ %d -lt 9 ] || exit 3", i, i))
		exit := 0
		if i >= 9 {
			exit = 1
		}
		want(t, ex, r, exit)
	}
}

func TestAKeeperEndsWithAPrepareThatFails(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		job := newJob(runner.Job{})
		_, call := midway(t, newSettings(t, tiny("")).runner(t), job, "  machine ")
		until(t, "the keeper has begun", func() bool { return keeper(t, machineOf(job)) != 0 })
		if err := syscall.Kill(call.Pid(), sig); err != nil {
			t.Fatal(err)
		}
		call.Wait(t.Context())
		until(t, "the keeper has ended", func() bool { return keeper(t, machineOf(job)) == 0 })
	}
}

func TestWithoutAKeptConnectionEveryScriptHasItsOwn(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, "keep_connection = false\n"+tiny("")).runner(t), job)
	if pid := keeper(t, machineOf(job)); pid != 0 {
		t.Errorf("process %d keeps the connection", pid)
	}
	if one, two := output(t, ex, `echo "$SSH_CONNECTION"`), output(t, ex, `echo "$SSH_CONNECTION"`); one == two || one == "\n" {
		t.Errorf("scripts came by %q and %q", one, two)
	}
}
