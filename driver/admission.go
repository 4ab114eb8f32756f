package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
// others only stand ready. The machine counts from then on, so that two never take
// the same room; the caller starts it, and then calls release, when it counts
// because it runs. Others are let in meanwhile. A machine that no job waits for is
// not waited for either.
func (mk *Maker) admit(ctx context.Context, m machine) (release func(), err error) {
	limit := mk.Settings.Timeouts.Turn
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no room after %v (timeouts.turn)", limit))
	defer cancel()
	begun := time.Now()
	var full error // what the host was short of, at the last look
	fail := func(err error) (func(), error) {
		if full != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", err, full)
		}
		return nil, err
	}
	for {
		if m.ahead && mk.crowded() {
			return nil, errNoRoom
		}
		lock, err := mk.lock(ctx, turn, "other machines, which are let in one by one")
		if err != nil {
			return fail(err)
		}
		short, err := mk.room(ctx, m)
		if err == nil && short == nil {
			release, err = mk.arrive(ctx, m)
		}
		lock.release()
		switch {
		case err != nil:
			return fail(err)
		case short == nil && full != nil:
			mk.Log.Step("turn", time.Since(begun), "the host has room now")
			return release, nil
		case short == nil:
			return release, nil
		}
		if m.ahead {
			return nil, errNoRoom
		}
		if mk.makeRoom(ctx) {
			continue
		}
		if full == nil {
			waiting, err := mk.lock(ctx, m.name+waitingSuffix, "who looks whether machines wait")
			if err != nil {
				return nil, err
			}
			defer waiting.release()
			mk.Log.Note("waiting for room on the host: %v", short)
		}
		full = short
		pause(ctx, recheck)
		if ctx.Err() != nil {
			return fail(context.Cause(ctx))
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
	arriving, guests := mk.arriving(memory.Guests), uint64(0)
	for _, most := range memory.Guests {
		guests += most
	}
	guests += arriving
	memory.Available -= min(memory.Available, arriving)
	switch {
	case needed+reserved > memory.Total:
		return nil, fmt.Errorf("the machine needs %s of memory and %s are reserved (reserve_memory), but the host has %s in all",
			size(needed), size(reserved), mebibytes(memory.Total))
	case guests+needed+reserved > memory.Total:
		return fmt.Errorf("guests may take %s of its %s of memory, this one needs %s, and %s are reserved",
			mebibytes(guests), mebibytes(memory.Total), size(needed), size(reserved)), nil
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

// What the name of a lock has more than the machine's that waits for room, and
// that has been let in and does not run yet.
const (
	waitingSuffix = ".turn"
	arrivalSuffix = ".arrival"
)

// arrive has the machine count as one that will run until release is called, or
// this process ends. The caller is the one whose turn it is.
func (mk *Maker) arrive(ctx context.Context, m machine) (release func(), err error) {
	lock, err := mk.lock(ctx, m.name+arrivalSuffix, "who looks which machines arrive")
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintln(lock.file, m.domain, m.image.Memory); err != nil {
		lock.release()
		return nil, fmt.Errorf("record the machine's size: %w", err)
	}
	return lock.release, nil
}

// arriving returns how much memory machines will take that have been let in and
// are not among those that run. The caller is the one whose turn it is.
func (h *Host) arriving(running map[string]uint64) (memory uint64) {
	for _, machine := range h.lockedWith(arrivalSuffix) {
		text, err := os.ReadFile(h.lockPath(machine + arrivalSuffix))
		if err != nil {
			continue // it has arrived
		}
		var domain string
		var size uint64
		fmt.Sscan(string(text), &domain, &size)
		if _, runs := running[domain]; !runs {
			memory += size
		}
	}
	return memory
}

// crowded reports whether machines wait for room.
func (h *Host) crowded() bool { return len(h.lockedWith(waitingSuffix)) > 0 }

// lockedWith returns the names of which, with a suffix, someone holds the lock.
func (h *Host) lockedWith(suffix string) (names []string) {
	paths, _ := filepath.Glob(h.lockPath("*" + suffix))
	for _, path := range paths {
		name := strings.TrimSuffix(filepath.Base(path), lockSuffix)
		lock, err := h.tryLock(name)
		switch {
		case err == nil:
			lock.release() // of one that was killed
		case errors.Is(err, errLocked):
			names = append(names, strings.TrimSuffix(name, suffix))
		}
	}
	return names
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
