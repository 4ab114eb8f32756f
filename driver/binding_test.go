package driver

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"libvirt-driver/domainxml"
)

const ownName = "libvirt-driver-standby-0123456789ab"

// bound adds a domain with a name of its own to the host and makes it the job's
// machine.
func (s *stage) bound(t *testing.T) {
	t.Helper()
	text, err := domainxml.Metadata{Job: 1001, Project: 42, Pool: "default", Volume: volumeName(ownName),
		Created: time.Now(), Owner: dead(t).String(), Start: startStandby, Machine: machineName}.Element()
	if err != nil {
		t.Fatal(err)
	}
	s.host.domains[ownName] = text
	s.host.volumes["default/"+volumeName(ownName)] = 1
	if err := os.MkdirAll(s.LockDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.bind(machineName, ownName); err != nil {
		t.Fatal(err)
	}
}

func TestCleanupRemovesTheDomainThatIsTheMachine(t *testing.T) {
	s := newStage(t, nil)
	s.bound(t)
	if err := s.Cleanup(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, there := s.host.domains[ownName]; there {
		t.Error("the domain is left")
	}
	if _, there := s.host.volumes["default/"+volumeName(ownName)]; there {
		t.Error("its overlay is left")
	}
	if left, err := filepath.Glob(filepath.Join(s.LockDir, machineName+"*")); err != nil || len(left) > 0 {
		t.Errorf("left in the folder for locks: %v, %v", left, err)
	}
}

func TestListShowsABoundDomainAsItsJobsMachine(t *testing.T) {
	s := newStage(t, nil)
	s.bound(t)
	nobodys, err := domainxml.Metadata{Pool: "default", Start: startMemory, Created: time.Now()}.Element()
	if err != nil {
		t.Fatal(err)
	}
	const other = "libvirt-driver-memory-0123456789ab"
	s.host.domains[other] = nobodys
	s.host.domains["libvirt-driver-memory-000000000000"] = s.host.domains[ownName] // whose metadata says something else
	machines, err := s.List(context.Background())
	if err != nil || len(machines) != 2 {
		t.Fatalf("%+v, %v", machines, err)
	}
	for _, m := range machines {
		switch m.Name {
		case machineName:
			if m.Domain != ownName || m.Job != 1001 || m.Start != "standby" || m.Volume != volumeName(ownName) {
				t.Errorf("%+v", m)
			}
		case other:
			if m.Domain != other || m.Job != 0 || m.Start != "memory" {
				t.Errorf("%+v", m)
			}
		default:
			t.Errorf("unexpected: %+v", m)
		}
	}
}

func TestARecordThatCannotBeReadIsNotPassedOver(t *testing.T) {
	for _, doc := range []string{"", "{", `{"domain":"someone-elses"}`, `{"domain":"../x"}`} {
		s := newStage(t, nil)
		s.bound(t)
		if err := os.WriteFile(s.bindingPath(machineName), []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		if domain, err := s.domainOf(machineName); err == nil {
			t.Errorf("%q is taken for %s", doc, domain)
		}
	}
}
