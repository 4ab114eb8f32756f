//go:build integration

package integration

import (
	order "encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/integration/runner"
)

// serveDHCP hands out addresses on a network as someone else's DHCP server does, of which libvirt knows nothing.
func serveDHCP(t *testing.T, n network) {
	t.Helper()
	cmd := exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--port=0",
		"--interface="+n.bridge, "--except-interface=lo", "--bind-interfaces",
		fmt.Sprintf("--dhcp-range=%[1]s.2,%[1]s.254", n.prefix), "--dhcp-leasefile="+filepath.Join(t.TempDir(), "leases"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // it was killed
	})
}

func TestAGuestIsFoundWhereItsNetworkKeepsNoLeases(t *testing.T) {
	t.Parallel()
	n := newNetwork(t, false)
	serveDHCP(t, n)
	for _, source := range []string{"agent", "arp", "auto"} {
		t.Run("by "+source, func(t *testing.T) {
			job := newJob(runner.Job{})
			ex := prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q\naddress = %q", n.name, source))).runner(t), job)
			if log := string(ex.JobLog()); !strings.Contains(log, "  address  "+n.prefix+".") {
				t.Errorf("not at an address of the network:\n%s", log)
			}
			cleanUp(t, ex, job)
		})
	}
	t.Run("not by leases, and prepare says what to do", func(t *testing.T) {
		ex := start(t, newSettings(t, tiny(fmt.Sprintf("network = %q\naddress = \"lease\"", n.name))).runner(t), newJob(runner.Job{}))
		want(t, ex, ex.Prepare(t.Context()), 2, "network "+n.name+" hands out no addresses", "set address to agent or arp for image tiny")
	})
}

// lent returns the addresses that a network lends, by MAC.
func lent(t *testing.T, network string) map[string]string {
	t.Helper()
	leases := map[string]string{}
	for line := range strings.Lines(virsh(t, "net-dhcp-leases", network)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			leases[fields[2]], _, _ = strings.Cut(fields[4], "/")
		}
	}
	return leases
}

// A lease outlives its guest by an hour, and a few hundred of them fill a network.
func TestCleanupGivesTheGuestsLeaseBack(t *testing.T) {
	t.Parallel()
	n := newNetwork(t, true)
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q", n.name))).runner(t), job)
	if leases := virsh(t, "net-dhcp-leases", n.name); !strings.Contains(leases, n.prefix+".") {
		t.Errorf("the guest has no lease: %q", leases)
	}
	cleanUp(t, ex, job)
	if leases := strings.TrimSpace(virsh(t, "net-dhcp-leases", n.name)); leases != "" {
		t.Errorf("the network still lends: %s", leases)
	}
}

// The second job starts without an address, and gets one when the first is gone.
func TestAFullRangeOnlyMakesAJobWait(t *testing.T) {
	t.Parallel()
	n := smallNetwork(t, 2)
	s := newSettings(t, tiny(fmt.Sprintf("network = %q", n.name)))
	first, second := newJob(runner.Job{}), newJob(runner.Job{})
	ex, waiting := prepared(t, s.runner(t), first), start(t, s.runner(t), second)
	call := waiting.StartPrepare()
	waitFor(t, call, "  machine  ")
	cleanUp(t, ex, first)
	want(t, waiting, call.Wait(t.Context()), 0, n.prefix+".2")
}

// offers returns the DHCP server's offers on a network, as they come.
func offers(t *testing.T, n network) <-chan *dhcpv4.DHCPv4 {
	t.Helper()
	bridge, err := net.InterfaceByName(n.bridge)
	if err != nil {
		t.Fatal(err)
	}
	// Only sockets that ask for all protocols see what this host itself sends.
	protocol := order.BigEndian.Uint16(order.NativeEndian.AppendUint16(nil, syscall.ETH_P_ALL))
	socket, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	wire := os.NewFile(uintptr(socket), "packets")
	t.Cleanup(func() { wire.Close() })
	if err := syscall.Bind(socket, &syscall.SockaddrLinklayer{Protocol: protocol, Ifindex: bridge.Index}); err != nil {
		t.Fatal(err)
	}
	seen := make(chan *dhcpv4.DHCPv4, 8)
	go func() {
		const headers = 20 + 8 // of IP and UDP
		for packet := make([]byte, 1<<16); ; {
			size, err := wire.Read(packet)
			if err != nil {
				return
			}
			if size < headers || packet[0] != 0x45 || packet[9] != syscall.IPPROTO_UDP {
				continue
			}
			if m, err := dhcpv4.FromBytes(packet[headers:size]); err == nil && m.MessageType() == dhcpv4.MessageTypeOffer {
				seen <- m
			}
		}
	}()
	return seen
}

// The server first tries for three seconds whether someone has the address, and the guest has not to wait for that. Nor
// is anything offered to the guest before it asks: from an offer libvirt's network filter would learn its address.
func TestAGuestThatWasSpokenForIsOfferedItsAddressAtOnce(t *testing.T) {
	t.Parallel()
	n := cautiousNetwork(t)
	prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q", n.name))).runner(t), newJob(runner.Job{})) // or the bridge sends nothing
	offers, c := offers(t, n), connect(t, "qemu:///system")
	spokenFor, other := net.HardwareAddr{0x52, 0x54, 0, 0, 2, 1}, net.HardwareAddr{0x52, 0x54, 0, 0, 2, 2}
	if err := c.Discover(t.Context(), n.name, spokenFor.String()); err != nil {
		t.Fatal(err)
	}
	took := map[string]time.Duration{}
	for _, mac := range []net.HardwareAddr{other, spokenFor} { // the server is at it for three seconds each
		ask, err := dhcpv4.NewDiscovery(mac)
		if err != nil {
			t.Fatal(err)
		}
		server, err := net.Dial("udp4", n.prefix+".1:67")
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		if _, err := server.Write(ask.ToBytes()); err != nil {
			t.Fatal(err)
		}
		server.Close()
		select {
		case offer := <-offers:
			took[mac.String()] = time.Since(begun)
			if offer.ClientHWAddr.String() != mac.String() {
				t.Errorf("%v was offered an address when %v asked", offer.ClientHWAddr, mac)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("no offer to %v came", mac)
		}
	}
	if took[other.String()] < 2*time.Second || took[spokenFor.String()] > took[other.String()]/2 {
		t.Errorf("the server took %v", took)
	}
	if leases := lent(t, n.name); leases[spokenFor.String()] != "" {
		t.Errorf("the network lends: %v", leases)
	}
}

func TestNobodyIsAskedForAnAddressWhereNoneIsLent(t *testing.T) {
	t.Parallel()
	c := connect(t, "qemu:///system")
	if err := c.Discover(t.Context(), newNetwork(t, false).name, "52:54:00:00:02:02"); err != nil {
		t.Error(err)
	}
	if err := c.Discover(t.Context(), "no-such-network", "52:54:00:00:02:02"); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("a network that is not there: %v", err)
	}
}
