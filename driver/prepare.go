package driver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"libvirt-driver/driver/settings"
)

// Prepare gets the job a machine and returns when a script can run in it.
func (s *Stage) Prepare(ctx context.Context) error {
	m, err := s.plan()
	if err != nil {
		return err
	}
	done, err := s.atWork(m.name)
	if err != nil {
		return err
	}
	defer done()
	s.introduce(m)

	contact, settle, err := s.obtain(ctx, &m)
	ready := false
	defer func() { settle(ready) }()
	if err != nil {
		return err
	}
	asking, cancel := context.WithTimeoutCause(ctx, creation, errSlow)
	defer cancel()
	if err := s.handOver(asking, m, contact); err != nil {
		return err
	}
	// The runner goes on with the job after a prepare that succeeds, whatever it
	// told it.
	if err := stopped(ctx); err != nil {
		return err
	}
	ready = true
	s.Log.Title("The machine is ready after %.1f s.", time.Since(m.made).Seconds())
	return nil
}

// obtain gets the job's machine: one that stands ready, one that starts from
// memory, or else one that boots. m becomes that machine. settle says whether it is to be the job's or not, and
// is to be called in any case.
func (s *Stage) obtain(ctx context.Context, m *machine) (_ contact, settle func(bool), err error) {
	lock, err := s.lock(ctx, m.name, "another stage that works on "+m.name)
	if err != nil {
		return contact{}, func(bool) {}, err
	}
	release := sync.OnceFunc(lock.release)
	defer release()
	if err := s.removeLeftovers(ctx, *m); err != nil {
		return contact{}, func(bool) {}, err
	}
	if contact, claimed := s.claim(ctx, m); claimed {
		return contact, func(bool) {}, nil
	}
	if m.image.Start == settings.StartMemory {
		contact, settle, err := s.fromMemory(ctx, m)
		var no *unfitError
		if !errors.As(err, &no) || ctx.Err() != nil {
			return contact, settle, err
		}
		s.Log.Note("the machine is booted, and not started from memory: %v", err)
	}
	return s.boot(ctx, m, release)
}

// introduce tells the job's owner what the machine will be, and what it will
// not be.
func (s *Stage) introduce(m machine) {
	disk := ""
	if m.image.Disk != 0 {
		disk = ", " + settings.FormatSize(m.image.Disk) + " disk"
	}
	s.Log.Title("Machine %s: image %s, %d vCPUs, %s memory%s",
		m.name, m.image.Name, m.image.VCPUs, settings.FormatSize(m.image.Memory), disk)
	if s.Settings.BuiltIn && m.job.Image != "" {
		s.Log.Note("this host has one image, %s, and every job gets it: the job's image: is not looked at", m.image.Volume)
	}
	if len(m.job.Services) > 0 {
		s.Log.Note("services: are not started in a virtual machine (%d asked for): start what the job needs in its script",
			len(m.job.Services))
	}
}

// removeLeftovers removes what an earlier attempt at this job left, if any.
func (s *Stage) removeLeftovers(ctx context.Context, m machine) error {
	found, err := s.removeWithin(ctx, m.name, m.job)
	if err != nil {
		return fmt.Errorf("make room for the machine: %w", err)
	}
	if found {
		s.Log.Note("removed what an earlier attempt at this job left")
	}
	return s.unbind(m.name)
}
