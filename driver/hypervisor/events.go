package hypervisor

import (
	"context"
	"fmt"
	"sync"

	"github.com/digitalocean/go-libvirt"
)

// Watch returns when done says so of the domain's state, with that state: at
// once, or when libvirt's events tell of a change. It follows the domain
// across restarts of libvirtd, and returns an error only when ctx ends.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainEventID
func (c *Connection) Watch(ctx context.Context, name string, done func(State) bool) (State, error) {
	for {
		events, err := c.lifecycle(ctx)
		if err != nil {
			return State{}, wrap(err, "watch domain %s", name)
		}
		state, ended, err := c.watch(ctx, events, name, done)
		if err != nil || !ended {
			return state, err
		}
	}
}

// watch is Watch for as long as the events last; ended says that they did not.
func (c *Connection) watch(ctx context.Context, events *events, name string, done func(State) bool) (_ State, ended bool, err error) {
	told, leave := events.of(name)
	defer leave()
	for { // Events come from now on; what came before them is in the state.
		state, err := c.State(ctx, name)
		if err != nil || done(state) {
			return state, false, err
		}
		select {
		case <-told:
		case <-events.ended:
			return state, true, nil
		case <-ctx.Done():
			return State{}, false, fmt.Errorf("watch domain %s: %w", name, context.Cause(ctx))
		}
	}
}

// events tells all who watch a domain of the lifecycle events of one session:
// libvirt does not take a second subscription on a connection.
type events struct {
	rpc   *libvirt.Libvirt // the session's
	ended chan struct{}    // closed when no more come, as the session has ended

	mu       sync.Mutex
	watchers map[chan<- struct{}]string // what each watches
}

// lifecycle returns the events of the current session. It subscribes to those of
// all domains, until the session ends: to end a subscription is one more call, and
// libvirtd (9.0 was seen to) can crash when it works on that while the client's
// connection closes, since the closing ends the subscription too.
func (c *Connection) lifecycle(ctx context.Context) (*events, error) {
	var current *events
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		select {
		case c.subscribing <- struct{}{}:
			defer func() { <-c.subscribing }()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if c.events == nil || c.events.rpc != rpc {
			source, err := rpc.LifecycleEvents(context.Background())
			if err != nil {
				return err
			}
			c.events = &events{rpc: rpc, ended: make(chan struct{}), watchers: map[chan<- struct{}]string{}}
			go c.events.pass(source)
		}
		current = c.events
		return nil
	})
	return current, err
}

// of returns a channel that tells, until leave is called, that there was an event
// of the domain. Several that nobody has received are told as one.
func (e *events) of(domain string) (told <-chan struct{}, leave func()) {
	watcher := make(chan struct{}, 1)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.watchers[watcher] = domain
	return watcher, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.watchers, watcher)
	}
}

// pass passes on what comes, to its end.
func (e *events) pass(source <-chan libvirt.DomainEventLifecycleMsg) {
	defer close(e.ended)
	for event := range source {
		e.mu.Lock()
		for watcher, domain := range e.watchers {
			if domain != event.Dom.Name {
				continue
			}
			select {
			case watcher <- struct{}{}:
			default: // it has been told already
			}
		}
		e.mu.Unlock()
	}
}
