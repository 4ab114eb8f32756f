package driver

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"libvirt-driver/driver/settings"
)

const (
	// Overhead is what a guest takes of the host's memory besides its own, in bytes: QEMU
	// and its buffers.
	Overhead = 128 << 20
	// turn is the name of the lock under which machines are let in, one by one.
	turn = "admission"
	// recheck is how often a machine that waits looks again.
	recheck = 500 * time.Millisecond
)

// errNoRoom is why a machine that no job waits for is not made now.
var errNoRoom = errors.New("the host has no room for a machine that stands ready")

// admit waits until the host has room for the machine, and makes room where
// others only stand ready. The caller starts the machine and then calls release,
// so that two never take the same room. A machine that no job waits for is not
// waited for either.
func (mk *Maker) admit(ctx context.Context, m machine) (release func(), err error) {
	limit := mk.Settings.Timeouts.Turn
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no room after %v (timeouts.turn)", limit))
	defer cancel()
	begun := time.Now()
	var full error
	for {
		if m.ahead && mk.crowded() {
			return nil, errNoRoom
		}
		lock, err := mk.lock(ctx, turn, "other machines, which are let in one by one")
		switch {
		case err != nil && full != nil:
			return nil, fmt.Errorf("%w: %w", err, full)
		case err != nil:
			return nil, err
		}
		short, err := mk.room(ctx, m)
		switch {
		case err == nil && short == nil && full != nil:
			mk.Log.Step("turn", time.Since(begun), "the host has room now")
			return lock.release, nil
		case err == nil && short == nil:
			return lock.release, nil
		}
		lock.release()
		if err != nil {
			return nil, err
		}
		if m.ahead {
			return nil, errNoRoom
		}
		if mk.makeRoom(ctx) {
			continue
		}
		if full == nil {
			waiting, err := mk.tryLock(m.name + waitingSuffix)
			if err != nil {
				return nil, err
			}
			defer waiting.release()
			mk.Log.Note("waiting for room on the host: %v", short)
		}
		full = short
		pause(ctx, recheck)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), full)
		}
	}
}

// room returns what the host is short of for the machine to start, or nil. The
// error is for a host that never will have room, or cannot be asked.
func (mk *Maker) room(ctx context.Context, m machine) (short, err error) {
	size := settings.FormatSize
	memory, err := mk.Hypervisor.Memory(ctx)
	if err != nil {
		return nil, err
	}
	needed := m.image.Memory + Overhead
	reserved := mk.Settings.ReserveMemory
	switch {
	case needed+reserved > memory.Total:
		return nil, fmt.Errorf("the machine needs %s of memory and %s are reserved (reserve_memory), but the host has %s in all",
			size(needed), size(reserved), mebibytes(memory.Total))
	case memory.Guests+needed+reserved > memory.Total:
		return fmt.Errorf("guests may take %s of its %s of memory, this one needs %s, and %s are reserved",
			mebibytes(memory.Guests), mebibytes(memory.Total), size(needed), size(reserved)), nil
	case needed+reserved > memory.Available:
		return fmt.Errorf("%s of its memory are available, this guest needs %s, and %s are reserved",
			mebibytes(memory.Available), size(needed), size(reserved)), nil
	}
	space, err := mk.Hypervisor.PoolSpace(ctx, m.image.Pool)
	if err != nil {
		return nil, withRemedy(err, m.image.Pool, m.image.Volume)
	}
	if space < mk.Settings.ReserveDisk {
		return fmt.Errorf("pool %s has %s left, and %s are reserved (reserve_disk)",
			m.image.Pool, mebibytes(space), size(mk.Settings.ReserveDisk)), nil
	}
	return nil, nil
}

// waitingSuffix is what the name of the lock has more than the machine's that
// waits for room.
const waitingSuffix = ".turn"

// crowded reports whether machines wait for room.
func (h *Host) crowded() bool {
	locks, _ := filepath.Glob(h.lockPath("*" + waitingSuffix))
	return slices.ContainsFunc(locks, func(path string) bool {
		lock, err := h.tryLock(strings.TrimSuffix(filepath.Base(path), lockSuffix))
		if err == nil {
			lock.release() // of one that was killed
		}
		return errors.Is(err, errLocked)
	})
}

// makeRoom removes the oldest machine that stands ready, and reports whether
// there was one.
func (h *Host) makeRoom(ctx context.Context) bool {
	for _, ready := range h.standings() {
		if h.takeBack(ready.Domain) {
			h.Log.Note("removing %s, which stood ready, to make room", ready.Domain)
			if err := h.discard(ctx, ready.Domain); err != nil {
				h.Log.Note("%v", err)
			}
			return true
		}
	}
	return false
}

// mebibytes writes a size that is no round number.
func mebibytes(size uint64) string {
	return fmt.Sprintf("%d MiB", size>>20)
}
