package domainxml

import (
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirtxml"
)

func machine() Machine {
	return Machine{
		Name:  "runner-1-project-2-concurrent-0-job-3",
		Host:  Host{VirtType: "qemu", Arch: "x86_64", MachineType: "q35", HostPassthrough: true, MaximumCPU: true},
		VCPUs: 2, Memory: 2048 << 20,
		Disk:    Disk{Path: "/pool/job.qcow2", BasePath: "/pool/base.raw", BaseFormat: "raw"},
		Network: "default", MAC: "52:54:00:01:02:03",
		ConsoleLog: "/log/console.log",
		Metadata: Metadata{Job: 3, Project: 2, Runner: 1, JobURL: "https://gitlab.example/-/jobs/3", Image: "debian",
			Pool: "default", Volume: "job.qcow2", Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)},
	}
}

// parse reads a document back, as libvirt would.
func parse(t *testing.T, m Machine) *libvirtxml.Domain {
	t.Helper()
	text, err := m.XML()
	if err != nil {
		t.Fatal(err)
	}
	var domain libvirtxml.Domain
	if err := domain.Unmarshal(text); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return &domain
}

func TestDiskFormatsAreExplicitAllTheWayDown(t *testing.T) {
	disk := parse(t, machine()).Devices.Disks[0]
	if disk.Driver.Type != "qcow2" || disk.Source.File.File != "/pool/job.qcow2" {
		t.Errorf("overlay is %q at %v", disk.Driver.Type, disk.Source.File)
	}
	base := disk.BackingStore
	if base == nil || base.Format.Type != "raw" || base.Source.File.File != "/pool/base.raw" {
		t.Fatalf("base is %+v", base)
	}
	if base.BackingStore == nil || base.BackingStore.Source.File != nil {
		t.Errorf("the chain does not end at the base volume: %+v", base.BackingStore)
	}
}

func TestCPU(t *testing.T) {
	for _, test := range []struct {
		name, virtType, asked string
		passthrough, maximum  bool
		mode, model           string
	}{
		{name: "kvm", virtType: "kvm", passthrough: true, maximum: true, mode: "host-passthrough"},
		{name: "emulated", virtType: "qemu", passthrough: true, maximum: true, mode: "maximum"},
		{name: "emulated by an old QEMU", virtType: "qemu", passthrough: true},
		{name: "a mode", virtType: "kvm", passthrough: true, asked: "host-model", mode: "host-model"},
		{name: "a model", virtType: "qemu", maximum: true, asked: "Haswell", mode: "custom", model: "Haswell"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := machine()
			m.CPU = test.asked
			m.Host.VirtType, m.Host.HostPassthrough, m.Host.MaximumCPU = test.virtType, test.passthrough, test.maximum
			cpu := parse(t, m).CPU
			if cpu == nil {
				cpu = &libvirtxml.DomainCPU{}
			}
			if cpu.Mode != test.mode {
				t.Errorf("mode %q, want %q", cpu.Mode, test.mode)
			}
			if model := cpu.Model; (model == nil) != (test.model == "") || model != nil && model.Value != test.model {
				t.Errorf("model %+v, want %q", model, test.model)
			}
		})
	}
}

func TestFirmware(t *testing.T) {
	m := machine()
	if os := parse(t, m).OS; os.Firmware != "" || len(os.BootDevices) != 1 {
		t.Errorf("BIOS: %+v", os)
	}
	m.UEFI = true
	if os := parse(t, m).OS; os.Firmware != "efi" || len(os.FirmwareInfo.Features) != 1 || os.FirmwareInfo.Features[0].Enabled != "no" {
		t.Errorf("UEFI on x86_64 must ask for firmware without secure boot: %+v", os)
	}
	m.Host.Arch, m.Host.MachineType = "aarch64", "virt"
	domain := parse(t, m)
	if domain.OS.Firmware != "efi" || domain.OS.FirmwareInfo != nil || domain.Features.ACPI == nil || domain.Features.APIC != nil {
		t.Errorf("UEFI on aarch64: %+v %+v", domain.OS, domain.Features)
	}
	m.UEFI, m.Kernel, m.Initrd, m.Cmdline = false, "/k", "/i", "console=ttyAMA0"
	domain = parse(t, m)
	if os := domain.OS; os.Kernel != "/k" || os.Initrd != "/i" || os.Cmdline != "console=ttyAMA0" || len(os.BootDevices) != 0 {
		t.Errorf("direct kernel boot: %+v", os)
	}
	if domain.Features != nil {
		t.Errorf("ACPI without UEFI on aarch64: %+v", domain.Features)
	}
}

func TestTextFromOutsideStaysText(t *testing.T) {
	const nasty = `"/><disk type='file'/> & ]]> <!-- ` + "\x00\x1b"
	m := machine()
	m.Metadata.JobURL, m.Metadata.Image, m.Cmdline, m.Kernel = nasty, nasty, nasty, "/k"
	domain := parse(t, m)
	if n := len(domain.Devices.Disks); n != 1 {
		t.Errorf("%d disks", n)
	}
	if !strings.HasPrefix(domain.OS.Cmdline, `"/><disk type='file'/> & ]]> <!-- `) {
		t.Errorf("cmdline came back as %q", domain.OS.Cmdline)
	}
	metadata, err := ParseMetadata(domain.Metadata.XML)
	if err != nil {
		t.Fatal(err)
	}
	if metadata.JobURL != domain.OS.Cmdline {
		t.Errorf("job URL came back as %q", metadata.JobURL)
	}
}

