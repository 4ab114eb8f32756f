package runner

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
)

func TestTrace(t *testing.T) {
	cfg := fake{
		// Four processes: the recording line's basename and its subshell, ls, and a
		// subshell that becomes sleep.
		prepare: `ls / > "$OUT/ls"; (exec sleep 0.1) & wait; trap 'exit 5' USR1; echo ready; while :; do read -t 1 x < /dev/null; done`,
	}.runner(t)
	cfg.Trace = true
	ex, err := New(cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Cleanup(t.Context())
	if r := ex.Config(t.Context()); r.Err != nil {
		t.Fatal(r.Err)
	}
	c := ex.StartPrepare()
	if err := c.WaitFor(t.Context(), "ready"); err != nil {
		t.Fatal(err)
	}
	if err := c.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	r := c.Wait(t.Context())
	if r.ExitCode != 5 || r.Trace == nil {
		t.Fatalf("exit code %d, error %v, trace %v", r.ExitCode, r.Err, r.Trace)
	}
	var programs []string
	for _, program := range r.Trace.Execs {
		programs = append(programs, filepath.Base(program))
	}
	if want := []string{"basename", "ls", "sleep"}; !slices.Equal(programs, want) {
		t.Errorf("executed %q, want %q", programs, want)
	}
	if r.Trace.Processes < 3 || r.Trace.Processes > 4 {
		t.Errorf("%d processes, want 3, or 4 with a shell that forks for $( )", r.Trace.Processes)
	}
	if own := r.Trace.OwnRSS; own < 256<<10 || own > 16<<20 || r.Trace.PeakRSS < own {
		t.Errorf("peak memory %d of the shell, %d of all", own, r.Trace.PeakRSS)
	}
}

// A driver that starts nothing has started nothing, however many threads it has.
func TestTraceCountsNoThreads(t *testing.T) {
	cfg := fake{}.runner(t)
	cfg.Trace = true
	cfg.Commands.Prepare = []string{"/proc/self/exe", "-test.run=^TestThreads$"}
	cfg.Env = append(cfg.Env, "THREADS=1")
	ex, err := New(cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Cleanup(t.Context())
	ex.Config(t.Context())
	r := ex.Prepare(t.Context())
	if r.Err != nil || r.Trace == nil {
		t.Fatalf("error %v, trace %v, stdout %s", r.Err, r.Trace, r.Stdout)
	}
	if r.Trace.Processes != 0 || len(r.Trace.Execs) != 0 {
		t.Errorf("trace %+v, want no process", r.Trace)
	}
}

// Traced calls leave the processes of other calls alone.
func TestTraceBesideOtherCalls(t *testing.T) {
	done := make(chan *Outcome)
	for i := range 4 {
		cfg := fake{prepare: `for i in 1 2 3 4 5 6 7 8; do ls / > /dev/null; done`}.runner(t)
		cfg.Trace = i%2 == 0
		go func() {
			o, err := RunJob(t.Context(), cfg, Job{Script: []string{"true"}})
			if err != nil {
				t.Error(err)
			}
			done <- o
		}()
	}
	for range 4 {
		select {
		case o := <-done:
			if o != nil && !o.Green() {
				t.Errorf("a job failed: %v", o.Err)
			}
		case <-time.After(time.Minute):
			t.Fatal("a call does not end")
		}
	}
}

// TestThreads is the program of TestTraceCountsNoThreads, and on its own a check
// that threads can be had at all.
func TestThreads(t *testing.T) {
	stop := make(chan struct{})
	for range 8 {
		go func() {
			runtime.LockOSThread()
			<-stop
		}()
	}
	deadline := time.Now().Add(10 * time.Second)
	for threads := 0; threads < 8; {
		entries, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		if threads = len(entries); time.Now().After(deadline) {
			t.Fatalf("%d threads", threads)
		}
		time.Sleep(time.Millisecond)
	}
	close(stop)
}
