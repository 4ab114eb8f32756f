package driver

import (
	"context"
	"errors"
	"fmt"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// What a slot's state is in a list.
const (
	slotSaved    = "saved"
	slotInUse    = "in use"
	slotHalfMade = "not made yet"
)

// listSlots returns the slots, and what there is of ones that are not made to
// their end. machines are the host's other machines.
func (h *Host) listSlots(ctx context.Context, machines []Machine) ([]Machine, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, looking, fmt.Errorf("not answered within %v", looking))
	defer cancel()
	slots, err := h.slots()
	if err != nil {
		return nil, err
	}
	known := map[string]*Machine{}
	used := map[string]bool{}
	for _, machine := range machines {
		if machine.isSlot() {
			machine.State, machine.Disk = slotHalfMade, 0
			known[machine.Name] = &machine
		} else {
			used[machine.Domain] = true
		}
	}
	pools := h.Settings.Pools()
	for _, each := range slots {
		state := slotSaved
		if used[each.Name] {
			state = slotInUse
		}
		known[each.Name] = &Machine{Name: each.Name, Domain: each.Name, Start: startMemory, Image: each.Image,
			Created: each.Made, State: state, Address: each.Address, Pool: each.Pool, Volume: stateVolume(each.Name)}
		pools = with(pools, each.Pool)
	}
	for _, pool := range pools {
		volumes, err := h.Hypervisor.Volumes(ctx, pool)
		if errors.Is(err, hypervisor.ErrInactive) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, volume := range volumes {
			name := slotOf(volume.Name)
			if name == "" {
				continue
			}
			if known[name] == nil {
				known[name] = &Machine{Name: name, Domain: name, Start: startMemory, Created: volume.Modified, State: slotHalfMade,
					Pool: pool, Volume: volume.Name}
			}
			known[name].Disk += volume.Allocation
		}
	}
	var list []Machine
	for _, machine := range known {
		list = append(list, *machine)
	}
	return list, nil
}

// collectSlots removes the free slots that no image is like any more, and what
// is left of ones that were not made to their end. With dryRun it only says
// which.
func (h *Host) collectSlots(ctx context.Context, dryRun bool) ([]Collection, error) {
	machines, err := h.list(ctx, func(string) {})
	if err != nil {
		return nil, err
	}
	slots, err := h.listSlots(ctx, machines)
	if err != nil {
		return nil, err
	}
	wanted, unknown := map[string]bool{}, map[string]bool{}
	for _, image := range h.Settings.Images {
		if image.Start != settings.StartMemory {
			continue
		}
		print, err := h.slotPrint(ctx, machine{image: image})
		switch {
		case errors.Is(err, hypervisor.ErrNotFound): // the base volume is gone
		case err != nil:
			unknown[image.Name] = true
		default:
			wanted[print] = true
		}
	}
	if err := h.dropRefusals(wanted, dryRun || len(unknown) > 0); err != nil {
		return nil, err
	}
	var done []Collection
	var failures []error
	for _, each := range slots {
		if unknown[each.Image] {
			continue
		}
		c, err := h.collectSlot(ctx, each, wanted, dryRun)
		if err != nil {
			c.Err = err.Error()
			failures = append(failures, fmt.Errorf("saved guest %s: %w", each.Name, err))
		}
		if c.Why != "" {
			done = append(done, c)
		}
	}
	return done, errors.Join(failures...)
}

func (h *Host) collectSlot(ctx context.Context, machine Machine, wanted map[string]bool, dryRun bool) (Collection, error) {
	c := Collection{Machine: machine}
	why, err := h.superfluous(machine.Name, wanted)
	if err != nil || why == "" {
		return c, err
	}
	lock, free, err := h.hold(ctx, machine.Name)
	if err != nil || !free {
		return c, err
	}
	defer lock.release()
	// It may have been made to its end, or removed, before the lock was taken.
	if c.Why, err = h.superfluous(machine.Name, wanted); err != nil || c.Why == "" || dryRun {
		return c, err
	}
	if err := h.removeSlot(ctx, machine.Name); err != nil {
		return c, err
	}
	c.Removed = true
	return c, nil
}

// superfluous returns why a slot is of no use, or nothing.
func (h *Host) superfluous(name string, wanted map[string]bool) (string, error) {
	slots, err := h.slots()
	for _, each := range slots {
		switch {
		case each.Name != name:
		case wanted[each.Print]:
			return "", err
		default:
			return "a saved guest that no image is like any more", err
		}
	}
	return "a saved guest that was not made to its end", err
}
