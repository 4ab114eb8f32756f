package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// creation bounds the time that libvirt may take to create the disk and start
// the machine, and that it may take to answer what is asked besides. It takes
// well under a second on a host that is not overloaded.
const creation = 2 * time.Minute

var errSlow = fmt.Errorf("libvirt took more than %v", creation)

// boot makes a machine and waits until it can be used. started is called when
// it has been started: from then on the machine needs no lock.
func (mk *Maker) boot(ctx context.Context, m *machine, started func()) (_ contact, settle func(bool), err error) {
	settle = func(bool) {}
	if m.keys, err = newKeys(m.image.HostKey); err != nil {
		return contact{}, settle, err
	}
	if err := mk.create(ctx, m); err != nil {
		return contact{}, settle, err
	}
	started()
	keeper := mk.startKeeper(*m)
	reached, err := mk.reach(ctx, *m, keeper)
	if err != nil {
		mk.showConsole(m.domain)
	}
	return reached, keeper.release, err
}

// create makes the machine's disk, has an address chosen for it, and starts it.
func (mk *Maker) create(ctx context.Context, m *machine) error {
	release, err := mk.admit(ctx, *m)
	if err != nil {
		return fmt.Errorf("find room for the machine: %w", err)
	}
	defer release()
	ctx, cancel := context.WithTimeoutCause(ctx, creation, errSlow)
	defer cancel()
	discovered := mk.discover(ctx, *m)
	defer discovered()
	begun := time.Now()
	if m.disk, err = mk.createDisk(ctx, *m); err != nil {
		return fmt.Errorf("create disk: %w", err)
	}
	mk.Log.Step("disk", time.Since(begun), "%s, on %s", settings.FormatSize(m.disk.capacity), m.image.Volume)

	if m.provision, err = mk.inject(ctx, *m); err != nil {
		return err
	}
	begun = time.Now()
	if m.address, err = mk.reserve(ctx, *m); err != nil {
		return err
	}
	host, err := mk.startMachine(ctx, *m)
	if err != nil {
		return fmt.Errorf("start machine: %w", errors.Join(err, mk.blank(ctx, *m)))
	}
	if err := mk.blank(ctx, *m); err != nil {
		return err
	}
	mk.Log.Step("machine", time.Since(begun), "started, %s %s", host.Arch, accelerated(host.VirtType))
	return nil
}

// discover has the network's DHCP server choose the guest's address while
// libvirt starts the guest, where it is to be found by its lease. It returns how
// to wait for the end of that. Without it the guest gets its address all the
// same, only later.
func (mk *Maker) discover(ctx context.Context, m machine) (wait func()) {
	if !m.image.Address.ByLease() {
		return func() {}
	}
	var asking sync.WaitGroup
	asking.Go(func() { mk.Hypervisor.Discover(ctx, m.image.Network, m.mac) })
	return asking.Wait
}

// reserve has the network keep an address for a guest that is saved, and is to be
// found by its lease: it goes on to have the address while it is not there. It is
// found by the lease all the same: where none can be kept, it gets any.
func (mk *Maker) reserve(ctx context.Context, m machine) (netip.Addr, error) {
	if !m.image.Address.ByLease() || m.frozen == nil {
		return netip.Addr{}, nil
	}
	address, err := mk.Hypervisor.Reserve(ctx, m.image.Network, m.mac)
	if errors.Is(err, hypervisor.ErrUnreservable) {
		return netip.Addr{}, nil
	}
	return address, err
}

func accelerated(virtType string) string {
	if virtType == "qemu" {
		return "emulated (virt_type qemu)"
	}
	return "on " + strings.ToUpper(virtType)
}

// disk is the machine's overlay and the base volume under it.
type disk struct {
	domainxml.Disk
	capacity uint64
}

// createDisk creates the overlay. The base volume is only ever read.
func (mk *Maker) createDisk(ctx context.Context, m machine) (disk, error) {
	base, err := mk.Hypervisor.Volume(ctx, m.image.Pool, m.image.Volume)
	if err != nil {
		return disk{}, withRemedy(err, m.image.Pool, m.image.Volume)
	}
	if m.image.Disk != 0 && m.image.Disk < base.Capacity {
		err := fmt.Errorf("a disk of %s is asked for, but base volume %s has %s, and a disk can only grow",
			settings.FormatSize(m.image.Disk), base.Name, settings.FormatSize(base.Capacity))
		if m.sized {
			return disk{}, &gitlab.BuildError{Err: fmt.Errorf("job variable LIBVIRT_DRIVER_DISK: %w", err)}
		}
		return disk{}, fmt.Errorf("setting disk of image %s: %w", m.image.Name, err)
	}
	overlay, err := mk.Hypervisor.CreateOverlay(ctx, m.volume, base, string(m.image.Format), m.image.Disk)
	if err != nil {
		return disk{}, err
	}
	return disk{
		Disk:     domainxml.Disk{Path: overlay.Path, BasePath: base.Path, BaseFormat: string(m.image.Format)},
		capacity: overlay.Capacity,
	}, nil
}

