//go:build integration

package integration

import (
	"os"
	"strconv"
	"strings"
	"sync"
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

// stopLibvirtd ends the private libvirtd by a signal; guests run on. It runs again after start, at the test's end at
// the latest.
func stopLibvirtd(t *testing.T, sig syscall.Signal) (start func()) {
	t.Helper()
	pid := libvirtd(t)
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
	start = sync.OnceFunc(func() { command(t, "libvirtd", "--daemon") })
	t.Cleanup(start)
	until(t, "libvirtd has ended", func() bool { return syscall.Kill(pid, 0) != nil })
	return start
}

// freezeLibvirtd makes the private libvirtd deaf and dumb until it is thawed: its socket takes connections, and no
// call comes back.
func freezeLibvirtd(t *testing.T) (thaw func()) {
	t.Helper()
	pid := libvirtd(t)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	thaw = sync.OnceFunc(func() {
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(thaw)
	return thaw
}

// storm is one fault of what all jobs share, and the tries that it strikes at the same time.
type storm struct {
	tries []func(*testing.T)
	// arranged is done when every try has what it needs before the fault.
	arranged sync.WaitGroup
	// clear is closed when all have, struck when the fault is there, mended when it is over.
	clear, struck, mended chan struct{}
	// ahead is for how long before the fault tries begin.
	ahead time.Duration
}

func (f *faults) newStorm() *storm {
	return &storm{
		clear: make(chan struct{}), struck: make(chan struct{}), mended: make(chan struct{}),
		ahead: max(f.prepare.total(), f.cleanup.total()),
	}
}

// add adds n tries. They call await when what they need is there; it returns at a time before the fault. What do
// leaves is looked at when the fault is over.
func (s *storm) add(f *faults, r *row, n int, do func(t *testing.T, x *trial, await func(time.Duration))) {
	for range n {
		s.arranged.Add(1)
		s.tries = append(s.tries, func(t *testing.T) {
			arrive := sync.OnceFunc(s.arranged.Done)
			f.try(t, r, func(t *testing.T, x *trial) {
				defer func() {
					arrive()
					<-s.mended
				}()
				do(t, x, func(before time.Duration) {
					arrive()
					<-s.clear
					time.Sleep(s.ahead - before)
				})
			})
		})
	}
}

// rage makes the tries, and the fault for a while.
func (s *storm) rage(t *testing.T, lasts time.Duration, strike func(*testing.T) (mend func())) {
	t.Helper()
	var all sync.WaitGroup
	defer all.Wait()
	defer close(s.mended)
	for _, try := range s.tries {
		all.Go(func() { try(t) })
	}
	s.arranged.Wait()
	close(s.clear)
	time.Sleep(s.ahead)
	mend := func() func() {
		defer close(s.struck)
		return strike(t)
	}()
	time.Sleep(lasts)
	mend()
}

// libvirtdFaults breaks libvirtd while jobs are in every stage. Nobody else may need it.
func (f *faults) libvirtdFaults(t *testing.T) {
	f.restart(t, "libvirtd killed, started again 2 s later", syscall.SIGKILL)
	f.restart(t, "libvirtd stopped in order, started again 2 s later", syscall.SIGTERM)
	f.freeze(t)
}

// during returns a random moment of a stage's time.
func (x *trial) during(stage *target) time.Duration {
	return time.Duration(x.random.Float64() * float64(stage.total()))
}

func (f *faults) restart(t *testing.T, what string, sig syscall.Signal) {
	s := f.newStorm()
	s.add(f, f.row(what, "config"), 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		await(0)
		<-s.struck
		x.start(t, f.config(t, ""))
	})
	s.add(f, f.row(what, "prepare"), 4, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.start(t, f.config(t, ""))
		await(x.during(f.prepare))
		want(t, ex, ex.Prepare(t.Context()), 0)
		x.wantOwn(t, ex)
	})
	run := f.row(what, "run")
	s.add(f, run, 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.prepared(t, f.config(t, ""))
		call := ex.StartRun("build_script", "echo begun; until [ -e /tmp/go ]; do sleep 0.1; done; echo done; exit 7")
		waitFor(t, call, "begun\n")
		await(0)
		<-s.struck
		// While there is no libvirtd at all.
		want(t, ex, ex.Run(t.Context(), "step_other", "touch /tmp/go"), 0)
		r := x.end(t, call)
		want(t, ex, r, 1)
		wantExitCode(t, ex, 7)
		if string(r.Stdout) != "begun\ndone\n" {
			t.Errorf("stdout is %q", r.Stdout)
		}
	})
	s.add(f, run, 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.prepared(t, f.config(t, ""))
		call := ex.StartRun("build_script", "echo begun; sleep 600")
		waitFor(t, call, "begun\n")
		await(0)
		// Whoever watched the guest before libvirtd went away does so when it is back.
		<-s.mended
		virsh(t, "qemu-monitor-command", x.machine(), `{"execute": "query-status"}`) // when libvirtd has taken the guest up again
		virsh(t, "destroy", x.machine())
		destroyed := time.Now()
		r := x.end(t, call)
		want(t, ex, r, 2, "is shut off (destroyed)")
		wantNoExitCode(t, ex)
		if took := r.Ended.Sub(destroyed); took > 30*time.Second {
			t.Errorf("the script's stage went on for %v", took)
		}
	})
	s.add(f, f.row(what, "cleanup"), 3, func(t *testing.T, x *trial, await func(time.Duration)) {
		cfg := f.config(t, "")
		if x.n == 0 {
			cfg = f.whole(t)
		}
		ex := x.prepared(t, cfg)
		await(x.during(f.cleanup))
		want(t, ex, ex.Cleanup(t.Context()), 0)
		<-s.mended
		x.count(t)
	})
	s.rage(t, 2*time.Second, func(t *testing.T) func() { return stopLibvirtd(t, sig) })
}

