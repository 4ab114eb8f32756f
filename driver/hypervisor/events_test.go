package hypervisor

import (
	"context"
	"net"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/digitalocean/go-libvirt"
)

// libvirtd answers a second subscription with an error.
func TestAllWhoWatchShareASubscription(t *testing.T) {
	const lookUp, state, register, name = 23, 212, 316, "d"
	domain := slices.Concat(counted(1, name), make([]byte, 16), words(1))
	var subscriptions atomic.Int32
	var off atomic.Bool
	asked := make(chan net.Conn, 10)
	c := libvirtd(t, func(conn net.Conn, h header) []byte {
		var payload []byte
		switch h.number {
		case lookUp:
			payload = domain
		case state:
			payload = words(uint32(libvirt.DomainRunning), 0)
			if off.Load() {
				payload = words(uint32(libvirt.DomainShutoff), 0)
			}
			asked <- conn
		case register:
			if subscriptions.Add(1) > 1 {
				return frame(h.procedure, kindReply, h.serial, statusError, failed(libvirt.ErrInvalidArg, "event callback already tracked"))
			}
			payload = words(7)
		default:
			t.Errorf("procedure %d is called", h.number)
		}
		return frame(h.procedure, kindReply, h.serial, statusOK, payload)
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if got, err := c.Watch(ctx, name, func(State) bool { return true }); err != nil || got.Kind != Running {
		t.Fatalf("the first: %v, %v", got, err)
	}
	<-asked
	err := within(t, func() error {
		ended := make(chan error, 2)
		for range 2 {
			go func() {
				got, err := c.Watch(ctx, name, func(s State) bool { return s.Kind != Running })
				if err == nil && got.Kind != Off {
					t.Errorf("the domain is %v", got)
				}
				ended <- err
			}()
		}
		<-asked
		conn := <-asked // both have seen it run
		off.Store(true)
		event := slices.Concat(words(7), domain, words(5, 0)) // stopped
		if _, err := conn.Write(frame(lifecycleEvent, kindMessage, 0, statusOK, event)); err != nil {
			return err
		}
		if err := <-ended; err != nil {
			return err
		}
		return <-ended
	})
	if err != nil || subscriptions.Load() != 1 {
		t.Errorf("%v, after %d subscriptions", err, subscriptions.Load())
	}

	left := make(chan error, 1)
	off.Store(false)
	go func() {
		_, err := c.Watch(ctx, name, func(s State) bool { return s.Kind != Running })
		left <- err
	}()
	for range 3 {
		<-asked
	}
	cancel()
	if within(t, func() error { return <-left }) == nil {
		t.Error("who does not watch any more is told that nothing is wrong")
	}
	c.events.mu.Lock()
	defer c.events.mu.Unlock()
	if len(c.events.watchers) != 0 {
		t.Errorf("%d still watch", len(c.events.watchers))
	}
}
