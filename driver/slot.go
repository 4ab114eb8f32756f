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
