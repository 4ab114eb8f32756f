package driver

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// What prepare decides about slots. That a guest can be saved and restored is for
// the tests in integration/.

// change changes the settings of the stage's image.
func (s *stage) change(f func(*settings.Image)) {
	image := s.Settings.Images["default"]
	f(&image)
	s.Settings.Images["default"] = image
}

// newRemembering makes a stage whose image starts from memory.
func newRemembering(t *testing.T, vars map[string]string) *stage {
	t.Helper()
	s := newStage(t, vars)
	s.change(func(i *settings.Image) { i.Start = settings.StartMemory })
	return s
}

// next makes the stage of another job on the same host.
func (s *stage) next(t *testing.T, concurrent int) *stage {
	t.Helper()
	other := newStage(t, map[string]string{"CUSTOM_ENV_CI_CONCURRENT_PROJECT_ID": strconv.Itoa(concurrent)})
	other.Maker, other.host = s.Maker, s.host
	other.Log = gitlab.NewLog(&other.log, true)
	return other
}

// machine returns the name of the stage's machine, and of the domain that it is.
func (s *stage) machine(t *testing.T) (name, domain string) {
	t.Helper()
	m, err := s.plan()
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.contact(context.Background(), m.name)
	if err != nil {
		t.Fatal(err)
	}
	return m.name, cmp.Or(c.Domain, m.name)
}

// restored prepares the stage's job, and returns the slot that its machine
// started from.
func (s *stage) restored(t *testing.T) string {
	t.Helper()
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatalf("%v\n%s", err, s.log.String())
	}
	name, domain := s.machine(t)
	if startOf(domain) != startMemory || !s.host.called("RestoreDomain "+domain) || s.host.called("StartDomain "+name) {
		t.Fatalf("%s is %s, which did not start from memory: %q\n%s", name, domain, s.host.calls, s.log.String())
	}
	return domain
}

// booted prepares the stage's job, and checks that its machine booted, and why.
func (s *stage) booted(t *testing.T, why string) {
	t.Helper()
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatalf("%v\n%s", err, s.log.String())
	}
	name, domain := s.machine(t)
	if bound, err := s.domainOf(name); domain != name || bound != name || err != nil || !s.host.called("StartDomain "+name) {
		t.Errorf("%s is %s (%s on record, %v), which did not boot: %q", name, domain, bound, err, s.host.calls)
	}
	if log := s.log.String(); !strings.Contains(log, "the machine is booted, and not started from memory: ") || !strings.Contains(log, why) {
		t.Errorf("no %q in the log:\n%s", why, log)
	}
}

