package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

const (
	// attempt bounds one SSH handshake: long enough for an emulated guest on a
	// busy host, short enough that a server which says nothing gets another
	// chance.
	attempt = 30 * time.Second
	// rejections is for how long a guest may refuse the key before that is its
	// last word: while it boots, accounts may be missing or locked yet.
	rejections = 20 * time.Second
	// glance is the pause between two looks that cost nearly nothing: whether
	// something listens at the guest's address, which its kernel answers by itself.
	glance = 50 * time.Millisecond
)

// reach waits until the new machine answers over SSH, for as long as it runs.
func (mk *Maker) reach(ctx context.Context, m machine, keeper *Keeper) (contact, error) {
	ctx, stop := mk.followed(ctx, m.domain, 0, func(state hypervisor.State) bool {
		return state.Kind != hypervisor.Running
	})
	defer stop()
	asking, asked := context.WithTimeoutCause(ctx, creation, errSlow)
	look, pace, err := mk.locate(asking, m)
	asked()
	if err != nil {
		return contact{}, fmt.Errorf("find the guest's address: %w", err)
	}
	begun := time.Now()
	address, err := mk.waitForAddress(ctx, m, look, pace)
	if err != nil {
		return contact{}, fmt.Errorf("wait for the guest's address: %w", err)
	}
	mk.Log.Step("address", time.Since(begun), "%s", address)

	begun = time.Now()
	reached, err := mk.waitForShell(ctx, m, look, keeper)
	if err != nil {
		return contact{}, fmt.Errorf("wait for the guest's SSH: %w", err)
	}
	mk.Log.Step("shell", time.Since(begun), "%s@%s", m.image.User, reached.Address)
	return reached, nil
}

// kvmHint is what to do about a guest that KVM cannot run.
const kvmHint = `: if the host offers KVM but cannot use it, as nested virtualisation does, set virt_type = "qemu"`

// guestLost is why a wait for a guest is over: it does not run any more.
type guestLost struct {
	machine string
	state   hypervisor.State
}

func (e *guestLost) Error() string {
	hint := ""
	if e.state.Kind == hypervisor.Paused && !e.state.ByHand && e.state.Reason == "" {
		hint = kvmHint
	}
	return fmt.Sprintf("the guest %s is %s%s", e.machine, e.state, hint)
}

// followed returns a context that ends, with a guestLost as its cause, when
// lost says so of the machine's state, which is first looked at after a while. A
// libvirtd that is away is waited for: what counts then is what the guest itself
// says.
func (h *Host) followed(ctx context.Context, name string, after time.Duration, lost func(hypervisor.State) bool) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pause(ctx, after)
		for ctx.Err() == nil {
			state, err := h.Hypervisor.Watch(ctx, name, lost)
			if err == nil {
				cancel(&guestLost{name, state})
				return
			}
			pause(ctx, time.Second)
		}
	}()
	return ctx, func() {
		cancel(context.Canceled)
		<-done
	}
}

// locator looks for a guest's address once; the address is invalid when it has
// none yet.
type locator func(context.Context) (netip.Addr, error)

// pace returns the pause after a look that found no address: after so many tries
// since the guest was noticed or, while it has not been, since the beginning.
type pace func(noticed bool, try int) time.Duration

// waitForAddress waits until the guest has an address.
func (mk *Maker) waitForAddress(ctx context.Context, m machine, look locator, pace pace) (netip.Addr, error) {
	limit := mk.Settings.Timeouts.Address
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("none after %v (timeouts.address)", limit))
	defer cancel()
	notices, err := mk.Hypervisor.Noticed(ctx, m.mac)
	if err != nil {
		mk.Log.Note("the guest's address will be noticed late: %v", err)
	}
	noticed := false
	for try := 0; ; try++ {
		address, err := look(ctx)
		switch {
		case ctx.Err() != nil:
			return netip.Addr{}, fmt.Errorf("%w: looked for MAC address %s on network %s", context.Cause(ctx), m.mac, m.image.Network)
		case err != nil || address.IsValid():
			return address, err
		}
		select {
		case <-notices: // it asks for its address about now
			noticed = true
			try = -1 // so that the next look is the first
		case <-time.After(pace(noticed, try)):
		case <-ctx.Done():
		}
	}
}

