package hypervisor

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// hostOf makes the part of a capabilities document that is looked at, for a
// host of arch that also emulates i686.
func hostOf(arch, machines string, types ...string) string {
	var domains, list strings.Builder
	for _, t := range types {
		fmt.Fprintf(&domains, "<domain type='%s'/>", t)
	}
	for _, m := range strings.Fields(machines) {
		fmt.Fprintf(&list, "<machine maxCpus='255'>%s</machine>", m)
	}
	return fmt.Sprintf(`<capabilities><host><cpu><arch>%[1]s</arch></cpu></host>
		<guest><os_type>hvm</os_type><arch name='i686'><wordsize>32</wordsize><machine>isapc</machine><domain type='qemu'/></arch></guest>
		<guest><os_type>hvm</os_type><arch name='%[1]s'><wordsize>64</wordsize><emulator>/usr/bin/qemu</emulator>%[3]s%[2]s</arch></guest>
		</capabilities>`, arch, domains.String(), list.String())
}

func TestMachineTypeIsTheArchitecturesModernOne(t *testing.T) {
	for _, test := range []struct {
		arch, machines, asked string
		types                 []string
		virtType              string
		want                  Capabilities
	}{
		{"x86_64", "pc-i440fx-7.2 pc q35 isapc", "", []string{"qemu", "kvm"}, "auto", Capabilities{VirtType: "kvm", MachineType: "q35"}},
		{"x86_64", "pc-i440fx-7.2 pc q35", "pc", []string{"qemu", "kvm"}, "qemu", Capabilities{VirtType: "qemu", MachineType: "pc"}},
		{"aarch64", "virt-7.2 virt raspi3b", "", []string{"qemu"}, "auto", Capabilities{VirtType: "qemu", MachineType: "virt"}},
		{"riscv64", "spike virt", "", []string{"qemu", "kvm"}, "kvm", Capabilities{VirtType: "kvm", MachineType: "virt"}},
		{"ppc64le", "pseries powernv", "", []string{"qemu"}, "qemu", Capabilities{VirtType: "qemu", MachineType: "pseries"}},
		{"s390x", "s390-ccw-virtio", "", []string{"qemu", "kvm"}, "auto", Capabilities{VirtType: "kvm", MachineType: "s390-ccw-virtio"}},
		// QEMU's own default, where its builder left the modern one out.
		{"x86_64", "microvm", "", []string{"qemu"}, "auto", Capabilities{VirtType: "qemu"}},
		{"loongarch64", "virt", "", []string{"qemu"}, "auto", Capabilities{VirtType: "qemu"}},
	} {
		test.want.Arch = test.arch
		got, err := choose(hostOf(test.arch, test.machines, test.types...), test.virtType, test.asked)
		if err != nil || got != test.want {
			t.Errorf("%s, %s, %q: %+v, %v, want %+v", test.arch, test.virtType, test.asked, got, err, test.want)
		}
	}
}

func TestWhatTheHostCannotRunIsNamed(t *testing.T) {
	if _, err := choose(hostOf("x86_64", "q35", "qemu"), "kvm", ""); err == nil || !strings.Contains(err.Error(), "guests of type kvm") {
		t.Errorf("KVM on a host without: %v", err)
	}
	if _, err := choose("<capabilities><host><cpu><arch>x86_64</arch></cpu></host></capabilities>", "auto", ""); err == nil || !strings.Contains(err.Error(), "x86_64") {
		t.Errorf("no emulator: %v", err)
	}
	if _, err := choose("<capabilities><host/></capabilities>", "auto", ""); err == nil || !strings.Contains(err.Error(), "no processor") {
		t.Errorf("no processor: %v", err)
	}
	if _, err := choose("<capabilities", "auto", ""); err == nil {
		t.Error("a torn document is taken for an answer")
	}
}

func TestAnOfferCountsForAWhile(t *testing.T) {
	c := New("qemu:///system", t.TempDir()+"/none")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	want := Capabilities{VirtType: "kvm", Arch: "x86_64", MachineType: "q35"}
	c.offers[demand{"auto", ""}] = offer{want, time.Now()}
	if got, err := c.Capabilities(ctx, "auto", ""); err != nil || got != want {
		t.Errorf("a fresh one: %+v, %v", got, err)
	}
	if _, err := c.Capabilities(ctx, "qemu", ""); err == nil {
		t.Error("another one has been taken")
	}
	c.offers[demand{"auto", ""}] = offer{want, time.Now().Add(-freshness)}
	if _, err := c.Capabilities(ctx, "auto", ""); err == nil {
		t.Error("an old one has been taken")
	}
}

// What reads little of a document must not take another for it.
func TestAnotherDocumentIsNotTakenForLibvirts(t *testing.T) {
	for what, read := range map[string]func() error{
		"network": func() error {
			_, err := keepsLeases("<A><ip><dhcp><range/></dhcp></ip></A>")
			return err
		},
		"pool": func() error {
			_, err := folderSpace("<A type='dir'><target><path>/</path></target></A>")
			return err
		},
		"capabilities": func() error {
			_, err := choose("<A><host><cpu><arch>x86_64</arch></cpu></host><guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/></arch></guest></A>", "qemu", "")
			return err
		},
		"domainCapabilities": func() error {
			_, err := Capabilities{}.complete("<A><machine>q35</machine></A>")
			return err
		},
	} {
		if err := read(); err == nil || !strings.Contains(err.Error(), "expected element type <"+what+">") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