func (s *stage) cleanUp(t *testing.T) {
	t.Helper()
	if err := s.Cleanup(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// kept returns the slots that are on record.
func (s *stage) kept(t *testing.T) (names []string) {
	t.Helper()
	slots, err := s.slots()
	if err != nil {
		t.Fatal(err)
	}
	for _, each := range slots {
		names = append(names, each.Name)
	}
	return names
}

// refusals returns the files of the refusals.
func (s *stage) refusals(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(s.refusalPath("*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// wantNoSlot checks that nothing of any slot is left.
func (s *stage) wantNoSlot(t *testing.T) {
	t.Helper()
	if files, err := filepath.Glob(filepath.Join(s.LockDir, "libvirt-driver-memory-*")); err != nil || len(files) > 0 {
		t.Errorf("left in the folder for locks: %v, %v", files, err)
	}
	for name := range s.host.domains {
		if startOf(name) == startMemory {
			t.Errorf("domain %s is left", name)
		}
	}
	for path := range s.host.volumes {
		if slotOf(filepath.Base(path)) != "" {
			t.Errorf("volume %s is left", path)
		}
	}
}

func TestAPrepareMakesASlotWhereThereIsNoneAndUsesTheOneThatThereIs(t *testing.T) {
	s := newRemembering(t, nil)
	var door *sshexec.Door
	s.Connect = func(_ context.Context, target sshexec.Target) (Shell, error) {
		door = cmp.Or(target.Door, door)
		return &shell{}, nil
	}
	name := s.restored(t)
	saved, restored := s.host.index("SaveDomain "+name+" /default/"+name+"-frozen.state"), s.host.index("RestoreDomain "+name+" /default/"+name+"-frozen.state")
	if saved < 0 || restored < saved || !strings.Contains(s.log.String(), "one is made first") {
		t.Errorf("calls: %q\n%s", s.host.calls, s.log.String())
	}
	if door == nil || !strings.HasSuffix(door.Server, name+"/door") || !strings.HasSuffix(door.Shell, name+"/shell") || !strings.Contains(door.Words, "\n"+machineName+"\n") {
		t.Errorf("the guest was entered by %+v", door)
	}
	metadata, err := domainxml.ParseMetadata(s.host.domains[name])
	if err != nil || metadata.Machine != machineName || metadata.Job != 1001 {
		t.Errorf("the domain is %+v, %v", metadata, err)
	}
	s.cleanUp(t)
	var volumes []string
	for path := range s.host.volumes {
		volumes = append(volumes, filepath.Base(path))
	}
	slices.Sort(volumes)
	if want := []string{"gitlab-runner-base.qcow2", name + "-frozen.qcow2", name + "-frozen.state"}; !slices.Equal(volumes, want) {
		t.Errorf("volumes after the first job: %q", volumes)
	}
	if s.host.called("Unreserve") || s.host.called("ReleaseLeases default "+macAddress(name)) || len(s.host.domains) > 0 {
		t.Errorf("the slot is not as it was: %v, %q", s.host.domains, s.host.calls)
	}

	s.host.calls = nil
	next := s.next(t, 1)
	if from := next.restored(t); from != name || s.host.called("SaveDomain") || strings.Contains(next.log.String(), "one is made first") {
		t.Errorf("started from %s, not from %s: %q", from, name, s.host.calls)
	}
	if slots := s.kept(t); !slices.Equal(slots, []string{name}) {
		t.Errorf("slots: %q", slots)
	}
}

func TestASlotThatCannotBeUsedIsThrownAwayAndTheMachineBoots(t *testing.T) {
	for what, test := range map[string]struct {
		spoil func(*stage)
		why   string
	}{
		"it is not restored": {func(s *stage) { s.host.failures["RestoreDomain"] = errors.New("no such file") }, "no such file"},
		"it has no door":     {func(s *stage) { s.host.failures["Channels"] = hypervisor.ErrNotFound }, hypervisor.ErrNotFound.Error()},
		"the door is shut": {func(s *stage) {
			s.Connect = func(_ context.Context, target sshexec.Target) (Shell, error) {
				if target.Door != nil {
					return nil, sshexec.ErrShut
				}
				return &shell{}, nil
			}
		}, sshexec.ErrShut.Error()},
		"no address is kept any more": {func(s *stage) { s.host.failures["Reserve"] = hypervisor.ErrUnreservable }, "its address 192.0.2.7:22 is not kept for it any more"},
		"another address is kept":     {func(s *stage) { s.host.kept = netip.MustParseAddr("192.0.2.8") }, "its address 192.0.2.7:22 is not kept for it any more"},
	} {
		t.Run(what, func(t *testing.T) {
			s := newRemembering(t, nil)
			name := s.restored(t)
			s.cleanUp(t)
			next := s.next(t, 1)
			test.spoil(next)
			next.booted(t, test.why)
			next.wantNoSlot(t)
			if !s.host.called("Unreserve default " + macAddress(name)) {
				t.Error("the slot's address is still kept")
			}
			// It may have been this one alone.
			if files := s.refusals(t); len(files) > 0 {
				t.Errorf("refused: %q", files)
			}
			clear(s.host.failures)
			if again := s.next(t, 2).restored(t); again == name {
				t.Error("the slot is used all the same")
			}
		})
	}
}

func TestAnImageThatCannotStartFromMemoryIsNotTriedByEveryJob(t *testing.T) {
	for what, test := range map[string]struct {
		spoil func(*stage)
		why   string
	}{
		"no door can be made": {func(s *stage) {
			s.Connect = func(context.Context, sshexec.Target) (Shell, error) {
				return &shell{result: errors.New("no sshd")}, nil
			}
		}, "no sshd"},
		"it cannot be saved":         {func(s *stage) { s.host.failures["SaveDomain"] = errors.New("disk full") }, "disk full"},
		"what is saved is of no use": {func(s *stage) { s.host.failures["RestoreDomain"] = errors.New("no such CPU") }, "no such CPU"},
	} {
		t.Run(what, func(t *testing.T) {
			s := newRemembering(t, nil)
			works := s.next(t, 2)
			test.spoil(s)
			s.booted(t, test.why)
			s.wantNoSlot(t)
			if files := s.refusals(t); len(files) != 1 {
				t.Fatalf("refusals: %q", files)
			}
			s.host.calls = nil
			s.next(t, 1).booted(t, "tried within the last hour, in vain: ")
			if s.host.called("CreateFile") || s.host.called("DefineDomain libvirt-driver-memory-") {
				t.Errorf("tried again: %q", s.host.calls)
			}
			clear(s.host.failures)
			long := time.Now().Add(-refusalCounts - time.Minute)
			if err := os.Chtimes(s.refusals(t)[0], long, long); err != nil {
				t.Fatal(err)
			}
			works.restored(t)
		})
	}
}

func TestARefusalCountsForWhatWasTriedAlone(t *testing.T) {
	s := newRemembering(t, nil)
	s.host.failures["SaveDomain"] = errors.New("disk full")
	s.booted(t, "disk full")
	clear(s.host.failures)
	s.host.volumes["default/gitlab-runner-base.qcow2"]++
	s.next(t, 1).restored(t)
}

// The host's faults, and the end of the job, say nothing against the image; and
// are no reason to boot.
func TestAPrepareThatFailsWhileItMakesASlotRefusesNothing(t *testing.T) {
	s := newRemembering(t, nil)
	s.host.failures["StartDomain"] = errors.New("no emulator")
	if err := s.Prepare(context.Background()); err == nil || !strings.Contains(err.Error(), "no emulator") {
		t.Errorf("error: %v", err)
	}
	s.wantNoSlot(t)

	ctx, cancel := context.WithCancelCause(context.Background())
	stopped := s.next(t, 1)
	stopped.Connect = func(context.Context, sshexec.Target) (Shell, error) {
		return &stopper{stop: func() { cancel(errors.New("terminated")) }}, nil
	}
	clear(s.host.failures)
	s.host.calls = nil
	if err := stopped.Prepare(ctx); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("error: %v", err)
	}
	if s.host.called("StartDomain runner-") || len(s.refusals(t)) > 0 {
		t.Errorf("calls: %q, refusals: %q", s.host.calls, s.refusals(t))
	}
	// Who is told to stop leaves the rest to gc.
	if got := s.collected(t, false); len(got) != 1 {
		t.Errorf("gc removes %v", got)
	}
	s.wantNoSlot(t)
}

// stopper is a guest in which the script has the stage told to stop.
type stopper struct {
	shell
	stop func()
}

func (s *stopper) Run(ctx context.Context, _ sshexec.Command) error {
	s.stop()
	return context.Cause(ctx)
}

func TestAnOutdatedSlotIsNotUsed(t *testing.T) {
	for what, change := range map[string]func(*stage){
		"base volume": func(s *stage) { s.host.volumes["default/gitlab-runner-base.qcow2"]++ },
		"memory":      func(s *stage) { s.change(func(i *settings.Image) { i.Memory *= 2 }) },
		"user":        func(s *stage) { s.change(func(i *settings.Image) { i.User = "other" }) },
		"driver":      func(s *stage) { s.Version = "1.2.4" },
		"console log": func(s *stage) { s.Settings.LogDir = t.TempDir() },
	} {
		t.Run(what, func(t *testing.T) {
			s := newRemembering(t, nil)
			name := s.restored(t)
			s.cleanUp(t)
			next := s.next(t, 1)
			change(next)
			again := next.restored(t)
			if again == name {
				t.Error("the slot is used")
			}
			// It makes room for the one that is made in its place.
			if slots := s.kept(t); !slices.Equal(slots, []string{again}) {
				t.Errorf("slots: %q", slots)
			}
		})
	}
}

func TestAJobThatAsksForAnotherSizeBoots(t *testing.T) {
	s := newRemembering(t, map[string]string{"CUSTOM_ENV_LIBVIRT_DRIVER_MEMORY": "3 GiB"})
	s.change(func(i *settings.Image) { i.MaxMemory = 4 << 30 })
	s.booted(t, "another size")
	if s.wantNoSlot(t); len(s.refusals(t)) > 0 {
		t.Error("refused")
	}
}

func TestPreparesAtOnceStartFromSlotsOfTheirOwn(t *testing.T) {
	s := newRemembering(t, nil)
	first := s.restored(t)
	s.cleanUp(t)
	const jobs = 4
	for range 3 {
		var stages [jobs]*stage
		var failures [jobs]error
		var preparing sync.WaitGroup
		for i := range stages {
			stages[i] = s.next(t, i)
			preparing.Go(func() { failures[i] = stages[i].Prepare(context.Background()) })
		}
		preparing.Wait()
		users := map[string]string{}
		for i, each := range stages {
			if failures[i] != nil {
				t.Fatalf("%v\n%s", failures[i], each.log.String())
			}
			name, domain := each.machine(t)
			if other, taken := users[domain]; taken || startOf(domain) != startMemory {
				t.Errorf("%s and %s are both %s", name, other, domain)
			}
			users[domain] = name
			metadata, err := domainxml.ParseMetadata(s.host.domains[domain])
			if bound, unread := s.domainOf(name); err != nil || unread != nil || metadata.Machine != name || bound != domain {
				t.Errorf("%s is %s by its record and belongs to %q by its domain: %v, %v", name, bound, metadata.Machine, unread, err)
			}
		}
		// No more of them are made than there were machines at once.
		if slots := s.kept(t); len(slots) != jobs || users[first] == "" {
			t.Errorf("slots: %q, used: %v, the first was %s", slots, users, first)
		}
		for _, each := range stages {
			preparing.Go(func() {
				if err := each.Cleanup(context.Background()); err != nil {
					t.Error(err)
				}
			})
		}
		preparing.Wait()
	}
}

func TestASlotWhoseMachineRunsIsNotWaitedFor(t *testing.T) {
	s := newRemembering(t, nil)
	name := s.restored(t)
	begun := time.Now()
	if from := s.next(t, 1).restored(t); from == name || time.Since(begun) > ending/2 {
		t.Errorf("started from %s, the first job from %s, after %v", from, name, time.Since(begun))
	}
}

func TestASlotWhoseMachineIsBeingRemovedIsWaitedFor(t *testing.T) {
	for _, gone := range []bool{false, true} {
		s := newRemembering(t, nil)
		name := s.restored(t)
		m, err := s.plan()
		if err != nil {
			t.Fatal(err)
		}
		lock, err := s.lock(context.Background(), machineName, "nobody")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.markOver(machineName); err != nil {
			t.Fatal(err)
		}
		if gone {
			// What is left then are the records.
			if _, err := s.removeWithin(context.Background(), machineName, m.job); err != nil {
				t.Fatal(err)
			}
		}
		removed := make(chan error)
		go func() {
			time.Sleep(100 * time.Millisecond)
			err := s.finish(context.Background(), machineName, m.job)
			lock.release()
			removed <- err
		}()
		if from := s.next(t, 1).restored(t); from != name {
			t.Errorf("started from %s, not from %s", from, name)
		}
		if err := <-removed; err != nil {
			t.Fatal(err)
		}
	}
}
