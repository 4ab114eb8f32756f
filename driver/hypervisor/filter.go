package hypervisor

import (
	"context"
	"net/netip"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"
)

// FilterAddress tells the network filter of a running domain's interface which
// address the guest has. libvirt learns that by itself, from the first address that
// it sees the guest use or be offered, and the guest may end up with another: a
// DHCP server can offer one address to two, and lends it to who is faster. The
// filter then drops whatever the guest sends. An interface that has no filter is
// left as it is.
//
// https://libvirt.org/formatnwfilter.html#automatic-ip-address-detection
func (c *Connection) FilterAddress(ctx context.Context, domain, mac string, address netip.Addr) error {
	return wrap(c.domain(ctx, domain, func(rpc *libvirt.Libvirt, d libvirt.Domain) error {
		text, err := rpc.DomainGetXMLDesc(d, 0)
		if err != nil {
			return err
		}
		nic, err := filtered(text, mac, address)
		if err != nil || nic == "" {
			return err
		}
		return rpc.DomainUpdateDeviceFlags(d, nic, libvirt.DomainDeviceModifyLive)
	}), "tell the network filter of domain %s the guest's address %s", domain, address)
}

// filtered returns the XML of a domain's interface with the address in its filter,
// and nothing when there is none.
func filtered(text, mac string, address netip.Addr) (string, error) {
	var doc libvirtxml.Domain
	if err := doc.Unmarshal(text); err != nil {
		return "", err
	}
	if doc.Devices == nil {
		return "", nil
	}
	for _, nic := range doc.Devices.Interfaces {
		if nic.MAC == nil || nic.MAC.Address != mac || nic.FilterRef == nil {
			continue
		}
		nic.FilterRef.Parameters = []libvirtxml.DomainInterfaceFilterParam{{Name: "IP", Value: address.String()}}
		return nic.Marshal()
	}
	return "", nil
}

// filterRemains reports whether err says that there is a filter already under the
// name that libvirt has chosen for a guest's port. libvirtd leaves one for a while,
// or for good, when it is killed as it starts or ends a guest. It has no number for
// this.
func filterRemains(err error) bool {
	return is(err, libvirt.ErrOperationFailed) && strings.Contains(err.Error(), "binding '")
}
