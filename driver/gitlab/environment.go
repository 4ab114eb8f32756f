// Package gitlab is GitLab Runner's side of the conversation: the environment
// that the Custom executor gives to every stage, the job that it describes,
// the answer to the config stage, exit codes, and lines for the job log.
//
// The contract is written down at
// https://docs.gitlab.com/runner/executors/custom/.
package gitlab

import (
	"fmt"
	"strconv"
	"strings"
)

// Environment is what GitLab Runner tells a stage through its environment.
type Environment struct {
	// BuildFailure is the exit code for "the job failed", SystemFailure the
	// one for "the infrastructure failed". The runner chooses both.
	BuildFailure, SystemFailure int
	// ExitCodeFile is where the job's own exit code goes when a stage exits
	// with BuildFailure. Empty when the runner names none.
	ExitCodeFile string
	// JobResponseFile is the JSON document in which GitLab described the job.
	JobResponseFile string

	vars map[string]string
}

// ReadEnvironment reads the environment, a list of NAME=value as os.Environ
// returns it. It fails when a variable that every stage depends on is missing
// or malformed, as when the command is started by hand.
func ReadEnvironment(environ []string) (*Environment, error) {
	e := &Environment{vars: make(map[string]string, len(environ))}
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		e.vars[name] = value
	}
	var err error
	if e.BuildFailure, err = e.exitCode("BUILD_FAILURE_EXIT_CODE"); err != nil {
		return nil, err
	}
	if e.SystemFailure, err = e.exitCode("SYSTEM_FAILURE_EXIT_CODE"); err != nil {
		return nil, err
	}
	e.ExitCodeFile = e.vars["BUILD_EXIT_CODE_FILE"]
	e.JobResponseFile = e.vars["JOB_RESPONSE_FILE"]
	return e, nil
}

func (e *Environment) exitCode(name string) (int, error) {
	text, ok := e.vars[name]
	if !ok {
		return 0, fmt.Errorf("%s is not set: this command is for GitLab Runner's Custom executor to call", name)
	}
	code, err := strconv.Atoi(text)
	if err != nil || code < 1 || code > 255 {
		return 0, fmt.Errorf("%s is %q, not an exit code from 1 to 255", name, clip(text))
	}
	return code, nil
}

// JobVariable returns a variable of the job (CUSTOM_ENV_NAME). Its text is the
// job's to choose, predefined variables included: it proves nothing.
func (e *Environment) JobVariable(name string) string {
	return e.vars["CUSTOM_ENV_"+name]
}

// Passed returns a variable that the config stage passed on through job_env.
// A job cannot set it: its own variables all carry the CUSTOM_ENV_ prefix. It
// is empty in config itself and after a config stage that failed.
func (e *Environment) Passed(name string) string {
	return e.vars[name]
}

// clip shortens text of unknown origin for an error message.
func clip(text string) string {
	const longest = 60
	if len(text) > longest {
		return text[:longest] + "..."
	}
	return text
}
