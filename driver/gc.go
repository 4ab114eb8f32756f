package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"libvirt-driver/driver/hypervisor"
)

// quiet is for how long no stage of a machine must have been at work before its
// runner being gone counts. Between two stages of a living job pass
// milliseconds; the rest is for a caller that is no runner but a wrapper, gone
// after each stage.
const quiet = 5 * time.Minute

// Collection is what gc made of one machine that it found.
type Collection struct {
	Machine Machine `json:"machine"`
	// Why says why the machine's job is over.
	Why string `json:"why"`
	// Removed is false after a dry run and when Err is set.
	Removed bool   `json:"removed"`
	Err     string `json:"error,omitempty"`
}

// Collect removes the machines whose jobs are over: those older than maxAge,
// and those whose runner is proven to be gone and of which no stage has been at
// work for a while; and those that were made before their job and are of no
// use. With dryRun it only says which. A machine that someone works on at this
// moment is left alone. The error tells that some could not be looked at or
// removed.
func (h *Host) Collect(ctx context.Context, maxAge time.Duration, dryRun bool) ([]Collection, error) {
	done, failed := h.collectSlots(ctx, dryRun)
	machines, err := h.list(ctx, h.noteInactive)
	if err != nil {
		return done, errors.Join(failed, err)
	}
	failures := []error{failed}
	for _, machine := range machines {
		if machine.isSlot() {
			continue
		}
		c, err := h.collect(ctx, machine, maxAge, dryRun)
		if err != nil {
			failures = append(failures, fmt.Errorf("machine %s: %w", machine.Name, err))
			c.Err = err.Error()
		}
		if c.Why != "" {
			done = append(done, c)
		}
	}
	if !dryRun {
		failures = append(failures, h.tidy(machines))
	}
	return done, errors.Join(failures...)
}

// tidy removes what stages that were killed have left in the folder for locks:
// locks that nobody holds, and the records of machines of which there is nothing
// else and of which no stage has been at work for a while.
func (h *Host) tidy(machines []Machine) error {
	locks, _ := filepath.Glob(h.lockPath("*"))
	for _, path := range locks {
		if lock, err := h.tryLock(strings.TrimSuffix(filepath.Base(path), lockSuffix)); err == nil {
			lock.release() // which removes it
		}
	}
	var failures []error
	for _, pattern := range []string{h.activity("*"), h.bindingPath("*")} {
		records, _ := filepath.Glob(pattern)
		for _, path := range records {
			name := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
			info, err := os.Lstat(path)
			if err != nil || slices.ContainsFunc(machines, func(m Machine) bool { return m.Name == name }) {
				continue
			}
			if since, idle, err := h.idle(name, info.ModTime()); err == nil && idle && time.Since(since) > quiet {
				failures = append(failures, h.forget(name))
			}
		}
	}
	return errors.Join(failures...)
}

func (h *Host) collect(ctx context.Context, machine Machine, maxAge time.Duration, dryRun bool) (Collection, error) {
	c := Collection{Machine: machine}
	lock, err := h.tryLock(machine.Name)
	if errors.Is(err, errLocked) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	defer lock.release()
	// What was listed before the lock was taken may be another attempt's by now.
	machine, found, err := h.find(ctx, machine.Name)
	if err != nil || !found {
		return c, err
	}
	c.Machine = machine
	if c.Why, err = h.over(machine, maxAge); err != nil || c.Why == "" || dryRun {
		return c, err
	}
	if machine.Job == 0 && h.isReady(machine.Domain) && !h.takeBack(machine.Domain) {
		return Collection{Machine: machine}, nil // a job has just taken it
	}
	job, _ := parseMachine(machine.Name)
	if _, err := h.removeWithin(ctx, machine.Name, job); err != nil {
		return c, err
	}
	c.Removed = true
	return c, h.forget(machine.Name)
}

// find looks one machine up.
func (h *Host) find(ctx context.Context, name string) (Machine, bool, error) {
	machines, err := h.list(ctx, func(string) {})
	for _, machine := range machines {
		if machine.Name == name {
			return machine, true, nil
		}
	}
	return Machine{}, false, err
}

// astray returns why a machine that was made before its job is of no use, or
// nothing. The caller holds the lock on it, so nobody is making it.
func (h *Host) astray(machine Machine) string {
	switch ready := h.isReady(machine.Domain); {
	case ready && machine.State != string(hypervisor.Running):
		return "stood ready, and is " + machine.State
	case ready || h.isBound(machine.Domain):
		return ""
	}
	return "made before its job, and not finished"
}

// over returns why a machine's job is over, or nothing.
func (h *Host) over(machine Machine, maxAge time.Duration) (string, error) {
	if machine.Job == 0 {
		return h.astray(machine), nil
	}
	since, idle, err := h.idle(machine.Name, machine.Created)
	if err != nil {
		return "", err
	}
	age := time.Since(machine.Created).Round(time.Second)
	switch {
	case age > maxAge:
		return fmt.Sprintf("older than %v", maxAge), nil
	case h.isOver(machine.Name):
		return "its cleanup was not finished", nil
	case !idle || time.Since(since) < quiet:
		return "", nil
	case machine.State == noDomain:
		return "a volume without a domain", nil
	}
	runner, err := parseOwner(machine.owner)
	if err != nil {
		return "", err
	}
	gone, err := runner.gone()
	if gone {
		return fmt.Sprintf("its runner (process %d) is gone", runner.PID), err
	}
	return "", err
}
