package hypervisor

import (
	"fmt"
	"testing"
)

func TestQEMUsUserIsInTheHostsCapabilities(t *testing.T) {
	const caps = `<capabilities><host><cpu><arch>x86_64</arch></cpu>%s</host></capabilities>`
	const dac = `<secmodel><model>apparmor</model><doi>0</doi></secmodel><secmodel><model>dac</model><doi>0</doi>
		<baselabel type='kvm'>%s</baselabel></secmodel>`
	for name, test := range map[string]struct {
		text     string
		uid, gid int
		ok       bool
	}{
		"Debian":         {fmt.Sprintf(caps, fmt.Sprintf(dac, "+64055:+106")), 64055, 106, true},
		"names":          {fmt.Sprintf(caps, fmt.Sprintf(dac, "qemu:qemu")), 0, 0, false},
		"another model":  {fmt.Sprintf(caps, "<secmodel><model>selinux</model><doi>0</doi></secmodel>"), 0, 0, false},
		"no model":       {fmt.Sprintf(caps, ""), 0, 0, false},
		"not a document": {"<", 0, 0, false},
	} {
		if uid, gid, ok := baseLabel(test.text); uid != test.uid || gid != test.gid || ok != test.ok {
			t.Errorf("%s: %d, %d, %v", name, uid, gid, ok)
		}
	}
}

func TestANetworksDocumentsSayWhatItLends(t *testing.T) {
	var n Network
	err := n.read(`<network><bridge name='virbr0' stp='off' delay='0'/>
		<ip address='192.168.122.1' netmask='255.255.255.0'><dhcp><range start='192.168.122.2' end='192.168.122.9'/>
		<range start='192.168.122.20' end='192.168.122.29'/><host mac='52:54:00:00:00:01' ip='192.168.122.99'/></dhcp></ip>
		<ip family='ipv6' address='fd00::1' prefix='64'><dhcp><range start='fd00::100' end='fd00::1ff'/></dhcp></ip></network>`,
		`<network><bridge name='virbr0' stp='on' delay='0'/></network>`)
	lent := 0
	for _, r := range n.Ranges {
		lent += r.Size()
	}
	if err != nil || n.Bridge != "virbr0" || !n.STP || lent != 18 || n.Reserved != 1 || fmt.Sprint(n.Addresses) != "[192.168.122.1/24 fd00::1/64]" {
		t.Errorf("%+v, %v", n, err)
	}
	n = Network{}
	if err := n.read("<network><forward mode='bridge'/><bridge name='br0'/></network>", "<network><bridge name='br0'/></network>"); err != nil || n.STP || n.Bridge != "br0" {
		t.Errorf("a bridge of the host's: %+v, %v", n, err)
	}
	if (Range{}).Size() != 0 {
		t.Error("no range has addresses")
	}
}

func TestOnlyDisksThatADomainMayWriteToCount(t *testing.T) {
	disks, err := writableDisks(`<domain type='qemu'><name>d</name><devices>
		<disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk>
		<disk type='file'><source file='/b'/><target dev='vdb'/></disk>
		<disk type='file' device='disk'><source file='/c'/><target dev='vdc'/><readonly/></disk>
		<disk type='file' device='cdrom'><source file='/d'/><target dev='sda'/></disk>
		<disk type='file' device='disk'><source file='/e'/><target dev='vde'/><transient/></disk>
		<disk type='block' device='lun'><source dev='/dev/f'/><target dev='sdb'/></disk>
		<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdg'/></disk>
		<disk type='file' device='floppy'><target dev='fda'/></disk></devices></domain>`)
	if got := fmt.Sprint(disks); err != nil || got != "[{  vda /a  } {  vdb /b  } {  sdb /dev/f  } {  vdg  p v}]" {
		t.Errorf("%s, %v", got, err)
	}
	if disks, err := writableDisks("<domain type='qemu'><name>d</name></domain>"); err != nil || disks != nil {
		t.Errorf("no devices: %v, %v", disks, err)
	}
}

func TestVersionsAreUnpacked(t *testing.T) {
	if got := version(9_000_000) + " " + version(7_002_022); got != "9.0.0 7.2.22" {
		t.Error(got)
	}
}
