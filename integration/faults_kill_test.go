//go:build integration

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// points is how often a stage is ended by a signal, each time at another point.
const points = 20

// phase is a part of a stage: from a sign that shows from outside to the next phase's.
type phase struct {
	name  string
	begun func(call *runner.Call, machine string) bool
}

var (
	preparing = []phase{
		{"begins", func(*runner.Call, string) bool { return true }},
		{"overlay", func(_ *runner.Call, m string) bool { return there(filepath.Join(images, m+".qcow2")) }},
		{"domain", func(_ *runner.Call, m string) bool { return there(filepath.Join("/etc/libvirt/qemu", m+".xml")) }},
		{"QEMU", func(_ *runner.Call, m string) bool { return there(filepath.Join("/run/libvirt/qemu", m+".pid")) }},
		{"boot", said("  machine ")},
		{"address", said("  address ")},
		{"shell", said("  shell ")},
	}
	removing = []phase{
		{"begins", func(*runner.Call, string) bool { return true }},
		{"QEMU gone", func(_ *runner.Call, m string) bool { return !there(filepath.Join("/run/libvirt/qemu", m+".pid")) }},
		{"overlay gone", func(_ *runner.Call, m string) bool { return !there(filepath.Join(images, m+".qcow2")) }},
		{"domain gone", func(_ *runner.Call, m string) bool { return !there(filepath.Join("/etc/libvirt/qemu", m+".xml")) }},
	}
)

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func said(text string) func(*runner.Call, string) bool {
	return func(call *runner.Call, _ string) bool {
		_, stderr := call.Output()
		return bytes.Contains(stderr, []byte(text))
	}
}

// look is how often a phase's sign is looked for where it is not known how long the phase takes: some take no longer
// than a few milliseconds.
const look = 200 * time.Microsecond

// await looks, at intervals, until a phase has begun, and reports false when the call ends without.
func (p phase) await(call *runner.Call, machine string, interval time.Duration) bool {
	for {
		if p.begun(call, machine) {
			return true
		}
		select {
		case <-call.Done():
			return false
		case <-time.After(interval):
		}
	}
}

// clock measures how long the phases of a call take.
func clock(call *runner.Call, machine string, phases []phase) []time.Duration {
	began := make([]time.Time, len(phases)+1)
	for i, p := range phases {
		p.await(call, machine, look)
		began[i] = time.Now()
	}
	<-call.Done()
	began[len(phases)] = time.Now()
	took := make([]time.Duration, len(phases))
	for i := range took {
		took[i] = began[i+1].Sub(began[i])
	}
	return took
}

// target is a stage to be struck by a signal.
type target struct {
	stage  string
	phases []phase
	took   []time.Duration // how long each phase takes

	mu   sync.Mutex
	hits map[string]int // by phase, and "after its end"
}

// strike sends the signal to the call at the random point of a try, and returns when, and whether the stage's last phase
// had begun. The tries of a row go through the phases by turns; those of one phase are spread over it.
func (g *target) strike(t *testing.T, x *trial, call *runner.Call, sig syscall.Signal) (at time.Time, late bool) {
	t.Helper()
	i := x.n % len(g.phases)
	of := (points - i + len(g.phases) - 1) / len(g.phases) // how many tries are made in this phase
	share := (float64(x.n/len(g.phases)) + x.random.Float64()) / float64(of)
	delay := time.Duration(share * float64(g.took[i]))
	if i == len(g.phases)-1 {
		delay /= 4 // it is over in milliseconds, of which the look that finds it has taken some
	}
	// As exact as the phase is long: guests boot meanwhile, and need the processors more.
	g.phases[i].await(call, x.machine(), min(max(look, g.took[i]/100), 10*time.Millisecond))
	time.Sleep(delay)

	hit := "after its end"
	late = true
	at = time.Now()
	if err := call.Signal(sig); err == nil {
		for _, p := range g.phases {
			if p.begun(call, x.machine()) {
				hit = p.name
			}
		}
		late = hit == g.phases[len(g.phases)-1].name
	}
	t.Logf("%v %v after phase %q began, in phase %q", sig, delay, g.phases[i].name, hit)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hits[hit]++
	return at, late
}

// total is how long the stage takes when nothing goes wrong.
func (g *target) total() time.Duration {
	var sum time.Duration
	for _, d := range g.took {
		sum += d
	}
	return sum
}

func (g *target) String() string {
	var parts []string
	for i, p := range g.phases {
		parts = append(parts, fmt.Sprintf("%s %d (%v)", p.name, g.hits[p.name], g.took[i].Round(time.Millisecond)))
	}
	if n := g.hits["after its end"]; n > 0 {
		parts = append(parts, fmt.Sprintf("after its end %d", n))
	}
	const fit = 4 // into a line
	text := "points of " + g.stage + ":"
	for line := range slices.Chunk(parts, fit) {
		text += "\n  " + strings.Join(line, ", ")
	}
	return text
}

