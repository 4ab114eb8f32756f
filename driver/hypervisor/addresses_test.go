package hypervisor

import (
	"fmt"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
)

func TestLeasesNewestUnexpiredFirst(t *testing.T) {
	now := time.Unix(1000, 0)
	got := ""
	for _, l := range leases([]libvirt.NetworkDhcpLease{
		{Ipaddr: "192.0.2.1", Expirytime: 999},
		{Ipaddr: "192.0.2.2", Expirytime: 1000},
		{Ipaddr: "2001:db8::1", Expirytime: 9000},
		{Ipaddr: "192.0.2.3", Expirytime: 1001},
		{Ipaddr: "no address", Expirytime: 5000},
		{Ipaddr: "192.0.2.4", Expirytime: 2000},
	}, now) {
		got += l.Address.String() + " "
	}
	if want := "192.0.2.4 192.0.2.3 2001:db8::1 "; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if l := leases([]libvirt.NetworkDhcpLease{{Ipaddr: "192.0.2.9"}}, now); len(l) != 1 {
		t.Errorf("a lease without end does not count")
	}
}

func TestNeighboursOfAMACAddress(t *testing.T) {
	const table = `IP address       HW type     Flags       HW address            Mask     Device
192.0.2.1        0x1         0x2         52:54:00:00:00:01     *        virbr0
192.0.2.2        0x1         0x0         52:54:00:00:00:02     *        virbr0
192.0.2.3        0x1         0x2         52:54:00:00:00:02     *        virbr0
192.0.2.4        0x1         0x6         52:54:00:00:00:02     *        virbr0
no address       0x1         0x2
`
	got := fmt.Sprint(neighbours(table, "52:54:00:00:00:02"))
	if want := "[192.0.2.3 192.0.2.4]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
