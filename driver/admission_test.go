package driver

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"libvirt-driver/driver/hypervisor"
)

func TestAMachineWaitsForRoom(t *testing.T) {
	for name, fill := range map[string]func(*host){
		"guests that run may take it all": func(h *host) { h.memory.Guests = map[string]uint64{"another": 15 << 30} },
		"the host itself has used it up":  func(h *host) { h.memory.Available = 2 << 30 },
		"the pool is full":                func(h *host) { h.space = 100 << 20 },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, nil)
			memory, space := s.host.memory, s.host.space
			fill(s.host)
			done := make(chan error, 1)
			go func() { done <- s.Prepare(context.Background()) }()
			select {
			case err := <-done:
				t.Fatalf("started without room: %v", err)
			case <-time.After(3 * recheck / 2):
			}
			if s.host.called("CreateOverlay") {
				t.Error("the disk is made before there is room")
			}
			s.host.mu.Lock()
			s.host.memory, s.host.space = memory, space
			s.host.mu.Unlock()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if log := s.log.String(); strings.Count(log, "waiting for room") != 1 || !strings.Contains(log, "the host has room now") {
				t.Errorf("log:\n%s", log)
			}
		})
	}
}

func TestNoRoomInTimeIsTheHostsFault(t *testing.T) {
	s := newStage(t, nil)
	s.Settings.Timeouts.Turn = 100 * time.Millisecond
	s.host.memory.Guests = map[string]uint64{"another": 16 << 30}
	err := s.Prepare(context.Background())
	if err == nil || isBuild(err) || !strings.Contains(err.Error(), "timeouts.turn") || !strings.Contains(err.Error(), "16384 MiB") {
		t.Errorf("error: %v", err)
	}
}

func TestATurnThatDoesNotComeSaysWhy(t *testing.T) {
	s := newStage(t, nil)
	s.Settings.Timeouts.Turn = 100 * time.Millisecond
	lock, err := s.tryLock(turn)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.release()
	err = s.Prepare(context.Background())
	if err == nil || isBuild(err) || !strings.Contains(err.Error(), "waited for other machines, which are let in one by one") || strings.Contains(err.Error(), "\n") {
		t.Errorf("error: %v", err)
	}
}

func TestAMachineThatNeverFitsIsNotWaitedFor(t *testing.T) {
	s := newStage(t, nil)
	s.host.memory = hypervisor.Memory{Total: 2 << 30, Available: 2 << 30}
	err := s.Prepare(context.Background())
	if err == nil || isBuild(err) || !strings.Contains(err.Error(), "in all") {
		t.Errorf("error: %v", err)
	}
	s = newStage(t, nil)
	s.host.failures["PoolSpace"] = hypervisor.ErrInactive
	if err := s.Prepare(context.Background()); !errors.Is(err, hypervisor.ErrInactive) || !strings.Contains(err.Error(), "virsh pool-start") {
		t.Errorf("pool that does not run: %v", err)
	}
}

// What has been let in and does not run yet takes its room, once, and keeps
// nobody else waiting.
func TestAMachineCountsFromWhenItIsLetIn(t *testing.T) {
	s := newStage(t, nil)
	s.Settings.Timeouts.Turn = 100 * time.Millisecond
	s.Settings.ReserveMemory = 0
	image := s.Settings.Images["default"]
	ctx, size := context.Background(), image.Memory
	admit := func(name string) (func(), error) {
		return s.admit(ctx, machine{name: name, domain: name + "-domain", image: image})
	}
	s.host.memory.Total, s.host.memory.Available = 2*size+Overhead, 2*size+Overhead

	first, err := admit("a")
	if err != nil {
		t.Fatal(err)
	}
	second, err := admit("b")
	if err != nil {
		t.Fatalf("while another one starts: %v", err)
	}
	if _, err := admit("c"); err == nil || !strings.Contains(err.Error(), "guests may take "+mebibytes(2*size)) {
		t.Errorf("a third where two have been let in: %v", err)
	}
	s.host.memory.Guests = map[string]uint64{"a-domain": size}
	if _, err := admit("c"); err == nil || !strings.Contains(err.Error(), "guests may take "+mebibytes(2*size)) {
		t.Errorf("a third where one runs already: %v", err)
	}
	first()
	second()
	third, err := admit("c")
	if err != nil {
		t.Fatalf("when one of two has not come: %v", err)
	}
	third()
	if left := s.lockedWith(arrivalSuffix); len(left) > 0 {
		t.Errorf("still arriving: %q", left)
	}
}

func TestAMachineWhosePrepareWasKilledTakesNoRoom(t *testing.T) {
	s := newStage(t, nil)
	if err := os.WriteFile(s.lockPath("killed"+arrivalSuffix), []byte("killed 9999999999999\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Prepare(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.lockPath("killed" + arrivalSuffix)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its lock: %v", err)
	}
}
