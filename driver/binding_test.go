package driver

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
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
		if !s.isBound(ownName) {
			t.Errorf("nobody's, although there is a record %q", doc)
		}
	}
}

// stand puts a machine that fits the stage's job where it is looked for.
func (s *stage) stand(t *testing.T, domain string) {
	t.Helper()
	m, err := s.plan()
	if err != nil {
		t.Fatal(err)
	}
	fits, err := s.fingerprint(context.Background(), m)
	if err != nil {
		t.Fatal(err)
	}
	text, err := domainxml.Metadata{Pool: "default", Volume: volumeName(domain), Created: time.Now(), Start: startStandby}.Element()
	if err != nil {
		t.Fatal(err)
	}
	s.host.mu.Lock()
	s.host.domains[domain] = text
	s.host.mu.Unlock()
	if err := os.MkdirAll(s.LockDir, 0o700); err != nil {
		t.Fatal(err)
	}
	ready := standing{binding{domain}, fits, contact{Address: "192.0.2.7:22", HostKey: "ssh-ed25519 AAAA"}.of(m.image), time.Now()}
	if err := s.line(ready); err != nil {
		t.Fatal(err)
	}
}

func TestOneJobGetsAMachineThatStandsReady(t *testing.T) {
	for range 50 {
		s := newStage(t, nil)
		s.stand(t, ownName)
		m, err := s.plan()
		if err != nil {
			t.Fatal(err)
		}
		var claims sync.WaitGroup
		var claimed atomic.Int32
		for i := range 8 {
			job := m
			job.job.ID += int64(i)
			job.name = job.job.Machine()
			claims.Go(func() {
				if _, ok := s.claim(context.Background(), &job); ok {
					claimed.Add(1)
					if domain, err := s.domainOf(job.name); err != nil || domain != ownName || job.domain != ownName {
						t.Errorf("claimed %s, on record is %s, %v", job.domain, domain, err)
					}
				}
			})
		}
		claims.Wait()
		if n := claimed.Load(); n != 1 {
			t.Fatalf("%d jobs have the machine", n)
		}
	}
}

func TestAMachineIsClaimedOnlyByAJobThatItFits(t *testing.T) {
	for what, change := range map[string]func(*stage, *machine){
		"memory":        func(_ *stage, m *machine) { m.image.Memory *= 2 },
		"network":       func(_ *stage, m *machine) { m.image.Network = "other" },
		"base volume":   func(s *stage, m *machine) { s.host.volumes["default/gitlab-runner-base.qcow2"]++ },
		"emulation":     func(s *stage, m *machine) { s.Settings.VirtType = settings.VirtKVM },
		"nothing (max)": func(_ *stage, m *machine) { m.image.MaxMemory = 1 << 40 },
	} {
		s := newStage(t, nil)
		s.stand(t, ownName)
		m, err := s.plan()
		if err != nil {
			t.Fatal(err)
		}
		change(s, &m)
		if _, claimed := s.claim(context.Background(), &m); claimed != (what == "nothing (max)") {
			t.Errorf("%s: claimed %v", what, claimed)
		}
	}
}

func TestAReadyMachineIsClaimedOnlyIfItIsAlive(t *testing.T) {
	for _, alive := range []bool{true, false} {
		s := newStage(t, nil)
		s.stand(t, ownName)
		s.Connect = func(context.Context, sshexec.Target) (Shell, error) {
			if alive {
				return &shell{}, nil
			}
			return &shell{ping: sshexec.ErrLost}, nil
		}
		m, err := s.plan()
		if err != nil {
			t.Fatal(err)
		}
		if _, claimed := s.claim(context.Background(), &m); claimed != alive {
			t.Errorf("claimed %v, alive %v", claimed, alive)
		}
		if _, there := s.host.domains[ownName]; there != alive {
			t.Errorf("the domain is there: %v, alive %v", there, alive)
		}
	}
}

func TestAJobThatFindsNoRoomHasAReadyMachineRemoved(t *testing.T) {
	s := newStage(t, nil)
	s.stand(t, ownName)
	s.Settings.Timeouts.Turn = time.Second
	s.host.memory.Available = 0
	m, err := s.plan()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.admit(context.Background(), m); err == nil {
		t.Error("let in without room")
	}
	if _, there := s.host.domains[ownName]; there || s.isReady(ownName) {
		t.Error("the machine stands ready still")
	}
	if s.crowded() {
		t.Error("someone seems to wait for room")
	}
	m.ahead = true
	if _, err := s.admit(context.Background(), m); !errors.Is(err, errNoRoom) {
		t.Errorf("made ahead without room: %v", err)
	}
}

// Whoever is told to stop in that moment must not take one ready machine after
// the other for dead.
func TestAPrepareThatIsToldToStopThrowsNoReadyMachineAway(t *testing.T) {
	const other = "libvirt-driver-standby-ba9876543210"
	s := newStage(t, nil)
	s.stand(t, ownName)
	s.stand(t, other)
	m, err := s.plan()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.Connect = func(context.Context, sshexec.Target) (Shell, error) {
		cancel()
		return nil, ctx.Err()
	}
	if _, claimed := s.claim(ctx, &m); claimed {
		t.Error("claimed")
	}
	domain, err := s.domainOf(m.name)
	if err != nil || startOf(domain) != startStandby {
		t.Errorf("the machine that was taken is not on record: %s, %v", domain, err)
	}
	for _, name := range []string{ownName, other} {
		if _, there := s.host.domains[name]; !there || s.isReady(name) != (name != domain) {
			t.Errorf("%s: there %v, ready %v", name, there, s.isReady(name))
		}
	}
}
