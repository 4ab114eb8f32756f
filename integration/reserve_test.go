//go:build integration

package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/integration/runner"
)

// reservations returns the addresses that a network keeps, by MAC.
func reservations(t *testing.T, network string) map[string]string {
	t.Helper()
	kept := map[string]string{}
	for _, host := range reservation.FindAllStringSubmatch(virsh(t, "net-dumpxml", network), -1) {
		kept[host[1]] = host[2]
	}
	return kept
}

// lent returns the addresses that a network lends, by MAC.
func lent(t *testing.T, network string) map[string]string {
	t.Helper()
	leases := map[string]string{}
	for line := range strings.Lines(virsh(t, "net-dhcp-leases", network)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			leases[fields[2]], _, _ = strings.Cut(fields[4], "/")
		}
	}
	return leases
}

// The network has the DHCP server's own habits: it tries an address before it lends it, unless it is kept.
func TestGuestsGetTheAddressesThatAreReservedForThem(t *testing.T) {
	t.Parallel()
	s := newSettings(t, tiny("reserve_address = true"))
	var jobs [4]runner.Job
	var all sync.WaitGroup
	for i := range jobs {
		jobs[i] = newJob(runner.Job{})
		all.Go(func() { prepared(t, s.runner(t), jobs[i]) })
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	kept, leases, seen := reservations(t, "default"), lent(t, "default"), map[string]bool{}
	for _, job := range jobs {
		mac := macOf(job)
		if kept[mac] == "" || leases[mac] != kept[mac] || seen[kept[mac]] {
			t.Errorf("of %s, %q is kept for %s and %q is lent: %v, %v", machineOf(job), kept[mac], mac, leases[mac], kept, leases)
		}
		seen[kept[mac]] = true
	}
	if text := virsh(t, "net-dumpxml", "--inactive", "default"); strings.Contains(text, "<host ") {
		t.Errorf("the network's definition has changed: %s", text)
	}
}

func TestACleanupEndsTheReservation(t *testing.T) {
	t.Parallel()
	n, job := newNetwork(t, true), newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q\nreserve_address = true", n.name))).runner(t), job)
	if kept := reservations(t, n.name); kept[macOf(job)] == "" {
		t.Fatalf("no address is kept: %v", kept)
	}
	cleanUp(t, ex, job)
	until(t, "no address is kept", func() bool { return len(reservations(t, n.name)) == 0 })
}

// The second guest starts without a reservation, and gets its address when the first is gone.
func TestAFullRangeOnlyMakesAJobWait(t *testing.T) {
	t.Parallel()
	n := smallNetwork(t, 2)
	s := newSettings(t, tiny(fmt.Sprintf("network = %q\nreserve_address = true", n.name)))
	first, second := newJob(runner.Job{}), newJob(runner.Job{})
	ex, waiting := prepared(t, s.runner(t), first), start(t, s.runner(t), second)
	call := waiting.StartPrepare()
	waitFor(t, call, "  machine  ")
	if kept := reservations(t, n.name); kept[macOf(second)] != "" || kept[macOf(first)] == "" {
		t.Errorf("kept: %v", kept)
	}
	cleanUp(t, ex, first)
	want(t, waiting, call.Wait(t.Context()), 0, n.prefix+".2")
}

// What the DHCP server knows of and libvirt does not, only shows when it is too late.
func TestAGuestIsFoundThatGetsAnotherAddressThanItsOwn(t *testing.T) {
	t.Parallel()
	n := smallNetwork(t, 3)
	s := newSettings(t, tiny(fmt.Sprintf("network = %q\nreserve_address = true", n.name)))
	holder := newJob(runner.Job{})
	prepared(t, s.runner(t), holder)
	held := reservations(t, n.name)[macOf(holder)]
	// The holder keeps its lease, and libvirt forgets that it has one.
	virsh(t, "net-update", n.name, "delete", "ip-dhcp-host", fmt.Sprintf("<host mac='%s' ip='%s'/>", macOf(holder), held), "--live")
	forget := func() { // when the DHCP server has told it once more, as it does after each change
		t.Helper()
		until(t, "libvirt knows of the lease", func() bool { return lent(t, n.name)[macOf(holder)] == held })
		if err := os.WriteFile("/var/lib/libvirt/dnsmasq/"+n.bridge+".status", []byte("[]"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := connect(t, "qemu:///system")
	var job runner.Job
	for wanted := ""; wanted != held; { // one whose MAC points to that very address
		forget()
		job = newJob(runner.Job{})
		address, err := c.Reserve(t.Context(), n.name, macOf(job))
		if err := errors.Join(err, c.Unreserve(t.Context(), n.name, macOf(job))); err != nil {
			t.Fatal(err)
		}
		wanted = address.String()
	}
	// The DHCP server tells it after each change, and may not be through with that.
	until(t, "libvirt has forgotten the lease for good", func() bool {
		if lent(t, n.name)[macOf(holder)] != "" {
			forget()
		}
		time.Sleep(2 * time.Second)
		return lent(t, n.name)[macOf(holder)] == ""
	})
	ex := prepared(t, s.runner(t), job)
	if kept, got := reservations(t, n.name)[macOf(job)], lent(t, n.name)[macOf(job)]; kept != held || got == held || got == "" {
		t.Errorf("%q is kept, %q is lent, and %q is another's", kept, got, held)
	}
	if got := output(t, ex, "echo alive"); got != "alive\n" {
		t.Errorf("the guest says %q", got)
	}
}

func TestAddressesAreReservedOnceAndOnNetworksThatLendThem(t *testing.T) {
	t.Parallel()
	c, ctx := connect(t, "qemu:///system"), t.Context()
	n := smallNetwork(t, 9)
	mac := func(i int) string { return fmt.Sprintf("52:54:00:00:01:%02x", i) }
	var mu sync.Mutex
	seen := map[netip.Addr]bool{}
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			own := hypervisor.New("qemu:///system", "") // as each job's process has
			defer own.Close()
			for range 2 {
				address, err := own.Reserve(ctx, n.name, mac(i))
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				seen[address] = true
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if kept := reservations(t, n.name); len(kept) != 6 || len(seen) != 6 {
		t.Errorf("kept: %v, returned: %v", kept, seen)
	}
	for i := 6; i < 8; i++ {
		if _, err := c.Reserve(ctx, n.name, mac(i)); err != nil {
			t.Error(err)
		}
	}
	if address, err := c.Reserve(ctx, n.name, mac(8)); !errors.Is(err, hypervisor.ErrUnreservable) {
		t.Errorf("the ninth of eight is %v, %v", address, err)
	}
	for range 2 {
		for i := range 9 {
			if err := c.Unreserve(ctx, n.name, mac(i)); err != nil {
				t.Error(err)
			}
		}
	}
	if kept := reservations(t, n.name); len(kept) != 0 {
		t.Errorf("still kept: %v", kept)
	}
	for _, name := range []string{newNetwork(t, false).name, defineNetwork(t, true).name, "no-such-network"} {
		if address, err := c.Reserve(ctx, name, mac(0)); !errors.Is(err, hypervisor.ErrUnreservable) {
			t.Errorf("network %s: %v, %v", name, address, err)
		}
		if err := c.Unreserve(ctx, name, mac(0)); err != nil {
			t.Errorf("network %s: %v", name, err)
		}
	}
}
