package hypervisor

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/digitalocean/go-libvirt"
)

func TestTheFilterOfAnInterfaceIsToldItsAddress(t *testing.T) {
	const domain = `<domain><devices>
		<interface type="network"><mac address="52:54:00:00:00:01"/><source network="other"/></interface>
		<interface type="network"><mac address="52:54:00:00:00:02"/><source network="default"/><target dev="vnet7"/>
			<filterref filter="clean-traffic"><parameter name="IP" value="192.0.2.1"/></filterref></interface>
	</devices></domain>`
	nic, err := filtered(domain, "52:54:00:00:00:02", netip.MustParseAddr("192.0.2.9"))
	if err != nil || strings.Count(nic, "<parameter ") != 1 || !strings.Contains(nic, `<parameter name="IP" value="192.0.2.9">`) ||
		!strings.Contains(nic, `dev="vnet7"`) || strings.Contains(nic, "00:01") {
		t.Errorf("%q, %v", nic, err)
	}
	for text, mac := range map[string]string{domain: "52:54:00:00:00:01", "<domain></domain>": "52:54:00:00:00:02"} {
		if nic, err := filtered(text, mac, netip.MustParseAddr("192.0.2.9")); err != nil || nic != "" {
			t.Errorf("no filter: %q, %v", nic, err)
		}
	}
	if _, err := filtered("<domain", "52:54:00:00:00:01", netip.Addr{}); err == nil {
		t.Error("a torn domain is no error")
	}
}

// libvirtd was killed as it started another guest, and removes what came of that.
func TestAPortWithAnotherGuestsFilterIsNotTheEnd(t *testing.T) {
	const lookUp, state, create = 23, 212, 196
	domain := slices.Concat(counted(1, "d\x00\x00\x00"), make([]byte, 16), words(0xffffffff))
	for _, test := range []struct {
		refused int // how often
		code    libvirt.ErrorNumber
		text    string
		want    string // the error, if any
		starts  int
	}{
		{2, libvirt.ErrOperationFailed, "operation failed: binding 'vnet10' is already being removed", "", 3},
		{9, libvirt.ErrOperationFailed, "operation failed: binding 'vnet10' already exists", "'vnet10' already exists", 5},
		{9, libvirt.ErrOperationFailed, "operation failed: no room", "start domain d: operation failed: no room", 1},
		{9, libvirt.ErrInternalError, "internal error: binding 'vnet10'", "internal error: binding 'vnet10'", 1},
	} {
		starts := 0
		c := libvirtd(t, func(_ net.Conn, h header) []byte {
			payload := domain
			switch h.number {
			case lookUp:
			case state:
				payload = words(uint32(libvirt.DomainShutoff), 0)
			case create:
				if starts++; starts <= test.refused {
					return frame(h.procedure, kindReply, h.serial, statusError, failed(test.code, test.text))
				}
			default:
				t.Errorf("procedure %d is called", h.number)
			}
			return frame(h.procedure, kindReply, h.serial, statusOK, payload)
		})
		err := within(t, func() error { return c.StartDomain(t.Context(), "d") })
		if starts != test.starts || (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v after %d starts, want %d", test.text, err, starts, test.starts)
		}
	}
}
