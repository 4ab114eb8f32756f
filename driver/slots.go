package driver

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// A slot is a guest that has been saved when its shell was up, from which jobs'
// machines start, one at a time: libvirt restores it under one name, UUID and
// MAC address alone. It has a record in the folder for locks, which is written
// when all of it is there, and three volumes in its image's pool. Whoever makes,
// uses or removes it holds the lock of its name until the domain of that name is
// there; while that is there, the slot is in use.
type slot struct {
	// Name is also the domain's.
	Name    string    `json:"name"`
	Image   string    `json:"image"`
	Pool    string    `json:"pool"`
	Network string    `json:"network"`
	Made    time.Time `json:"made"`
	// Print is the fingerprint of all that the guest was made of.
	Print string `json:"fingerprint"`
	// Address is the guest's SSH server, and HostKey the key that it showed before
	// the save. Reserved tells that the network keeps the address.
	Address  string `json:"address"`
	HostKey  string `json:"host_key"`
	Reserved bool   `json:"reserved"`
	// Key is the public key that was made to get into it before it was saved, if any.
	Key string `json:"key,omitempty"`
	// Frozen and State are the paths of the disk and the memory as they were when
	// the guest was saved, and Identity that of the volume by which it got its keys,
	// if it did. Base is what the disk is on, and Capacity is in bytes.
	Frozen   string `json:"frozen"`
	State    string `json:"state"`
	Identity string `json:"identity,omitempty"`
	Base     string `json:"base"`
	Capacity uint64 `json:"capacity"`
}

// frozen is what the names of a slot's volumes begin with after its own, so that
// they are not taken for those of the machine that starts from it.
const frozen = "-frozen"

// slotVolumes returns the names of a slot's volumes.
func slotVolumes(name string) []string {
	return []string{stateVolume(name), volumeName(name + frozen), identityVolume(name + frozen)}
}

// stateVolume returns the name of the volume with a slot's memory.
func stateVolume(name string) string { return name + stateSuffix }

const stateSuffix = frozen + ".state"

// slotOf returns the slot that a volume is of, or nothing.
func slotOf(volume string) string {
	name, _, found := strings.Cut(volume, frozen)
	if !found || startOf(name) != startMemory {
		return ""
	}
	return name
}

