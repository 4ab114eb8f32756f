// Package runner plays GitLab Runner's side of the Custom executor, so that a
// driver can be tested, measured and shown without a GitLab. It makes the calls
// that Runner makes, in Runner's order, with Runner's environment, and reads
// exit codes, signals and files as Runner does.
//
// There are two levels. [RunJob] and [Start] run a whole job: config and
// prepare with their retries, every sub-stage, cleanup, and a job log as GitLab
// shows it. [New] gives an [Executor], one attempt's private folder and
// environment, whose calls are made one by one.
//
// What Runner does is described at
// https://docs.gitlab.com/runner/executors/custom/; what the page leaves open is
// taken from Runner 19.4's own behaviour.
package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

// Version is the GitLab Runner whose behaviour this package keeps, and the value
// of CI_RUNNER_VERSION.
const Version = "19.4.0"

// Commands are the programs of a driver with their arguments, as config.toml's
// [runners.custom] names them. Run gets the script's path and the sub-stage's
// name as two more arguments. Config, Prepare and Cleanup may be empty: those
// stages are then left out.
type Commands struct {
	Config, Prepare, Run, Cleanup []string
}

// Driver gives the Commands of a binary that takes the stage's name as its
// argument, after the arguments given here (global flags such as --config FILE).
func Driver(binary string, args ...string) Commands {
	stage := func(name string) []string {
		return append(append([]string{binary}, args...), name)
	}
	return Commands{
		Config:  stage("config"),
		Prepare: stage("prepare"),
		Run:     stage("run"),
		Cleanup: stage("cleanup"),
	}
}

// Scripts gives the Commands of a folder with prepare.sh, run.sh and cleanup.sh,
// and no config stage.
func Scripts(dir string) Commands {
	return Commands{
		Prepare: []string{filepath.Join(dir, "prepare.sh")},
		Run:     []string{filepath.Join(dir, "run.sh")},
		Cleanup: []string{filepath.Join(dir, "cleanup.sh")},
	}
}

// Config is the runner's own side: its config.toml and the constants that are
// compiled into it. The zero value of every field but Commands is Runner's own.
type Config struct {
	Commands

	// Env is the runner's host environment, KEY=VALUE; nil means this process's.
	Env []string
	// TempDir is where the attempts' private folders are made; "" means
	// os.TempDir.
	TempDir string
	// BuildsDir and CacheDir are for drivers whose config stage names none.
	BuildsDir, CacheDir string
	// Shell generates the scripts until the config stage names another; "" means
	// bash.
	Shell string

	// BuildFailure and SystemFailure are the exit codes that the driver is told to
	// use; 0 means 1 and 2.
	BuildFailure, SystemFailure int

	// PrepareAttempts is how often config and prepare are tried; 0 means 3.
	PrepareAttempts int
	// RetryInterval is the pause after a failed attempt, the last included; 0
	// means 3 s.
	RetryInterval time.Duration
	// StageRetryInterval is the pause before get_sources, restore_cache or
	// download_artifacts are tried again; 0 means 5 s.
	StageRetryInterval time.Duration

	// ConfigTimeout, PrepareTimeout and CleanupTimeout bound those stages; 0 means
	// 1 h.
	ConfigTimeout, PrepareTimeout, CleanupTimeout time.Duration
	// GracefulKillTimeout is from SIGTERM to SIGKILL; 0 means 10 min.
	GracefulKillTimeout time.Duration
	// ForceKillTimeout is from SIGKILL to giving up; 0 means 10 s.
	ForceKillTimeout time.Duration
	// BuildFinishTimeout is how long an aborted or timed out job waits for its
	// sub-stage before cleanup starts all the same; 0 means 5 min.
	BuildFinishTimeout time.Duration

	// Log gets the job log as it grows, besides Outcome.Log.
	Log io.Writer
	// RunnerLog gets what Runner writes to its own log: what cleanup prints above
	// all. Nothing is masked in it.
	RunnerLog io.Writer

	// OnCall is told of every call when its process has started, before it is
	// waited for.
	OnCall func(*Call)
	// KeepOutput is how many bytes of stdout, and as many of stderr, a Result
	// keeps, and Outcome.Log of the job log; 0 means all, less than 0 none.
	KeepOutput int64
	// Trace follows every process that a call starts; see Result.Trace. It slows
	// calls that start many processes.
	Trace bool
}

