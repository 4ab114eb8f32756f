package runner

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Executor is one attempt at a job: a private folder, which is the calls'
// TMPDIR and current directory, and what the config stage has said. The calls of
// one Executor are made one after the other.
type Executor struct {
	build  *Build
	dir    string
	jobEnv map[string]string
	driver driverInfo
}

type driverInfo struct {
	Name, Version *string
}

// New makes the first Executor of a job, for callers that make the calls one by
// one. Its Cleanup removes the private folder.
func New(cfg Config, job Job) (*Executor, error) {
	b, err := newBuild(cfg, job)
	if err != nil {
		return nil, err
	}
	return b.newExecutor()
}

// Next makes the Executor of a further attempt at the same job.
func (ex *Executor) Next() (*Executor, error) { return ex.build.newExecutor() }

func (b *Build) newExecutor() (*Executor, error) {
	dir, err := os.MkdirTemp(b.cfg.TempDir, "custom-executor")
	if err != nil {
		return nil, fmt.Errorf("make a private folder: %w", err)
	}
	ex := &Executor{build: b, dir: dir}
	response, err := b.job.Response()
	if err == nil {
		err = os.WriteFile(ex.ResponseFile(), response, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write job response: %w", err), os.RemoveAll(dir))
	}
	return ex, nil
}

// Dir is the private folder.
func (ex *Executor) Dir() string { return ex.dir }

// ResponseFile is $JOB_RESPONSE_FILE.
func (ex *Executor) ResponseFile() string { return filepath.Join(ex.dir, "response.json") }

// ExitCodeFile is $BUILD_EXIT_CODE_FILE.
func (ex *Executor) ExitCodeFile() string { return filepath.Join(ex.dir, "build_exit_code") }

// ProjectDir is where the job's sources are in the guest, once the config stage
// has named the builds folder.
func (ex *Executor) ProjectDir() string { return ex.build.project }

// JobLog is the job log so far.
func (ex *Executor) JobLog() []byte { return ex.build.logText.bytes() }

// RunnerLog is what the runner's own log got so far.
func (ex *Executor) RunnerLog() []byte { return ex.build.runnerLog.bytes() }

// SetStatus sets the CI_JOB_STATUS of the calls to come: running, success,
// failed, canceled or timedout.
func (ex *Executor) SetStatus(status string) { ex.build.setStatus(status) }

// Env is the environment of a call made now: the runner's own, what the contract
// adds, job_env, then the job's variables. Of a name that is set more than once
// only the last setting is there.
func (ex *Executor) Env() []string {
	cfg := ex.build.cfg
	env := slices.Clone(cfg.Env)
	set := func(key, value string) { env = append(env, key+"="+value) }
	set("TMPDIR", ex.dir)
	set("BUILD_FAILURE_EXIT_CODE", strconv.Itoa(cfg.BuildFailure))
	set("SYSTEM_FAILURE_EXIT_CODE", strconv.Itoa(cfg.SystemFailure))
	set("BUILD_EXIT_CODE_FILE", ex.ExitCodeFile())
	set("JOB_RESPONSE_FILE", ex.ResponseFile())
	for key, value := range ex.jobEnv {
		set(key, value)
	}
	for _, v := range ex.build.variables() {
		set("CUSTOM_ENV_"+v.Key, v.Value)
	}
	set("CUSTOM_ENV_CI_JOB_SERVICES", ex.services())

	last := make(map[string]int, len(env))
	for i, kv := range env {
		key, _, _ := strings.Cut(kv, "=")
		last[key] = i
	}
	kept := env[:0]
	for i, kv := range env {
		key, _, _ := strings.Cut(kv, "=")
		if last[key] == i {
			kept = append(kept, kv)
		}
	}
	return kept
}

func (ex *Executor) services() string {
	services := ex.build.job.Services
	if len(services) == 0 {
		return ""
	}
	text, err := json.Marshal(services)
	if err != nil {
		panic(err) // strings and booleans only
	}
	return string(text)
}

// Config makes the config call and takes over what its JSON says. A driver
// without a config stage gets the Result of a call that was not made.
func (ex *Executor) Config(ctx context.Context) *Result {
	ctx, cancel := context.WithTimeout(ctx, ex.build.cfg.ConfigTimeout)
	defer cancel()
	return ex.StartConfig().Wait(ctx)
}

// StartConfig starts the config call. What its JSON says is taken over when the
// call has ended.
func (ex *Executor) StartConfig() *Call {
	return ex.start("config", "", ex.build.cfg.Commands.Config, nil, ex.build.log.stream(), func(r *Result) {
		if r.Err == nil {
			r.Err = ex.configure(r.Stdout)
		}
	})
}

// configure takes over a config stage's output, which may be empty.
func (ex *Executor) configure(output []byte) error {
	var c struct {
		Hostname  *string           `json:"hostname"`
		BuildsDir *string           `json:"builds_dir"`
		CacheDir  *string           `json:"cache_dir"`
		Shared    *bool             `json:"builds_dir_is_shared"`
		Shell     *string           `json:"shell"`
		Driver    driverInfo        `json:"driver"`
		JobEnv    map[string]string `json:"job_env"`
	}
	if len(output) > 0 {
		if err := json.Unmarshal(output, &c); err != nil {
			return fmt.Errorf("error while parsing JSON output: %w", err)
		}
	}
	b := ex.build
	builds, cache := b.cfg.BuildsDir, b.cfg.CacheDir
	for _, s := range []struct{ to, from *string }{
		{&b.hostname, c.Hostname}, {&builds, c.BuildsDir}, {&cache, c.CacheDir}, {&b.shell, c.Shell},
	} {
		if s.from != nil {
			*s.to = *s.from
		}
	}
	ex.driver, ex.jobEnv = c.Driver, c.JobEnv
	if builds == "" {
		return &BuildError{Err: errors.New("the builds_dir is not configured")}
	}
	if cache == "" {
		return &BuildError{Err: errors.New("the cache_dir is not configured")}
	}
	b.builds, b.cache = builds, path.Join(cache, projectPath)
	b.project = path.Join(builds, projectPath)
	if c.Shared != nil && *c.Shared {
		b.project = path.Join(builds, shortToken, strconv.Itoa(b.job.ConcurrentProjectID), projectPath)
	}
	return nil
}

// greeting is the job log's line about the driver.
func (ex *Executor) greeting() string {
	switch d := ex.driver; {
	case d.Name == nil:
		return "Using Custom executor..."
	case d.Version == nil:
		return fmt.Sprintf("Using Custom executor with driver %s...", *d.Name)
	default:
		return fmt.Sprintf("Using Custom executor with driver %s %s...", *d.Name, *d.Version)
	}
}

// Hostname is the one that the config stage has named.
func (ex *Executor) Hostname() string { return ex.build.hostname }

// JobEnv is what the config stage hands to later calls.
func (ex *Executor) JobEnv() map[string]string { return ex.jobEnv }

// Prepare makes the prepare call.
func (ex *Executor) Prepare(ctx context.Context) *Result {
	ctx, cancel := context.WithTimeout(ctx, ex.build.cfg.PrepareTimeout)
	defer cancel()
	return ex.StartPrepare().Wait(ctx)
}

// StartPrepare starts the prepare call.
func (ex *Executor) StartPrepare() *Call {
	log := ex.build.log
	return ex.start("prepare", "", ex.build.cfg.Commands.Prepare, log.stream(), log.stream(), nil)
}

// Run makes the run call of a sub-stage. See [Executor.Script] for the scripts
// that Runner generates.
func (ex *Executor) Run(ctx context.Context, subStage, script string) *Result {
	return ex.StartRun(subStage, script).Wait(ctx)
}

// StartRun writes the script to a file and starts the run call.
func (ex *Executor) StartRun(subStage, script string) *Call {
	dir, err := os.MkdirTemp(ex.dir, "script")
	file := filepath.Join(dir, "script")
	if shell := ex.build.shell; shell == "pwsh" || shell == "powershell" {
		file += ".ps1"
	}
	if err == nil {
		err = os.WriteFile(file, []byte(script), 0o700)
	}
	if err != nil {
		return endedCall("run", subStage, func(r *Result) { r.Err = fmt.Errorf("write script: %w", err) })
	}
	log := ex.build.log
	argv := append(slices.Clone(ex.build.cfg.Commands.Run), file, subStage)
	return ex.start("run", subStage, argv, log.stream(), log.stream(), nil)
}

// Cleanup makes the cleanup call, whose output goes to the runner's log, and
// removes the private folder.
func (ex *Executor) Cleanup(ctx context.Context) *Result {
	ctx, cancel := context.WithTimeout(ctx, ex.build.cfg.CleanupTimeout)
	defer cancel()
	return ex.StartCleanup().Wait(ctx)
}

// StartCleanup starts the cleanup call. The private folder is removed when the
// call has ended.
func (ex *Executor) StartCleanup() *Call {
	b := ex.build
	return ex.start("cleanup", "", b.cfg.Commands.Cleanup, b.runnerLogWriter("debug"), b.runnerLogWriter("warning"),
		func(r *Result) {
			if err := os.RemoveAll(ex.dir); err != nil {
				r.Err = errors.Join(r.Err, fmt.Errorf("remove private folder: %w", err))
			}
		})
}

// cleanup ends an attempt within a whole job. Its result changes nothing.
func (ex *Executor) cleanup() {
	if err := ex.Cleanup(context.Background()).Err; err != nil {
		ex.build.log.warning("Cleanup script failed: " + err.Error())
	}
}

// start starts a call. Its stdout and stderr go to the two writers, of which
// that for stdout may be nil, and then says what the call means.
func (ex *Executor) start(stage, subStage string, argv []string, stdout, stderr io.WriteCloser, then func(*Result)) *Call {
	if stdout == nil {
		stdout = nopCloser{io.Discard}
	}
	finish := func(r *Result) {
		err := errors.Join(stdout.Close(), stderr.Close())
		if r.Err == nil {
			r.Err = ex.verdict(r)
		}
		if then != nil {
			then(r)
		}
		if r.Err == nil && err != nil {
			r.Err = fmt.Errorf("write job log: %w", err)
		}
		if r.Pid != 0 {
			ex.build.addCall(r)
		}
	}
	if len(argv) == 0 {
		return endedCall(stage, subStage, finish)
	}
	cfg := ex.build.cfg
	keep := cfg.KeepOutput
	if stage == "config" {
		keep = 0 // its JSON is needed
	}
	c := &Call{
		Stage: stage, SubStage: subStage, Args: argv,
		graceful: cfg.GracefulKillTimeout, force: cfg.ForceKillTimeout,
		stdout:    stream{capture: capture{limit: keep}, to: stdout},
		stderr:    stream{capture: capture{limit: keep}, to: stderr},
		exited:    make(chan struct{}),
		done:      make(chan struct{}),
		interpret: finish,
	}
	if err := c.start(ex.dir, ex.Env(), cfg.Trace); err != nil {
		return endedCall(stage, subStage, func(r *Result) {
			r.ExitCode, r.Err = -1, fmt.Errorf("failed to start command: %w", err)
			finish(r)
		})
	}
	if cfg.OnCall != nil {
		cfg.OnCall(c)
	}
	return c
}

// verdict reads an ended process as Runner does: nil, a BuildError, or a system
// failure.
func (ex *Executor) verdict(r *Result) error {
	cfg := ex.build.cfg
	status := fmt.Sprintf("exit status %d", r.ExitCode)
	if r.Signal != 0 {
		status = "signal: " + r.Signal.String()
	}
	switch {
	case r.Pid == 0 || r.ExitCode == 0:
		return nil
	case r.ExitCode == cfg.BuildFailure:
		file, err := os.Open(ex.ExitCodeFile())
		if err != nil {
			return &BuildError{ExitCode: cfg.BuildFailure, Err: errors.New(status)}
		}
		defer file.Close()
		lines := bufio.NewScanner(file)
		lines.Scan()
		code, err := strconv.Atoi(lines.Text())
		if err != nil {
			return unknownFailure(cfg.SystemFailure, status)
		}
		return &BuildError{ExitCode: code, Err: fmt.Errorf("exit status %s", lines.Text())}
	case r.ExitCode == cfg.SystemFailure:
		return errors.New(status)
	}
	return unknownFailure(r.ExitCode, status)
}

func unknownFailure(code int, status string) error {
	return fmt.Errorf("unknown Custom executor executable exit code %d; executable execution terminated with: %s", code, status)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// exitSignal is the signal that a process died of, or 0.
func exitSignal(ws syscall.WaitStatus) syscall.Signal {
	if ws.Signaled() {
		return ws.Signal()
	}
	return 0
}