// locate returns how to find the guest's address: by the network's leases where
// it keeps any; elsewhere by what the guest agent says or the host has seen.
func (mk *Maker) locate(ctx context.Context, m machine) (look locator, pace pace, err error) {
	keepsLeases, err := mk.Hypervisor.KeepsLeases(ctx, m.image.Network)
	if err != nil {
		return nil, nil, networkRemedy(err, err, m.image.Network)
	}
	switch source := m.image.Address; {
	case source == settings.AddressAgent:
		return mk.ask(m, hypervisor.Agent), steadily, nil
	case source == settings.AddressARP:
		return mk.ask(m, hypervisor.ARP), steadily, nil
	case source == settings.AddressAuto && !keepsLeases:
		return mk.ask(m, hypervisor.Agent, hypervisor.ARP), steadily, nil
	case !keepsLeases:
		return nil, nil, fmt.Errorf("network %s hands out no addresses: set address to agent or arp for image %s", m.image.Network, m.image.Name)
	}
	checked := time.Now()
	return func(ctx context.Context) (netip.Addr, error) {
		// No lease does not tell whether the network still runs.
		if time.Since(checked) >= 10*time.Second {
			checked = time.Now()
			if _, err := mk.Hypervisor.KeepsLeases(ctx, m.image.Network); err != nil {
				return netip.Addr{}, networkRemedy(err, err, m.image.Network)
			}
		}
		leases, err := mk.Hypervisor.Leases(ctx, m.image.Network, m.mac)
		if err != nil || len(leases) == 0 {
			return netip.Addr{}, err
		}
		return leases[0].Address, nil
	}, leasePace, nil
}

// steadily is the pace where a look is at what the guest or the host knows.
func steadily(_ bool, try int) time.Duration { return backoff(try) }

// leasePace is the pace where a look is at the network's leases. Every look takes
// libvirt's processor time and this one's, most when many guests boot at once and
// take long. On the host of its network a guest is noticed before it has a lease,
// and mostly as it gets one.
func leasePace(noticed bool, try int) time.Duration {
	const slowest = 3 * time.Second
	if !noticed {
		return slowest
	}
	return min(time.Duration(try+1)*glance, slowest)
}

// ask returns a locator that asks each source in turn.
func (mk *Maker) ask(m machine, sources ...hypervisor.AddressSource) locator {
	return func(ctx context.Context) (netip.Addr, error) {
		for _, source := range sources {
			addresses, err := mk.Hypervisor.Addresses(ctx, m.domain, m.mac, source)
			if err != nil {
				return netip.Addr{}, err
			}
			if len(addresses) > 0 {
				return addresses[0], nil
			}
		}
		return netip.Addr{}, nil
	}
}