func (c Config) withDefaults() (Config, error) {
	if len(c.Run) == 0 {
		return c, errors.New("custom executor is missing RunExec")
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	if c.Shell == "" {
		c.Shell = "bash"
	}
	for _, n := range []struct {
		field *int
		value int
	}{
		{&c.BuildFailure, 1}, {&c.SystemFailure, 2}, {&c.PrepareAttempts, 3},
	} {
		if *n.field == 0 {
			*n.field = n.value
		}
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.RetryInterval, 3 * time.Second},
		{&c.StageRetryInterval, 5 * time.Second},
		{&c.ConfigTimeout, time.Hour},
		{&c.PrepareTimeout, time.Hour},
		{&c.CleanupTimeout, time.Hour},
		{&c.GracefulKillTimeout, 10 * time.Minute},
		{&c.ForceKillTimeout, 10 * time.Second},
		{&c.BuildFinishTimeout, 5 * time.Minute},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return c, nil
}

// Status is how a job ended.
type Status string

// The ends of a job. A job that ran out of time has failed.
const (
	Success  Status = "success"
	Failed   Status = "failed"
	Canceled Status = "canceled"
)

// Failure reasons, as they are reported to GitLab.
const (
	ScriptFailure       = "script_failure"
	RunnerSystemFailure = "runner_system_failure"
	JobExecutionTimeout = "job_execution_timeout"
	JobCanceled         = "job_canceled"
)

// Outcome is what became of a job.
type Outcome struct {
	Status Status
	// FailureReason is "" for a job that succeeded.
	FailureReason string
	// ExitCode is the one that allow_failure:exit_codes is compared with; 0 when
	// the failure carries none.
	ExitCode int
	// Err is what the job log's last line says; nil for a job that succeeded.
	Err error
	// Log is the job log with its section markers and colours.
	Log []byte
	// RunnerLog is what went to the runner's own log.
	RunnerLog []byte
	// Calls are the driver's calls in the order in which they ended.
	Calls []*Result
	// Duration is from the first call's preparation to after the last's cleanup.
	Duration time.Duration
}

// Green reports whether the job succeeded.
func (o *Outcome) Green() bool { return o.Status == Success }

// BuildError is the failure of a job that is not the runner's or the driver's
// fault. Every other error is a system failure.
type BuildError struct {
	ExitCode int
	Reason   string // "" means ScriptFailure
	Err      error
}

func (e *BuildError) Error() string { return e.Err.Error() }
func (e *BuildError) Unwrap() error { return e.Err }

var (
	errCanceled      = errors.New("canceled")
	errScriptTimeout = errors.New("script timeout")
)

// Build is a job that runs. Its methods may be called from any goroutine.
type Build struct {
	cfg Config
	job Job

	log       *jobLog
	logText   *capture
	runnerLog *capture
	abort     context.CancelFunc
	done      chan struct{}
	outcome   *Outcome

	mu     sync.Mutex
	cancel context.CancelFunc // what a normal cancel ends at this moment
	calls  []*Result

	// What later calls are told of the job, set by the config stage and kept over
	// attempts, as Runner keeps it.
	builds, cache, project string
	hostname, shell        string
	status                 string // CI_JOB_STATUS
}

func newBuild(cfg Config, job Job) (*Build, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	b := &Build{
		cfg:       cfg,
		job:       job.withDefaults(),
		logText:   &capture{limit: cfg.KeepOutput},
		runnerLog: &capture{},
		done:      make(chan struct{}),
		shell:     cfg.Shell,
		status:    "running",
	}
	b.log = newJobLog(b.job.masked(), writers(b.logText, cfg.Log))
	return b, nil
}

// RunJob runs a whole job and returns what became of it. Ending ctx aborts the
// job, which ends the driver's call and goes straight to cleanup. The error is
// for jobs that could not be started at all, not for those that fail.
func RunJob(ctx context.Context, cfg Config, job Job) (*Outcome, error) {
	b, err := Start(ctx, cfg, job)
	if err != nil {
		return nil, err
	}
	return b.Wait(), nil
}

// Start starts a whole job. Whoever starts one calls Wait.
func Start(ctx context.Context, cfg Config, job Job) (*Build, error) {
	b, err := newBuild(cfg, job)
	if err != nil {
		return nil, err
	}
	ctx, b.abort = context.WithTimeout(ctx, b.job.Timeout)
	b.cancel = b.abort
	go b.runJob(ctx)
	return b, nil
}

// Cancel does what GitLab's cancel button does. While the job's script runs it
// ends that, and after_script and everything later still run; before that it
// ends the job as Abort does; afterwards nothing is left to cancel.
func (b *Build) Cancel() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cancel()
}

