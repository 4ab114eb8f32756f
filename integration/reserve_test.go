//go:build integration

package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"libvirt-driver/driver/hypervisor"
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
