package hypervisor

import (
	"encoding/hex"
	"net/netip"
	"testing"

	"github.com/digitalocean/go-libvirt"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"libvirt.org/go/libvirtxml"
)

// A masked address is the network's, and nobody listens there.
func TestServerAddressKeepsItsHostPart(t *testing.T) {
	for _, ip := range []libvirtxml.NetworkIP{
		{Address: "192.0.2.1", Netmask: "255.255.255.0"},
		{Address: "192.0.2.1", Prefix: 24},
	} {
		if got, err := prefix(ip); err != nil || got.String() != "192.0.2.1/24" {
			t.Errorf("%+v: %v, %v", ip, got, err)
		}
	}
}

func TestReleaseMessageIsWhatTheGuestWouldSend(t *testing.T) {
	lease := libvirt.NetworkDhcpLease{
		Ipaddr: "192.0.2.9", Mac: libvirt.OptString{"52:54:00:01:02:03"}, Clientid: libvirt.OptString{"ff:00:01"},
	}
	message, err := releaseMessage(lease, netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := dhcpv4.FromBytes(message.ToBytes())
	if err != nil {
		t.Fatal(err)
	}
	if m.OpCode != dhcpv4.OpcodeBootRequest || m.MessageType() != dhcpv4.MessageTypeRelease ||
		m.ClientIPAddr.String() != "192.0.2.9" || m.ClientHWAddr.String() != "52:54:00:01:02:03" ||
		m.ServerIdentifier().String() != "192.0.2.1" || hex.EncodeToString(m.Options.Get(dhcpv4.OptionClientIdentifier)) != "ff0001" {
		t.Errorf("message: %v", m.Summary())
	}
	lease.Clientid = libvirt.OptString{"not hexadecimal"}
	if _, err := releaseMessage(lease, netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("192.0.2.1")); err == nil {
		t.Error("an unreadable client id is sent")
	}
}
