//go:build integration

package integration

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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
	net := newNetwork(t, false)
	serveDHCP(t, net)
	for _, source := range []string{"agent", "arp", "auto"} {
		t.Run("by "+source, func(t *testing.T) {
			job := newJob(runner.Job{})
			ex := prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q\naddress = %q", net.name, source))).runner(t), job)
			if log := string(ex.JobLog()); !strings.Contains(log, "  address  "+net.prefix+".") {
				t.Errorf("not at an address of the network:\n%s", log)
			}
			cleanUp(t, ex, job)
		})
	}
	t.Run("not by leases, and prepare says what to do", func(t *testing.T) {
		ex := start(t, newSettings(t, tiny(fmt.Sprintf("network = %q\naddress = \"lease\"", net.name))).runner(t), newJob(runner.Job{}))
		want(t, ex, ex.Prepare(t.Context()), 2, "network "+net.name+" hands out no addresses", "set address to agent or arp for image tiny")
	})
}

// A lease outlives its guest by an hour, and a few hundred of them fill a network.
func TestCleanupGivesTheGuestsLeaseBack(t *testing.T) {
	t.Parallel()
	net := newNetwork(t, true)
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q", net.name))).runner(t), job)
	if leases := virsh(t, "net-dhcp-leases", net.name); !strings.Contains(leases, net.prefix+".") {
		t.Errorf("the guest has no lease: %q", leases)
	}
	cleanUp(t, ex, job)
	if leases := strings.TrimSpace(virsh(t, "net-dhcp-leases", net.name)); leases != "" {
		t.Errorf("the network still lends: %s", leases)
	}
}
