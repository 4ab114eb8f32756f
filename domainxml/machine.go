// Package domainxml turns a description of a job's machine into libvirt's
// domain XML (https://libvirt.org/formatdomain.html), through the structs of
// libvirtxml alone, so that no text from outside can become markup.
package domainxml

import (
	"fmt"

	"libvirt.org/go/libvirtxml"
)

// Machine describes a job's machine. Every field is required unless its
// comment says otherwise.
type Machine struct {
	// Name is the domain's name.
	Name string
	// Host is what the host can offer to the machine.
	Host Host
	// CPU overrides the best CPU: "host-passthrough", "host-model", "maximum"
	// or the name of a model. Optional.
	CPU string
	// VCPUs is the number of virtual CPUs, 1 or more.
	VCPUs uint
	// Memory is the guest's memory in bytes.
	Memory uint64
	// UEFI boots by UEFI in place of the machine's own firmware. libvirt
	// picks the firmware and makes its NVRAM.
	UEFI bool
	// Kernel, Initrd and Cmdline boot a kernel directly. Optional.
	Kernel, Initrd, Cmdline string
	// Disk is the overlay that the machine writes to.
	Disk Disk
	// Network is the libvirt network and MAC the address on it.
	Network, MAC string
	// Isolated keeps the guest from reaching other isolated guests of the
	// network; it needs a Linux bridge.
	Isolated bool
	// Filter is the libvirt network filter that the guest's packets pass; it
	// needs a Linux bridge, too. Optional.
	Filter string
	// Limits bounds what the guest may take of the host's disk and network.
	Limits Limits
	// ConsoleLog is the host's file that receives what the guest writes to
	// its serial console.
	ConsoleLog string
	// Provision is the host's file that the guest's systemd executes as it boots,
	// in the format of tmpfiles.d. QEMU reads it when it starts. Optional.
	Provision string
	// Frozen says what it takes for a machine whose memory is to be saved or that
	// starts from what was saved; both are described with the same. Optional.
	Frozen *Frozen
	// Metadata says whose machine it is.
	Metadata Metadata
}

// Frozen is what a machine that is saved and restored has more than others.
type Frozen struct {
	// UUID is the domain's.
	UUID string
	// Generation is the generation ID with which the machine is saved; each time
	// that it is restored libvirt makes another, by which the guest's kernel knows.
	// See https://libvirt.org/formatdomain.html#general-metadata.
	Generation string
}

// Door and DoorShell are the names of the virtio channels by which the host gets into
// a guest that was saved: one leads to an SSH server, the other to the shell that has
// it go on.
const (
	Door      = "org.libvirt-driver.door"
	DoorShell = "org.libvirt-driver.door.shell"
)

// Limits bounds a guest's I/O; 0 is no limit.
type Limits struct {
	// DiskRate is in bytes per second and DiskIOPS in operations per second, of
	// reads and writes together.
	DiskRate, DiskIOPS uint64
	// NetworkRate is in bytes per second, each way.
	NetworkRate uint64
}

// Host is what the hypervisor can offer.
type Host struct {
	// VirtType is "kvm" or "qemu".
	VirtType string
	// Arch is libvirt's name of the architecture: x86_64, aarch64, ...
	Arch string
	// MachineType is the machine type: q35, virt, ...
	MachineType string
	// HostPassthrough and MaximumCPU tell whether these CPU modes exist.
	HostPassthrough, MaximumCPU bool
}

// Disk is a qcow2 overlay and the base volume under it. Both formats are
// explicit, so that nothing on the host ever guesses a format from bytes that
// a guest may have written.
type Disk struct {
	// Path is the overlay, BasePath the base volume.
	Path, BasePath string
	// Between is a qcow2 overlay between the two, if any.
	Between string
	// BaseFormat is "qcow2" or "raw".
	BaseFormat string
}

