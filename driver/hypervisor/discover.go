package hypervisor

import (
	"context"
	"net"
	"net/netip"

	"github.com/digitalocean/go-libvirt"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"libvirt.org/go/libvirtxml"
)

// Discover asks a network's DHCP server for an address in the name of a guest
// that is yet to boot, and takes none. Before dnsmasq, libvirt's DHCP server,
// offers an address, it tries for three seconds whether someone has it; what it
// has found holds for half a minute, and it is the same address that it offers
// to the same MAC address again. So the guest, when it asks, gets its answer at
// once. Nothing of that is kept, and a server that does otherwise is only asked
// once more. A network that lends no addresses by IPv4 is not asked.
//
// It asks as a relay does that has the server's own address, so that the offer
// goes there, where nobody takes it, and not to the guests' bridge. There
// libvirt's network filters would learn the guest's address from it, which the
// guest need not get in the end, and drop all that it sends from another.
//
// Nothing tells whether the server has heard it.
//
// https://www.rfc-editor.org/rfc/rfc2131#section-4.1
func (c *Connection) Discover(ctx context.Context, network, mac string) error {
	var text string
	err := c.network(ctx, network, func(rpc *libvirt.Libvirt, n libvirt.Network) (err error) {
		text, err = rpc.NetworkGetXMLDesc(n, 0)
		return err
	})
	if err == nil {
		err = discover(ctx, text, mac)
	}
	return wrap(err, "ask the DHCP server of network %s for an address for %s", network, mac)
}

// discover sends a DHCPDISCOVER to the server of the network with that XML.
func discover(ctx context.Context, text, mac string) error {
	var doc libvirtxml.Network
	if err := doc.Unmarshal(text); err != nil {
		return err
	}
	hardware, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	for _, ip := range doc.IPs { // libvirt has DHCP by IPv4 in one of them at most
		server, err := prefix(ip)
		if err != nil || !server.Addr().Is4() || ip.DHCP == nil || len(lent(ip.DHCP)) == 0 {
			continue
		}
		message, err := dhcpv4.NewDiscovery(hardware, dhcpv4.WithRelay(server.Addr().AsSlice()))
		if err != nil {
			return err
		}
		return toServer(ctx, message, server.Addr())
	}
	return nil
}

// toServer sends a message to a DHCP server of this host.
func toServer(ctx context.Context, message *dhcpv4.DHCPv4, server netip.Addr) error {
	conn, err := new(net.Dialer).DialContext(ctx, "udp4", netip.AddrPortFrom(server, dhcpv4.ServerPort).String())
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write(message.ToBytes())
	return err
}
