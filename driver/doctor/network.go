package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// The checks of networks.

// checkNetwork looks whether a network is there and runs.
func (d *Doctor) checkNetwork(ctx context.Context, name string) Finding {
	network, err := d.hypervisor.Network(ctx, name)
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		return failure(d.defineNetwork(name), "there is no such network")
	case err != nil:
		return unknown(err)
	case !network.Active:
		return failure(d.virsh("net-start", name), "does not run")
	case !network.Autostart:
		return warning(d.virsh("net-autostart", name), "runs, but will not after a restart of the host")
	case network.Bridge == "":
		return fine("runs")
	}
	return fine("runs, on bridge %s", network.Bridge)
}

// stock is libvirt's own document of the network "default".
const stock = "/usr/share/libvirt/networks/default.xml"

// defineNetwork returns what makes a network: libvirt's own "default", or one
// like it on a bridge and a range of its own.
func (d *Doctor) defineNetwork(name string) string {
	then := []string{d.virsh("net-start", name), d.virsh("net-autostart", name)}
	if name == "default" && exists(stock) {
		return script(append([]string{d.virsh("net-define", stock)}, then...)...)
	}
	subnet := unusedSubnet()
	document := command("printf", "%s", "<network><name>"+escape(name)+"</name><forward mode='nat'/><bridge stp='off' delay='0'/>",
		"<ip address='"+subnet+".1' netmask='255.255.255.0'><dhcp>",
		"<range start='"+subnet+".2' end='"+subnet+".254'/></dhcp></ip></network>")
	return script(append([]string{document + " |\n    " + d.virsh("net-define", "/dev/stdin")}, then...)...)
}

// escape writes text for XML.
func escape(text string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(text)
}

// unusedSubnet returns the first three numbers of a private network of which the
// host has no address.
func unusedSubnet() string {
	used := hostSubnets()
	for third := 123; third < 255; third++ {
		subnet := fmt.Sprintf("192.168.%d", third)
		if !used[subnet] {
			return subnet
		}
	}
	return "192.168.255"
}

// checkAddresses looks whether an image's guests get addresses that the driver
// can find, and whether there are enough of them.
func (d *Doctor) checkAddresses(ctx context.Context, name string) Finding {
	image := d.settings.Images[name]
	network, err := d.hypervisor.Network(ctx, image.Network)
	if err != nil || !network.Active {
		return Finding{Level: Skipped, Found: "the network does not run"}
	}
	lent := 0
	for _, r := range network.Ranges {
		lent += r.Size()
	}
	subnet, largest := largestRange(network)
	switch {
	case !image.Address.ByLease():
		return fine("%s, asked of the %s", image.Network, image.Address)
	case lent+network.Reserved == 0 && image.Address == settings.AddressAuto && largest.Size() == 0:
		return fine("%s lends none: they are asked of the guest agent and the host's ARP table", image.Network)
	case lent+network.Reserved == 0 && largest.Size() == 0:
		return failure(d.setImage(name, "address", `"agent"`), "%s lends none, and the driver looks for leases alone (address)", image.Network)
	case lent+network.Reserved == 0 && image.Address == settings.AddressLease:
		return failure(d.addRange(image.Network, largest), "%s has no DHCP, and the driver looks for leases alone (address)", image.Network)
	case lent+network.Reserved == 0:
		return fine("%s has no DHCP: they are asked of the guest agent and the host's ARP table", image.Network)
	case lent+network.Reserved < d.jobs.n && largest.Size() > lent:
		remedy := d.addRange(image.Network, largest)
		if len(network.Ranges) > 0 {
			var remove []string
			for _, r := range network.Ranges {
				remove = append(remove, d.changeRange("delete", image.Network, r))
			}
			remedy = script(append(remove, remedy)...)
		}
		return failure(remedy, "%s lends %s, too few for %s at once: %s has %d", image.Network, addresses(lent), count(d.jobs.n, "job"),
			subnet, largest.Size())
	case lent+network.Reserved < d.jobs.n:
		return failure(d.jobs.fewer(lent), "%s lends %s, too few for %s at once, and has no more", image.Network, addresses(lent), count(d.jobs.n, "job"))
	case lent-network.Leases < d.jobs.n:
		return warning("", "%s lends %s, and %d are taken: %s at once need more", image.Network, addresses(lent), network.Leases, count(d.jobs.n, "job"))
	}
	return fine("%s lends %s, %d are taken, for %s at once", image.Network, addresses(lent), network.Leases, count(d.jobs.n, "job"))
}

func addresses(n int) string {
	if n == 1 {
		return "1 address"
	}
	return fmt.Sprintf("%d addresses", n)
}

func (d *Doctor) addRange(network string, r hypervisor.Range) string {
	return d.changeRange("add-last", network, r)
}

