package hypervisor

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"libvirt.org/go/libvirtxml"
)

// releasing is how often a DHCP server that takes a lease back is waited for,
// each time for releasePause. What libvirtd takes to answer, or is away for, does
// not count.
const (
	releasing    = 500
	releasePause = 10 * time.Millisecond
)

// ReleaseLeases gives a MAC address's IPv4 leases on a network back, for a
// guest that is gone: left alone they last an hour, and a few hundred jobs
// would fill a network's range. libvirt has no call for it, so the network's
// DHCP server is sent what the guest would have sent; the server is on this
// host and listens on the network's own address. A network that keeps no leases
// or does not run has none to give back.
//
// https://www.rfc-editor.org/rfc/rfc2131#section-4.4.6
func (c *Connection) ReleaseLeases(ctx context.Context, network, mac string) error {
	for try := 0; ; try++ {
		held, servers, err := c.held(ctx, network, mac)
		if is(err, libvirt.ErrNoNetwork) || errors.Is(err, ErrInactive) || err == nil && len(held) == 0 {
			return nil
		}
		if err != nil {
			return wrap(err, "release leases of %s on network %s", mac, network)
		}
		if try >= releasing {
			return wrap(fmt.Errorf("still there after %v", releasing*releasePause), "release lease %s of %s on network %s", held[0].Ipaddr, mac, network)
		}
		if try%10 == 0 {
			for _, lease := range held {
				if err := release(ctx, lease, servers); err != nil {
					return wrap(err, "release lease %s of %s on network %s", lease.Ipaddr, mac, network)
				}
			}
		}
		select {
		case <-ctx.Done():
			return wrap(context.Cause(ctx), "release lease %s of %s on network %s", held[0].Ipaddr, mac, network)
		case <-time.After(releasePause):
		}
	}
}

// held returns a MAC's IPv4 leases and the addresses of the network's servers.
func (c *Connection) held(ctx context.Context, network, mac string) (held []libvirt.NetworkDhcpLease, servers []netip.Prefix, err error) {
	var text string
	var reply []libvirt.NetworkDhcpLease
	err = c.network(ctx, network, func(rpc *libvirt.Libvirt, n libvirt.Network) error {
		active, err := rpc.NetworkIsActive(n)
		if err != nil {
			return err
		}
		if active == 0 {
			return ErrInactive
		}
		if reply, _, err = rpc.NetworkGetDhcpLeases(n, libvirt.OptString{mac}, 1, 0); err != nil || len(reply) == 0 {
			return err
		}
		text, err = rpc.NetworkGetXMLDesc(n, 0)
		return err
	})
	if err != nil || len(reply) == 0 {
		return nil, nil, err
	}
	for _, lease := range reply {
		if libvirt.IPAddrType(lease.Type) == libvirt.IPAddrTypeIpv4 {
			held = append(held, lease)
		}
	}
	if servers, err = serversOf(text); err != nil {
		return nil, nil, err
	}
	return held, servers, nil
}

// serversOf returns a network's own addresses from its XML.
func serversOf(text string) (servers []netip.Prefix, err error) {
	var doc libvirtxml.Network
	if err := doc.Unmarshal(text); err != nil {
		return nil, err
	}
	for _, ip := range doc.IPs {
		if server, err := prefix(ip); err == nil {
			servers = append(servers, server)
		}
	}
	return servers, nil
}

// prefix returns a network's own address with the length of its prefix, which
// libvirt writes in one of two ways.
func prefix(ip libvirtxml.NetworkIP) (netip.Prefix, error) {
	address, err := netip.ParseAddr(ip.Address)
	if err != nil {
		return netip.Prefix{}, err
	}
	bits := int(ip.Prefix)
	if mask, err := netip.ParseAddr(ip.Netmask); err == nil && mask.Is4() {
		bits, _ = net.IPMask(mask.AsSlice()).Size()
	}
	server := netip.PrefixFrom(address, bits)
	if !server.IsValid() || bits == 0 {
		return netip.Prefix{}, fmt.Errorf("address %s has no network: netmask %q, prefix %d", ip.Address, ip.Netmask, ip.Prefix)
	}
	return server, nil
}

// release sends a DHCPRELEASE for a lease to the server whose network it is in.
func release(ctx context.Context, lease libvirt.NetworkDhcpLease, servers []netip.Prefix) error {
	address, err := netip.ParseAddr(lease.Ipaddr)
	if err != nil {
		return err
	}
	for _, server := range servers {
		if !server.Contains(address) {
			continue
		}
		message, err := releaseMessage(lease, address, server.Addr())
		if err != nil {
			return err
		}
		return toServer(ctx, message, server.Addr())
	}
	return errors.New("no DHCP server of the network is known")
}

func releaseMessage(lease libvirt.NetworkDhcpLease, address, server netip.Addr) (*dhcpv4.DHCPv4, error) {
	var mac net.HardwareAddr
	if len(lease.Mac) > 0 {
		var err error
		if mac, err = net.ParseMAC(lease.Mac[0]); err != nil {
			return nil, err
		}
		if len(mac) != 6 {
			return nil, fmt.Errorf("%s is no MAC address of Ethernet", lease.Mac[0])
		}
	}
	modifiers := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(dhcpv4.MessageTypeRelease),
		dhcpv4.WithHwAddr(mac),
		dhcpv4.WithClientIP(address.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(server.AsSlice())),
	}
	// The server knows a lease by the client id where the guest gave one.
	if len(lease.Clientid) > 0 {
		id, err := hex.DecodeString(strings.ReplaceAll(lease.Clientid[0], ":", ""))
		if err != nil {
			return nil, err
		}
		modifiers = append(modifiers, dhcpv4.WithOption(dhcpv4.OptClientIdentifier(id)))
	}
	return dhcpv4.New(modifiers...)
}