// Abort ends the call that is running and goes straight to cleanup: GitLab's
// forced cancel.
func (b *Build) Abort() { b.abort() }

// Wait waits for the job's end.
func (b *Build) Wait() *Outcome {
	<-b.done
	return b.outcome
}

func (b *Build) runJob(ctx context.Context) {
	started := time.Now()
	b.log.println("Running with an integration test's runner that plays GitLab Runner " + Version)
	b.log.println(fmt.Sprintf("  on %s, job %d", hostname(), b.job.ID))
	err := b.run(ctx)
	b.abort()

	o := &Outcome{Status: Success, Err: err}
	var buildErr *BuildError
	switch {
	case err == nil:
		b.log.println(boldGreen + "Job succeeded")
	case errors.As(err, &buildErr):
		o.Status, o.FailureReason, o.ExitCode = Failed, buildErr.Reason, buildErr.ExitCode
		if o.FailureReason == "" {
			o.FailureReason = ScriptFailure
		}
		if o.FailureReason == JobCanceled {
			o.Status = Canceled
		}
		b.log.println(boldRed + "ERROR: Job failed: " + err.Error())
	default:
		o.Status, o.FailureReason = Failed, RunnerSystemFailure
		b.log.println(boldRed + "ERROR: Job failed (system failure): " + err.Error())
	}
	b.mu.Lock()
	o.Calls = append(o.Calls, b.calls...)
	b.mu.Unlock()
	o.Log, o.RunnerLog = b.logText.bytes(), b.runnerLog.bytes()
	o.Duration = time.Since(started)
	b.outcome = o
	close(b.done)
}

func (b *Build) run(ctx context.Context) error {
	ex, err := b.prepareExecutor(ctx)
	if err != nil {
		return err
	}
	defer ex.cleanup()

	finished := make(chan error, 1)
	go func() { finished <- b.runScripts(ctx, ex) }()
	select {
	case err := <-finished:
		if ctx.Err() != nil {
			return b.ended(ctx)
		}
		return err
	case <-ctx.Done():
	}
	select {
	case <-finished:
	case <-time.After(b.cfg.BuildFinishTimeout):
		b.log.warning("Timed out waiting for the build to finish")
	}
	return b.ended(ctx)
}

// ended is the failure of a job whose context has ended.
func (b *Build) ended(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &BuildError{
			Reason: JobExecutionTimeout,
			Err:    fmt.Errorf("execution took longer than %v seconds", b.job.Timeout),
		}
	}
	return &BuildError{Reason: JobCanceled, Err: errCanceled}
}

// prepareExecutor is the prepare sequence: config and prepare in a fresh private
// folder, up to three times, with cleanup after each that failed.
func (b *Build) prepareExecutor(ctx context.Context) (*Executor, error) {
	defer b.log.section("prepare_executor", `Preparing the "custom" executor`)()

	var err error
	for range b.cfg.PrepareAttempts {
		var ex *Executor
		ex, err = b.newExecutor()
		if err != nil {
			return nil, err
		}
		err = ex.Config(ctx).Err
		if err == nil {
			b.log.println(ex.greeting())
			err = ex.Prepare(ctx).Err
		}
		if err == nil {
			return ex, nil
		}
		ex.cleanup()
		var buildErr *BuildError
		if errors.As(err, &buildErr) {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, b.ended(ctx)
		}
		b.log.println(boldRed + "ERROR: Preparation failed: " + err.Error())
		b.log.println(boldGreen + fmt.Sprintf("Will be retried in %v ...", b.cfg.RetryInterval))
		time.Sleep(b.cfg.RetryInterval)
	}
	return nil, err
}

