package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// activity is the file by which a machine's stages show that they are at work:
// each holds a shared lock on it while it lives, and its time is when the last
// one ended.
func (h *Host) activity(machine string) string {
	return filepath.Join(h.LockDir, machine+".stage")
}

// atWork shows that a stage of a machine is at work until done is called or the
// process ends.
func (h *Host) atWork(machine string) (done func(), err error) {
	if err := os.MkdirAll(h.LockDir, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder for locks: %w", err)
	}
	f, err := os.OpenFile(h.activity(machine), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("show that a stage is at work: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); err != nil && !errors.Is(err, syscall.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("show that a stage is at work: %w", err)
	}
	if err := f.Truncate(0); err != nil { // of an earlier attempt's cleanup
		f.Close()
		return nil, fmt.Errorf("show that a stage is at work: %w", err)
	}
	return func() {
		now := time.Now()
		os.Chtimes(f.Name(), now, now)
		f.Close()
	}, nil
}

// idle returns since when no stage of a machine has been at work; ok is false
// while one is. A machine of which no stage is on record, as after a restart of
// the host, has been idle since it was made.
func (h *Host) idle(machine string, made time.Time) (since time.Time, ok bool, err error) {
	f, err := os.Open(h.activity(machine))
	if errors.Is(err, fs.ErrNotExist) {
		return made, true, nil
	}
	if err != nil {
		return made, false, err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return made, false, nil
		}
		return made, false, err
	}
	info, err := f.Stat()
	if err != nil {
		return made, false, err
	}
	return info.ModTime(), true, nil
}

// forget removes the records of a machine that is gone.
func (h *Host) forget(machine string) error {
	var left []error
	for _, record := range []string{
		h.bindingPath(machine), h.bindingPath(machine) + half, h.readyPath(machine) + half,
		h.activity(machine), h.lockPath(machine + waitingSuffix), h.lockPath(machine + arrivalSuffix),
	} {
		left = append(left, gone(os.Remove(record)))
	}
	return errors.Join(left...)
}
