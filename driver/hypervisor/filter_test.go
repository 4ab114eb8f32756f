package hypervisor

import (
	"net/netip"
	"strings"
	"testing"
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
