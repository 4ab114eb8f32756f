package hypervisor

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// lending is a network whose element <dhcp> has content.
func lending(content string) string {
	return `<network><name>n</name><ip family='ipv6' address='2001:db8::1' prefix='64'/>
		<ip address='192.0.2.1' netmask='255.255.255.0'><dhcp>` + content + `</dhcp></ip></network>`
}

const (
	testMAC  = "52:54:00:00:00:01"
	otherMAC = "52:54:00:00:00:02"
)

func TestAnAddressIsChosenThatIsFree(t *testing.T) {
	now := time.Unix(1000, 0)
	lease := func(address, mac string, expiry int64) libvirt.NetworkDhcpLease {
		return libvirt.NetworkDhcpLease{Ipaddr: address, Mac: libvirt.OptString{mac}, Expirytime: expiry}
	}
	const three = "<range start='192.0.2.1' end='192.0.2.3'/>" // of which the host has the first
	for name, test := range map[string]struct {
		dhcp   string
		leases []libvirt.NetworkDhcpLease
		want   string // one of these
	}{
		"free":                         {three, nil, "192.0.2.2 192.0.2.3"},
		"lent to another":              {three, []libvirt.NetworkDhcpLease{lease("192.0.2.2", otherMAC, 1001)}, "192.0.2.3"},
		"lent without end":             {three, []libvirt.NetworkDhcpLease{lease("192.0.2.3", otherMAC, 0)}, "192.0.2.2"},
		"lent without a MAC":           {three, []libvirt.NetworkDhcpLease{{Ipaddr: "192.0.2.3"}}, "192.0.2.2"},
		"run out":                      {"<range start='192.0.2.9' end='192.0.2.9'/>", []libvirt.NetworkDhcpLease{lease("192.0.2.9", otherMAC, 1000)}, "192.0.2.9"},
		"kept for another":             {three + "<host mac='" + otherMAC + "' ip='192.0.2.3'/>", nil, "192.0.2.2"},
		"kept for a name":              {three + "<host name='other' ip='192.0.2.3'/>", nil, "192.0.2.2"},
		"lent to it":                   {three, []libvirt.NetworkDhcpLease{lease("192.0.2.3", testMAC, 2000)}, "192.0.2.3"},
		"lent to it, kept for another": {three + "<host mac='" + otherMAC + "' ip='192.0.2.3'/>", []libvirt.NetworkDhcpLease{lease("192.0.2.3", testMAC, 2000)}, "192.0.2.2"},
		"lent to it, out of the range": {three, []libvirt.NetworkDhcpLease{lease("192.0.2.9", testMAC, 2000), lease("192.0.2.3", otherMAC, 2000)}, "192.0.2.2"},
		"in a second range": {"<range start='192.0.2.1' end='192.0.2.1'/><range start='192.0.2.7' end='192.0.2.8'/>",
			[]libvirt.NetworkDhcpLease{lease("192.0.2.7", otherMAC, 2000)}, "192.0.2.8"},
		"full":     {three, []libvirt.NetworkDhcpLease{lease("192.0.2.2", otherMAC, 2000), lease("192.0.2.3", otherMAC, 2000)}, ""},
		"no range": {"<host mac='" + otherMAC + "' ip='192.0.2.3'/>", nil, ""},
	} {
		r, err := chooseAddress(lending(test.dhcp), test.leases, testMAC, now)
		switch {
		case test.want == "" && !errors.Is(err, ErrUnreservable):
			t.Errorf("%s: %v, %v", name, r, err)
		case test.want != "" && (err != nil || !strings.Contains(test.want, r.address.String()) || r.parent != 1 || r.kept):
			t.Errorf("%s: %+v, %v, not %s", name, r, err, test.want)
		}
	}
}

func TestAKeptAddressStays(t *testing.T) {
	const dhcp = "<range start='192.0.2.2' end='192.0.2.9'/><host mac='" + testMAC + "' ip='192.0.2.200'/>"
	r, err := chooseAddress(lending(dhcp), nil, testMAC, time.Now())
	if want := (reservation{testMAC, netip.MustParseAddr("192.0.2.200"), 1, true}); err != nil || r != want {
		t.Errorf("%+v, %v", r, err)
	}
}

// Two guests rarely want the same address, and each wants the same again.
func TestAddressesFollowFromTheMAC(t *testing.T) {
	seen := map[netip.Addr]int{}
	for i := range 50 {
		mac := fmt.Sprintf("52:54:%02x:00:00:%02x", 7*i%256, i)
		var first netip.Addr
		for range 2 {
			r, err := chooseAddress(lending("<range start='192.0.2.2' end='192.0.2.254'/>"), nil, mac, time.Now())
			if err != nil || first.IsValid() && r.address != first {
				t.Fatalf("%v, %v, first %v", r, err, first)
			}
			first = r.address
		}
		seen[first]++
	}
	if len(seen) < 35 {
		t.Errorf("50 MAC addresses point to %d addresses", len(seen))
	}
}
