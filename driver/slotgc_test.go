package driver

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/hypervisor"
)

// saved puts a slot on the host, made as print says.
func (s *stage) saved(t *testing.T, name, print string) {
	t.Helper()
	for _, volume := range slotVolumes(name)[:2] {
		s.host.addVolume("default", volume, 1)
	}
	if err := s.record(slot{Name: name, Image: "default", Pool: "default", Network: "default", Made: time.Now(), Print: print}); err != nil {
		t.Fatal(err)
	}
}

func TestCollectRemovesOnlySlotsThatAreOfNoUse(t *testing.T) {
	const (
		wanted   = "libvirt-driver-memory-000000000001"
		outdated = "libvirt-driver-memory-000000000002"
		inUse    = "libvirt-driver-memory-000000000003"
		removing = "libvirt-driver-memory-000000000004"
		never    = "libvirt-driver-memory-000000000005"
		torn     = "libvirt-driver-memory-000000000006"
		volumes  = "libvirt-driver-memory-000000000007"
		domain   = "libvirt-driver-memory-000000000008"
		making   = "libvirt-driver-memory-000000000009"
		other    = "runner-7-project-42-concurrent-1-job-1001"
		killed   = "runner-7-project-42-concurrent-2-job-1001"
	)
	want := map[string]string{
		outdated: "no image is like any more", never: "no image is like any more", torn: "no image is like any more",
		volumes: "not made to its end", domain: "not made to its end",
	}
	s := newRemembering(t, nil)
	print, err := s.slotPrint(context.Background(), machine{image: s.Settings.Images["default"]})
	if err != nil {
		t.Fatal(err)
	}
	s.saved(t, wanted, print)
	for _, name := range []string{outdated, inUse, removing, never, torn} {
		s.saved(t, name, "other")
	}
	if err := os.WriteFile(s.slotPath(torn), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A job's machine has started from one; that of another is being removed; and
	// one never came to start.
	self, err := process(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if s.host.domains[inUse], err = (domainxml.Metadata{Job: 1001, Project: 42, Machine: machineName, Start: startMemory, Created: time.Now(), Owner: self.String()}).Element(); err != nil {
		t.Fatal(err)
	}
	for name, bound := range map[string]string{machineName: inUse, other: removing, killed: never} {
		if err := s.bind(name, bound); err != nil {
			t.Fatal(err)
		}
	}
	// These are not made to their end: one of them still may be.
	for _, name := range []string{volumes, making} {
		s.host.addVolume("default", stateVolume(name), 1)
	}
	if s.host.domains[domain], err = (domainxml.Metadata{Start: startMemory, Created: time.Now()}).Element(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{other, making} {
		lock, err := s.tryLock(name)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.release()
	}

	for _, dryRun := range []bool{true, false} {
		got := s.collected(t, dryRun)
		for name, why := range want {
			if !strings.Contains(got[name], why) {
				t.Errorf("%s: %q, want %q", name, got[name], why)
			}
		}
		if len(got) != len(want) {
			t.Errorf("dry run %v: %v", dryRun, got)
		}
	}
	if slots := s.kept(t); !slices.Equal(slots, []string{wanted, inUse, removing}) {
		t.Errorf("slots: %q", slots)
	}
	for _, name := range []string{wanted, inUse, removing, making} {
		if _, there := s.host.volumes["default/"+stateVolume(name)]; !there {
			t.Errorf("the memory of %s is gone", name)
		}
	}
	for name := range want {
		_, there := s.host.domains[name]
		for _, volume := range slotVolumes(name) {
			_, stored := s.host.volumes["default/"+volume]
			there = there || stored
		}
		if there || !s.host.called("Unreserve default "+macAddress(name)) {
			t.Errorf("something of %s is left: %v, %v", name, s.host.domains, s.host.volumes)
		}
	}
	if s.isBound(never) || !s.isBound(inUse) {
		t.Error("the record of the machine that never started is left, or one too many is gone")
	}
}

func TestCollectLeavesTheSlotsOfAnImageThatCannotBeLookedAt(t *testing.T) {
	const name = "libvirt-driver-memory-000000000001"
	s := newRemembering(t, nil)
	s.saved(t, name, "other")
	if err := s.refuse("another", errors.New("why")); err != nil {
		t.Fatal(err)
	}
	s.host.failures["Volume"] = hypervisor.ErrUnreachable
	if got := s.collected(t, false); len(got) > 0 || len(s.kept(t)) != 1 || len(s.refusals(t)) != 1 {
		t.Errorf("collected %v", got)
	}
	// A base volume that is gone comes back as another.
	delete(s.host.volumes, "default/gitlab-runner-base.qcow2")
	if got := s.collected(t, false); len(got) != 1 || len(s.refusals(t)) != 0 {
		t.Errorf("collected %v", got)
	}
	s.wantNoSlot(t)
}

func TestCollectKeepsARefusalForAsLongAsItCounts(t *testing.T) {
	s := newRemembering(t, nil)
	print, err := s.slotPrint(context.Background(), machine{image: s.Settings.Images["default"]})
	if err != nil {
		t.Fatal(err)
	}
	for _, each := range []string{print, "other"} {
		if err := s.refuse(each, errors.New("why")); err != nil {
			t.Fatal(err)
		}
	}
	if s.collected(t, true); len(s.refusals(t)) != 2 {
		t.Error("a dry run removes refusals")
	}
	if s.collected(t, false); !slices.Equal(s.refusals(t), []string{s.refusalPath(print)}) {
		t.Errorf("refusals: %q", s.refusals(t))
	}
	long := time.Now().Add(-refusalCounts - time.Minute)
	if err := os.Chtimes(s.refusalPath(print), long, long); err != nil {
		t.Fatal(err)
	}
	if s.collected(t, false); len(s.refusals(t)) != 0 {
		t.Errorf("refusals: %q", s.refusals(t))
	}
}

// The definition is what a later attempt knows the volumes by.
func TestASlotsDefinitionStaysUntilItsVolumesAreGone(t *testing.T) {
	const name = "libvirt-driver-memory-000000000001"
	s := newRemembering(t, nil)
	s.saved(t, name, "other")
	text, err := domainxml.Metadata{Start: startMemory, Created: time.Now()}.Element()
	if err != nil {
		t.Fatal(err)
	}
	s.host.domains[name] = text
	s.host.failures["DeleteVolume"] = hypervisor.ErrInactive
	_, err = s.Collect(context.Background(), 24*time.Hour, false)
	if _, there := s.host.domains[name]; !there || err == nil || !strings.Contains(err.Error(), "left behind: volume "+name+"-frozen.state in pool default") {
		t.Errorf("the domain is there: %v; %v", there, err)
	}
	clear(s.host.failures)
	s.collected(t, false)
	s.wantNoSlot(t)
}
