package driver

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"libvirt-driver/driver/hypervisor"
)

func TestAMachineWaitsForRoom(t *testing.T) {
	for name, fill := range map[string]func(*host){
		"guests that run may take it all": func(h *host) { h.memory.Guests = 15 << 30 },
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
	s.host.memory.Guests = 16 << 30
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