// uuid returns a UUID that follows from a slot's name and what it is for.
func uuid(name, what string) string {
	sum := sha256.Sum256([]byte(what + " of " + name))
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // version 8, see RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

// frozenAs returns what a slot's domain is described with, saved and restored.
func frozenAs(name string) *domainxml.Frozen {
	return &domainxml.Frozen{UUID: uuid(name, "domain"), Generation: uuid(name, "generation")}
}

func (h *Host) slotPath(name string) string { return filepath.Join(h.LockDir, name+".slot") }

// record makes a slot known.
func (h *Host) record(s slot) error {
	if err := writeRecord(h.slotPath(s.Name), s); err != nil {
		return fmt.Errorf("record the saved guest: %w", err)
	}
	return nil
}

// slots returns the slots that are on record. A record that makes no sense is of
// a slot of which only the name is known.
func (h *Host) slots() ([]slot, error) {
	paths, err := filepath.Glob(filepath.Join(h.LockDir, "*.slot"))
	if err != nil {
		return nil, err
	}
	var found []slot
	for _, path := range paths {
		name := strings.TrimSuffix(filepath.Base(path), ".slot")
		if startOf(name) != startMemory {
			continue
		}
		doc, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		var s slot
		if json.Unmarshal(doc, &s) != nil || s.Name != name {
			s = slot{Name: name}
		}
		found = append(found, s)
	}
	return found, nil
}

// slotPrint stands for all that a guest which is saved is made of, and all that
// restores it. A slot whose fingerprint is another is outdated.
func (h *Host) slotPrint(ctx context.Context, m machine) (string, error) {
	guest, err := h.fingerprint(ctx, m)
	if err != nil {
		return "", err
	}
	host, err := h.Hypervisor.Capabilities(ctx, string(h.Settings.VirtType), m.image.Machine)
	if err != nil {
		return "", err
	}
	versions, err := h.Hypervisor.Versions(ctx)
	if err != nil {
		return "", err
	}
	parts := []any{guest, host, versions, h.Version, h.Settings.LogDir, doorScript, identityScript}
	for _, path := range []string{m.image.Kernel, m.image.Initrd} {
		if info, err := os.Stat(path); err == nil {
			parts = append(parts, info.Size(), info.ModTime())
		}
	}
	doc, err := json.Marshal(parts)
	return fmt.Sprintf("%x", sha256.Sum256(doc)), err
}

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
	bindings, err := filepath.Glob(h.bindingPath("*"))
	if err != nil {
		return false, err
	}
	for _, path := range bindings {
		machine := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
		if domain, err := h.domainOf(machine); err != nil || domain != name {
			continue // whoever works on that machine will say what is wrong
		}
		lock, err := h.tryLock(machine)
		if errors.Is(err, errLocked) {
			return false, nil // it is being removed
		}
		if err != nil {
			return false, err
		}
		err = gone(os.Remove(path))
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
			lock, free, err := h.hold(ctx, each.Name)
			if err != nil {
				return nil, nil, err
			}
			if !free {
				soon = soon || h.isEnding(ctx, each.Name)
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
func (h *Host) isEnding(ctx context.Context, name string) bool {
	text, _, err := h.Hypervisor.Metadata(ctx, name, domainxml.Namespace)
	if err != nil {
		return false
	}
	metadata, _ := domainxml.ParseMetadata(text)
	return metadata.Machine != "" && h.isOver(metadata.Machine)
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
	left := []error{h.endKeeper(ctx, name)}
	networks := with(h.Settings.Networks(), known.Network)
	released := h.releaseLeases(ctx, networks, macAddress(name))
	defer released()
	for _, network := range networks {
		left = append(left, h.Hypervisor.Unreserve(ctx, network, macAddress(name)))
	}
	for _, pool := range with(h.Settings.Pools(), known.Pool) {
		for _, volume := range slotVolumes(name) {
			if _, err := h.Hypervisor.DeleteVolume(ctx, pool, volume); err != nil && !errors.Is(err, hypervisor.ErrInactive) {
				left = append(left, err)
			}
		}
	}
	return errors.Join(append(left, h.Hypervisor.UndefineDomain(ctx, name), h.removeLogs(name))...)
}

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

// A refusal is the record that guests of a fingerprint cannot start from memory,
// so that not every job makes a slot in vain. It counts for a while.
const refusalCounts = time.Hour

func (h *Host) refusalPath(print string) string { return filepath.Join(h.LockDir, print+".refusal") }

// refuse records why guests of a fingerprint cannot start from memory.
func (h *Host) refuse(print string, why error) error {
	return os.WriteFile(h.refusalPath(print), []byte(why.Error()), 0o600)
}

// refused returns why guests of a fingerprint cannot start from memory, if that
// is on record.
func (h *Host) refused(print string) string {
	info, err := os.Stat(h.refusalPath(print))
	if err != nil || time.Since(info.ModTime()) > refusalCounts {
		return ""
	}
	why, err := os.ReadFile(h.refusalPath(print))
	if err != nil {
		return ""
	}
	return string(why)
}

// dropRefusals removes those that no image is like any more, unless told to keep
// them.
func (h *Host) dropRefusals(wanted map[string]bool, keep bool) error {
	paths, err := filepath.Glob(h.refusalPath("*"))
	if err != nil || keep {
		return err
	}
	for _, path := range paths {
		print := strings.TrimSuffix(filepath.Base(path), ".refusal")
		if wanted[print] && h.refused(print) != "" {
			continue
		}
		if err := gone(os.Remove(path)); err != nil {
			return err
		}
	}
	return nil
}
