package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The driver leaves processes of its own behind its calls: the keeper of the
// connection to a guest and the finisher of its removal. Nobody waits for them,
// and so what they took is in no call's figures. But the kernel gives every
// process whose parent has ended to the nearest of its ancestors that asked for
// such: bench does, and so waits for them itself, and is told all that they took.

// adoptAll makes this process the parent of what its children leave behind.
func adoptAll() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the parent of what calls leave behind: %w", err)
	}
	return nil
}

// usage is what a process took that a call left behind.
type usage struct {
	pid int
	// cpu is in seconds. peak is its largest memory in bytes, or that of the call
	// that started it up to then.
	cpu  float64
	peak int64
}

// waitForAdopted waits until nothing of what calls left behind is there any more.
// Calls' own processes are in this process's session, and are left to those who
// wait for them.
func waitForAdopted(ctx context.Context) ([]usage, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var ended []usage
	for {
		pids, err := adopted()
		if err != nil || len(pids) == 0 {
			return ended, err
		}
		for _, pid := range pids {
			if took, over := reap(pid); over {
				ended = append(ended, took)
			}
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return ended, fmt.Errorf("processes that calls have left behind do not end: %v", pids)
		}
	}
}

// reap takes the end of a child, if it has ended, and what it took. A child that
// is traced and has stopped is left to who traces it: any wait that does not only
// look would take that from them.
func reap(pid int) (usage, bool) {
	const exited, killed, dumped = 1, 2, 3 // CLD_EXITED and so on: sigaction(2)
	var info unix.Siginfo
	var took unix.Rusage
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, &took)
	if err != nil || info.Signo == 0 || info.Code != exited && info.Code != killed && info.Code != dumped {
		return usage{}, false
	}
	if unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG, nil) != nil {
		return usage{}, false // who traces it has taken it
	}
	cpu := time.Duration(took.Utime.Nano() + took.Stime.Nano())
	return usage{pid, cpu.Seconds(), took.Maxrss << 10}, true
}

// adopted returns the children that are in a session of their own.
func adopted() ([]int, error) {
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for _, field := range strings.Fields(string(text)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", list, err)
			}
			if session(pid) == pid {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

// session returns a process's session, as /proc/PID/stat has it even of one that
// has ended; 0 when there is no such process. See
// https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html.
func session(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name before it may hold anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 4 {
		return 0
	}
	id, _ := strconv.Atoi(fields[3])
	return id
}

// cpuClock returns the processor time that a process and its threads have taken
// so far, in seconds; 0 when there is no such process.
func cpuClock(pid int) float64 {
	if pid == 0 {
		return 0
	}
	const perProcess = 2 // CPUCLOCK_SCHED, to the nanosecond: clock_getcpuclockid(3)
	var t unix.Timespec
	if unix.ClockGettime(int32(^pid<<3|perProcess), &t) != nil {
		return 0
	}
	return time.Duration(t.Nano()).Seconds()
}

// peakMemory returns the largest memory that a process has had so far, in bytes.
func peakMemory(pid int) int64 {
	var kib int64
	if _, err := fmt.Sscanf(procField(fmt.Sprintf("/proc/%d/status", pid), "VmHWM"), "%d kB", &kib); err != nil {
		return 0
	}
	return kib << 10
}

// records is where the driver, as root, keeps what it knows of its machines.
const records = "/run/libvirt-driver"

// keeperOf returns the process that keeps the connection to a machine; 0 when
// there is none. Its file is named after the machine's domain, which has a name
// of its own where it was made before the job.
func keeperOf(machine string) int {
	var record struct{ Domain string }
	domain := machine
	if text, err := os.ReadFile(filepath.Join(records, machine+".machine")); err == nil &&
		json.Unmarshal(text, &record) == nil && record.Domain != "" {
		domain = record.Domain
	}
	text, err := os.ReadFile(filepath.Join(records, domain+".keeper"))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return pid
}