// changeRange returns what changes what a network lends, now and later.
//
// https://libvirt.org/manpages/virsh.html#net-update
func (d *Doctor) changeRange(how, network string, r hypervisor.Range) string {
	return d.virsh("net-update", network, how, "ip-dhcp-range", fmt.Sprintf("<range start='%s' end='%s'/>", r.Start, r.End), "--live", "--config")
}

// largestRange returns the largest range that a network could lend: all of its
// subnet but the host's own address, and what comes before it or after it,
// whichever is more.
func largestRange(network hypervisor.Network) (subnet netip.Prefix, largest hypervisor.Range) {
	for _, address := range network.Addresses {
		if !address.Addr().Is4() || address.Bits() > 30 {
			continue
		}
		first, last := ends(address)
		own := address.Addr()
		for _, r := range []hypervisor.Range{{Start: first, End: own.Prev()}, {Start: own.Next(), End: last}} {
			if r.Size() > largest.Size() {
				subnet, largest = address.Masked(), r
			}
		}
	}
	return subnet, largest
}

// ends returns the first and the last address of a subnet that a guest can
// have.
func ends(subnet netip.Prefix) (first, last netip.Addr) {
	first = subnet.Masked().Addr()
	b := first.As4()
	for bit := subnet.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return first.Next(), netip.AddrFrom4(b).Prev()
}

// checkBridge looks whether a network's bridge lets a new guest's packets
// through at once.
//
// https://wiki.linuxfoundation.org/networking/bridge_stp
func (d *Doctor) checkBridge(ctx context.Context, name string) Finding {
	network, err := d.hypervisor.Network(ctx, name)
	switch {
	case err != nil || !network.Active:
		return Finding{Level: Skipped, Found: "the network does not run"}
	case network.Bridge == "":
		return fine("none of libvirt's")
	}
	now := bridgeFile(network.Bridge, "stp_state")
	if now != "1" && !network.STP {
		return fine("%s passes a new guest's packets on at once", network.Bridge)
	}
	var remedy []string
	if network.STP {
		// sed is for what virsh writes, in which every attribute is in single quotes.
		remedy = append(remedy, d.virsh("net-dumpxml", "--inactive", name)+` | sed "s/ stp='on'/ stp='off'/" |`+"\n    "+d.virsh("net-define", "/dev/stdin"))
	}
	if now == "1" {
		remedy = append(remedy, command("ip", "link", "set", network.Bridge, "type", "bridge", "stp_state", "0"))
	}
	return warning(script(remedy...), "%s has STP on: it holds a new guest's first packets back for seconds%s", network.Bridge, delay(network.Bridge))
}

// checkFilter looks whether the host has the filter that an image's guests are
// to be started with.
func (d *Doctor) checkFilter(ctx context.Context, name string) Finding {
	filter := d.settings.Images[name].Filter
	known, err := d.hypervisor.Filters(ctx)
	if err != nil {
		return unknown(err)
	}
	if slices.Contains(known, filter) {
		return fine("%s", filter)
	}
	file := filepath.Join("/usr/share/libvirt/nwfilter", filepath.Base(filter)+".xml")
	near := settings.Nearest(filter, known)
	switch {
	case exists(file) && len(known) > 0:
		return failure(d.virsh("nwfilter-define", file), "there is no filter %s: no guest starts", filter)
	case near != "":
		return failure(d.setImage(name, "filter", strconv.Quote(near)), "there is no filter %s, but a %s: no guest starts", filter, near)
	case len(known) > 0:
		return failure(d.setImage(name, "filter", `"clean-traffic"`), "there is no filter %s: no guest starts", filter)
	case exists("/usr/bin/apt-get"):
		return failure(command("apt-get", "install", "--reinstall", "libvirt-daemon-config-nwfilter"), "the host has no filters: no guest starts")
	}
	return failure(command("dnf", "install", "libvirt-daemon-config-nwfilter", "libvirt-daemon-driver-nwfilter"), "the host has no filters: no guest starts")
}

// delay says what a bridge's forward delay is, which it waits twice.
func delay(bridge string) string {
	if hundredths := bridgeFile(bridge, "forward_delay"); hundredths != "" && len(hundredths) > 2 {
		return fmt.Sprintf(" (delay %s.%s s)", hundredths[:len(hundredths)-2], hundredths[len(hundredths)-2:])
	}
	return ""
}

// bridgeFile returns what the kernel says of a bridge; "" where it cannot be
// seen.
//
// https://www.kernel.org/doc/html/latest/networking/bridge.html
func bridgeFile(bridge, name string) string {
	text, err := os.ReadFile(filepath.Join("/sys/class/net", filepath.Base(bridge), "bridge", name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// hostSubnets returns the first three numbers of the host's own addresses.
func hostSubnets() map[string]bool {
	used := map[string]bool{}
	addresses, _ := net.InterfaceAddrs()
	for _, address := range addresses {
		if text := address.String(); strings.Count(text, ".") == 3 {
			used[text[:strings.LastIndexByte(text, '.')]] = true
		}
	}
	return used
}