// freeze makes libvirtd deaf and dumb, which no time-out of libvirt's protocol ends.
func (f *faults) freeze(t *testing.T) {
	const (
		told     = "libvirtd frozen (SIGSTOP), the stage told to stop"
		deadline = "libvirtd frozen (SIGSTOP) beyond a deadline"
		resumed  = "libvirtd frozen (SIGSTOP) for 15 s"
	)
	short := []string{"[timeouts]", `destroy = "3s"`}
	s := f.newStorm()
	s.add(f, f.row(told, "prepare"), 2, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.start(t, f.config(t, ""))
		await(x.during(f.prepare))
		call := ex.StartPrepare()
		<-s.struck
		x.tell(t, call)
	})
	s.add(f, f.row(told, "run"), 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.prepared(t, f.config(t, ""))
		call := ex.StartRun("build_script", "echo begun; sleep 600")
		waitFor(t, call, "begun\n")
		await(0)
		<-s.struck
		x.tell(t, call)
	})
	s.add(f, f.row(told, "cleanup"), 2, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.prepared(t, f.config(t, ""))
		await(0)
		<-s.struck
		x.tell(t, ex.StartCleanup())
	})

	prepare := f.row(deadline, "prepare")
	s.add(f, prepare, 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		file := newSettings(t, f.tiny("", short...))
		ex := x.start(t, file.runner(t))
		await(0)
		<-s.struck
		x.wantLost(t, ex.Prepare(t.Context()), 10*time.Second, "did not answer", "not done after 3s (timeouts.destroy)")
		file.write(t, f.tiny(""))
	})
	s.add(f, prepare, 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		// A guest that asks for no address.
		x.start(t, f.config(t, `cmdline = "console=ttyS0 quiet no_timer_check rdinit=/bin/sh"`, "[timeouts]", `address = "10s"`))
		await(f.prepare.total())
		// Where it is frozen while the machine is started, the guest's time begins when it is not any more.
		x.wantLost(t, x.ex.Prepare(t.Context()), f.prepare.total()+time.Minute, "none after 10s (timeouts.address)")
	})
	s.add(f, f.row(deadline, "run"), 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.prepared(t, f.config(t, ""))
		await(0)
		<-s.struck
		x.wantOwn(t, ex)
	})
	s.add(f, f.row(deadline, "cleanup"), 1, func(t *testing.T, x *trial, await func(time.Duration)) {
		file := newSettings(t, f.tiny("", short...))
		ex := x.prepared(t, file.runner(t))
		await(0)
		<-s.struck
		x.wantLost(t, ex.Cleanup(t.Context()), 10*time.Second, "did not answer", "not done after 3s (timeouts.destroy)")
		file.write(t, f.tiny(""))
	})

	s.add(f, f.row(resumed, "prepare"), 3, func(t *testing.T, x *trial, await func(time.Duration)) {
		ex := x.start(t, f.config(t, ""))
		await(x.during(f.prepare))
		want(t, ex, ex.Prepare(t.Context()), 0)
		x.wantOwn(t, ex)
	})
	s.add(f, f.row(resumed, "cleanup"), 3, func(t *testing.T, x *trial, await func(time.Duration)) {
		cfg := f.config(t, "")
		if x.n == 0 {
			cfg = f.whole(t)
		}
		ex := x.prepared(t, cfg)
		await(x.during(f.cleanup))
		want(t, ex, ex.Cleanup(t.Context()), 0)
		x.count(t)
	})
	s.rage(t, 15*time.Second, freezeLibvirtd)
}

// tell tells a call to stop when it has been at it for a second, and checks that it does.
func (x *trial) tell(t *testing.T, call *runner.Call) {
	t.Helper()
	time.Sleep(time.Second)
	told := time.Now()
	if err := call.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	x.wantStopped(t, x.end(t, call), told)
}
