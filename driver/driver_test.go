package driver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

func testKey(t testing.TB) string {
	t.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigTellsLaterStagesWhatTheyMayTrust(t *testing.T) {
	var out bytes.Buffer
	if err := newStage(t, nil).Config(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"LIBVIRT_DRIVER_MACHINE":"` + machineName + `"`, `"LIBVIRT_DRIVER_IMAGE":"default"`, `"GOMAXPROCS":"1"`,
		`"builds_dir":"/home/gitlab-runner/builds"`, `"version":"1.2.3"`, `"shell":"bash"`,
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in %s", want, out.String())
		}
	}
}

func TestAJobThatChangesItsNameIsRefused(t *testing.T) {
	vars := map[string]string{"LIBVIRT_DRIVER_MACHINE": "runner-8-project-42-concurrent-0-job-1001"}
	for name, stage := range map[string]func(*stage) error{
		"config":  func(s *stage) error { return s.Config(&bytes.Buffer{}) },
		"prepare": func(s *stage) error { return s.Prepare(context.Background()) },
		"run":     func(s *stage) error { return s.Run(context.Background(), "script") },
	} {
		s := newStage(t, vars)
		if err := stage(s); !isBuild(err) || len(s.host.calls) != 0 {
			t.Errorf("%s: %v after %q", name, err, s.host.calls)
		}
	}
}

func TestSizeBeyondTheLimitIsTheJobsFault(t *testing.T) {
	for variable, want := range map[string]string{
		"VCPUS": "LIBVIRT_DRIVER_VCPUS", "MEMORY": "LIBVIRT_DRIVER_MEMORY", "DISK": "LIBVIRT_DRIVER_DISK",
	} {
		s := newStage(t, map[string]string{"CUSTOM_ENV_LIBVIRT_DRIVER_" + variable: "999999"})
		err := s.Prepare(context.Background())
		if !isBuild(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", variable, err)
		}
	}
}

func TestPrepareHandsOverAddressAndHostKey(t *testing.T) {
	s := newStage(t, nil)
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatal(err)
	}
	want := contact{Address: "192.0.2.7:22", HostKey: "ssh-ed25519 AAAA",
		User: "gitlab-runner", Key: s.Settings.Images["default"].Key, Shell: "bash"}
	if got, err := s.contact(context.Background(), machineName); got != want || err != nil {
		t.Errorf("from the job's folder: %+v, %v", got, err)
	}
	if err := os.Remove(s.contactPath()); err != nil {
		t.Fatal(err)
	}
	if got, err := s.contact(context.Background(), machineName); got != want || err != nil {
		t.Errorf("from the domain: %+v, %v", got, err)
	}
}

// Nothing depends on it.
func TestTheDHCPServerIsAskedInTheNameOfAGuestThatIsFoundByItsLease(t *testing.T) {
	for source, asked := range map[settings.AddressSource]bool{
		settings.AddressAuto: true, settings.AddressLease: true, settings.AddressAgent: false, settings.AddressARP: false,
	} {
		s := newStage(t, nil)
		image := s.Settings.Images["default"]
		image.Address = source
		s.Settings.Images["default"] = image
		s.host.failures["Discover"] = hypervisor.ErrNotFound
		s.host.failures["Addresses"] = errors.New("enough")
		if err := s.Prepare(context.Background()); (err == nil) != asked {
			t.Fatal(err)
		}
		if got := s.host.called("Discover " + image.Network + " " + macAddress(machineName)); got != asked {
			t.Errorf("%s: asked %t: %q", source, got, s.host.calls)
		}
	}
}

func TestPrepareDoesNotWaitForAGuestThatStops(t *testing.T) {
	s := newStage(t, nil)
	s.Connect = func(ctx context.Context, _ sshexec.Target) (Shell, error) {
		console := filepath.Join(s.dir, machineName+"-console.log")
		if err := os.WriteFile(console, []byte("Kernel panic\r\n"), 0o600); err != nil {
			t.Error(err)
		}
		s.host.stop(hypervisor.State{Kind: hypervisor.Paused})
		<-ctx.Done()
		return nil, ctx.Err()
	}
	err := s.Prepare(context.Background())
	var lost *guestLost
	if !errors.As(err, &lost) || !strings.Contains(err.Error(), `virt_type = "qemu"`) {
		t.Errorf("error: %v", err)
	}
	if !strings.Contains(s.log.String(), "Kernel panic") {
		t.Errorf("no console in the log:\n%s", s.log.String())
	}
}

func TestDiskSmallerThanItsBase(t *testing.T) {
	s := newStage(t, map[string]string{"CUSTOM_ENV_LIBVIRT_DRIVER_DISK": "1 GiB"})
	image := s.Settings.Images["default"]
	image.MaxDisk = 20 << 30
	s.Settings.Images["default"] = image
	if err := s.Prepare(context.Background()); !isBuild(err) || !strings.Contains(err.Error(), "can only grow") {
		t.Errorf("asked for by the job: %v", err)
	}
	s = newStage(t, nil)
	image.Disk, image.MaxDisk = 1<<30, 0
	s.Settings.Images["default"] = image
	if err := s.Prepare(context.Background()); err == nil || isBuild(err) || !strings.Contains(err.Error(), "setting disk") {
		t.Errorf("asked for by the administrator: %v", err)
	}
}

// prepared is a stage whose machine prepare has handed over.
func prepared(t *testing.T, guest *shell) (*stage, string) {
	t.Helper()
	s := newStage(t, nil)
	doc, err := json.Marshal(contact{Address: "192.0.2.7:22", HostKey: "ssh-ed25519 AAAA"}.of(s.Settings.Images["default"]))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.contactPath(), doc, 0o600); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(s.dir, "script")
	if err := os.WriteFile(script, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Connect = func(context.Context, sshexec.Target) (Shell, error) { return guest, nil }
	return s, script
}

func TestRunMapsEndings(t *testing.T) {
	s, script := prepared(t, &shell{})
	if err := s.Run(context.Background(), script); err != nil {
		t.Errorf("exit 0: %v", err)
	}
	s, script = prepared(t, &shell{result: &sshexec.ExitError{Code: 255}})
	err := s.Run(context.Background(), script)
	var build *gitlab.BuildError
	if !errors.As(err, &build) || build.ExitCode != 255 {
		t.Errorf("exit 255: %v", err)
	}
	guest := &shell{hangs: true, aborted: make(chan error, 1)}
	s, script = prepared(t, guest)
	s.host.stop(hypervisor.State{Kind: hypervisor.Off, Reason: "destroyed"})
	if err := s.Run(context.Background(), script); err == nil || isBuild(err) || !strings.Contains(err.Error(), "shut off (destroyed)") {
		t.Errorf("guest destroyed: %v", err)
	}
}

// Most scripts take less than it costs to watch their guest.
func TestLibvirtIsAskedAboutTheGuestOfAScriptThatTakesLong(t *testing.T) {
	for takes, want := range map[time.Duration][]string{
		brief - time.Millisecond: nil,
		brief + time.Millisecond: {"Watch " + machineName},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, script := prepared(t, &shell{takes: takes})
			if err := s.Run(t.Context(), script); err != nil || !slices.Equal(s.host.calls, want) {
				t.Errorf("a script of %v: %v after %q, want %q", takes, err, s.host.calls, want)
			}
		})
	}
}

// What the administrator changes while a job runs is no fault of the job's.
func TestRunGoesOnWhenTheSettingsChange(t *testing.T) {
	s, script := prepared(t, &shell{})
	image := s.Settings.Images["default"]
	used := make(chan sshexec.Target, 1)
	s.Connect = func(_ context.Context, target sshexec.Target) (Shell, error) {
		used <- target
		return &shell{}, nil
	}
	s.Settings = settings.Default()
	s.Settings.Images = map[string]settings.Image{"other": {Name: "other", User: "other", Shell: settings.ShellSh}}
	s.Settings.BuiltIn = false
	if err := s.Run(context.Background(), script); err != nil {
		t.Fatal(err)
	}
	if target := <-used; target.User != image.User || target.Address != "192.0.2.7:22" {
		t.Errorf("logged in to %+v", target)
	}
	// Without what prepare handed over nothing is known of the image.
	if err := os.Remove(s.contactPath()); err != nil {
		t.Fatal(err)
	}
	text, err := domainxml.Metadata{Job: 1001, Project: 42, Image: "default", Address: "192.0.2.7:22", HostKey: "k"}.Element()
	if err != nil {
		t.Fatal(err)
	}
	s.host.domains[machineName] = text
	if err := s.Run(context.Background(), script); err == nil || isBuild(err) || !strings.Contains(err.Error(), `image "default"`) {
		t.Errorf("without the hand-over: %v", err)
	}
}

// A cleanup that comes while the script runs has paused the guest, and may take
// longer to end it than a stage waits to learn what became of it.
func TestAGuestThatIsPausedByHandIsNotSaidToRun(t *testing.T) {
	for state, want := range map[hypervisor.State]string{
		{Kind: hypervisor.Paused, Reason: "by a user", ByHand: true}: "the guest " + machineName + " is paused (by a user), and the connection to it failed: lost",
		{Kind: hypervisor.Running}:                                   "the guest still runs, but the connection to it failed: lost",
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t, nil)
			s.host.domains[machineName], s.host.state = "defined", state
			if err := s.explain(t.Context(), t.Context(), machineName, errors.New("lost")); err.Error() != want {
				t.Errorf("%+v: %v, want %q", state, err, want)
			}
		})
	}
}

func TestPrepareWhoseImageIsGoneSinceConfigIsNotTheJobsFailure(t *testing.T) {
	s := newStage(t, map[string]string{"LIBVIRT_DRIVER_IMAGE": "gone"})
	s.Settings.BuiltIn = false
	err := s.Prepare(context.Background())
	if err == nil || isBuild(err) || !strings.Contains(err.Error(), "settings have changed") || len(s.host.calls) != 0 {
		t.Errorf("error: %v after %q", err, s.host.calls)
	}
}

func TestAnAddressIsLookedForWhenTheGuestIsNoticed(t *testing.T) {
	s := newStage(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	looks := 0
	var paced []string
	address, err := s.waitForAddress(ctx, machine{}, func(context.Context) (netip.Addr, error) {
		if looks++; looks == 3 {
			return s.host.lent, nil
		}
		go func() { s.host.noticed <- struct{}{} }()
		return netip.Addr{}, nil
	}, func(noticed bool, try int) time.Duration {
		paced = append(paced, fmt.Sprint(noticed, " ", try))
		return time.Hour
	})
	if err != nil || address != s.host.lent || looks != 3 || !slices.Equal(paced, []string{"false 0", "true 0"}) {
		t.Errorf("%v, %v after %d looks, paced as after %q", address, err, looks, paced)
	}
}

func TestLeasesAreLookedAtOftenOnlyWhenTheGuestHasBeenNoticed(t *testing.T) {
	for _, test := range []struct {
		noticed bool
		try     int
		want    time.Duration
	}{
		{false, 0, 3 * time.Second}, {false, 9, 3 * time.Second},
		{true, 0, 50 * time.Millisecond}, {true, 1, 100 * time.Millisecond}, {true, 1000, 3 * time.Second},
	} {
		if got := leasePace(test.noticed, test.try); got != test.want {
			t.Errorf("noticed %v, try %d: %v, want %v", test.noticed, test.try, got, test.want)
		}
	}
}

func TestAnInactiveNetworkIsSaidWithItsRemedy(t *testing.T) {
	for why, remedy := range map[error]string{
		hypervisor.ErrInactive: "start the network: virsh net-start default, and virsh net-autostart default for the next boot",
		hypervisor.ErrNotFound: "virsh net-list --all",
	} {
		s := newStage(t, nil)
		s.host.failures["StartDomain"] = errors.New("libvirt's own words")
		s.host.failures["KeepsLeases"] = fmt.Errorf("network default: %w", why)
		err := s.Prepare(context.Background())
		if err == nil || isBuild(err) || !strings.Contains(err.Error(), "start machine: libvirt's own words: ") || !strings.Contains(err.Error(), remedy) {
			t.Errorf("as it starts: %v", err)
		}
		delete(s.host.failures, "StartDomain")
		clear(s.host.domains)
		if err := s.Prepare(context.Background()); err == nil || !strings.Contains(err.Error(), remedy) {
			t.Errorf("once it has started: %v", err)
		}
	}
	s := newStage(t, nil)
	s.host.failures["StartDomain"] = errors.New("libvirt's own words")
	if err := s.Prepare(context.Background()); err == nil || strings.Contains(err.Error(), "virsh") {
		t.Errorf("with a network that runs: %v", err)
	}
}

// The log's rule: only titles begin with a capital.
func TestOnlyTitlesBeginWithACapital(t *testing.T) {
	s := newStage(t, nil)
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatal(err)
	}
	var titles []string
	for line := range strings.Lines(s.log.String()) {
		if unicode.IsUpper(rune(line[0])) {
			title, _, _ := strings.Cut(line, " ")
			titles = append(titles, title)
		}
	}
	if got := strings.Join(titles, " "); got != "Machine The" {
		t.Errorf("lines that begin with a capital: %s\n%s", got, s.log.String())
	}
}

// A guest that powers off ends its scripts first, with whatever exit code.
func TestScriptEndedByItsGuestsShutdownIsNotTheJobsFailure(t *testing.T) {
	guest := &shell{result: &sshexec.ExitError{Code: 143, Signal: "TERM"}, ping: errors.New("connection closed"), aborted: make(chan error, 1)}
	s, script := prepared(t, guest)
	s.host.stop(hypervisor.State{Kind: hypervisor.Off, Reason: "the guest powered off"})
	if err := s.Run(context.Background(), script); err == nil || isBuild(err) || !strings.Contains(err.Error(), "powered off") {
		t.Errorf("error: %v", err)
	}
}

func TestRunToldToStopIsNoSuccess(t *testing.T) {
	s, script := prepared(t, &shell{hangs: true, aborted: make(chan error, 1)})
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("terminated"))
	if err := s.Run(ctx, script); err == nil || isBuild(err) || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("error: %v", err)
	}
}

func TestCleanupRemovesEverythingOfItsJob(t *testing.T) {
	s := newStage(t, nil)
	s.host.domains[machineName] = mine(t, 1001, "elsewhere")
	s.host.volumes["default/"+machineName+".qcow2"] = 1
	s.host.volumes["elsewhere/"+machineName+".qcow2"] = 1
	log := filepath.Join(s.dir, machineName+"-console.log.0")
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(context.Background()); err != nil {
		t.Fatal(err)
	}
	if len(s.host.domains) != 0 || len(s.host.volumes) != 1 {
		t.Errorf("left: %v %v", s.host.domains, s.host.volumes)
	}
	if _, err := os.Stat(log); err == nil {
		t.Error("the console's log is left")
	}
	if err := s.Cleanup(context.Background()); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestCleanupLeavesWhatIsNotItsJobs(t *testing.T) {
	for name, metadata := range map[string]string{"no metadata": "", "another job's": mine(t, 1002, "default"), "garbage": "<machine"} {
		s := newStage(t, nil)
		s.host.domains[machineName] = metadata
		s.host.volumes["default/"+machineName+".qcow2"] = 1
		err := s.Cleanup(context.Background())
		if !errors.Is(err, errForeign) || !strings.Contains(err.Error(), "left behind: domain "+machineName) {
			t.Errorf("%s: %v", name, err)
		}
		if s.host.called("DestroyDomain") || s.host.called("DeleteVolume") || s.host.called("UndefineDomain") {
			t.Errorf("%s: touched: %q", name, s.host.calls)
		}
	}
}

// The job's variables may say by then what they like.
func TestCleanupRemovesTheMachineThatConfigNamed(t *testing.T) {
	for name, vars := range map[string]map[string]string{
		"the runner":     {"CUSTOM_ENV_CI_RUNNER_ID": "8"},
		"no runner":      {"CUSTOM_ENV_CI_RUNNER_ID": "../.."},
		"the job":        {"CUSTOM_ENV_CI_JOB_ID": "1002"},
		"the project":    {"CUSTOM_ENV_CI_PROJECT_ID": "43"},
		"the image":      {"CUSTOM_ENV_CI_JOB_IMAGE": "other"},
		"and a response": {"CUSTOM_ENV_CI_RUNNER_ID": "8", "JOB_RESPONSE_FILE": "/nonexistent"},
	} {
		vars["LIBVIRT_DRIVER_MACHINE"] = machineName
		s := newStage(t, vars)
		s.host.domains[machineName] = mine(t, 1001, "default")
		s.host.volumes["default/"+machineName+".qcow2"] = 1
		if err := s.Cleanup(context.Background()); err != nil || len(s.host.domains) != 0 || len(s.host.volumes) != 1 {
			t.Errorf("%s is forged: %v, left: %v %v", name, err, s.host.domains, s.host.volumes)
		}
	}
}

// Without a config stage that succeeded in this attempt, an earlier one may
// have made the machine, by the same variables.
func TestCleanupAfterAConfigThatRefusedTheJob(t *testing.T) {
	s := newStage(t, map[string]string{"CUSTOM_ENV_CI_JOB_ID": "1002", "CUSTOM_ENV_CI_JOB_IMAGE": "other"})
	s.host.domains[machineName] = mine(t, 1001, "default")
	if err := s.Cleanup(context.Background()); err != nil || len(s.host.domains) != 0 {
		t.Errorf("forged ids: %v, left: %v", err, s.host.domains)
	}
	s = newStage(t, map[string]string{"CUSTOM_ENV_CI_CONCURRENT_PROJECT_ID": "0/.."})
	if err := s.Cleanup(context.Background()); err != nil || len(s.host.calls) != 0 || !strings.Contains(s.log.String(), "nothing to remove") {
		t.Errorf("variables that make no name: %v after %q, log: %s", err, s.host.calls, s.log.String())
	}
	s = newStage(t, map[string]string{"JOB_RESPONSE_FILE": "/nonexistent"})
	if err := s.Cleanup(context.Background()); err == nil || isBuild(err) || !strings.Contains(err.Error(), "response file") {
		t.Errorf("no response: %v", err)
	}
}

// The definition names the volume: while that is left, so must the domain be.
func TestCleanupNamesWhatIsLeft(t *testing.T) {
	s := newStage(t, nil)
	s.host.domains[machineName] = mine(t, 1001, "default")
	s.host.failures["DeleteVolume"] = hypervisor.ErrInactive
	err := s.Cleanup(context.Background())
	if err == nil || isBuild(err) || !strings.Contains(err.Error(), "volume "+machineName+".qcow2 in pool default") {
		t.Errorf("error: %v", err)
	}
	if len(s.host.domains) != 1 {
		t.Error("the domain is gone before its volume")
	}
}

func TestGuestTextInTheLogIsText(t *testing.T) {
	got := printable("\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07x\rwiped\n\n a\tb\x00\x9b\xff\u202e!\r\nsection_start:1:x\r\x1b[0Kfold\n\x1bPdcs\x1b\\end\x1b")
	want := []string{"red", "wiped", " a b?!", "fold", "end"}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStagesOfOneMachineWaitForEachOther(t *testing.T) {
	s := newStage(t, nil)
	lock, err := s.tryLock(machineName)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.tryLock(machineName); !errors.Is(err, errLocked) {
		t.Errorf("locked twice: %v", err)
	}
	if _, err := s.tryLock(machineName + "0"); err != nil {
		t.Errorf("another machine: %v", err)
	}
	done := make(chan error)
	go func() { done <- s.Cleanup(context.Background()) }()
	lock.release()
	if err := <-done; err != nil {
		t.Errorf("cleanup after the lock is free: %v", err)
	}
	told := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(told)
	if lock, err = s.tryLock(machineName); err != nil {
		t.Fatal(err)
	}
	defer lock.release()
	if err := s.Cleanup(ctx); !errors.Is(err, told) {
		t.Errorf("cleanup told to stop while it waits: %v", err)
	}
}
