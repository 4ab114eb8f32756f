//go:build integration

package integration

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// TestFaults breaks everything that a job depends on, and the driver itself, while jobs are in the real driver's
// stages, and prints what became of them as one table. A try has survived when the stage did what is promised of it:
// it ended in bounded time, with the exit code that puts the blame where it belongs, and said why. Whatever happened,
// the next cleanup leaves nothing.
//
// Points in time are drawn at random. LIBVIRT_DRIVER_FAULTS_SEED repeats the draw of an earlier run.
func TestFaults(t *testing.T) {
	f := &faults{seed: uint64(time.Now().UnixNano()), network: newNetwork(t, true)}
	if text := os.Getenv("LIBVIRT_DRIVER_FAULTS_SEED"); text != "" {
		var err error
		if f.seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	begun := time.Now()
	t.Cleanup(func() { f.print(time.Since(begun)) })

	f.measure(t)

	// What everyone shares first, while nobody else is there.
	f.libvirtdFaults(t)

	f.guestFaults() // these wait most, and so begin first
	f.hostFaults()
	f.kills()
	f.helpers()
	f.tryAll(t)
}

// faults are the rows of the table and what their tries share.
type faults struct {
	seed uint64
	// network has no forwarding delay, so that a guest's boot is not longer than it must be.
	network network
	// prepare and cleanup are those stages, and what struck them.
	prepare, cleanup *target
	rows             []*row
	queue            []func(*testing.T)
	// slots bounds how many tries keep the host busy at a time.
	slots chan struct{}
}

// tiny are settings of the tiny guest on the faults' network.
func (f *faults) tiny(image string, more ...string) string {
	return tiny(fmt.Sprintf("network = %q\n%s", f.network.name, image), more...)
}

// config is that of a runner with these settings.
func (f *faults) config(t *testing.T, image string, more ...string) runner.Config {
	t.Helper()
	return newSettings(t, f.tiny(image, more...)).runner(t)
}

// random returns the source of a try's random numbers. It follows from the seed and the try alone.
func (f *faults) random(r *row, n int) *rand.Rand {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s|%s|%d", r.what, r.where, n))
	return rand.New(rand.NewPCG(f.seed, uint64(sum[0])<<24|uint64(sum[1])<<16|uint64(sum[2])<<8|uint64(sum[3])))
}

// row is one line of the table.
type row struct {
	what, where string

	mu                    sync.Mutex
	tried, survived, left int
}

func (f *faults) row(what, where string) *row {
	r := &row{what: what, where: where}
	f.rows = append(f.rows, r)
	return r
}

// trial is one try of a row, with a job of its own.
type trial struct {
	faults *faults
	row    *row
	n      int // 0 for the row's first try
	job    runner.Job
	random *rand.Rand
	ex     *runner.Executor // of the last attempt at the job
	gone   bool             // nothing is left, or what is has been counted
	// forgotten is a file of libvirt's own from which it takes nothing any more, or empty.
	forgotten string
}

// add queues n tries.
func (f *faults) add(r *row, n int, do func(*testing.T, *trial)) {
	for range n {
		f.queue = append(f.queue, func(t *testing.T) { f.try(t, r, do) })
	}
}

// tryAll makes all tries that are queued, a few at a time.
func (f *faults) tryAll(t *testing.T) {
	f.slots = make(chan struct{}, 4)
	var all sync.WaitGroup
	for _, try := range f.queue {
		f.slots <- struct{}{}
		all.Go(func() {
			defer func() { <-f.slots }()
			try(t)
		})
	}
	all.Wait()
	f.queue = nil
}

// wait calls a function that does nothing but wait, during which others may be tried.
func (x *trial) wait(f func()) {
	<-x.faults.slots
	defer func() { x.faults.slots <- struct{}{} }()
	f()
}

// try makes one try and counts what came of it.
func (f *faults) try(t *testing.T, r *row, do func(*testing.T, *trial)) {
	r.mu.Lock()
	x := &trial{faults: f, row: r, n: r.tried, job: newJob(runner.Job{}), random: f.random(r, r.tried)}
	r.tried++
	r.mu.Unlock()
	t.Run(fmt.Sprintf("%s, %s %d", r.what, r.where, x.n+1), func(t *testing.T) {
		defer func() {
			if x.ex != nil && !x.gone {
				x.cleanUp(t)
			}
			if t.Failed() {
				t.Logf("the try was made with LIBVIRT_DRIVER_FAULTS_SEED=%d", f.seed)
				return
			}
			r.mu.Lock()
			r.survived++
			r.mu.Unlock()
		}()
		do(t, x)
	})
}

// start begins an attempt at the try's job; config has succeeded.
func (x *trial) start(t *testing.T, cfg runner.Config) *runner.Executor {
	t.Helper()
	cfg.PrepareTimeout, cfg.CleanupTimeout = patience, patience
	ex, err := runner.New(cfg, x.job)
	if err != nil {
		t.Fatal(err)
	}
	x.ex = ex
	want(t, ex, ex.Config(t.Context()), 0)
	return ex
}

// prepared begins an attempt whose prepare succeeds.
func (x *trial) prepared(t *testing.T, cfg runner.Config) *runner.Executor {
	t.Helper()
	ex := x.start(t, cfg)
	want(t, ex, ex.Prepare(t.Context()), 0)
	return ex
}

// patience is how long a call may take that should end long before.
const patience = 3 * time.Minute

// end waits for a call's end.
func (x *trial) end(t *testing.T, call *runner.Call) *runner.Result {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return call.Wait(ctx)
}

// machine is the name of the try's machine.
func (x *trial) machine() string { return machineOf(x.job) }

// cleanUp makes the cleanup call that follows the fault, in a folder of its own, as the runner's after a restart would
// be, and counts what it leaves.
func (x *trial) cleanUp(t *testing.T) {
	t.Helper()
	if ex, err := x.ex.Next(); err != nil {
		t.Error(err)
	} else if r := ex.Cleanup(context.Background()); r.ExitCode != 0 || len(r.Stderr) > 0 {
		t.Errorf("the next cleanup exits with %d: %s", r.ExitCode, r.Stderr)
	}
	if err := os.RemoveAll(x.ex.Dir()); err != nil {
		t.Error(err)
	}
	x.count(t)
}

// count counts what is left of the try's machine when what finishes its cleanup has had its time.
func (x *trial) count(t *testing.T) {
	t.Helper()
	x.gone = true
	machine := x.machine()
	sum := sha256.Sum256([]byte(machine))
	socket := fmt.Sprintf("%x.ssh", sum[:12])
	left, err := leftOnHost(func(thing string) bool {
		if x.forgotten != "" && strings.HasPrefix(thing, x.forgotten) {
			return false
		}
		return strings.Contains(thing, machine) || strings.Contains(thing, macAddress(machine)) || strings.Contains(thing, socket)
	})
	if err != nil {
		t.Error(err)
	}
	for _, thing := range left {
		t.Errorf("left behind: %s", thing)
	}
	x.row.mu.Lock()
	defer x.row.mu.Unlock()
	x.row.left += len(left)
}

// wantLost checks that a call is the host's failure, says why, and hands over no exit code.
func (x *trial) wantLost(t *testing.T, r *runner.Result, within time.Duration, texts ...string) {
	t.Helper()
	want(t, x.ex, r, 2, texts...)
	wantNoExitCode(t, x.ex)
	wantWithin(t, r, within)
}

// wantStopped checks that a call which got SIGTERM at a moment ended as one that was told to.
func (x *trial) wantStopped(t *testing.T, r *runner.Result, told time.Time) {
	t.Helper()
	if took := r.Ended.Sub(told); took > 10*time.Second {
		t.Errorf("%s went on for %v", r.Name(), took)
	}
	want(t, x.ex, r, 2, "terminated")
	wantNoExitCode(t, x.ex)
}

// wantOwn runs a script that fails by itself and checks that this is the job's own failure, with its exit code.
func (x *trial) wantOwn(t *testing.T, ex *runner.Executor) {
	t.Helper()
	want(t, ex, ex.Run(t.Context(), "build_script", "exit 7"), 1)
	wantExitCode(t, ex, 7)
}

// print prints the table, whatever came of the tries.
func (f *faults) print(took time.Duration) {
	const format = "%-52s %-24s %5v %8v %6v\n"
	fmt.Printf("\n"+format, "fault", "where", "tried", "survived", "behind")
	fmt.Println(strings.Repeat("-", 99))
	var tried, survived, left int
	for _, r := range f.rows {
		fmt.Printf(format, r.what, r.where, r.tried, r.survived, r.left)
		tried, survived, left = tried+r.tried, survived+r.survived, left+r.left
	}
	fmt.Println(strings.Repeat("-", 99))
	fmt.Printf(format+"\n", fmt.Sprintf("all, in %v", took.Round(time.Second)), "", tried, survived, left)
	fmt.Println(f.prepare)
	fmt.Println(f.cleanup)
	fmt.Printf("drawn with LIBVIRT_DRIVER_FAULTS_SEED=%d\n\n", f.seed)
}
