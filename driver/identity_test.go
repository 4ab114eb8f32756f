package driver

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// knows sets how the stage's guest is known, and takes the settings' key away.
func (s *stage) knows(way settings.HostKey) {
	image := s.Settings.Images["default"]
	image.HostKey = way
	if way != settings.HostKeyPinned {
		image.Key = "/no/such/key"
	}
	s.Settings.Images["default"] = image
}

// dialled makes the stage's guests note how they were called.
func (s *stage) dialled() *sshexec.Target {
	var seen sshexec.Target
	s.Connect = func(_ context.Context, target sshexec.Target) (Shell, error) {
		seen = target
		return &shell{}, nil
	}
	return &seen
}

// index returns the place of the first call that begins so.
func (h *host) index(call string) int {
	for i, c := range h.calls {
		if strings.HasPrefix(c, call) {
			return i
		}
	}
	return -1
}

func TestInjectedKeysAreTheGuestsAloneAndWipedWhenItRuns(t *testing.T) {
	s := newStage(t, nil)
	s.knows(settings.HostKeyInjected)
	seen := s.dialled()
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatal(err)
	}
	created, started, wiped := s.host.index("CreateSecret default "+machineName+"-identity"), s.host.index("StartDomain"), s.host.index("WipeVolume default "+machineName+"-identity")
	if created < 0 || started < created || wiped < started {
		t.Fatalf("calls: %q", s.host.calls)
	}
	// What the guest unpacks is the other half of what the driver expects and shows.
	var hostKey, client *sshexec.KeyPair
	var authorized string
	for line := range strings.Lines(s.host.calls[created]) {
		fields := strings.Fields(line)
		text, err := base64.StdEncoding.DecodeString(fields[len(fields)-1])
		if err != nil || len(text) == 0 {
			continue
		}
		switch {
		case strings.Contains(line, "/etc/ssh/ssh_host_ed25519_key 0600 root root -"):
			if hostKey, err = sshexec.ParseKeyPair(string(text)); err != nil {
				t.Fatal(err)
			}
		case strings.Contains(line, "/home/gitlab-runner/.ssh/authorized_keys 0600 gitlab-runner - -"):
			authorized = strings.TrimSpace(string(text))
		}
	}
	if hostKey == nil || seen.HostKey != hostKey.Public() {
		t.Errorf("the guest has %v, the driver expects %q", hostKey, seen.HostKey)
	}
	doc, err := os.ReadFile(s.contactPath())
	if err != nil {
		t.Fatal(err)
	}
	var c contact
	if err := json.Unmarshal(doc, &c); err != nil {
		t.Fatal(err)
	}
	if client, err = sshexec.ParseKeyPair(c.Own); err != nil || client.Public() != authorized {
		t.Errorf("run logs in with %v (%v), the guest admits %q", client, err, authorized)
	}
	if info, err := os.Stat(s.contactPath()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the file with the private key: %v, %v", info.Mode(), err)
	}
	// Nothing of either is in what everyone can read.
	for _, private := range []string{hostKey.Private(), client.Private()} {
		lines := strings.Split(strings.TrimSpace(private), "\n")
		secret := lines[len(lines)-3] // the private half is in the last line but one
		for i, call := range s.host.calls {
			if i != created && strings.Contains(call, secret) {
				t.Errorf("a private key is in %q", call)
			}
		}
		if strings.Contains(s.host.domains[machineName], secret) || strings.Contains(s.log.String(), secret) {
			t.Error("a private key is in the domain or the log")
		}
	}
}

func TestKeysThatCannotReachTheGuestAreWipedToo(t *testing.T) {
	s := newStage(t, nil)
	s.knows(settings.HostKeyInjected)
	s.host.failures["StartDomain"] = errors.New("no room")
	if err := s.Prepare(context.Background()); err == nil || isBuild(err) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("error: %v", err)
	}
	if !s.host.called("WipeVolume default " + machineName + "-identity") {
		t.Errorf("calls: %q", s.host.calls)
	}
	// A key that may be on the disk yet is no machine to use.
	s = newStage(t, nil)
	s.knows(settings.HostKeyInjected)
	s.host.failures["WipeVolume"] = errors.New("read-only file system")
	if err := s.Prepare(context.Background()); err == nil || !strings.Contains(err.Error(), "wipe the guest's keys") {
		t.Errorf("error: %v", err)
	}
}

func TestRunLogsInWithTheJobsOwnKey(t *testing.T) {
	s := newStage(t, nil)
	s.knows(settings.HostKeyInjected)
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatal(err)
	}
	job, err := s.identify()
	if err != nil {
		t.Fatal(err)
	}
	machine := job.Machine()
	handed, err := s.contact(context.Background(), machine)
	if err != nil {
		t.Fatal(err)
	}
	seen := s.dialled()
	if _, err := s.enter(context.Background(), machine, handed); err != nil {
		t.Fatal(err)
	}
	own, err := sshexec.ParseKeyPair(handed.Own)
	if err != nil || seen.Key.PublicKey().Type() != "ecdsa-sha2-nistp256" || string(seen.Key.PublicKey().Marshal()) != string(own.Signer().PublicKey().Marshal()) {
		t.Errorf("logs in with another key: %v", err)
	}
	if seen.HostKey != handed.HostKey || seen.HostKey == "" {
		t.Errorf("expects %q, prepare handed over %q", seen.HostKey, handed.HostKey)
	}
	// The domain's metadata cannot stand in for the file.
	if err := os.Remove(s.contactPath()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.contact(context.Background(), machine); err == nil || !strings.Contains(err.Error(), s.contactPath()+" is gone") {
		t.Errorf("without the hand-over: %v", err)
	}
	handed.Own = "c2VjcmV0"
	if _, err := s.enter(context.Background(), machine, handed); err == nil || strings.Contains(err.Error(), "c2VjcmV0") {
		t.Errorf("a torn key: %v", err)
	}
}