// runScripts runs the sub-stages. Which of them fail the job, and which still
// run when an earlier one has failed, is Runner's rule.
func (b *Build) runScripts(ctx context.Context, ex *Executor) error {
	if err := b.runStage(ctx, ex, "prepare_script"); err != nil {
		return fmt.Errorf("prepare environment: %w. "+
			"Check https://docs.gitlab.com/runner/shells/#shell-profile-loading for more information", err)
	}
	err := b.attempt(ctx, ex, "get_sources", "GET_SOURCES_ATTEMPTS")
	if err == nil {
		err = b.attempt(ctx, ex, "restore_cache", "RESTORE_CACHE_ATTEMPTS")
	}
	if err == nil {
		err = b.attempt(ctx, ex, "download_artifacts", "ARTIFACT_DOWNLOAD_ATTEMPTS")
	}
	if err == nil {
		err = b.runUserScripts(ctx, ex)
	}
	archive, upload := "archive_cache", "upload_artifacts_on_success"
	if err != nil {
		archive, upload = "archive_cache_on_failure", "upload_artifacts_on_failure"
	}
	archiveErr := b.runStage(ctx, ex, archive)
	uploadErr := b.runStage(ctx, ex, upload)
	if err := b.runStage(ctx, ex, "cleanup_file_variables"); err != nil {
		b.runnerLogLine("warning", "Error while executing file based variables removal script: "+err.Error())
	}
	for _, e := range []error{err, archiveErr, uploadErr} {
		if e != nil {
			return e
		}
	}
	return nil
}

func (b *Build) runUserScripts(ctx context.Context, ex *Executor) error {
	scriptCtx, cancel := b.stageContext(ctx, "RUNNER_SCRIPT_TIMEOUT", 0)
	defer cancel()
	b.mu.Lock()
	b.cancel = cancel
	b.mu.Unlock()

	var err error
	for _, step := range b.job.steps() {
		if err = b.runStage(scriptCtx, ex, "step_"+step.Name); err != nil {
			break
		}
	}
	switch {
	case ctx.Err() == nil && errors.Is(scriptCtx.Err(), context.Canceled):
		err = &BuildError{Reason: JobCanceled, Err: errCanceled}
		b.log.warning("script canceled externally (UI, API)")
	case ctx.Err() == nil && errors.Is(scriptCtx.Err(), context.DeadlineExceeded):
		err = &BuildError{Reason: JobExecutionTimeout, Err: fmt.Errorf("%w: %w", errScriptTimeout, scriptCtx.Err())}
	}

	b.setStatus(jobStatus(err))
	afterCtx, cancelAfter := b.stageContext(ctx, "RUNNER_AFTER_SCRIPT_TIMEOUT", 5*time.Minute)
	defer cancelAfter()
	if afterErr := b.runStage(afterCtx, ex, "after_script"); afterErr != nil && ctx.Err() == nil {
		b.log.warning("after_script failed, but job will continue unaffected: " + afterErr.Error())
	}
	return err
}

// jobStatus is the CI_JOB_STATUS that after_script and everything later see.
func jobStatus(err error) string {
	var buildErr *BuildError
	switch {
	case err == nil:
		return "success"
	case errors.As(err, &buildErr) && buildErr.Reason == JobCanceled, errors.Is(err, context.Canceled):
		return "canceled"
	case errors.As(err, &buildErr) && buildErr.Reason == JobExecutionTimeout, errors.Is(err, context.DeadlineExceeded):
		return "timedout"
	}
	return "failed"
}

