package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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

// side is one of the two that are compared.
type side struct {
	name     string
	commands runner.Commands
}

// job is what came of one whole job.
type job struct {
	// config has no process where a side has no config stage.
	config, prepare, cleanup *runner.Result
	// runs are the job's sub-stages, which follow prepare at once. The sooner that
	// returns, the more of the guest's boot they still run beside. So the same are
	// made once more, beside the job, when the guest has come to rest.
	runs, atRest []*runner.Result
	boot         boot
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

// measurements are what a comparison gathers.
type measurements struct {
	timed, traced pair
}

// bench runs jobs.
type bench struct {
	// watch begins to watch the next guest's boot; what it returns ends that.
	watch func() (end func() (boot, error), err error)
	// rest is between jobs, so that what one leaves libvirt to do is not measured
	// with the next; settle is for a guest to finish its boot.
	rest, settle time.Duration
	// env is the runner's own environment, which both sides' calls find.
	env []string
	// dir is where the calls' private folders are made.
	dir string
	// progress gets a line for each job.
	progress io.Writer
	jobs     int64
}

// compare runs one job of each side that does not count, then n of each, then
// one of each that is traced. Which side begins alternates, so that what
// changes on the host while it is measured changes both alike.
func (b *bench) compare(ctx context.Context, n int, sides [2]side) (*measurements, error) {
	m := &measurements{}
	for round := 0; round < n+2; round++ {
		what, traced := fmt.Sprintf("round %d of %d", round, n), false
		switch round {
		case 0:
			what = "warm-up, not counted"
		case n + 1:
			what, traced = "traced, not timed", true
		}
		for turn := range sides {
			which := (round + turn) % len(sides)
			j, err := b.job(ctx, sides[which], traced)
			if err != nil {
				return nil, fmt.Errorf("%s, job of the %s: %w", what, sides[which].name, err)
			}
			fmt.Fprintf(b.progress, "%-20s  %-8s  prepare %6.2f s  run %6.3f s  cleanup %6.3f s  job %6.2f s\n", what, sides[which].name,
				wall(j.prepare), of(j.runs, wall).median(), wall(j.cleanup), ofCalls(wall, sum)(j))
			switch {
			case traced:
				m.traced[which] = append(m.traced[which], j)
			case round > 0:
				m.timed[which] = append(m.timed[which], j)
			}
		}
	}
	return m, nil
}

// job runs one whole job. Whatever becomes of it, its machine is removed.
func (b *bench) job(ctx context.Context, s side, traced bool) (*job, error) {
	if err := pause(ctx, b.rest); err != nil {
		return nil, err
	}
	b.jobs++
	ex, err := runner.New(runner.Config{
		Commands: s.commands,
		Env:      b.env,
		TempDir:  b.dir,
		// Where the driver's own config stage says the same.
		BuildsDir: "/home/gitlab-runner/builds", CacheDir: "/home/gitlab-runner/cache",
		GracefulKillTimeout: 30 * time.Second,
		Trace:               traced,
	}, runner.Job{ID: 1000 + b.jobs})
	if err != nil {
		return nil, err
	}
	j := &job{}
	err = b.live(ctx, ex, j, traced)
	if ctx.Err() != nil {
		err = context.Cause(ctx) // and not what came of the call that this has ended
	}
	j.cleanup = ex.Cleanup(context.WithoutCancel(ctx))
	return j, errors.Join(err, failure(j.cleanup))
}

// live makes the job's calls but cleanup.
func (b *bench) live(ctx context.Context, ex *runner.Executor, j *job, traced bool) error {
	if j.config = ex.Config(ctx); j.config.Err != nil {
		return failure(j.config)
	}
	end, err := b.watch()
	if err != nil {
		return err
	}
	j.prepare = ex.Prepare(ctx)
	j.boot, err = end()
	if err := failure(j.prepare); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	if j.runs, err = runAll(ctx, ex); err != nil || traced {
		return err
	}
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	j.atRest, err = runAll(ctx, ex)
	return err
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
	output := bytes.TrimSpace(append(append([]byte(nil), r.Stdout...), r.Stderr...))
	const keep = 2000
	return fmt.Errorf("%s after %.1f s: %w: %s", r.Name(), r.Duration().Seconds(), r.Err, output[max(0, len(output)-keep):])
}
