package runner

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// Trace is what ptrace saw of a call. Threads are not processes.
type Trace struct {
	// Processes is how many processes were started by the call's own and by those
	// it started.
	Processes int
	// Execs are the programs that were executed, in order, without the call's own
	// first one.
	Execs []string
	// PeakRSS is the largest peak resident memory, in bytes, of any one process;
	// OwnRSS is that of the call's own.
	PeakRSS, OwnRSS int64
}

const traceOptions = syscall.PTRACE_O_TRACEFORK | syscall.PTRACE_O_TRACEVFORK | syscall.PTRACE_O_TRACECLONE |
	syscall.PTRACE_O_TRACEEXEC | syscall.PTRACE_O_TRACEEXIT

// startTraced starts the process as start does, under ptrace(2). Only the stops
// at fork, exec and exit are asked for, so that everything else runs at its full
// speed. The thread that traces is the one that forks, for as long as any of the
// traced processes lives.
func (c *Call) startTraced(program string, attr *syscall.ProcAttr) (int, error) {
	type start struct {
		pid int
		err error
	}
	started := make(chan start)
	go onThreadWithoutChildren(func(err error) {
		var pid int
		if err == nil {
			attr.Sys.Ptrace = true
			pid, err = syscall.ForkExec(program, c.Args, attr)
		}
		if err == nil {
			if err = beginTrace(pid); err != nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		started <- start{pid, err}
		if err == nil {
			c.follow(pid)
		}
	})
	s := <-started
	return s.pid, s.err
}

// onThreadWithoutChildren calls f on an operating system thread of its own that
// no process was started from: f's waits would take the ends of those processes
// from whoever waits for them. It belongs in a goroutine that ends with it, as
// the thread then does.
func onThreadWithoutChildren(f func(error)) {
	runtime.LockOSThread()
	children, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", syscall.Gettid()))
	if err == nil && len(children) > 0 {
		// While this thread is held the next goroutine gets another.
		found := make(chan struct{})
		go onThreadWithoutChildren(func(err error) {
			close(found)
			f(err)
		})
		<-found
		runtime.UnlockOSThread()
		return
	}
	f(err)
}

// beginTrace waits for the stop after the first exec and sets the options.
func beginTrace(pid int) error {
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, syscall.WALL, nil); err != nil {
		return fmt.Errorf("wait for the traced process: %w", err)
	}
	if !ws.Stopped() {
		return fmt.Errorf("traced process ended before its first instruction: %v", ws)
	}
	if err := syscall.PtraceSetOptions(pid, traceOptions); err != nil {
		return fmt.Errorf("trace the process: %w", err)
	}
	if err := syscall.PtraceCont(pid, 0); err != nil {
		return fmt.Errorf("let the traced process run: %w", err)
	}
	return nil
}

// follow handles the stops of the process and of all that it starts, until the
// last of them has ended.
func (c *Call) follow(leader int) {
	t := &Trace{}
	c.trace = t
	known := map[int]bool{leader: true} // has had its first stop
	ended := false                      // the leader has
	for {
		var ws syscall.WaitStatus
		var usage syscall.Rusage
		// Without WNOTHREAD this would take what other threads' waits are for.
		pid, err := syscall.Wait4(-1, &ws, syscall.WALL|syscall.WNOTHREAD, &usage)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			if !ended { // never to be; but do not hang on it
				c.waitErr, c.exitedAt = err, time.Now()
				close(c.exited)
			}
			return // ECHILD: the last has ended
		}
		if ws.Exited() || ws.Signaled() {
			if pid == leader {
				c.status, c.usage, c.exitedAt = ws, usage, time.Now()
				// Later events are those of processes that outlived the leader. The result
				// is of what was seen until now.
				snapshot := *t
				c.trace = &snapshot
				ended = true
				close(c.exited)
			}
			continue
		}
		deliver := 0
		switch cause := ws.TrapCause(); {
		case ws.StopSignal() != syscall.SIGTRAP:
			// A new process's or thread's first stop is ptrace's own SIGSTOP.
			if known[pid] || ws.StopSignal() != syscall.SIGSTOP {
				deliver = int(ws.StopSignal())
			}
			known[pid] = true
		case cause == syscall.PTRACE_EVENT_FORK, cause == syscall.PTRACE_EVENT_VFORK, cause == syscall.PTRACE_EVENT_CLONE:
			if child, err := syscall.PtraceGetEventMsg(pid); err == nil && isProcess(int(child)) {
				t.Processes++
			}
		case cause == syscall.PTRACE_EVENT_EXEC:
			if program, err := os.Readlink(procFile(pid, "exe")); err == nil {
				t.Execs = append(t.Execs, program)
			}
		case cause == syscall.PTRACE_EVENT_EXIT:
			peak := statusKiB(pid, "VmHWM") << 10
			t.PeakRSS = max(t.PeakRSS, peak)
			if pid == leader || statusField(pid, "Tgid") == strconv.Itoa(leader) {
				t.OwnRSS = max(t.OwnRSS, peak)
			}
		case cause == 0:
			deliver = int(syscall.SIGTRAP)
		}
		// A process that was killed while stopped is gone: its end comes next.
		if err := syscall.PtraceCont(pid, deliver); err != nil && !errors.Is(err, syscall.ESRCH) && !ended {
			c.waitErr = fmt.Errorf("let traced process %d run: %w", pid, err)
		}
	}
}

func procFile(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

// isProcess tells a process from a thread: it leads its thread group.
func isProcess(pid int) bool { return statusField(pid, "Tgid") == strconv.Itoa(pid) }

// statusField is a field of /proc/PID/status
// (https://man7.org/linux/man-pages/man5/proc_pid_status.5.html); "" when there
// is none.
func statusField(pid int, name string) string {
	text, err := os.ReadFile(procFile(pid, "status"))
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(text) {
		if value, ok := bytes.CutPrefix(line, []byte(name+":")); ok {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

func statusKiB(pid int, name string) int64 {
	var n int64
	if _, err := fmt.Sscanf(statusField(pid, name), "%d kB", &n); err != nil {
		return 0
	}
	return n
}
