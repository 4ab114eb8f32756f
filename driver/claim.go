package driver

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"libvirt-driver/driver/hypervisor"
)

// standing is the record of a machine that stands ready, in a file of its own in
// the folder for locks. Who renames the file to a job's record of its domain
// has the machine, and nobody else: that is how a job claims one. Who removes
// the file has it, too, and is to remove the machine.
type standing struct {
	binding
	// Fits says what it was made as; see [Host.fingerprint].
	Fits string `json:"fits"`
	// Contact is how to get into it.
	Contact contact   `json:"contact"`
	Created time.Time `json:"created"`
}

const readySuffix = ".ready"

func (h *Host) readyPath(domain string) string { return filepath.Join(h.LockDir, domain+readySuffix) }

// standings returns the machines that stand ready, the oldest first.
func (h *Host) standings() []standing {
	files, _ := filepath.Glob(h.readyPath("*"))
	var all []standing
	for _, file := range files {
		doc, err := os.ReadFile(file)
		var s standing
		if err != nil || json.Unmarshal(doc, &s) != nil || file != h.readyPath(s.Domain) || startOf(s.Domain) == "" {
			continue // claimed meanwhile, or not written by this version
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b standing) int { return a.Created.Compare(b.Created) })
	return all
}

// claim takes a machine that stands ready for the job and fits it, and reports
// whether there was one. m becomes that machine.
func (s *Stage) claim(ctx context.Context, m *machine) (contact, bool) {
	begun := time.Now()
	all := s.standings()
	if len(all) == 0 {
		return contact{}, false
	}
	fits, err := s.fingerprint(ctx, *m)
	if err != nil {
		return contact{}, false // whoever makes a machine will say so
	}
	for _, ready := range all {
		if ready.Fits != fits || os.Rename(s.readyPath(ready.Domain), s.bindingPath(m.name)) != nil {
			continue
		}
		if err := s.answers(ctx, ready); err != nil {
			if ctx.Err() != nil {
				return contact{}, false // the machine is the job's, and its cleanup's to remove
			}
			s.Log.Note("threw a machine away that stood ready: %v", err)
			if _, err := s.removeWithin(ctx, m.name, m.job); err != nil {
				s.Log.Note("%v", err)
			}
			if err := s.unbind(m.name); err != nil {
				s.Log.Note("%v", err)
			}
			continue
		}
		m.domain, m.volume, m.mac = ready.Domain, volumeName(ready.Domain), macAddress(ready.Domain)
		s.Log.Step("machine", time.Since(begun), "stood ready for %s, %s@%s",
			time.Since(ready.Created).Round(time.Second), ready.Contact.User, ready.Contact.Address)
		return ready.Contact, true
	}
	return contact{}, false
}

// answering is how long a machine that stands ready may take to answer.
const answering = 5 * time.Second

// answers checks that a machine that was ready still is.
func (s *Stage) answers(ctx context.Context, ready standing) error {
	ctx, cancel := context.WithTimeout(ctx, answering)
	defer cancel()
	asking, asked := context.WithTimeout(ctx, answering/2)
	defer asked()
	// A libvirtd that is away says nothing against the guest, which is asked next.
	state, err := s.Hypervisor.State(asking, ready.Domain)
	if err == nil && state.Kind != hypervisor.Running {
		return &guestLost{ready.Domain, state}
	}
	shell, err := s.enter(ctx, ready.Domain, ready.Contact)
	if err != nil {
		return err
	}
	defer shell.Close()
	return shell.Alive(ctx)
}

// fingerprint stands for everything that a machine is made of: the image's
// settings at the machine's size, and the base volume as it is now. Machines with
// equal fingerprints can stand in for each other.
func (h *Host) fingerprint(ctx context.Context, m machine) (string, error) {
	base, err := h.Hypervisor.Volume(ctx, m.image.Pool, m.image.Volume)
	if err != nil {
		return "", err
	}
	image := m.image
	// These say what a job may have, and not what it gets.
	image.Standby, image.MaxVCPUs, image.MaxMemory, image.MaxDisk = 0, 0, 0, 0
	doc, err := json.Marshal([]any{image, h.Settings.VirtType, base.Path, base.Capacity, base.Modified})
	return fmt.Sprintf("%x", sha256.Sum256(doc)), err
}

// isReady reports whether a domain stands ready.
func (h *Host) isReady(domain string) bool {
	_, err := os.Lstat(h.readyPath(domain))
	return err == nil
}

// takeBack takes a machine that stands ready out of everyone's reach, and
// reports whether nobody was faster.
func (h *Host) takeBack(domain string) bool { return os.Remove(h.readyPath(domain)) == nil }