// kills queues what ends the driver itself.
func (f *faults) kills() {
	random := func(stage string) string { return fmt.Sprintf("%s, %d random points", stage, points) }
	f.add(f.row("SIGKILL", random("prepare")), points, func(t *testing.T, x *trial) {
		call := x.start(t, f.config(t, "")).StartPrepare()
		f.prepare.strike(t, x, call, syscall.SIGKILL)
		wantKilled(t, x.end(t, call))
	})
	f.add(f.row("SIGKILL", random("cleanup")), points, func(t *testing.T, x *trial) {
		call := x.made(t, f.whole(t), f.cleanup).StartCleanup()
		f.cleanup.strike(t, x, call, syscall.SIGKILL)
		wantKilled(t, x.end(t, call))
	})
	f.add(f.row("SIGTERM", random("prepare")), points, func(t *testing.T, x *trial) {
		ex := x.start(t, f.config(t, ""))
		call := ex.StartPrepare()
		told, late := f.prepare.strike(t, x, call, syscall.SIGTERM)
		x.wantTerminated(t, x.end(t, call), told, late, func() { x.wantOwn(t, ex) })
	})
	f.add(f.row("SIGTERM", random("cleanup")), points, func(t *testing.T, x *trial) {
		call := x.made(t, f.whole(t), f.cleanup).StartCleanup()
		told, late := f.cleanup.strike(t, x, call, syscall.SIGTERM)
		x.wantTerminated(t, x.end(t, call), told, late, func() { x.count(t) })
	})
}

// made begins an attempt and makes its machine. A guest that is not waited for is as good as one that is, for what
// only removes it; of two tries in a phase of the stage, one waits.
func (x *trial) made(t *testing.T, cfg runner.Config, stage *target) *runner.Executor {
	t.Helper()
	if x.n/len(stage.phases)%2 == 0 {
		return x.prepared(t, cfg)
	}
	ex := x.start(t, cfg)
	call := ex.StartPrepare()
	waitFor(t, call, "  machine ")
	if err := call.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wantKilled(t, x.end(t, call))
	return ex
}

// whole is a configuration by which cleanup itself removes all.
func (f *faults) whole(t *testing.T) runner.Config {
	t.Helper()
	return newSettings(t, "early_cleanup = false\n"+f.tiny("")).runner(t)
}

// helpers queues what ends the processes that stages leave: the one that keeps a job's connection, and the one that
// finishes its cleanup.
func (f *faults) helpers() {
	f.add(f.row("SIGKILL of what finishes it, random points", "cleanup"), 5, func(t *testing.T, x *trial) {
		ex := x.prepared(t, f.config(t, ""))
		call := ex.StartCleanup()
		pid := 0
		until(t, "there is a finisher", func() bool { pid = finisher(t, x.machine()); return pid != 0 })
		time.Sleep(x.during(f.cleanup) * 4 / 5) // it has begun a while ago
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
		want(t, ex, x.end(t, call), 0)
	})
	f.add(f.row("SIGKILL of what keeps the connection", "prepare"), 1, func(t *testing.T, x *trial) {
		ex := x.start(t, f.config(t, ""))
		call := ex.StartPrepare()
		waitFor(t, call, "  machine ")
		until(t, "the keeper has begun", func() bool { return keeper(t, x.machine()) != 0 })
		x.killKeeper(t)
		want(t, ex, x.end(t, call), 0)
		x.wantOwn(t, ex)
	})
	f.add(f.row("SIGKILL of what keeps the connection", "run"), 1, func(t *testing.T, x *trial) {
		ex := x.prepared(t, f.config(t, ""))
		call := ex.StartRun("build_script", "echo begun; sleep 600")
		waitFor(t, call, "begun\n")
		x.killKeeper(t)
		x.wantLost(t, x.end(t, call), 30*time.Second, "the guest still runs, but the connection to it failed")
		x.wantOwn(t, ex)
	})
}

func (x *trial) killKeeper(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(keeper(t, x.machine()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// measure runs both stages while nothing else does: twice, as libvirt's first look at QEMU takes a second.
func (f *faults) measure(t *testing.T) {
	t.Helper()
	f.prepare = &target{stage: "prepare", phases: preparing, hits: map[string]int{}}
	f.cleanup = &target{stage: "cleanup", phases: removing, hits: map[string]int{}}
	for range 2 {
		job := newJob(runner.Job{})
		ex := start(t, f.whole(t), job)
		call := ex.StartPrepare()
		f.prepare.took = clock(call, machineOf(job), preparing)
		want(t, ex, call.Wait(t.Context()), 0)
		call = ex.StartCleanup()
		f.cleanup.took = clock(call, machineOf(job), removing)
		want(t, ex, call.Wait(t.Context()), 0)
	}
}

func wantKilled(t *testing.T, r *runner.Result) {
	t.Helper()
	if r.Signal != syscall.SIGKILL && r.ExitCode != 0 {
		t.Errorf("%s ended before it was killed: exit code %d\n%s", r.Name(), r.ExitCode, r.Stderr)
	}
}

// wantTerminated is wantStopped for a signal at any point: also before the driver's first instruction, and after its
// last look at its signals. Then it has done what it was to do, which whole looks at. From that look to its end it has
// longer when it was told late: a busy host may halt it there.
func (x *trial) wantTerminated(t *testing.T, r *runner.Result, told time.Time, late bool, whole func()) {
	t.Helper()
	last := 20 * time.Millisecond
	if late {
		last = time.Second
	}
	switch {
	case r.Signal == syscall.SIGTERM && len(r.Stderr) == 0:
	case r.ExitCode == 0 && r.Signal == 0 && r.Exited.Sub(told) < last:
		whole()
	default:
		x.wantStopped(t, r, told)
	}
}
