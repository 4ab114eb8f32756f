package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Result is what came of one call of the driver.
type Result struct {
	Stage    string // config, prepare, run or cleanup
	SubStage string // run's, else ""
	Args     []string
	Pid      int // 0 when no process was started

	// ExitCode is the process's; -1 when it died of Signal or was given up on.
	ExitCode int
	Signal   syscall.Signal

	// Stdout and Stderr are the output, as far as Config.KeepOutput allows.
	// StdoutBytes and StderrBytes count all of it.
	Stdout, Stderr           []byte
	StdoutBytes, StderrBytes int64
	// FirstByte is when the first of stdout came; zero when none did.
	FirstByte time.Time

	// Started is just before the process was started, Exited when it had ended,
	// Ended when its stdout and stderr had ended too, or when Runner gave up.
	// Exited is zero for a process that had not ended by then.
	Started, Exited, Ended time.Time

	// MaxRSS is the peak memory, in bytes, that wait4 reports for the process and
	// the children it waited for. The kernel counts the time between fork and exec
	// in, where the child still shares the runner's memory: the number is never
	// below the runner's own peak. Trace has the exact one.
	MaxRSS int64
	// User and System are the processor time of the process and of the children it
	// waited for.
	User, System time.Duration
	// Trace is nil unless Config.Trace asked for it.
	Trace *Trace

	// Err is how Runner reads the end of the call: nil is success, a *BuildError
	// the job's failure, all else a system failure.
	Err error
}

// Duration is how long the stage took as Runner sees it.
func (r *Result) Duration() time.Duration { return r.Ended.Sub(r.Started) }

// Held is how long something that outlived the driver held its stdout or stderr
// open and so kept the stage from ending. A few milliseconds are only the way of
// the last output.
func (r *Result) Held() time.Duration {
	if r.Exited.IsZero() {
		return 0
	}
	return r.Ended.Sub(r.Exited)
}

// Name is the stage, with the sub-stage where there is one.
func (r *Result) Name() string {
	if r.SubStage == "" {
		return r.Stage
	}
	return r.Stage + " " + r.SubStage
}

// Call is a call of the driver under way. Its methods may be called from any
// goroutine.
type Call struct {
	Stage, SubStage string
	Args            []string

	pid             int
	started         time.Time
	graceful, force time.Duration
	stdout, stderr  stream
	interpret       func(*Result)

	// exited is closed when the process has ended, done when the result is there.
	exited, done chan struct{}
	status       syscall.WaitStatus
	usage        syscall.Rusage
	trace        *Trace
	waitErr      error
	exitedAt     time.Time

	finishOnce sync.Once
	result     *Result
}

// stream is one of a call's two outputs.
type stream struct {
	capture
	to     io.WriteCloser
	reader *os.File
	err    error
}

// copy reads the pipe to its end, or until it is closed.
func (s *stream) copy() {
	buf := make([]byte, 64<<10)
	for {
		n, err := s.reader.Read(buf)
		if n > 0 {
			s.capture.Write(buf[:n])
			if _, werr := s.to.Write(buf[:n]); werr != nil && s.err == nil {
				s.err = fmt.Errorf("hand on output: %w", werr)
			}
		}
		if err != nil {
			if err != io.EOF && !errors.Is(err, os.ErrClosed) && s.err == nil {
				s.err = fmt.Errorf("read output: %w", err)
			}
			s.reader.Close()
			return
		}
	}
}

// start starts the process in a group of its own, with /dev/null as its stdin
// and a pipe each for stdout and stderr.
func (c *Call) start(dir string, env []string, trace bool) error {
	program, err := exec.LookPath(c.Args[0])
	if err != nil {
		return err
	}
	if program, err = filepath.Abs(program); err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	stdout, err := c.stdout.pipe()
	if err != nil {
		return err
	}
	defer syscall.Close(stdout)
	stderr, err := c.stderr.pipe()
	if err != nil {
		c.stdout.reader.Close()
		return err
	}
	defer syscall.Close(stderr)

	attr := &syscall.ProcAttr{
		Dir:   dir,
		Env:   env,
		Files: []uintptr{null.Fd(), uintptr(stdout), uintptr(stderr)},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	}
	c.started = time.Now()
	if trace {
		c.pid, err = c.startTraced(program, attr)
	} else {
		c.pid, err = syscall.ForkExec(program, c.Args, attr)
	}
	if err != nil {
		c.stdout.reader.Close()
		c.stderr.reader.Close()
		return fmt.Errorf("fork/exec %s: %w", program, err)
	}
	if !trace {
		go func() {
			for {
				_, c.waitErr = syscall.Wait4(c.pid, &c.status, 0, &c.usage)
				if c.waitErr != syscall.EINTR {
					break
				}
			}
			c.exitedAt = time.Now()
			close(c.exited)
		}()
	}
	var copies sync.WaitGroup
	copies.Go(c.stdout.copy)
	copies.Go(c.stderr.copy)
	go func() {
		copies.Wait()
		<-c.exited
		c.finish(nil)
	}()
	return nil
}

// pipe opens the stream's pipe and returns the end that the driver writes to.
// That end stays blocking, as a program expects of its standard output.
func (s *stream) pipe() (int, error) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		return 0, fmt.Errorf("pipe: %w", err)
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		syscall.Close(fds[0])
		syscall.Close(fds[1])
		return 0, fmt.Errorf("pipe: %w", err)
	}
	s.reader = os.NewFile(uintptr(fds[0]), "pipe")
	return fds[1], nil
}

