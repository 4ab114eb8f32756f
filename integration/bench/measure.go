package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"libvirt-driver/integration/runner"
)

// subStages are those of a job that has everything but after_script.
var subStages = [8]string{
	"prepare_script", "get_sources", "restore_cache", "download_artifacts",
	"build_script", "archive_cache", "upload_artifacts_on_success", "cleanup_file_variables",
}

// noOp is the script of every sub-stage.
const noOp = "#!/usr/bin/env bash\nexit 0\n"

// echo is a script of which the first byte comes back at once.
const echo = "#!/usr/bin/env bash\necho\n"

// side is one of those that are compared: the baseline, or a way of the driver's.
type side struct {
	name     string
	commands runner.Commands
	// image is what its jobs ask for.
	image string
	// boots tells that prepare boots the guest, which can be watched then.
	boots bool
	// command is the driver with its global arguments, and beside the service that
	// it runs beside each job; nil where there is none.
	command []string
	beside  *service
}

// job is what came of one whole job.
type job struct {
	// config has no process where a side has no config stage.
	config, prepare, cleanup *runner.Result
	// runs are the job's sub-stages, which follow prepare at once. The sooner that
	// returns, the more of the guest's boot they still run beside. So the same are
	// made once more, beside the job, when the guest has come to rest, and a run of
	// a script that writes.
	runs, atRest []*runner.Result
	echo         *runner.Result
	boot         boot
	// rpc are the calls to libvirtd that were seen.
	rpc []rpc
	// keeper is the processor time in seconds of the process that keeps the
	// connection, keeperPeak its memory in bytes, left what else the calls left
	// behind, and beside the service's processor time.
	keeper     float64
	keeperPeak int64
	left       []usage
	beside     float64
}

// calls are the job's own calls in their order.
func (j *job) calls() []*runner.Result {
	var calls []*runner.Result
	if j.config.Pid != 0 {
		calls = append(calls, j.config)
	}
	calls = append(calls, j.prepare)
	calls = append(calls, j.runs...)
	return append(calls, j.cleanup)
}

// measurements are what a comparison gathers: of each side, the baseline's
// first, its jobs.
type measurements struct {
	sides         []string
	timed, traced group
	// compared are the tables that the report has so far.
	compared []compared
}

// bench runs jobs.
type bench struct {
	// watch begins to watch the next guest's boot; what it returns ends that.
	watch func() (end func() (boot, error), err error)
	// rpc returns the calls to libvirtd since it was last asked.
	rpc func() []rpc
	// rest is between jobs, so that what one leaves libvirt to do is not measured
	// with the next; settle is for a guest to finish its boot.
	rest, settle time.Duration
	// env is the runner's own environment, which all sides' calls find.
	env []string
	// dir is where the calls' private folders are made.
	dir string
	// progress gets a line for each job.
	progress io.Writer
	jobs     atomic.Int64
}

// A kind of job says what is made of it.
type kind int

const (
	whole  kind = iota // timed, with runs at rest beside it
	traced             // for its processes and memory, and not timed
	bare               // timed, and nothing beside it
)

// compare runs one job of each side that does not count, then n of each, then
// one of each that is traced. Which side begins goes round, so that what changes
// on the host while it is measured changes all alike.
func (b *bench) compare(ctx context.Context, n int, sides []side) (*measurements, error) {
	m := &measurements{timed: make(group, len(sides)), traced: make(group, len(sides))}
	for _, s := range sides {
		m.sides = append(m.sides, s.name)
	}
	for round := 0; round < n+2; round++ {
		what, k := fmt.Sprintf("round %d of %d", round, n), whole
		switch round {
		case 0:
			what = "warm-up, not counted"
		case n + 1:
			what, k = "traced, not timed", traced
		}
		for turn := range sides {
			which := (round + turn) % len(sides)
			j, err := b.tell(ctx, what, sides[which], k)
			if err != nil {
				return nil, err
			}
			switch {
			case k == traced:
				m.traced[which] = append(m.traced[which], j)
			case round > 0:
				m.timed[which] = append(m.timed[which], j)
			}
		}
	}
	return m, nil
}

// tail runs one job of each of the driver's ways that does not count, then n of
// each with nothing beside them: so many that those show which are rare.
func (b *bench) tail(ctx context.Context, n int, sides []side) (*measurements, error) {
	m := &measurements{timed: make(group, len(sides))}
	for _, s := range sides {
		m.sides = append(m.sides, s.name)
	}
	for i := range n + 1 {
		for which, s := range sides {
			if which == 0 {
				continue // the baseline
			}
			what := fmt.Sprintf("%d of %d", i, n)
			if i == 0 {
				what = "warm-up, not counted"
			}
			j, err := b.tell(ctx, what, s, bare)
			if err != nil {
				return nil, err
			}
			if i > 0 {
				m.timed[which] = append(m.timed[which], j)
			}
		}
	}
	return m, nil
}