func TestTheAgentsHostKeyIsExpectedAndTheJobsKeyAuthorized(t *testing.T) {
	guest, err := sshexec.NewKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	for name, files := range map[string]map[string]string{
		"the best type":            {"/etc/ssh/ssh_host_ed25519_key.pub": guest.Public() + " root@guest\n", "/etc/ssh/ssh_host_rsa_key.pub": "no key"},
		"the only one":             {"/etc/ssh/ssh_host_rsa_key.pub": guest.Public() + "\n"},
		"one of two in the making": {"/etc/ssh/ssh_host_ed25519_key.pub": guest.Public()[:30], "/etc/ssh/ssh_host_ecdsa_key.pub": guest.Public() + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, nil)
			s.knows(settings.HostKeyAgent)
			s.host.files = files
			seen := s.dialled()
			if err := s.Prepare(context.Background()); err != nil {
				t.Fatal(err)
			}
			if seen.HostKey != guest.Public() {
				t.Errorf("expects %q, not %q", seen.HostKey, guest.Public())
			}
			m, err := s.plan()
			if err != nil {
				t.Fatal(err)
			}
			handed, err := s.contact(context.Background(), m.name)
			if err != nil {
				t.Fatal(err)
			}
			own, err := sshexec.ParseKeyPair(handed.Own)
			if err != nil || !s.host.called("AuthorizeKey gitlab-runner "+own.Public()) {
				t.Errorf("%v, calls: %q", err, s.host.calls)
			}
			if s.host.called("CreateSecret") {
				t.Error("the guest's private key was on the host")
			}
		})
	}
}

func TestAGuestWithoutAnAgentIsNotDialled(t *testing.T) {
	for name, test := range map[string]struct {
		err  error
		took time.Duration
		want string
	}{
		"no agent":        {hypervisor.ErrNoAgent, time.Second, "none after 1s (timeouts.ssh)"},
		"no such command": {hypervisor.ErrAgentRefuses, 0, "does not do this"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, nil)
			s.knows(settings.HostKeyAgent)
			s.Settings.Timeouts.SSH = time.Second
			s.host.failures["ReadGuestFile"] = fmt.Errorf("guest: %w", test.err)
			s.Connect = func(context.Context, sshexec.Target) (Shell, error) {
				t.Error("connected")
				return nil, errors.New("connected")
			}
			begun := time.Now()
			err := s.Prepare(context.Background())
			if err == nil || isBuild(err) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "install and enable qemu-guest-agent") {
				t.Errorf("error: %v", err)
			}
			if took := time.Since(begun); took < test.took || took > test.took+5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func TestAnotherHostKeyThanExpectedEndsPrepareAtOnce(t *testing.T) {
	for way, hint := range map[settings.HostKey]string{
		settings.HostKeyInjected: `host_key = "injected"`,
		settings.HostKeyAgent:    "something else than the guest answers",
	} {
		s := newStage(t, nil)
		s.knows(way)
		guest, err := sshexec.NewKeyPair()
		if err != nil {
			t.Fatal(err)
		}
		s.host.files = map[string]string{hostKeyFiles[0]: guest.Public()}
		tries := 0
		s.Connect = func(context.Context, sshexec.Target) (Shell, error) {
			tries++
			return nil, fmt.Errorf("log in: %w: showed A, expected B", sshexec.ErrHostKey)
		}
		err = s.Prepare(context.Background())
		if err == nil || isBuild(err) || !strings.Contains(err.Error(), "showed A, expected B") || !strings.Contains(err.Error(), hint) || tries != 1 {
			t.Errorf("%s: after %d tries: %v", way, tries, err)
		}
	}
}

func TestAVolumeWithKeysBelongsToItsMachine(t *testing.T) {
	s := newStage(t, nil)
	s.host.volumes["default/"+machineName+"-identity"] = 1
	s.host.volumes["default/runner-x-identity"] = 1
	s.host.modified = time.Now().Add(-time.Hour)
	list, err := s.List(context.Background())
	if err != nil || len(list) != 1 || list[0].Name != machineName || list[0].State != noDomain || list[0].Volume != machineName+"-identity" {
		t.Fatalf("%+v, %v", list, err)
	}
	s.host.volumes["default/"+machineName+".qcow2"] = 1
	if list, err = s.List(context.Background()); err != nil || len(list) != 1 || list[0].Volume != machineName+".qcow2" || list[0].Disk != 2<<20 {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := s.Collect(context.Background(), 24*time.Hour, false); err != nil {
		t.Fatal(err)
	}
	if len(s.host.volumes) != 2 { // the base volume and the stranger
		t.Errorf("left: %v", s.host.volumes)
	}
}