// XML returns the machine as a document for virDomainDefineXML.
func (m Machine) XML() (string, error) {
	metadata, err := m.Metadata.marshal(Namespace)
	if err != nil {
		return "", err
	}
	domain := libvirtxml.Domain{
		Type:     m.Host.VirtType,
		Name:     m.Name,
		Title:    m.Metadata.title(),
		Metadata: &libvirtxml.DomainMetadata{XML: metadata},
		Memory:   &libvirtxml.DomainMemory{Value: uint(m.Memory / 1024), Unit: "KiB"},
		VCPU:     &libvirtxml.DomainVCPU{Value: m.VCPUs, Placement: "static"},
		OS:       m.os(),
		Features: m.features(),
		CPU:      m.cpu(),
		Clock:    &libvirtxml.DomainClock{Offset: "utc"},
		// A machine that powers off stays defined until cleanup: the stage
		// that waits for it can then still say what became of it.
		OnPoweroff: "destroy",
		OnReboot:   "restart",
		OnCrash:    "destroy",
		SysInfo:    m.sysInfo(),
		Devices:    m.devices(),
	}
	if m.Frozen != nil {
		domain.UUID = m.Frozen.UUID
		domain.GenID = &libvirtxml.DomainGenID{Value: m.Frozen.Generation}
	}
	text, err := domain.Marshal()
	if err != nil {
		return "", fmt.Errorf("write domain XML of %s: %w", m.Name, err)
	}
	return text, nil
}

func (m Machine) os() *libvirtxml.DomainOS {
	os := &libvirtxml.DomainOS{
		Type:    &libvirtxml.DomainOSType{Arch: m.Host.Arch, Machine: m.Host.MachineType, Type: "hvm"},
		Kernel:  m.Kernel,
		Initrd:  m.Initrd,
		Cmdline: m.Cmdline,
	}
	if m.UEFI {
		os.Firmware = "efi"
		if m.Host.Arch == "x86_64" {
			// Guests' boot loaders are rarely signed with a key that the
			// firmware knows, and the variant that checks needs SMM.
			os.FirmwareInfo = &libvirtxml.DomainOSFirmwareInfo{
				Features: []libvirtxml.DomainOSFirmwareFeature{{Enabled: "no", Name: "secure-boot"}},
			}
		}
	}
	if m.Kernel == "" {
		os.BootDevices = []libvirtxml.DomainBootDevice{{Dev: "hd"}}
	}
	return os
}

// provision is the entry of QEMU's firmware configuration device that systemd
// takes for the credential tmpfiles.extra. See
// https://systemd.io/CREDENTIALS/ and
// https://libvirt.org/formatdomain.html#smbios-system-information.
const provision = "opt/io.systemd.credentials/tmpfiles.extra"

// sysInfo names the file alone. What stands in a domain's XML or on QEMU's
// command line, every user of the host can read.
func (m Machine) sysInfo() []libvirtxml.DomainSysInfo {
	if m.Provision == "" {
		return nil
	}
	return []libvirtxml.DomainSysInfo{{FWCfg: &libvirtxml.DomainSysInfoFWCfg{
		Entry: []libvirtxml.DomainSysInfoEntry{{Name: provision, File: m.Provision}},
	}}}
}

func (m Machine) features() *libvirtxml.DomainFeatureList {
	switch {
	case m.Host.Arch == "x86_64":
		return &libvirtxml.DomainFeatureList{
			ACPI: &libvirtxml.DomainFeature{},
			APIC: &libvirtxml.DomainFeatureAPIC{},
		}
	case m.UEFI:
		// On other architectures ACPI comes with UEFI or not at all.
		return &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}}
	}
	return nil
}

// cpu returns the CPU: as asked; or the host's own under KVM; or, emulated,
// all that QEMU can emulate.
func (m Machine) cpu() *libvirtxml.DomainCPU {
	switch m.CPU {
	case "host-passthrough", "host-model", "maximum":
		return &libvirtxml.DomainCPU{Mode: m.CPU}
	case "":
	default:
		return &libvirtxml.DomainCPU{
			Mode: "custom", Match: "exact", Check: "none",
			Model: &libvirtxml.DomainCPUModel{Value: m.CPU, Fallback: "forbid"},
		}
	}
	switch {
	case m.Host.VirtType == "kvm" && m.Host.HostPassthrough:
		return &libvirtxml.DomainCPU{Mode: "host-passthrough"}
	case m.Host.VirtType != "kvm" && m.Host.MaximumCPU:
		return &libvirtxml.DomainCPU{Mode: "maximum"}
	}
	return nil
}

