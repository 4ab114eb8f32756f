package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"libvirt-driver/integration/runner"
)

// batch is what came of several whole jobs at once, of tiny guests that boot.
type batch struct {
	jobs []*job // without what is of all of them together
	left []usage
	rpc  []rpc
	// locks is how many were held at a time, at most.
	locks int
	// began is before the first call; ended when the last cleanup had returned, gone
	// when nothing was left.
	began, ended, gone time.Time
}

// several runs n whole jobs of a side at once.
func (b *bench) several(ctx context.Context, s side, n int, traced bool) (*batch, error) {
	if err := pause(ctx, b.rest); err != nil {
		return nil, err
	}
	b.rpc() // what was before is no job's
	all := &batch{jobs: make([]*job, n), began: time.Now()}
	errs, locked := make([]error, n), watchLocks()
	var working sync.WaitGroup
	for i := range n {
		working.Go(func() { all.jobs[i], errs[i] = b.alone(ctx, s, traced) })
	}
	working.Wait()
	all.ended = time.Now()
	var late error
	all.left, late = waitForAdopted(context.WithoutCancel(ctx))
	all.gone, all.locks = time.Now(), locked()
	all.rpc = b.rpc()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return all, errors.Join(append(errs, late)...)
}

// alone runs one whole job's calls.
func (b *bench) alone(ctx context.Context, s side, traced bool) (*job, error) {
	ex, err := b.executor(s, traced)
	if err != nil {
		return nil, err
	}
	j := &job{}
	err = func() error {
		if j.config = ex.Config(ctx); j.config.Err != nil {
			return failure(j.config)
		}
		if j.prepare = ex.Prepare(ctx); j.prepare.Err != nil {
			return failure(j.prepare)
		}
		j.runs, err = runAll(ctx, ex)
		return err
	}()
	keeper := keeperOf(ex.JobEnv()["LIBVIRT_DRIVER_MACHINE"])
	j.keeperPeak = peakMemory(keeper)
	j.cleanup = ex.Cleanup(context.WithoutCancel(ctx))
	return j, errors.Join(err, failure(j.cleanup))
}

// crowd is batches of several sizes, each timed once and traced once.
type crowd struct{ timed, traced []*batch }

// crowds runs a batch of each size that counts, and one more that is traced.
// Before them goes one job that does not count.
func (b *bench) crowds(ctx context.Context, s side, sizes []int) (*crowd, error) {
	if _, err := b.several(ctx, s, 1, false); err != nil {
		return nil, fmt.Errorf("warm-up of jobs at once: %w", err)
	}
	c := &crowd{}
	for _, n := range sizes {
		for _, traced := range []bool{false, true} {
			all, err := b.several(ctx, s, n, traced)
			if err != nil {
				return nil, fmt.Errorf("%d jobs at once: %w", n, err)
			}
			what := "timed"
			if traced {
				what = "traced"
				c.traced = append(c.traced, all)
			} else {
				c.timed = append(c.timed, all)
			}
			fmt.Fprintf(b.progress, "%2d tiny jobs at once, %-6s  %6.1f s\n", n, what, between(all.began, all.ended))
		}
	}
	return c, nil
}

// total sums a figure of the batch's jobs up.
func (a *batch) total(figure func(*job) float64) float64 {
	var all float64
	for _, j := range a.jobs {
		all += figure(j)
	}
	return all
}