// withRemedy adds what an administrator can do about a base volume that libvirt
// does not have.
func withRemedy(err error, pool, volume string) error {
	switch {
	case errors.Is(err, hypervisor.ErrInactive):
		return fmt.Errorf("%w: start the pool: virsh pool-start %s", err, pool)
	case errors.Is(err, hypervisor.ErrNotFound):
		return fmt.Errorf("%w: see virsh pool-list --all and virsh vol-list %s; put the image there as %s, or set volume and pool in the driver's settings",
			err, pool, volume)
	}
	return err
}

// networkRemedy adds to err what an administrator can do about a network, of
// which libvirt says why.
func networkRemedy(err, why error, network string) error {
	switch {
	case errors.Is(why, hypervisor.ErrInactive):
		return fmt.Errorf("%w: start the network: virsh net-start %s, and virsh net-autostart %[2]s for the next boot", err, network)
	case errors.Is(why, hypervisor.ErrNotFound):
		return fmt.Errorf("%w: see virsh net-list --all, or set network in the driver's settings", err)
	}
	return err
}

// define defines the machine's domain and returns its XML, and what the host can
// offer to it.
func (mk *Maker) define(ctx context.Context, m machine) (text string, host hypervisor.Capabilities, err error) {
	if host, err = mk.Hypervisor.Capabilities(ctx, string(mk.Settings.VirtType), m.image.Machine); err != nil {
		return "", host, err
	}
	metadata, err := m.metadata()
	if err != nil {
		return "", host, err
	}
	text, err = domainxml.Machine{
		Name: m.domain,
		Host: domainxml.Host{
			VirtType: host.VirtType, Arch: host.Arch, MachineType: host.MachineType,
			HostPassthrough: host.HostPassthrough, MaximumCPU: host.MaximumCPU,
		},
		CPU:      m.image.CPU,
		VCPUs:    m.image.VCPUs,
		Memory:   m.image.Memory,
		UEFI:     bootsByUEFI(m.image, host.Arch),
		Kernel:   m.image.Kernel,
		Initrd:   m.image.Initrd,
		Cmdline:  m.image.Cmdline,
		Disk:     m.disk.Disk,
		Network:  m.image.Network,
		MAC:      m.mac,
		Isolated: m.image.Isolated,
		Filter:   m.image.Filter,
		Limits: domainxml.Limits{
			DiskRate: m.image.DiskRate, DiskIOPS: uint64(m.image.DiskIOPS), NetworkRate: m.image.NetworkRate,
		},
		ConsoleLog: mk.consoleLog(m.domain),
		Provision:  m.provision,
		Frozen:     m.frozen,
		Metadata:   metadata,
	}.XML()
	if err != nil {
		return "", host, err
	}
	return text, host, mk.Hypervisor.DefineDomain(ctx, m.domain, text)
}

// startMachine defines the domain and starts it.
func (mk *Maker) startMachine(ctx context.Context, m machine) (hypervisor.Capabilities, error) {
	_, host, err := mk.define(ctx, m)
	if err != nil {
		return host, err
	}
	err = mk.Hypervisor.StartDomain(ctx, m.domain)
	if err != nil {
		// Libvirt's error does not tell a network from what else a domain needs.
		if _, why := mk.Hypervisor.KeepsLeases(ctx, m.image.Network); why != nil {
			err = networkRemedy(err, why, m.image.Network)
		}
	}
	if err != nil && host.VirtType == "kvm" && strings.Contains(strings.ToLower(err.Error()), "kvm") {
		// QEMU's own words, which libvirt passes on, put it down to KVM.
		err = fmt.Errorf("%w%s", err, kvmHint)
	}
	return host, err
}

// bootsByUEFI decides between a machine's own firmware and UEFI, which is all
// there is on some architectures.
func bootsByUEFI(image settings.Image, arch string) bool {
	if image.Firmware == settings.FirmwareDefault {
		return image.Kernel == "" && (arch == "aarch64" || arch == "riscv64")
	}
	return image.Firmware == settings.FirmwareUEFI
}
