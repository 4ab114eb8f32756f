//go:build integration

package integration

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// sleepers prints the processes that sleep for a number of seconds that begins with $1.
const sleepers = `sleepers() {
	for file in /proc/[0-9]*/cmdline; do
		tr '\0' ' ' <$file 2>/dev/null && echo
	done | grep "^sleep $1"
}
`

// tree starts processes in every way in which a script can lose sight of them, and waits for all of them.
const tree = sleepers + `sleep 4001 &
setsid sleep 4002 &
setsid nohup sleep 4003 >/dev/null 2>&1 </dev/null &
sudo sleep 4004 &
sudo setsid sleep 4005 &
bash -c 'trap "" TERM HUP INT; sleep 4006; true' &
(cd /; (setsid sleep 4007 &) &)
env -i sleep 4008 &
until [ $(sleepers 400 | wc -l) = 8 ]; do sleep 0.2; done
echo begun
wait
`

// signal ends a call as the runner does, and checks that this takes seconds.
func signal(t *testing.T, call *runner.Call) *runner.Result {
	t.Helper()
	told := time.Now()
	if err := call.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r := call.Wait(t.Context())
	if took := r.Ended.Sub(told); took > 15*time.Second {
		t.Errorf("%s went on for %v", r.Name(), took)
	}
	return r
}

func TestACancelledScriptsProcessesAreEndedAndTheGuestStaysUsable(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, func(c *runner.Config) { c.SystemFailure = 50 })
	want(t, ex, ex.Run(t.Context(), "get_sources", "setsid sleep 4900 >/dev/null 2>&1 </dev/null &"), 0)
	want(t, ex, ex.Run(t.Context(), "step_first", "exit 7"), 1)

	call := ex.StartRun("build_script", ex.WrapScript(tree))
	waitFor(t, call, "begun\n")
	r := signal(t, call)
	want(t, ex, r, 50, "terminated")
	wantNoExitCode(t, ex)

	ex.SetStatus("canceled")
	after := ex.Run(t.Context(), "after_script", sleepers+"sleepers 400; sleepers 4900; echo $(hostname)")
	want(t, ex, after, 0)
	if got := string(after.Stdout); got != "sleep 4900 \ndebian\n" {
		t.Errorf("after_script finds these processes: %q; not that of an earlier sub-stage alone", got)
	}
	want(t, ex, ex.Run(t.Context(), "cleanup_file_variables", "pkill() { for p in /proc/[0-9]*; do case $(tr '\\0' ' ' <$p/cmdline 2>/dev/null) in 'sleep 4900 ') kill ${p#/proc/} ;; esac; done; }; pkill"), 0)
}

func TestACancelledScriptMayTidyUpOrIgnoreTheSignal(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	t.Run("tidies up", func(t *testing.T) {
		call := ex.StartRun("build_script", "trap 'echo tidied; exit 0' TERM; echo begun; while :; do sleep 0.1; done")
		waitFor(t, call, "begun\n")
		r := signal(t, call)
		want(t, ex, r, 2)
		if string(r.Stdout) != "begun\ntidied\n" {
			t.Errorf("stdout is %q", r.Stdout)
		}
	})
	t.Run("ignores the signal", func(t *testing.T) {
		call := ex.StartRun("build_script", "trap '' TERM; echo begun; while :; do sleep 0.1; done")
		waitFor(t, call, "begun\n")
		want(t, ex, signal(t, call), 2)
	})
}

// endWhen runs a job and ends it when a stage, or sub-stage, has written a text.
func endWhen(t *testing.T, cfg runner.Config, job runner.Job, stage, text string, end func(*runner.Build)) *runner.Outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	written := make(chan error, 10)
	cfg.OnCall = func(call *runner.Call) {
		if call.Stage == stage || call.SubStage == stage {
			go func() { written <- call.WaitFor(ctx, text) }()
		}
	}
	build, err := runner.Start(ctx, cfg, job)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan *runner.Outcome, 1)
	go func() { ended <- build.Wait() }()
	select {
	case err := <-written:
		if err != nil {
			t.Error(err)
		}
		end(build)
	case o := <-ended:
		t.Fatalf("the job ended before %s wrote %q:\n%s", stage, text, o.Log)
	}
	o := <-ended
	if o.Status != runner.Canceled {
		t.Errorf("the job is %s: %v\n%s", o.Status, o.Err, o.Log)
	}
	wantGone(t, machineOf(job))
	return o
}

// endInScript runs a job in the tiny guest and ends it when its script has begun.
func endInScript(t *testing.T, end func(*runner.Build)) *runner.Outcome {
	t.Helper()
	job := newJob(runner.Job{
		Script:      []string{"echo the script has begun", "sleep 4100"},
		AfterScript: []string{"echo after_script sees that the job is $CI_JOB_STATUS"},
	})
	o := endWhen(t, newSettings(t, tiny("")).runner(t), job, "build_script", "the script has begun\n", end)
	for _, r := range o.Calls {
		if exit := map[bool]int{false: 0, true: 2}[r.SubStage == "build_script"]; r.ExitCode != exit {
			t.Errorf("%s exits with %d: %s", r.Name(), r.ExitCode, r.Stderr)
		}
	}
	return o
}

func TestACancelledJobStillRunsItsAfterScriptInTheSameGuest(t *testing.T) {
	t.Parallel()
	o := endInScript(t, (*runner.Build).Cancel)
	if !strings.Contains(string(o.Log), "after_script sees that the job is canceled\n") {
		t.Errorf("after_script has not said so:\n%s", o.Log)
	}
}

func TestAnAbortedJobGoesStraightToCleanup(t *testing.T) {
	t.Parallel()
	o := endInScript(t, (*runner.Build).Abort)
	calls := stages(o)
	if end := strings.Join(calls[max(0, len(calls)-2):], ", "); end != "run build_script, cleanup" {
		t.Errorf("the job ends with %s", end)
	}
}

func TestAJobThatIsCancelledInPrepareIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	o := endWhen(t, newSettings(t, tiny("")).runner(t), newJob(runner.Job{Script: []string{"true"}}), "prepare", "  machine ", (*runner.Build).Cancel)
	if calls := strings.Join(stages(o), ", "); calls != "config, prepare, cleanup" {
		t.Errorf("the calls are %s\n%s", calls, o.Log)
	}
}