// stageContext bounds ctx by the duration that the job's variable names, or by
// the default; 0 is no bound.
func (b *Build) stageContext(ctx context.Context, variable string, timeout time.Duration) (context.Context, context.CancelFunc) {
	if value := b.variables().get(variable); value != "" {
		d, err := time.ParseDuration(value)
		switch {
		case err != nil:
			b.log.warning(fmt.Sprintf("Ignoring malformed %s timeout: %v", variable, value))
		case d < 0:
			b.log.warning(fmt.Sprintf("Ignoring relative %s timeout: %v", variable, value))
		case d > 0:
			timeout = d
		}
	}
	if timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, timeout)
}

// attempt runs a sub-stage as often as the job's variable allows. Before the
// second get_sources comes clear_worktree.
func (b *Build) attempt(ctx context.Context, ex *Executor, stage, variable string) error {
	attempts := 1
	if n, err := strconv.Atoi(b.variables().get(variable)); err == nil {
		attempts = n
	}
	if attempts < 1 || attempts > 10 {
		return fmt.Errorf("number of attempts out of the range [1, 10] for stage: %s", stage)
	}
	var err error
	for i := range attempts {
		if i == 1 && stage == "get_sources" {
			if err = b.runStage(ctx, ex, "clear_worktree"); err != nil {
				continue
			}
		}
		err = b.runStage(ctx, ex, stage)
		if err == nil || ctx.Err() != nil || i == attempts-1 {
			break
		}
		b.log.println(boldGreen + fmt.Sprintf("Retrying in %v", b.cfg.StageRetryInterval))
		time.Sleep(b.cfg.StageRetryInterval)
	}
	return err
}

var stageTitles = map[string]string{
	"prepare_script":              "Preparing environment",
	"get_sources":                 "Getting source from Git repository",
	"clear_worktree":              "Deleting all tracked and untracked files due to source fetch failure",
	"restore_cache":               "Restoring cache",
	"download_artifacts":          "Downloading artifacts",
	"after_script":                "Running after_script",
	"archive_cache":               "Saving cache for successful job",
	"archive_cache_on_failure":    "Saving cache for failed job",
	"upload_artifacts_on_success": "Uploading artifacts for successful job",
	"upload_artifacts_on_failure": "Uploading artifacts for failed job",
	"cleanup_file_variables":      "Cleaning up project directory and file based variables",
}

// runStage runs one sub-stage, if the job has a script for it.
func (b *Build) runStage(ctx context.Context, ex *Executor, stage string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	script := ex.Script(stage)
	if script == "" {
		return nil
	}
	title, ok := stageTitles[stage]
	if !ok {
		title = fmt.Sprintf("Executing %q stage of the job script", stage)
	}
	defer b.log.section(stage, title)()
	if stage == "step_script" {
		stage = "build_script" // the Custom executor's contract keeps the old name
	}
	return ex.Run(ctx, stage, script).Err
}

func (b *Build) addCall(r *Result) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, r)
}

func (b *Build) setStatus(status string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status = status
}

// runnerLogLine writes one line to the runner's own log.
func (b *Build) runnerLogLine(level, message string) {
	fmt.Fprintf(writers(b.runnerLog, b.cfg.RunnerLog), "level=%s job=%d msg=%q\n", level, b.job.ID, message)
}

// runnerLogWriter gives a writer that makes every line one of the runner's log.
func (b *Build) runnerLogWriter(level string) *lineWriter {
	return &lineWriter{line: func(s string) { b.runnerLogLine(level, s) }}
}

// lineWriter hands on what is written to it line by line, without the newlines.
type lineWriter struct {
	rest bytes.Buffer
	line func(string)
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest.Write(p)
	for {
		i := bytes.IndexByte(w.rest.Bytes(), '\n')
		if i < 0 {
			return len(p), nil
		}
		w.line(string(w.rest.Next(i + 1)[:i]))
	}
}

// Close hands on a last line that has no newline.
func (w *lineWriter) Close() error {
	if w.rest.Len() > 0 {
		w.line(w.rest.String())
		w.rest.Reset()
	}
	return nil
}

func writers(w ...io.Writer) io.Writer {
	all := w[:0:0]
	for _, one := range w {
		if one != nil {
			all = append(all, one)
		}
	}
	return io.MultiWriter(all...)
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "localhost"
	}
	return name
}
