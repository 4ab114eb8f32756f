package hypervisor

import (
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// Lease is an address that a network's DHCP server has lent to a guest.
type Lease struct {
	Address netip.Addr
	// Expiry is when the lease ends, to the second.
	Expiry time.Time
}

// Leases returns the unexpired leases of a MAC address on a network: those of
// IPv4 first, the newest first. A MAC can have several, since leases outlive
// guests.
//
// https://libvirt.org/html/libvirt-libvirt-network.html#virNetworkGetDHCPLeases
func (c *Connection) Leases(ctx context.Context, network, mac string) ([]Lease, error) {
	var reply []libvirt.NetworkDhcpLease
	err := c.network(ctx, network, func(rpc *libvirt.Libvirt, n libvirt.Network) (err error) {
		reply, _, err = rpc.NetworkGetDhcpLeases(n, libvirt.OptString{mac}, 1, 0)
		if err != nil || len(reply) == 0 {
			return err
		}
		active, err := rpc.NetworkIsActive(n)
		if err != nil {
			return err
		}
		if active == 0 {
			return ErrInactive // these are the leases that there were
		}
		return nil
	})
	if err != nil {
		return nil, wrap(err, "read leases of %s on network %s", mac, network)
	}
	return leases(reply, time.Now()), nil
}

func leases(reply []libvirt.NetworkDhcpLease, now time.Time) []Lease {
	var found []Lease
	for _, l := range reply {
		address, ok := usable(l.Ipaddr)
		expiry := time.Unix(l.Expirytime, 0)
		// An expiry of 0 is a lease without end.
		if !ok || l.Expirytime != 0 && !expiry.After(now) {
			continue
		}
		found = append(found, Lease{address, expiry})
	}
	slices.SortStableFunc(found, func(a, b Lease) int {
		if a.Address.Is4() != b.Address.Is4() {
			if a.Address.Is4() {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.Expiry.Unix(), a.Expiry.Unix())
	})
	return found
}

// network makes a call about a network. Which one has the name is asked once, and
// again when that one is gone: a look for a lease is half as many calls by that.
func (c *Connection) network(ctx context.Context, name string, call func(*libvirt.Libvirt, libvirt.Network) error) error {
	return c.do(ctx, func(rpc *libvirt.Libvirt) error {
		c.mu.Lock()
		n, known := c.networks[name]
		c.mu.Unlock()
		if known {
			if err := call(rpc, n); !is(err, libvirt.ErrNoNetwork) {
				return err
			}
		}
		n, err := rpc.NetworkLookupByName(name)
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.networks[name] = n
		c.mu.Unlock()
		return call(rpc, n)
	})
}

// usable returns the address that text is, and whether a guest can be reached
// at it from here. A guest has its say in it, and must not lead to the host
// itself: 0.0.0.0 would.
func usable(text string) (address netip.Addr, ok bool) {
	address, err := netip.ParseAddr(text)
	address = address.Unmap()
	return address, err == nil && address.Zone() == "" && !address.IsUnspecified() && !address.IsLoopback() &&
		!address.IsLinkLocalUnicast() && !address.IsMulticast()
}

// AddressSource is who is asked for a guest's addresses.
type AddressSource uint32

// See https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainInterfaceAddressesSource.
const (
	// Agent asks the guest agent, inside the guest.
	Agent = AddressSource(libvirt.DomainInterfaceAddressesSrcAgent)
	// ARP asks the host's own ARP table.
	ARP = AddressSource(libvirt.DomainInterfaceAddressesSrcArp)
)

// Addresses returns the addresses of the domain's interface with that MAC, as
// source tells them: those of IPv4 first, none that are only good on the link.
// A guest agent that is not up yet has none.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainInterfaceAddresses
func (c *Connection) Addresses(ctx context.Context, domain, mac string, source AddressSource) ([]netip.Addr, error) {
	if source == ARP {
		// libvirt's own call fails under Linux 6.9 and later, which end a table in
		// the message that has it, where libvirt expects one more.
		table, err := os.ReadFile("/proc/net/arp")
		if err != nil {
			return nil, fmt.Errorf("read the host's ARP table: %w", err)
		}
		return neighbours(string(table), mac), nil
	}
	var reply []libvirt.DomainInterface
	err := c.domain(ctx, domain, func(rpc *libvirt.Libvirt, d libvirt.Domain) (err error) {
		reply, err = rpc.DomainInterfaceAddresses(d, uint32(source), 0)
		return err
	})
	if is(err, libvirt.ErrAgentUnresponsive) {
		return nil, nil
	}
	if err != nil {
		return nil, wrap(err, "read addresses of domain %s", domain)
	}
	return addresses(reply, mac), nil
}

func addresses(reply []libvirt.DomainInterface, mac string) []netip.Addr {
	var found []netip.Addr
	for _, nic := range reply {
		if len(nic.Hwaddr) == 0 || nic.Hwaddr[0] != mac {
			continue
		}
		for _, a := range nic.Addrs {
			if address, ok := usable(a.Addr); ok {
				found = append(found, address)
			}
		}
	}
	slices.SortStableFunc(found, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return found
}

// neighbours returns the addresses of a MAC address in an ARP table.
//
// https://man7.org/linux/man-pages/man5/proc_pid_net.5.html
func neighbours(table, mac string) []netip.Addr {
	const complete = 0x2 // ATF_COM of linux/if_arp.h
	var found []netip.Addr
	for line := range strings.Lines(table) {
		fields := strings.Fields(line) // address, hardware type, flags, MAC address, mask, device
		if len(fields) < 4 || fields[3] != mac {
			continue
		}
		flags, err := strconv.ParseUint(fields[2], 0, 32)
		if err != nil || flags&complete == 0 {
			continue
		}
		if address, ok := usable(fields[0]); ok {
			found = append(found, address)
		}
	}
	return found
}

// KeepsLeases reports whether a network hands out addresses itself, so that
// Leases can know them. ErrNotFound when there is no such network, ErrInactive
// when it is not running.
//
// https://libvirt.org/formatnetwork.html#addressing
func (c *Connection) KeepsLeases(ctx context.Context, network string) (bool, error) {
	var text string
	err := c.network(ctx, network, func(rpc *libvirt.Libvirt, n libvirt.Network) error {
		active, err := rpc.NetworkIsActive(n)
		if err != nil {
			return err
		}
		if active == 0 {
			return ErrInactive
		}
		text, err = rpc.NetworkGetXMLDesc(n, 0)
		return err
	})
	if err != nil {
		return false, wrap(err, "network %s", network)
	}
	keeps, err := keepsLeases(text)
	return keeps, wrap(err, "read XML of network %s", network)
}

func keepsLeases(text string) (bool, error) {
	var network struct {
		XMLName xml.Name   `xml:"network"`
		Ranges  []struct{} `xml:"ip>dhcp>range"`
		Hosts   []struct{} `xml:"ip>dhcp>host"`
	}
	err := xml.Unmarshal([]byte(text), &network)
	return err == nil && len(network.Ranges)+len(network.Hosts) > 0, err
}
