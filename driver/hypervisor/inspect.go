package hypervisor

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"
)

// Socket returns the socket that is dialled.
func (c *Connection) Socket() (string, error) { return c.path() }

// Versions are the versions of the host's parts, as in "9.0.0".
type Versions struct {
	Libvirt, Hypervisor string
}

// Versions returns the versions of libvirt and of the hypervisor that runs
// guests, which is QEMU's.
//
// https://libvirt.org/html/libvirt-libvirt-host.html#virConnectGetLibVersion
// https://libvirt.org/html/libvirt-libvirt-host.html#virConnectGetVersion
func (c *Connection) Versions(ctx context.Context) (Versions, error) {
	var daemon, hypervisor uint64
	err := c.do(ctx, func(rpc *libvirt.Libvirt) (err error) {
		if daemon, err = rpc.ConnectGetLibVersion(); err != nil {
			return err
		}
		hypervisor, err = rpc.ConnectGetVersion()
		return err
	})
	return Versions{version(daemon), version(hypervisor)}, wrap(err, "read the versions of libvirt and QEMU")
}

// version writes what libvirt packs into a number.
func version(n uint64) string {
	return fmt.Sprintf("%d.%d.%d", n/1_000_000, n/1_000%1_000, n%1_000)
}

// User returns the user and group that QEMU runs as; ok is false where libvirt
// does not say.
//
// https://libvirt.org/formatcaps.html#host-capabilities
func (c *Connection) User(ctx context.Context) (uid, gid int, ok bool, err error) {
	var text string
	err = c.do(ctx, func(rpc *libvirt.Libvirt) (err error) {
		text, err = rpc.ConnectGetCapabilities()
		return err
	})
	if err != nil {
		return 0, 0, false, wrap(err, "read the host's capabilities")
	}
	uid, gid, ok = baseLabel(text)
	return uid, gid, ok, nil
}

// baseLabel reads the label "+UID:+GID" that libvirt's security model for users
// and groups gives to guests.
func baseLabel(text string) (uid, gid int, ok bool) {
	var host libvirtxml.Caps
	if err := host.Unmarshal(text); err != nil {
		return 0, 0, false
	}
	for _, model := range host.Host.SecModel {
		if model.Name != "dac" || len(model.Labels) == 0 {
			continue
		}
		user, group, _ := strings.Cut(model.Labels[0].Value, ":")
		uid, errUser := strconv.Atoi(strings.TrimPrefix(user, "+"))
		gid, errGroup := strconv.Atoi(strings.TrimPrefix(group, "+"))
		return uid, gid, errUser == nil && errGroup == nil
	}
	return 0, 0, false
}

// Pool is how a storage pool stands.
type Pool struct {
	// Active tells that it runs, Autostart that it will after a restart.
	Active, Autostart bool
	// Path is the folder or device that it is over; "" when it is over none.
	Path string
	// Available is how many bytes it can still take.
	Available uint64
}

// Pool looks a storage pool up. ErrNotFound when there is none.
//
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStoragePoolGetInfo
// https://libvirt.org/formatstorage.html#target-elements
func (c *Connection) Pool(ctx context.Context, name string) (Pool, error) {
	var pool Pool
	var text string
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		p, err := rpc.StoragePoolLookupByName(name)
		if err != nil {
			return err
		}
		state, _, _, available, err := rpc.StoragePoolGetInfo(p)
		if err != nil {
			return err
		}
		autostart, err := rpc.StoragePoolGetAutostart(p)
		if err != nil {
			return err
		}
		pool = Pool{Active: libvirt.StoragePoolState(state) == libvirt.StoragePoolRunning, Autostart: autostart != 0, Available: available}
		text, err = rpc.StoragePoolGetXMLDesc(p, 0)
		return err
	})
	if err != nil {
		return pool, wrap(err, "pool %s", name)
	}
	var doc libvirtxml.StoragePool
	if err := doc.Unmarshal(text); err != nil {
		return pool, wrap(err, "read XML of pool %s", name)
	}
	if doc.Target != nil {
		pool.Path = doc.Target.Path
	}
	return pool, nil
}

