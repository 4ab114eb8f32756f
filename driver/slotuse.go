package driver

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/hypervisor"
)

// hold locks a slot that nobody makes, uses or removes. It reports false for
// one that somebody does.
func (h *Host) hold(ctx context.Context, name string) (lock *held, free bool, err error) {
	lock, err = h.tryLock(name)
	if errors.Is(err, errLocked) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	free, err = h.unused(ctx, name)
	if err != nil || !free {
		lock.release()
		return nil, false, err
	}
	return lock, true, nil
}

// unused reports whether no machine starts, or has started, from a slot that the
// caller has locked. The record of a machine that never came to start from it is
// removed.
func (h *Host) unused(ctx context.Context, name string) (bool, error) {
	state, err := h.Hypervisor.State(ctx, name)
	if err != nil {
		return false, err
	}
	if state.Kind != hypervisor.Gone {
		// Somebody's machine, or what is left of one that made the slot.
		text, _, err := h.Hypervisor.Metadata(ctx, name, domainxml.Namespace)
		if err != nil {
			return false, err
		}
		metadata, err := domainxml.ParseMetadata(text)
		return err == nil && metadata.Start == startMemory && metadata.Machine == "", nil
	}
	machines, _ := h.machinesOf(name) // whoever works on one that cannot be read will say so
	for _, machine := range machines {
		lock, err := h.tryLock(machine)
		if errors.Is(err, errLocked) {
			return false, nil // it is being removed
		}
		if err != nil {
			return false, err
		}
		err = h.unbind(machine)
		lock.release()
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// ending is how long a slot is waited for whose machine is being removed: less
// than to make another would take.
const ending = 10 * time.Second

// findSlot returns a slot, locked, from which a machine of that fingerprint can
// start; nil when none is free and none is about to be.
func (h *Host) findSlot(ctx context.Context, print string) (*slot, *held, error) {
	begun := time.Now()
	for try := 0; ; try++ {
		slots, err := h.slots()
		if err != nil {
			return nil, nil, err
		}
		soon := false
		for _, each := range slots {
			if each.Print != print {
				continue
			}
			ending := h.isEnding(each.Name) // first: it may have come to its end when it is not free
			lock, free, err := h.hold(ctx, each.Name)
			if err != nil {
				return nil, nil, err
			}
			if !free {
				soon = soon || ending
				continue
			}
			if _, err := os.Stat(h.slotPath(each.Name)); err == nil { // not removed meanwhile
				return &each, lock, nil
			}
			lock.release()
		}
		if !soon || time.Since(begun) > ending || ctx.Err() != nil {
			return nil, nil, nil
		}
		pause(ctx, backoff(try))
	}
}

// isEnding reports whether the machine that started from a slot is being removed.
func (h *Host) isEnding(name string) bool {
	machines, _ := h.machinesOf(name)
	return slices.ContainsFunc(machines, h.isOver)
}

// removeSlot removes a slot that the caller has locked, or what there is of it.
// The record goes first: what has none is removed by whoever comes across it.
func (h *Host) removeSlot(ctx context.Context, name string) error {
	var known slot
	slots, err := h.slots()
	if err != nil {
		return err
	}
	for _, each := range slots {
		if each.Name == name {
			known = each
		}
	}
	if err := errors.Join(gone(os.Remove(h.slotPath(name))), gone(os.Remove(h.slotPath(name)+half))); err != nil {
		return err
	}
	if err := h.Hypervisor.DestroyDomain(ctx, name); err != nil {
		return err
	}
	var left leftover
	networks := with(h.Settings.Networks(), known.Network)
	defer h.releaseLeases(ctx, networks, macAddress(name))()
	for _, network := range networks {
		left.add(h.Hypervisor.Unreserve(ctx, network, macAddress(name)), "its address on network %s", network)
	}
	h.tearDown(ctx, name, known.Pool, slotVolumes(name), &left)
	return left.report(nil)
}
