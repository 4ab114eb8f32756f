//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// libvirtd returns the process ID of the private libvirtd.
func libvirtd(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/run/libvirtd.pid")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// stopLibvirtd ends the private libvirtd; guests run on. It runs again after start, at the test's end at the latest.
func stopLibvirtd(t *testing.T) (start func()) {
	t.Helper()
	pid := libvirtd(t)
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(t, "libvirtd has ended", func() bool { return syscall.Kill(pid, 0) != nil })
	stopped := true
	start = func() {
		if stopped {
			stopped = false
			command(t, "libvirtd", "--daemon")
			// A libvirtd that is stopped while it takes guests up again ends them.
			for _, domain := range strings.Fields(virsh(t, "list", "--name")) {
				virsh(t, "qemu-monitor-command", domain, `{"execute": "query-status"}`)
			}
		}
	}
	t.Cleanup(start)
	return start
}

func TestAJobOutlivesRestartsOfLibvirtd(t *testing.T) {
	job := newJob(runner.Job{})
	ex := start(t, newSettings(t, tiny("")).runner(t), job)
	call := ex.StartPrepare()
	waitFor(t, call, "  machine ")
	stopLibvirtd(t)()
	want(t, ex, call.Wait(t.Context()), 0)

	// A script runs on, and others run, while there is no libvirtd at all.
	call = ex.StartRun("build_script", "echo begun; until [ -e /tmp/go ]; do sleep 0.1; done; echo done")
	waitFor(t, call, "begun\n")
	startLibvirtd := stopLibvirtd(t)
	r := ex.Run(t.Context(), "step_other", "touch /tmp/go")
	want(t, ex, r, 0)
	r = call.Wait(t.Context())
	want(t, ex, r, 0)
	if string(r.Stdout) != "begun\ndone\n" {
		t.Errorf("stdout is %q", r.Stdout)
	}

	// Whoever watched the guest before libvirtd went away does so when it is back.
	call = ex.StartRun("build_script", "echo begun; sleep 600")
	waitFor(t, call, "begun\n")
	startLibvirtd()
	stopLibvirtd(t)()
	virsh(t, "destroy", machineOf(job))
	destroyed := time.Now()
	r = call.Wait(t.Context())
	want(t, ex, r, 2, "is shut off (destroyed)")
	if took := r.Ended.Sub(destroyed); took > 30*time.Second {
		t.Errorf("the script's stage went on for %v", took)
	}

	// Cleanup waits for libvirtd to come back.
	startLibvirtd = stopLibvirtd(t)
	call = ex.StartCleanup()
	startLibvirtd()
	want(t, ex, call.Wait(t.Context()), 0)
	wantGone(t, machineOf(job))
}

// libvirt's protocol has no time-outs.
func TestALibvirtdThatDoesNotAnswerCannotHoldAStageThatIsToldToStop(t *testing.T) {
	job := newJob(runner.Job{})
	ex := start(t, newSettings(t, tiny("")).runner(t), job)
	pid := libvirtd(t)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() {
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(resume) // once more than needed does no harm
	for _, call := range []*runner.Call{ex.StartPrepare(), again(t, ex).StartCleanup()} {
		until(t, call.Stage+" has called libvirtd", func() bool { return hasSocket(call.Pid()) })
		r := signal(t, call)
		want(t, ex, r, 2, "did not answer", "terminated")
	}
	resume()
	cleanUp(t, ex, job)
}

// hasSocket reports whether a process has a socket open.
func hasSocket(pid int) bool {
	files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "fd", "*"))
	if err != nil {
		return false
	}
	for _, file := range files {
		if target, err := os.Readlink(file); err == nil && strings.HasPrefix(target, "socket:") {
			return true
		}
	}
	return false
}

func TestALibvirtdThatIsNotThereFailsWithARemedyInBoundedTime(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "no-such-socket")
	for name, begin := range map[string]func(*runner.Executor) *runner.Call{
		"prepare": (*runner.Executor).StartPrepare, "cleanup": (*runner.Executor).StartCleanup,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSettings(t, "socket = \""+socket+"\"\n"+tiny("", "[timeouts]", "destroy = \"5s\""))
			ex := start(t, s.runner(t), newJob(runner.Job{}))
			r := begin(ex).Wait(t.Context())
			s.write(t, tiny("")) // for the cleanup at the test's end
			want(t, ex, r, 2, socket, "waiting for libvirtd", "not done after 5s", "is libvirtd running? (systemctl start libvirtd)")
			wantWithin(t, r, 20*time.Second)
		})
	}
}