// tell runs one whole job and says how it went.
func (b *bench) tell(ctx context.Context, what string, s side, k kind) (*job, error) {
	j, err := b.job(ctx, s, k)
	if err != nil {
		return nil, fmt.Errorf("%s, job of %s: %w", what, s.name, err)
	}
	fmt.Fprintf(b.progress, "%-20s  %-8s  prepare %6.2f s  run %6.3f s  cleanup %6.3f s  job %6.2f s\n", what, s.name,
		wall(j.prepare), of(j.runs, wall).median(), wall(j.cleanup), wallOfJob(j))
	return j, nil
}

// executor begins a job.
func (b *bench) executor(s side, traced bool) (*runner.Executor, error) {
	return runner.New(runner.Config{
		Commands: s.commands,
		Env:      b.env,
		TempDir:  b.dir,
		// Where the driver's own config stage says the same.
		BuildsDir: "/home/gitlab-runner/builds", CacheDir: "/home/gitlab-runner/cache",
		GracefulKillTimeout: 30 * time.Second,
		Trace:               traced,
	}, runner.Job{ID: 1000 + b.jobs.Add(1), Image: s.image})
}

// job runs one whole job. Whatever becomes of it, its machine is removed, and
// all processes that its calls left behind have ended.
func (b *bench) job(ctx context.Context, s side, k kind) (j *job, err error) {
	if err := pause(ctx, b.rest); err != nil {
		return nil, err
	}
	j = &job{}
	ready, besides := func(context.Context) error { return nil }, 0
	if s.beside != nil {
		service, err := s.beside.start(s.command, b.env)
		if err != nil {
			return nil, err
		}
		defer func() {
			err = errors.Join(err, service.end())
			_, late := waitForAdopted(context.WithoutCancel(ctx)) // what it has left
			err = errors.Join(err, late)
		}()
		ready, besides = service.wait, service.process.Process.Pid
	}
	if err := ready(ctx); err != nil {
		return nil, err
	}
	b.rpc() // what was before is no job's
	ex, err := b.executor(s, k == traced)
	if err != nil {
		return nil, err
	}
	err = b.live(ctx, ex, s, j, ready, k)
	if ctx.Err() != nil {
		err = context.Cause(ctx) // and not what came of the call that this has ended
	}
	keeper := keeperOf(ex.JobEnv()["LIBVIRT_DRIVER_MACHINE"])
	j.keeper, j.keeperPeak = j.keeper+cpuClock(keeper), peakMemory(keeper)
	j.cleanup = ex.Cleanup(context.WithoutCancel(ctx))
	left, late := waitForAdopted(context.WithoutCancel(ctx))
	for _, u := range left {
		if u.pid != keeper { // which is counted
			j.left = append(j.left, u)
		}
	}
	j.rpc, j.beside = b.rpc(), cpuClock(besides)
	return j, errors.Join(err, failure(j.cleanup), late)
}

// live makes the job's calls but cleanup.
func (b *bench) live(ctx context.Context, ex *runner.Executor, s side, j *job, ready func(context.Context) error, k kind) error {
	if j.config = ex.Config(ctx); j.config.Err != nil {
		return failure(j.config)
	}
	end := func() (boot, error) { return boot{}, nil }
	if s.boots {
		var err error
		if end, err = b.watch(); err != nil {
			return err
		}
	}
	var err error
	j.prepare = ex.Prepare(ctx)
	j.boot, err = end()
	if err := failure(j.prepare); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	if j.runs, err = runAll(ctx, ex); err != nil || k != whole {
		return err
	}
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	if err := ready(ctx); err != nil { // the next machine boots no more
		return err
	}
	keeper := keeperOf(ex.JobEnv()["LIBVIRT_DRIVER_MACHINE"])
	before := cpuClock(keeper)
	if j.atRest, err = runAll(ctx, ex); err != nil {
		return err
	}
	j.echo = ex.Run(ctx, "build_script", echo)
	j.keeper = before - cpuClock(keeper) // these runs are not the job's
	return failure(j.echo)
}

// runAll runs the no-op script as each of the sub-stages.
func runAll(ctx context.Context, ex *runner.Executor) ([]*runner.Result, error) {
	var runs []*runner.Result
	for _, name := range subStages {
		r := ex.Run(ctx, name, noOp)
		if err := failure(r); err != nil {
			return nil, err
		}
		runs = append(runs, r)
	}
	return runs, nil
}

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// failure says why a call failed, with the end of what it wrote.
func failure(r *runner.Result) error {
	if r.Err == nil {
		return nil
	}
	output := append(append([]byte(nil), r.Stdout...), r.Stderr...)
	return fmt.Errorf("%s after %.1f s: %w: %s", r.Name(), r.Duration().Seconds(), r.Err, tail(output))
}