func TestMetadataRoundTrip(t *testing.T) {
	want := machine().Metadata
	want.Address, want.HostKey = "192.0.2.1", "ssh-ed25519 AAAA"
	text, err := want.Element()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text, "xmlns") {
		t.Errorf("libvirt adds the namespace itself: %s", text)
	}
	if got, err := ParseMetadata(text); err != nil || got != want {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	if got := parse(t, machine()).Metadata.XML; !strings.Contains(got, `<machine xmlns="`+Namespace+`">`) {
		t.Errorf("no namespace in the domain: %s", got)
	}
}

func TestNoDeviceThatAJobDoesNotNeed(t *testing.T) {
	devices := parse(t, machine()).Devices
	if len(devices.Graphics)+len(devices.Videos)+len(devices.Sounds)+len(devices.Inputs)+len(devices.Hostdevs) != 0 {
		t.Errorf("devices: %+v", devices)
	}
	if c := devices.Controllers; len(c) != 1 || c[0].Type != "usb" || c[0].Model != "none" {
		t.Errorf("controllers: %+v", c)
	}
	if len(devices.RNGs) != 1 || devices.RNGs[0].Model != "virtio" {
		t.Errorf("rng: %+v", devices.RNGs)
	}
	if s := devices.Serials; len(s) != 1 || s[0].Log == nil || s[0].Log.File != "/log/console.log" {
		t.Errorf("serial: %+v", s)
	}
}

func TestKeysForTheGuestAreInAFileAndNotInTheDocument(t *testing.T) {
	if info := parse(t, machine()).SysInfo; info != nil {
		t.Errorf("sysinfo of a machine without: %+v", info)
	}
	m := machine()
	m.Provision = "/pool/job-identity"
	info := parse(t, m).SysInfo
	if len(info) != 1 || info[0].FWCfg == nil || len(info[0].FWCfg.Entry) != 1 {
		t.Fatalf("sysinfo: %+v", info)
	}
	want := libvirtxml.DomainSysInfoEntry{Name: "opt/io.systemd.credentials/tmpfiles.extra", File: "/pool/job-identity"}
	if entry := info[0].FWCfg.Entry[0]; entry != want {
		t.Errorf("entry %+v, want %+v", entry, want)
	}
}

func TestIsolation(t *testing.T) {
	m := machine()
	if port := parse(t, m).Devices.Interfaces[0].PortOptions; port != nil {
		t.Errorf("port options without isolation: %+v", port)
	}
	m.Isolated = true
	if port := parse(t, m).Devices.Interfaces[0].PortOptions; port == nil || port.Isolated != "yes" {
		t.Errorf("port options with isolation: %+v", port)
	}
}

func TestLimitsAreLibvirts(t *testing.T) {
	m := machine()
	if xml := parse(t, m); xml.Devices.Disks[0].IOTune != nil || xml.Devices.Interfaces[0].Bandwidth != nil || xml.Devices.Interfaces[0].FilterRef != nil {
		t.Error("a machine without limits has some")
	}
	m.Limits = Limits{DiskRate: 4 << 20, DiskIOPS: 200, NetworkRate: 1 << 20}
	m.Filter = "clean-traffic"
	devices := parse(t, m).Devices
	if tune := devices.Disks[0].IOTune; tune == nil || tune.TotalBytesSec != 4<<20 || tune.TotalIopsSec != 200 {
		t.Errorf("disk: %+v", tune)
	}
	nic := devices.Interfaces[0]
	if nic.Bandwidth == nil || *nic.Bandwidth.Inbound.Average != 1024 || *nic.Bandwidth.Outbound.Average != 1024 {
		t.Errorf("network: %+v", nic.Bandwidth)
	}
	if nic.FilterRef == nil || nic.FilterRef.Filter != "clean-traffic" {
		t.Errorf("filter: %+v", nic.FilterRef)
	}
}

func TestAFrozenMachineIsTheSameSavedAndRestoredButForItsDisk(t *testing.T) {
	m := machine()
	if domain := parse(t, m); domain.UUID != "" || domain.GenID != nil || len(domain.Devices.Channels) != 1 {
		t.Errorf("a machine that is not saved: %q, %v, %d channels", domain.UUID, domain.GenID, len(domain.Devices.Channels))
	}
	m.Frozen = &Frozen{UUID: "0d6fb9a8-6ac6-8e7c-9d71-4e1f5d7d0a11", Generation: "4e1f5d7d-6ac6-8e7c-9d71-0d6fb9a80a11"}
	saved := parse(t, m)
	m.Disk.Path, m.Disk.Between = "/pool/next.qcow2", "/pool/frozen.qcow2"
	restored := parse(t, m)
	if saved.UUID != m.Frozen.UUID || saved.GenID == nil || saved.GenID.Value != m.Frozen.Generation {
		t.Errorf("%q, %v", saved.UUID, saved.GenID)
	}
	if c := saved.Devices.Channels; len(c) != 3 || c[1].Target.VirtIO.Name != Door || c[2].Target.VirtIO.Name != DoorShell {
		t.Errorf("channels: %+v", c)
	}
	frozen := restored.Devices.Disks[0].BackingStore
	if frozen.Source.File.File != "/pool/frozen.qcow2" || frozen.Format.Type != "qcow2" {
		t.Errorf("between: %+v", frozen)
	}
	base := frozen.BackingStore
	if base.Source.File.File != "/pool/base.raw" || base.Format.Type != "raw" || base.BackingStore == nil || base.BackingStore.Source != nil && base.BackingStore.Source.File != nil {
		t.Errorf("base: %+v", base)
	}
	saved.Devices.Disks, restored.Devices.Disks = nil, nil
	a, errA := saved.Marshal()
	b, errB := restored.Marshal()
	if errA != nil || errB != nil || a != b {
		t.Errorf("%v, %v:\n%s\nis not\n%s", errA, errB, b, a)
	}
}
