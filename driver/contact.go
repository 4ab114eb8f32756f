package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/settings"
)

// contact is how to get into a job's guest and run a script there: what prepare
// found out, and what the settings were then, which every sub-stage needs. Only
// a guest that shows this host key is the job's.
type contact struct {
	// Domain is libvirt's name of the machine, where that is not the job's.
	Domain string `json:"domain,omitempty"`
	// Address is the SSH server's, host:port.
	Address string `json:"address"`
	// HostKey is in authorized_keys format.
	HostKey string `json:"host_key"`
	// Relay is the token that the machine's keeper expects; empty when the
	// connection is not kept.
	Relay string `json:"relay,omitempty"`
	// User logs in, with the private key in the file Key or with Own, the private
	// key that was made for this machine alone, and runs scripts with Shell.
	User  string `json:"user"`
	Key   string `json:"key,omitempty"`
	Own   string `json:"own_key,omitempty"`
	Shell string `json:"shell"`
}

// parseContact reads what handOver wrote.
func parseContact(doc []byte) (contact, error) {
	var c contact
	if err := json.Unmarshal(doc, &c); err != nil {
		return contact{}, err
	}
	if c.Address == "" || c.HostKey == "" || c.User == "" || c.Key+c.Own == "" || c.Shell == "" {
		return contact{}, errors.New("not complete: was the machine prepared by another version of the driver?")
	}
	return c, nil
}

// on returns c for a machine that is this domain.
func (c contact) on(domain, machine string) contact {
	if domain != machine {
		c.Domain = domain
	}
	return c
}

// of returns c for a guest of image.
func (c contact) of(image settings.Image) contact {
	c.User, c.Shell = image.User, string(image.Shell)
	if c.Own == "" {
		c.Key = image.Key
	}
	return c
}

// contactFile is kept in the job's temporary folder on the host, which GitLab
// Runner makes for one attempt, lets nobody else read, and removes after
// cleanup. With it, run needs no libvirtd.
const contactFile = "libvirt-driver-guest.json"

func (s *Stage) contactPath() string {
	return filepath.Join(filepath.Dir(s.Environment.JobResponseFile), contactFile)
}

// describe writes down whose machine a domain is, and where to find it.
func (mk *Maker) describe(ctx context.Context, m machine, c contact) error {
	metadata, err := m.metadata()
	if err != nil {
		return err
	}
	metadata.Address, metadata.HostKey = c.Address, c.HostKey
	text, err := metadata.Element()
	if err != nil {
		return err
	}
	return mk.Hypervisor.SetMetadata(ctx, m.domain, domainxml.Namespace, domainxml.NamespacePrefix, text)
}

// handOver leaves the contact for the sub-stages: in the job's temporary folder
// and, for people and other calls, in the domain's metadata. Those everyone on
// the host can read, so the private key is not there.
func (s *Stage) handOver(ctx context.Context, m machine, c contact) error {
	if err := s.describe(ctx, m, c); err != nil {
		return err
	}
	doc, err := json.Marshal(c.on(m.domain, m.name).of(m.image))
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.contactPath(), doc, 0o600); err != nil {
		return fmt.Errorf("hand the guest's address over to the job's sub-stages: %w", err)
	}
	return nil
}

// contact returns what prepare handed over: from the job's temporary folder, or
// else from the domain's metadata and the settings as they are now.
func (s *Stage) contact(ctx context.Context, machine string) (contact, error) {
	doc, err := os.ReadFile(s.contactPath())
	if err == nil {
		c, err := parseContact(doc)
		if err != nil {
			return c, fmt.Errorf("%s: %w", s.contactPath(), err)
		}
		return c, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return contact{}, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, reconnect, fmt.Errorf("not known after %v", reconnect))
	defer cancel()
	domain, err := s.domainOf(machine)
	if err != nil {
		return contact{}, err
	}
	text, found, err := s.Hypervisor.Metadata(ctx, domain, domainxml.Namespace)
	if err != nil {
		return contact{}, err
	}
	if !found {
		return contact{}, fmt.Errorf("the job's machine %s does not exist: was it prepared?", machine)
	}
	metadata, err := domainxml.ParseMetadata(text)
	if err != nil || metadata.Address == "" || metadata.HostKey == "" {
		return contact{}, fmt.Errorf("the job's machine %s was not prepared to its end", machine)
	}
	image, ok := s.Settings.Images[metadata.Image]
	if !ok {
		return contact{}, fmt.Errorf("image %q, which the job's machine %s was made of, is not in the settings any more", metadata.Image, machine)
	}
	if image.HostKey != settings.HostKeyPinned {
		return contact{}, fmt.Errorf("%s is gone, and with it the key to the job's machine %s, which was made for this attempt at the job alone: start the job again",
			s.contactPath(), machine)
	}
	return contact{Address: metadata.Address, HostKey: metadata.HostKey}.on(domain, machine).of(image), nil
}