// Layout returns what libvirt takes a volume for: its format, and the file that
// it is an overlay on, or "".
//
// https://libvirt.org/formatstorage.html#storage-volume-xml
func (c *Connection) Layout(ctx context.Context, pool, name string) (format, backing string, err error) {
	var text string
	err = c.volume(ctx, pool, name, func(rpc *libvirt.Libvirt, vol libvirt.StorageVol) (err error) {
		text, err = rpc.StorageVolGetXMLDesc(vol, 0)
		return err
	})
	if err != nil {
		return "", "", wrap(err, "volume %s in pool %s", name, pool)
	}
	var doc libvirtxml.StorageVolume
	if err := doc.Unmarshal(text); err != nil {
		return "", "", wrap(err, "read XML of volume %s in pool %s", name, pool)
	}
	if doc.Target != nil && doc.Target.Format != nil {
		format = doc.Target.Format.Type
	}
	if doc.BackingStore != nil {
		backing = doc.BackingStore.Path
	}
	return format, backing, nil
}

// Network is how a network stands.
type Network struct {
	// Active tells that it runs, Autostart that it will after a restart.
	Active, Autostart bool
	// Bridge is the host's bridge of the network; "" for a network without one
	// that libvirt manages.
	Bridge string
	// STP tells whether the bridge will have the spanning tree protocol on when
	// the network is started the next time.
	STP bool
	// Addresses are the host's own on the network, each with the length of its
	// prefix.
	Addresses []netip.Prefix
	// Ranges are what the network's DHCP server lends by IPv4.
	Ranges []Range
	// Reserved counts the addresses that it keeps for guests of a known MAC or
	// name.
	Reserved int
	// Leases counts the IPv4 addresses that are lent now.
	Leases int
}

// Range is a range of addresses, both ends included.
type Range struct {
	Start, End netip.Addr
}

// Size returns how many addresses a range of IPv4 has; 0 for no range.
func (r Range) Size() int {
	if !r.Start.Is4() || !r.End.Is4() {
		return 0
	}
	return max(0, int(number(r.End))-int(number(r.Start))+1)
}

// holds reports whether an address is in a range.
func (r Range) holds(a netip.Addr) bool {
	return a.Is4() && r.Start.Compare(a) <= 0 && a.Compare(r.End) <= 0
}

// at returns a range's address number i, from 0.
func (r Range) at(i int) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, number(r.Start)+uint32(i))))
}

// number returns an address of IPv4 as a number.
func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// Network looks a network up. ErrNotFound when there is none.
//
// https://libvirt.org/formatnetwork.html
// https://libvirt.org/html/libvirt-libvirt-network.html#virNetworkGetDHCPLeases
func (c *Connection) Network(ctx context.Context, name string) (Network, error) {
	var network Network
	var now, later string
	err := c.network(ctx, name, func(rpc *libvirt.Libvirt, n libvirt.Network) error {
		active, err := rpc.NetworkIsActive(n)
		if err != nil {
			return err
		}
		autostart, err := rpc.NetworkGetAutostart(n)
		if err != nil {
			return err
		}
		network = Network{Active: active != 0, Autostart: autostart != 0}
		if now, err = rpc.NetworkGetXMLDesc(n, 0); err != nil {
			return err
		}
		if later, err = rpc.NetworkGetXMLDesc(n, uint32(libvirt.NetworkXMLInactive)); err != nil || !network.Active {
			return err
		}
		leases, _, err := rpc.NetworkGetDhcpLeases(n, nil, 1, 0)
		for _, lease := range leases {
			if libvirt.IPAddrType(lease.Type) == libvirt.IPAddrTypeIpv4 {
				network.Leases++
			}
		}
		return err
	})
	if err != nil {
		return network, wrap(err, "network %s", name)
	}
	return network, wrap(network.read(now, later), "read XML of network %s", name)
}

// read takes over what a network's documents say: of now, and of the next time
// that it is started.
func (n *Network) read(now, later string) error {
	var doc, next libvirtxml.Network
	if err := doc.Unmarshal(now); err != nil {
		return err
	}
	if err := next.Unmarshal(later); err != nil {
		return err
	}
	if doc.Bridge != nil {
		n.Bridge = doc.Bridge.Name
	}
	// A bridge that libvirt manages always says which.
	n.STP = next.Bridge != nil && next.Bridge.STP == "on"
	for _, ip := range doc.IPs {
		address, err := prefix(ip)
		if err != nil {
			continue
		}
		n.Addresses = append(n.Addresses, address)
		if ip.DHCP == nil || !address.Addr().Is4() {
			continue
		}
		n.Reserved += len(ip.DHCP.Hosts)
		n.Ranges = append(n.Ranges, lent(ip.DHCP)...)
	}
	return nil
}

