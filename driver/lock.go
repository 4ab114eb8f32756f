package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// lock keeps everyone else from making or removing a machine: other stages of
// the same job, which GitLab Runner may start while an earlier one still ends,
// and gc. It is the kernel's, so a process that dies holds none.
//
// The error says that the caller waited for holder.
func (h *Host) lock(ctx context.Context, machine, holder string) (*held, error) {
	for try := 0; ; try++ {
		lock, err := h.tryLock(machine)
		if !errors.Is(err, errLocked) {
			return lock, err
		}
		pause(ctx, backoff(try))
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: waited for %s", context.Cause(ctx), holder)
		}
	}
}

// held is a lock that this process holds, or has given to another.
type held struct{ file *os.File }

// release ends the lock.
func (l *held) release() {
	os.Remove(l.file.Name())
	l.file.Close()
}

// errLocked says that someone else works on the machine.
var errLocked = errors.New("another process works on it")

// tryLock locks a machine at once or returns errLocked.
func (h *Host) tryLock(machine string) (*held, error) {
	if err := os.MkdirAll(h.LockDir, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder for locks: %w", err)
	}
	path := h.lockPath(machine)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the machine: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// Whoever held the lock has removed the file that was opened here.
	opened, err := f.Stat()
	there, errThere := os.Lstat(path)
	if err != nil || errThere != nil || !os.SameFile(opened, there) {
		f.Close()
		return nil, errLocked
	}
	return &held{f}, nil
}

const lockSuffix = ".lock"

func (h *Host) lockPath(machine string) string { return filepath.Join(h.LockDir, machine+lockSuffix) }

// LockDir returns the folder for the locks of machines, which need not outlive
// the host's uptime: /run/libvirt-driver, or one of the user's own for a driver
// that is not root.
func LockDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/run/libvirt-driver", nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a folder for locks: %w", err)
	}
	return filepath.Join(cache, "libvirt-driver"), nil
}
