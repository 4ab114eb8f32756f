package driver

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// An owner is the process that called prepare, the runner, told apart from
// every other that there was or will be. A machine whose owner is gone has
// nobody left who would clean it up.
type owner struct {
	// Boot is the kernel's boot id, PIDs the namespace of the process id.
	Boot, PIDs string
	PID        int
	// Start is when the process started, in the kernel's ticks since boot.
	Start string
}

func (o owner) String() string {
	return fmt.Sprintf("%s %s %d %s", o.Boot, o.PIDs, o.PID, o.Start)
}

func parseOwner(text string) (owner, error) {
	var o owner
	if _, err := fmt.Sscanf(text, "%s %s %d %s", &o.Boot, &o.PIDs, &o.PID, &o.Start); err != nil {
		return owner{}, fmt.Errorf("owner %q: %w", text, err)
	}
	return o, nil
}

// process identifies a process of this host.
func process(pid int) (owner, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return owner{}, err
	}
	pids, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return owner{}, err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return owner{}, err
	}
	// The second field is the program's name in parentheses and may hold
	// anything; the start time is field 22. See proc_pid_stat(5).
	const start = 22 - 3
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) <= start {
		return owner{}, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields)+2)
	}
	return owner{strings.TrimSpace(string(boot)), pids, pid, fields[start]}, nil
}

// gone reports whether the process is proven to have ended: the host has been
// restarted since, or its id is free or another's. A process of another PID
// namespace can be neither seen nor missed.
func (o owner) gone() (bool, error) {
	self, err := process(os.Getpid())
	switch {
	case err != nil:
		return false, err
	case o.Boot != self.Boot:
		return true, nil
	case o.PIDs != self.PIDs:
		return false, nil
	}
	now, err := process(o.PID)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return err == nil && now.Start != o.Start, err
}