// table shows the batches side by side.
func (c *crowd) table() table {
	t := table{header: []string{"jobs at once"}}
	for _, a := range c.timed {
		t.header = append(t.header, strconv.Itoa(len(a.jobs)))
	}
	line := func(name string, u unit, figure func(timed, traced *batch) float64) {
		row := []string{name}
		for i := range c.timed {
			row = append(row, u.format(figure(c.timed[i], c.traced[i])))
		}
		t.rows = append(t.rows, row)
	}
	perJob := func(figure func(*batch) float64) func(timed, _ *batch) float64 {
		return func(timed, _ *batch) float64 { return figure(timed) / float64(len(timed.jobs)) }
	}
	calls := func(a *batch) float64 { return a.total(ofCalls(cpu, sum)) }
	left := func(a *batch) float64 {
		var all float64
		for _, u := range a.left {
			all += u.cpu
		}
		return all
	}
	median := func(figure func(*job) float64) func(timed, _ *batch) float64 {
		return func(timed, _ *batch) float64 {
			var s series
			for _, j := range timed.jobs {
				s = append(s, figure(j))
			}
			return s.median()
		}
	}
	oneDigit := unit{func(v float64) string { return fmt.Sprintf("%.1f", v) }, false}

	line("whole batch, s", seconds, func(timed, _ *batch) float64 { return between(timed.began, timed.ended) })
	line("until nothing is left of it, s", seconds, func(timed, _ *batch) float64 { return between(timed.began, timed.gone) })
	line("jobs a minute", oneDigit, func(timed, _ *batch) float64 {
		return 60 * float64(len(timed.jobs)) / between(timed.began, timed.ended)
	})
	line("prepare, median, s", seconds, median(func(j *job) float64 { return wall(j.prepare) }))
	line("run, median, s", seconds, median(func(j *job) float64 { return of(j.runs, wall).median() }))
	line("cleanup, median, s", seconds, median(func(j *job) float64 { return wall(j.cleanup) }))
	line("processor time a job, s", seconds, perJob(func(a *batch) float64 { return calls(a) + left(a) }))
	line("of it, the calls'", seconds, perJob(calls))
	line("of it, keeper's and finisher's", seconds, perJob(left))
	line("largest process, MiB", mebibytes, func(timed, traced *batch) float64 {
		var most float64
		for _, j := range traced.jobs {
			most = max(most, ofCalls(peak, larger)(j))
		}
		for _, u := range timed.left {
			most = max(most, float64(u.peak)/mib)
		}
		return most
	})
	line("locks held at a time, at most, a job", oneDigit, perJob(func(a *batch) float64 { return float64(a.locks) }))
	line("calls to libvirtd a job", oneDigit, perJob(func(a *batch) float64 { return float64(len(a.rpc)) }))
	for _, p := range procedures(c.timed) {
		line("  "+p.String(), oneDigit, perJob(func(a *batch) float64 {
			n := 0
			for _, c := range a.rpc {
				if c.procedure == p {
					n++
				}
			}
			return float64(n)
		}))
	}
	return t
}

// procedures returns those that were called, the most frequent of the last batch
// first.
func procedures(batches []*batch) []procedure {
	times := map[procedure]int{}
	for i, a := range batches {
		for _, c := range a.rpc {
			if i == len(batches)-1 {
				times[c.procedure]++
			} else {
				times[c.procedure] += 0
			}
		}
	}
	return slices.SortedFunc(maps.Keys(times), func(a, b procedure) int {
		return cmp.Or(times[b]-times[a], cmp.Compare(a.program, b.program), cmp.Compare(a.number, b.number))
	})
}

// parseSizes reads the argument of --many.
func parseSizes(text string) ([]int, error) {
	var sizes []int
	for field := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 || n > 64 {
			return nil, fmt.Errorf("%q is not a number of jobs from 1 to 64", field)
		}
		sizes = append(sizes, n)
	}
	return sizes, nil
}

// tiny are the settings of an image that boots in a few seconds even when it is
// emulated, and that many of fit into a host. On a busy host an emulated guest's
// timer is late, which Linux takes for a broken one, and panics, unless told
// no_timer_check. The kernel's tests of its own cryptography take it long, and so
// do programs whose addresses change from start to start (norandmaps): QEMU
// translates them anew.
const tiny = `volume = "tiny.qcow2"
vcpus = 1
memory = "256 MiB"
kernel = "/var/lib/libvirt/images/tiny-vmlinux"
initrd = "/var/lib/libvirt/images/tiny-initrd"
cmdline = "console=ttyS0 quiet no_timer_check cryptomgr.notests norandmaps"
`

// tinySide is the side of which many run at once.
func tinySide(command []string) side {
	return side{name: "tiny", commands: runner.Driver(command[0], command[1:]...), image: "tiny"}
}
