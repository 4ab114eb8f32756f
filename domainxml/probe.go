package domainxml

import (
	"fmt"

	"libvirt.org/go/libvirtxml"
)

// Probe returns a machine without disk and network for virDomainCreateXML: its
// firmware finds nothing to boot. It shows whether the host can run a machine
// with the CPU that a job's machine would have.
func Probe(name string, host Host) (string, error) {
	m := Machine{Name: name, Host: host}
	domain := libvirtxml.Domain{
		Type:       host.VirtType,
		Name:       name,
		Title:      "libvirt-driver tries what the host can run",
		Memory:     &libvirtxml.DomainMemory{Value: 64, Unit: "MiB"},
		VCPU:       &libvirtxml.DomainVCPU{Value: 1},
		OS:         &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: host.Arch, Machine: host.MachineType, Type: "hvm"}},
		Features:   m.features(),
		CPU:        m.cpu(),
		OnPoweroff: "destroy",
		OnReboot:   "restart",
		OnCrash:    "destroy",
		Devices: &libvirtxml.DomainDeviceList{
			Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
			MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
		},
	}
	text, err := domain.Marshal()
	if err != nil {
		return "", fmt.Errorf("write domain XML of %s: %w", name, err)
	}
	return text, nil
}
