package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"
)

// ErrUnreservable: no address can be kept for a guest, as the network lends
// none by IPv4, has none left, or is not libvirt's to change.
var ErrUnreservable = errors.New("no address can be reserved")

// Reserve keeps one of a network's IPv4 addresses for a MAC address, for as
// long as the network runs and until Unreserve, and returns it. One that is
// kept for it already stays. The network's DHCP server lends a kept address at
// once; of any other it first tries for three seconds whether someone has it.
//
// It is libvirt that sees to it that no address is kept twice. Where the DHCP
// server knows of a reason against it, the guest gets another address all the
// same.
//
// https://libvirt.org/html/libvirt-libvirt-network.html#virNetworkUpdate
func (c *Connection) Reserve(ctx context.Context, network, mac string) (netip.Addr, error) {
	var address netip.Addr
	err := c.network(ctx, network, func(rpc *libvirt.Libvirt, n libvirt.Network) error {
		for try := 0; ; try++ {
			text, err := rpc.NetworkGetXMLDesc(n, 0)
			if err != nil {
				return err
			}
			leases, _, err := rpc.NetworkGetDhcpLeases(n, nil, 1, 0)
			if err != nil {
				return err
			}
			r, err := chooseAddress(text, leases, mac, time.Now())
			address = r.address
			if err != nil || r.kept {
				return err
			}
			err = r.update(rpc, n, libvirt.NetworkUpdateCommandAddLast)
			// Someone else may have been faster.
			if !is(err, libvirt.ErrOperationInvalid) || try == 9 {
				return err
			}
		}
	})
	var refusal libvirt.Error
	if errors.As(err, &refusal) {
		err = fmt.Errorf("%w: %w", ErrUnreservable, err)
	}
	return address, wrap(err, "reserve an address for %s on network %s", mac, network)
}

// Unreserve ends what Reserve began. A network that is not there, or does not
// run, keeps no address.
func (c *Connection) Unreserve(ctx context.Context, network, mac string) error {
	err := c.network(ctx, network, func(rpc *libvirt.Libvirt, n libvirt.Network) error {
		text, err := rpc.NetworkGetXMLDesc(n, 0)
		if err != nil {
			return err
		}
		var doc libvirtxml.Network
		if err := doc.Unmarshal(text); err != nil {
			return err
		}
		if r, found := reservationOf(doc, mac); found {
			return r.update(rpc, n, libvirt.NetworkUpdateCommandDelete)
		}
		return nil
	})
	if is(err, libvirt.ErrNoNetwork) || is(err, libvirt.ErrOperationInvalid) {
		return nil
	}
	return wrap(err, "end the reservation of an address for %s on network %s", mac, network)
}

// reservation is an address that a network keeps, or is to keep, for a MAC
// address.
type reservation struct {
	mac     string
	address netip.Addr
	parent  int32 // which of the network's elements <ip> it is in
	kept    bool
}

// update makes or ends the reservation on a network that runs, and not in its
// definition.
func (r reservation) update(rpc *libvirt.Libvirt, n libvirt.Network, command libvirt.NetworkUpdateCommand) error {
	text, err := (&libvirtxml.NetworkDHCPHost{MAC: r.mac, IP: r.address.String()}).Marshal()
	if err != nil {
		return err
	}
	return rpc.NetworkUpdateCompat(n, command, libvirt.NetworkSectionIPDhcpHost, r.parent, text, libvirt.NetworkUpdateAffectLive)
}

// reservationOf returns the IPv4 address that a network keeps for a MAC address.
func reservationOf(doc libvirtxml.Network, mac string) (r reservation, found bool) {
	for i, ip := range doc.IPs {
		if ip.DHCP == nil {
			continue
		}
		for _, host := range ip.DHCP.Hosts {
			if address, err := netip.ParseAddr(host.IP); err == nil && address.Is4() && host.MAC == mac {
				return reservation{mac, address, int32(i), true}, true
			}
		}
	}
	return reservation{}, false
}

// chooseAddress returns the address that a network keeps for a MAC address, or
// else the one that it is to keep: what the MAC address has been lent, or one
// that follows from it and is free.
func chooseAddress(text string, leases []libvirt.NetworkDhcpLease, mac string, now time.Time) (reservation, error) {
	var doc libvirtxml.Network
	if err := doc.Unmarshal(text); err != nil {
		return reservation{}, err
	}
	if kept, found := reservationOf(doc, mac); found {
		return kept, nil
	}
	taken := map[netip.Addr]bool{}
	for _, ip := range doc.IPs {
		if own, err := netip.ParseAddr(ip.Address); err == nil {
			taken[own] = true
		}
		if ip.DHCP == nil {
			continue
		}
		for _, host := range ip.DHCP.Hosts {
			if address, err := netip.ParseAddr(host.IP); err == nil {
				taken[address] = true
			}
		}
	}
	var had []netip.Addr
	for _, lease := range leases {
		address, err := netip.ParseAddr(lease.Ipaddr)
		switch {
		case err != nil || lease.Expirytime != 0 && lease.Expirytime <= now.Unix():
		case len(lease.Mac) > 0 && lease.Mac[0] == mac:
			had = append(had, address)
		default:
			taken[address] = true
		}
	}
	for i, ip := range doc.IPs { // libvirt has DHCP by IPv4 in one of them at most
		if ip.DHCP == nil || len(lent(ip.DHCP)) == 0 {
			continue
		}
		address, found := free(lent(ip.DHCP), taken, had, mac)
		if !found {
			return reservation{}, fmt.Errorf("%w: all that it lends are taken", ErrUnreservable)
		}
		return reservation{mac, address, int32(i), false}, nil
	}
	return reservation{}, fmt.Errorf("%w: it lends none by IPv4", ErrUnreservable)
}

// free returns an address of the ranges that is not taken: one of had, or else
// the next from where the MAC address points to, so that a machine gets the same
// one again and any two rarely want the same.
func free(ranges []Range, taken map[netip.Addr]bool, had []netip.Addr, mac string) (address netip.Addr, found bool) {
	size := 0
	for _, r := range ranges {
		size += r.Size()
		for _, address := range had {
			if !taken[address] && r.holds(address) {
				return address, true
			}
		}
	}
	if size == 0 {
		return netip.Addr{}, false
	}
	hash := fnv.New32a()
	hash.Write([]byte(mac))
	first := int(hash.Sum32() % uint32(size))
	for i := range min(size, len(taken)+1) {
		address := nth(ranges, (first+i)%size)
		if !taken[address] {
			return address, true
		}
	}
	return netip.Addr{}, false
}

// nth returns address number i of the ranges, from 0.
func nth(ranges []Range, i int) netip.Addr {
	for _, r := range ranges {
		if i < r.Size() {
			return r.at(i)
		}
		i -= r.Size()
	}
	return netip.Addr{}
}
