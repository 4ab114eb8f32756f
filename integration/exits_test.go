//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"

	"libvirt-driver/integration/runner"
)

func TestAScriptsEndIsTheJobs(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	for _, end := range []struct {
		name, script string
		code         int
	}{
		{"exits with 0", "exit 0", 0},
		{"exits with 1", "exit 1", 1},
		{"exits with 2", "exit 2", 2},
		{"exits with 7", "exit 7", 7},
		{"exits with 255", "exit 255", 255},
		{"ends with a command that fails", "true\nfalse", 1},
		{"has a command that does not exist", "set -e\nno-such-command\nexit 0", 127},
		{"kills itself with KILL", "kill -KILL $$", 137},
		{"kills itself with TERM", "kill -TERM $$", 143},
		{"crashes", "kill -SEGV $$", 139},
		{"has a child that is killed", "set -e\nbash -c 'kill -KILL $$'\nexit 0", 137},
		{"is empty", "", 0},
	} {
		t.Run("a script that "+end.name, func(t *testing.T) { wantEnd(t, ex, 1, end.script, end.code) })
	}
}

// The runner chooses the numbers, and a script may exit with either of them.
func TestOtherNumbersForTheFailuresAreKeptTo(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, func(c *runner.Config) { c.BuildFailure, c.SystemFailure = 37, 99 })
	for _, code := range []int{0, 1, 2, 7, 37, 99} {
		t.Run(fmt.Sprintf("a script that exits with %d", code), func(t *testing.T) {
			wantEnd(t, ex, 37, fmt.Sprintf("exit %d", code), code)
		})
	}
}

// wantEnd runs a script and checks that its exit code is handed over as the job's, beside buildFailure.
func wantEnd(t *testing.T, ex *runner.Executor, buildFailure int, script string, code int) {
	t.Helper()
	r := ex.Run(t.Context(), "build_script", script)
	if code == 0 {
		want(t, ex, r, 0)
		wantNoExitCode(t, ex)
		return
	}
	want(t, ex, r, buildFailure)
	wantExitCode(t, ex, code)
	var failure *runner.BuildError
	if !errors.As(r.Err, &failure) || failure.ExitCode != code {
		t.Errorf("the runner takes it for %#v, not for the job's failure with %d", r.Err, code)
	}
}

func TestTheFrameOfGitLabsScriptsKeepsTheExitCode(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	want(t, ex, ex.Run(t.Context(), "get_sources", ex.GetSourcesScript()), 0)
	want(t, ex, ex.Run(t.Context(), "build_script", ex.StepScript("true", "(exit 42)", "echo not reached")), 1)
	wantExitCode(t, ex, 42)
	want(t, ex, ex.Run(t.Context(), "after_script", ex.AfterScript("true")), 0)
	wantNoExitCode(t, ex)
}

// The runner reads the file whenever a sub-stage exits with BUILD_FAILURE, and never removes it.
func TestNoSubStageSeesTheExitCodeOfAnEarlierOne(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	for _, stage := range []string{"prepare_script", "build_script", "after_script", "a_stage_of_tomorrow"} {
		want(t, ex, ex.Run(t.Context(), stage, "exit 7"), 1)
		wantExitCode(t, ex, 7)
		want(t, ex, ex.Run(t.Context(), stage, "exit 0"), 0)
		wantNoExitCode(t, ex)
	}
}

func wantExitCode(t *testing.T, ex *runner.Executor, code int) {
	t.Helper()
	text, err := os.ReadFile(ex.ExitCodeFile())
	if err != nil || string(text) != strconv.Itoa(code) {
		t.Errorf("BUILD_EXIT_CODE_FILE holds %q (%v), not %d", text, err, code)
	}
}

func wantNoExitCode(t *testing.T, ex *runner.Executor) {
	t.Helper()
	if text, err := os.ReadFile(ex.ExitCodeFile()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("BUILD_EXIT_CODE_FILE is there and holds %q (%v)", text, err)
	}
}