func (m Machine) devices() *libvirtxml.DomainDeviceList {
	return &libvirtxml.DomainDeviceList{
		Disks:      []libvirtxml.DomainDisk{m.disk()},
		Interfaces: []libvirtxml.DomainInterface{m.networkInterface()},
		Serials: []libvirtxml.DomainSerial{{
			Source: &libvirtxml.DomainChardevSource{Pty: &libvirtxml.DomainChardevSourcePty{}},
			Log:    &libvirtxml.DomainChardevLog{File: m.ConsoleLog, Append: "off"},
		}},
		Channels: m.channels(),
		RNGs: []libvirtxml.DomainRNG{{
			// Without it a guest may wait for entropy before sshd has keys.
			Model:   "virtio",
			Backend: &libvirtxml.DomainRNGBackend{Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"}},
		}},
		Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
		MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
	}
}

// channels are for the guest agent, which images may run, and the door.
func (m Machine) channels() (channels []libvirtxml.DomainChannel) {
	names := []string{"org.qemu.guest_agent.0"}
	if m.Frozen != nil {
		names = append(names, Door, DoorShell)
	}
	for _, name := range names {
		channels = append(channels, libvirtxml.DomainChannel{
			Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind"}},
			Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: name}},
		})
	}
	return channels
}

func (m Machine) disk() libvirtxml.DomainDisk {
	file := func(path string) *libvirtxml.DomainDiskSource {
		return &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}}
	}
	base := &libvirtxml.DomainDiskBackingStore{
		Format: &libvirtxml.DomainDiskFormat{Type: m.Disk.BaseFormat},
		Source: file(m.Disk.BasePath),
		// The chain ends here: a base volume has no base of its own.
		BackingStore: &libvirtxml.DomainDiskBackingStore{},
	}
	if m.Disk.Between != "" {
		base = &libvirtxml.DomainDiskBackingStore{
			Format:       &libvirtxml.DomainDiskFormat{Type: "qcow2"},
			Source:       file(m.Disk.Between),
			BackingStore: base,
		}
	}
	return libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{
			Name: "qemu",
			Type: "qcow2",
			// The disk dies with the job, so what a guest flushes need not
			// reach the platter, and base volumes stay in the host's cache.
			Cache:   "unsafe",
			Discard: "unmap",
		},
		Source:       file(m.Disk.Path),
		BackingStore: base,
		Target:       &libvirtxml.DomainDiskTarget{Dev: "vda", Bus: "virtio"},
		IOTune:       m.Limits.disk(),
	}
}

// disk returns the limits of the disk, nil for none.
// https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms
func (l Limits) disk() *libvirtxml.DomainDiskIOTune {
	if l.DiskRate == 0 && l.DiskIOPS == 0 {
		return nil
	}
	return &libvirtxml.DomainDiskIOTune{TotalBytesSec: l.DiskRate, TotalIopsSec: l.DiskIOPS}
}

// network returns the limits of the network, nil for none.
// https://libvirt.org/formatnetwork.html#quality-of-service
func (l Limits) network() *libvirtxml.DomainInterfaceBandwidth {
	if l.NetworkRate == 0 {
		return nil
	}
	average := int(l.NetworkRate / 1024) // in KiB/s
	way := func() *libvirtxml.DomainInterfaceBandwidthParams {
		return &libvirtxml.DomainInterfaceBandwidthParams{Average: &average}
	}
	return &libvirtxml.DomainInterfaceBandwidth{Inbound: way(), Outbound: way()}
}

func (m Machine) networkInterface() libvirtxml.DomainInterface {
	nic := libvirtxml.DomainInterface{
		MAC:    &libvirtxml.DomainInterfaceMAC{Address: m.MAC},
		Source: &libvirtxml.DomainInterfaceSource{Network: &libvirtxml.DomainInterfaceSourceNetwork{Network: m.Network}},
		Model:  &libvirtxml.DomainInterfaceModel{Type: "virtio"},
		// No boot ROM: the guest never boots from the network.
		ROM:       &libvirtxml.DomainROM{Enabled: "no"},
		Bandwidth: m.Limits.network(),
	}
	if m.Filter != "" {
		// It is not told the address, which the driver may know: libvirt would put
		// all of the filter up before the guest starts, which takes it a second and
		// more, rather than when it has seen the guest's first packets.
		nic.FilterRef = &libvirtxml.DomainInterfaceFilterRef{Filter: m.Filter}
	}
	if m.Isolated {
		nic.PortOptions = &libvirtxml.DomainInterfacePortOptions{Isolated: "yes"}
	}
	return nic
}