// lent returns what a DHCP server lends by IPv4.
func lent(dhcp *libvirtxml.NetworkDHCP) (ranges []Range) {
	for _, r := range dhcp.Ranges {
		start, errStart := netip.ParseAddr(r.Start)
		end, errEnd := netip.ParseAddr(r.End)
		if errStart == nil && errEnd == nil && start.Is4() && end.Is4() {
			ranges = append(ranges, Range{start, end})
		}
	}
	return ranges
}

// Filters returns the names of the network filters that the host has; none
// where its libvirt is without them.
//
// https://libvirt.org/html/libvirt-libvirt-nwfilter.html#virConnectListAllNWFilters
func (c *Connection) Filters(ctx context.Context) ([]string, error) {
	var names []string
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		names = nil
		filters, _, err := rpc.ConnectListAllNwfilters(1, 0)
		for _, filter := range filters {
			names = append(names, filter.Name)
		}
		return err
	})
	if is(err, libvirt.ErrNoSupport) {
		return nil, nil
	}
	return names, wrap(err, "list network filters")
}

// Disk is a disk that a domain may write to.
type Disk struct {
	// Domain is whose it is, and State that domain's.
	Domain string
	State  State
	// Target is the disk's name in the domain, such as "vda".
	Target string
	// Path is the disk's file or device on the host; Pool and Volume name it
	// where the domain does so.
	Path, Pool, Volume string
}

// Disks returns the disks of all domains, running or not, that they may write
// to: their own, not what is below an overlay.
//
// https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms
func (c *Connection) Disks(ctx context.Context) ([]Disk, error) {
	var disks []Disk
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		disks = nil
		found, _, err := rpc.ConnectListAllDomains(1, 0)
		if err != nil {
			return err
		}
		for _, domain := range found {
			text, err := rpc.DomainGetXMLDesc(domain, 0)
			if is(err, libvirt.ErrNoDomain) {
				continue // undefined meanwhile
			}
			if err != nil {
				return err
			}
			state, reason, err := rpc.DomainGetState(domain, 0)
			if is(err, libvirt.ErrNoDomain) {
				continue
			}
			if err != nil {
				return err
			}
			writable, err := writableDisks(text)
			if err != nil {
				return fmt.Errorf("domain %s: %w", domain.Name, err)
			}
			for _, disk := range writable {
				disk.Domain, disk.State = domain.Name, newState(libvirt.DomainState(state), reason)
				disks = append(disks, disk)
			}
		}
		return nil
	})
	return disks, wrap(err, "look at the disks of all domains")
}

// writableDisks returns the disks of a domain's document that it may write to.
func writableDisks(text string) ([]Disk, error) {
	var doc libvirtxml.Domain
	if err := doc.Unmarshal(text); err != nil {
		return nil, err
	}
	if doc.Devices == nil {
		return nil, nil
	}
	var disks []Disk
	for _, d := range doc.Devices.Disks {
		if d.ReadOnly != nil || d.Transient != nil || d.Device == "cdrom" || d.Source == nil {
			continue
		}
		disk := Disk{}
		if d.Target != nil {
			disk.Target = d.Target.Dev
		}
		switch {
		case d.Source.File != nil:
			disk.Path = d.Source.File.File
		case d.Source.Block != nil:
			disk.Path = d.Source.Block.Dev
		case d.Source.Volume != nil:
			disk.Pool, disk.Volume = d.Source.Volume.Pool, d.Source.Volume.Volume
		}
		if disk.Path != "" || disk.Volume != "" { // a drive may be empty
			disks = append(disks, disk)
		}
	}
	return disks, nil
}

// Try starts a domain that libvirt knows only while it runs, and destroys when
// this connection ends, however it does.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainCreateXML
func (c *Connection) Try(ctx context.Context, name, xml string) error {
	return wrap(c.do(ctx, func(rpc *libvirt.Libvirt) error {
		_, err := rpc.DomainCreateXML(xml, libvirt.DomainStartAutodestroy)
		return err
	}), "try domain %s", name)
}
