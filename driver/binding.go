package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A domain that was made before its job was known has a name of its own, as
// libvirt renames none that runs. It becomes the job's machine by a record in
// the folder for locks, which every later stage, and gc, goes by. What belongs
// to the domain is named after the domain: its keeper, its console's log, its
// MAC address. What belongs to stages is named after the machine: locks, and
// the record.

// The ways in which a domain can be made before its job, as they are in its
// name and its metadata.
const (
	startStandby = "standby"
	startMemory  = "memory"
)

// ownPrefix is what the name of such a domain begins with: see [newOwnName].
const ownPrefix = "libvirt-driver-"

// startOf returns the way in which a domain was made before its job, or nothing
// where its name is not like those of [newOwnName].
func startOf(domain string) string {
	name, ours := strings.CutPrefix(domain, ownPrefix)
	way, random, _ := strings.Cut(name, "-")
	if ours && (way == startStandby || way == startMemory) && len(random) == 12 && strings.Trim(random, "0123456789abcdef") == "" {
		return way
	}
	return ""
}

// binding is the record of a machine whose domain has a name of its own.
type binding struct {
	Domain string `json:"domain"`
}

const bindingSuffix = ".machine"

// bindingPath returns the file of a machine's record.
func (h *Host) bindingPath(machine string) string {
	return filepath.Join(h.LockDir, machine+bindingSuffix)
}

// bind records that a domain is a machine's. It is in force even if this
// process ends at once.
func (h *Host) bind(machine, domain string) error {
	if err := writeRecord(h.bindingPath(machine), binding{domain}); err != nil {
		return fmt.Errorf("record that %s is the job's machine: %w", domain, err)
	}
	return nil
}

// unbind removes a machine's record, if there is one.
func (h *Host) unbind(machine string) error {
	return gone(os.Remove(h.bindingPath(machine)))
}

// half is what the name of a record has more while it is written.
const half = ".new"

// writeRecord writes a record for this user alone. What is there under its name
// is whole, also if this process ends at once, or the disk is full.
func writeRecord(path string, record any) error {
	doc, err := json.Marshal(record)
	if err == nil {
		err = os.WriteFile(path+half, doc, 0o600)
	}
	if err == nil {
		err = os.Rename(path+half, path)
	}
	if err != nil {
		os.Remove(path + half)
	}
	return err
}

// domainOf returns libvirt's name of a machine.
func (h *Host) domainOf(machine string) (string, error) {
	path := h.bindingPath(machine)
	doc, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return machine, nil
	}
	var b binding
	if err == nil {
		err = json.Unmarshal(doc, &b)
	}
	switch {
	case err != nil:
		return "", fmt.Errorf("read which domain the machine %s is: %s: %w", machine, path, err)
	case startOf(b.Domain) == "":
		return "", fmt.Errorf("read which domain the machine %s is: %s: not a name that the driver gives: %q", machine, path, b.Domain)
	}
	return b.Domain, nil
}

// machinesOf returns the machines whose record says that they are a domain. The
// error tells of records that cannot be read, and may say so, too.
func (h *Host) machinesOf(domain string) (machines []string, err error) {
	records, err := filepath.Glob(h.bindingPath("*"))
	failures := []error{err}
	for _, record := range records {
		machine := strings.TrimSuffix(filepath.Base(record), bindingSuffix)
		bound, err := h.domainOf(machine)
		if bound == domain {
			machines = append(machines, machine)
		}
		failures = append(failures, err)
	}
	return machines, errors.Join(failures...)
}

// isBound reports whether a domain that was made before its job is a job's by
// now. A machine that stood ready a moment ago still does, is being removed, or
// is a job's.
func (h *Host) isBound(domain string) bool {
	machines, err := h.machinesOf(domain)
	return err != nil || len(machines) > 0 // who cannot be read may be anyone's
}
