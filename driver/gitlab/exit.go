package gitlab

import (
	"errors"
	"fmt"
	"os"
	"strconv"
)

// BuildError is a failure that is the job's own. GitLab Runner reports it as
// such and does not try again. Every other error is the infrastructure's.
type BuildError struct {
	Err error
	// ExitCode is the exit code of the job's script; 0 when it is not a
	// script that failed.
	ExitCode int
}

func (e *BuildError) Error() string { return e.Err.Error() }
func (e *BuildError) Unwrap() error { return e.Err }

// IsScriptFailure reports whether err is the failure of a job's script.
func IsScriptFailure(err error) bool {
	var build *BuildError
	return errors.As(err, &build) && build.ExitCode != 0
}

// ClearExitCode removes the exit code that an earlier sub-stage left. The
// runner never does, and would take it for this one's.
func (e *Environment) ClearExitCode() error {
	if e.ExitCodeFile == "" {
		return nil
	}
	if err := os.Remove(e.ExitCodeFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("clear the exit code of an earlier sub-stage: %w", err)
	}
	return nil
}

// Exit returns the exit code by which GitLab Runner understands err, nil
// included, and hands over the script's own where there is one. When that
// cannot be written the failure is the infrastructure's, and the error says so.
func (e *Environment) Exit(err error) (int, error) {
	var build *BuildError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &build):
		return e.SystemFailure, nil
	case build.ExitCode == 0 || e.ExitCodeFile == "":
		return e.BuildFailure, nil
	}
	if err := os.WriteFile(e.ExitCodeFile, []byte(strconv.Itoa(build.ExitCode)), 0o600); err != nil {
		return e.SystemFailure, fmt.Errorf("hand over the script's exit code %d: %w", build.ExitCode, err)
	}
	return e.BuildFailure, nil
}