// waitForShell waits until the guest lets the driver in and runs a command. It
// looks for the address again each time: a guest that asks for one in its boot
// loader and again later can have two, and an earlier attempt at the same job
// may have left one.
func (mk *Maker) waitForShell(ctx context.Context, m machine, look locator, keeper *Keeper) (contact, error) {
	limit := mk.Settings.Timeouts.SSH
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("none after %v (timeouts.ssh)", limit))
	defer cancel()
	k, err := mk.credentials(ctx, m)
	if err != nil {
		return contact{}, err
	}
	var last error
	var rejected time.Time
	for try := 0; ; {
		address, err := look(ctx)
		if err != nil {
			return contact{}, err
		}
		k.Address = socketAddress(address)
		done := mk.letThrough(ctx, m, address)
		reached, err := mk.tryShell(ctx, keeper, k)
		done()
		switch {
		case err == nil:
			reached.Own = k.Own
			return reached, nil
		case ctx.Err() != nil && last == nil:
			return contact{}, context.Cause(ctx)
		case ctx.Err() != nil:
			return contact{}, fmt.Errorf("%w: the last try: %w", context.Cause(ctx), last)
		case errors.Is(err, errHopeless):
			return contact{}, stranger(err, m.image)
		case !errors.Is(err, sshexec.ErrKeyRejected):
			rejected = time.Time{}
		case rejected.IsZero():
			rejected = time.Now()
		case time.Since(rejected) >= rejections:
			return contact{}, fmt.Errorf("image %s refuses %s for %v: %w", m.image.Name, m.keyName(), rejections, err)
		}
		last = err
		if errors.Is(err, syscall.ECONNREFUSED) {
			pause(ctx, glance)
			continue
		}
		// The guest has started a process for it, and may be slow.
		pause(ctx, backoff(try))
		try++
	}
}

// silence is how long a guest may leave the address that it was lent unanswered
// before its network filter is told it.
const silence = 3 * time.Second

// letThrough sees to it, until done is called, that the guest's network filter does
// not take the guest for someone else: it is told the address, which the network
// has lent to the guest, when nothing answers there.
func (mk *Maker) letThrough(ctx context.Context, m machine, address netip.Addr) (done func()) {
	if m.image.Filter == "" || !m.image.Address.ByLease() {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() {
		pause(ctx, silence)
		if ctx.Err() != nil {
			return
		}
		// A guest that is let through has answered the host's question who has the
		// address, whatever else it is slow at.
		seen, err := mk.Hypervisor.Addresses(ctx, m.domain, m.mac, hypervisor.ARP)
		if err == nil && !slices.Contains(seen, address) {
			err = mk.Hypervisor.FilterAddress(ctx, m.domain, m.mac, address)
		}
		if err != nil && ctx.Err() == nil {
			mk.Log.Note("nothing answers at %s, and its network filter cannot be told: %v", address, err)
		}
	})
	return func() {
		cancel()
		watching.Wait()
	}
}

// errHopeless marks an attempt after which another is no use.
var errHopeless = errors.New("no session with this guest is possible")

// tryShell makes one attempt to get a shell: the keeper's, or, without one, for
// this stage alone.
func (mk *Maker) tryShell(ctx context.Context, keeper *Keeper, k knock) (reached contact, err error) {
	if keeper.works() {
		reached, err = keeper.knock(ctx, k)
	} else {
		reached, err = mk.knock(ctx, k)
	}
	switch {
	case errors.Is(err, errNoKeeper) && ctx.Err() == nil:
		mk.Log.Note("every sub-stage will log in anew: %v", err)
		return mk.tryShell(ctx, nil, k)
	case err == nil, errors.Is(err, sshexec.ErrUnreachable), errors.Is(err, sshexec.ErrKeyRejected), errors.Is(err, syscall.ECONNREFUSED):
		return reached, err
	}
	return reached, fmt.Errorf("%w: %w", errHopeless, err)
}

// knock gets a shell and gives it up again.
func (mk *Maker) knock(ctx context.Context, k knock) (contact, error) {
	shell, err := k.try(ctx, sshexec.Keyring{}, mk.Connect)
	if err != nil {
		return contact{}, err
	}
	defer shell.Close()
	return contact{Address: k.Address, HostKey: shell.HostKey()}, nil
}

// socketAddress returns the address of a guest's SSH server.
func socketAddress(address netip.Addr) string {
	const ssh = 22
	return netip.AddrPortFrom(address, ssh).String()
}

// backoff returns the pause after a try: short at first, so that nothing is
// lost on a fast guest, then longer, so that a slow one is left alone.
func backoff(try int) time.Duration {
	return min(50*time.Millisecond<<min(try/10, 4), 500*time.Millisecond)
}

// pause waits, but not beyond the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