// Pid is the driver's process, and the number of its process group.
func (c *Call) Pid() int { return c.pid }

// Done is closed when the call has ended.
func (c *Call) Done() <-chan struct{} { return c.done }

// Signal sends a signal to the call's process group, as Runner does.
func (c *Call) Signal(sig syscall.Signal) error {
	select {
	case <-c.done:
		return os.ErrProcessDone
	default:
	}
	if err := syscall.Kill(-c.pid, sig); err != nil {
		return fmt.Errorf("send %v to process group %d: %w", sig, c.pid, err)
	}
	return nil
}

// SignalProcess sends a signal to the driver alone, as an administrator's kill
// does.
func (c *Call) SignalProcess(sig syscall.Signal) error {
	select {
	case <-c.exited:
		return os.ErrProcessDone
	default:
	}
	if err := syscall.Kill(c.pid, sig); err != nil {
		return fmt.Errorf("send %v to process %d: %w", sig, c.pid, err)
	}
	return nil
}

// Wait waits for the call's end. When ctx ends first, the process group gets
// SIGTERM, after Config.GracefulKillTimeout SIGKILL, and after
// Config.ForceKillTimeout Runner gives up: the Result then says so in Err.
func (c *Call) Wait(ctx context.Context) *Result {
	select {
	case <-c.done:
		return c.result
	case <-ctx.Done():
	}
	// Signals may fail: the leader may be gone and only what it left behind, in a
	// session of its own, hold the pipes.
	if c.Signal(syscall.SIGTERM) != nil {
		_ = c.Signal(syscall.SIGKILL)
	}
	select {
	case <-c.done:
		return c.result
	case <-time.After(c.graceful):
	}
	_ = c.Signal(syscall.SIGKILL)
	select {
	case <-c.done:
	case <-time.After(c.force):
		c.finish(fmt.Errorf("failed to kill process PID=%d, likely process is dormant", c.pid))
	}
	return c.result
}

// Output is what the call has written so far, as far as Config.KeepOutput
// allows.
func (c *Call) Output() (stdout, stderr []byte) {
	return c.stdout.bytes(), c.stderr.bytes()
}

// WaitFor waits until the call has written text to stdout or stderr. It is an
// error when the call or ctx ends without.
func (c *Call) WaitFor(ctx context.Context, text string) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		ended := false
		select {
		case <-c.done:
			ended = true
		default:
		}
		stdout, stderr := c.Output()
		if bytes.Contains(stdout, []byte(text)) || bytes.Contains(stderr, []byte(text)) {
			return nil
		}
		if ended {
			return fmt.Errorf("%s ended without writing %q; stdout %q, stderr %q", c.Stage, text, stdout, stderr)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s has not written %q: %w; stdout %q, stderr %q", c.Stage, text, ctx.Err(), stdout, stderr)
		case <-time.After(pause):
		}
	}
}

// finish makes the result, once. given is set when Runner gives up on the call.
func (c *Call) finish(given error) {
	c.finishOnce.Do(func() {
		r := &Result{
			Stage: c.Stage, SubStage: c.SubStage, Args: c.Args, Pid: c.pid,
			Started: c.started, Ended: time.Now(), ExitCode: -1, Err: given,
		}
		select {
		case <-c.exited:
			r.Exited = c.exitedAt
			r.ExitCode, r.Signal = c.status.ExitStatus(), exitSignal(c.status)
			r.MaxRSS = c.usage.Maxrss << 10
			r.User = time.Duration(c.usage.Utime.Nano())
			r.System = time.Duration(c.usage.Stime.Nano())
			r.Trace = c.trace
			if c.waitErr != nil && r.Err == nil {
				r.Err = fmt.Errorf("wait for process %d: %w", c.pid, c.waitErr)
			}
		default:
		}
		if given != nil {
			// Whatever holds the pipes is not read any more.
			c.stdout.reader.Close()
			c.stderr.reader.Close()
		} else if err := errors.Join(c.stdout.err, c.stderr.err); err != nil && r.Err == nil {
			r.Err = err
		}
		r.Stdout, r.StdoutBytes, r.FirstByte = c.stdout.bytes(), c.stdout.written(), c.stdout.begun()
		r.Stderr, r.StderrBytes = c.stderr.bytes(), c.stderr.written()
		c.interpret(r)
		c.result = r
		close(c.done)
	})
}

// endedCall is a call without a process.
func endedCall(stage, subStage string, interpret func(*Result)) *Call {
	now := time.Now()
	r := &Result{Stage: stage, SubStage: subStage, Started: now, Exited: now, Ended: now}
	interpret(r)
	c := &Call{Stage: stage, SubStage: subStage, started: now, result: r, exited: make(chan struct{}), done: make(chan struct{})}
	close(c.exited)
	close(c.done)
	return c
}

// capture keeps what is written to it, up to limit bytes: 0 keeps all, less than
// 0 nothing.
type capture struct {
	limit int64
	mu    sync.Mutex
	buf   []byte
	total int64
	first time.Time // when the first byte came
}

func (c *capture) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total == 0 && len(p) > 0 {
		c.first = time.Now()
	}
	c.total += int64(len(p))
	switch keep := c.limit - int64(len(c.buf)); {
	case c.limit == 0:
		c.buf = append(c.buf, p...)
	case keep > 0:
		c.buf = append(c.buf, p[:min(keep, int64(len(p)))]...)
	}
	return len(p), nil
}

// bytes is what has been kept so far. What it returns does not change.
func (c *capture) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf[:len(c.buf):len(c.buf)]
}

func (c *capture) begun() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first
}

func (c *capture) written() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}
