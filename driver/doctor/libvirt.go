package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// The checks of libvirt's daemon and of what the host can run.

// answer is how long libvirtd may take to answer a question that it has only to
// read.
const answer = 10 * time.Second

// checkSocket looks whether libvirtd is there, lets the driver in, and answers.
func (d *Doctor) checkSocket(ctx context.Context, _ string) Finding {
	path, err := d.hypervisor.Socket()
	if err != nil {
		return unknown(err)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return forbidden(path)
	case err != nil:
		if usual := d.usualSocket(); usual != "" && usual != path {
			return failure(d.file.set(nil, "socket", `""`), "nothing answers at %s, which the settings name, but there is %s", path, usual)
		}
		return failure(start(), "libvirtd does not run: nothing answers at %s", path)
	}
	conn.Close()
	if found := modular(path); found.Level != OK {
		return found
	}
	ctx, cancel := context.WithTimeoutCause(ctx, answer, fmt.Errorf("nothing after %v", answer))
	defer cancel()
	if _, err := d.hypervisor.Versions(ctx); err != nil {
		if ctx.Err() != nil {
			return failure(restart(), "libvirtd is there and does not answer: %s", oneLine(context.Cause(ctx).Error()))
		}
		return failure(start(), "%s", oneLine(err.Error()))
	}
	d.asked = true
	if uid, gid, ok, err := d.hypervisor.User(ctx); err == nil {
		d.uid, d.gid, d.knowsUser = uid, gid, ok
	}
	return fine("%s answers", path)
}

// usualSocket returns the socket that would be dialled if the settings named
// none, or "" when it is not there.
func (d *Doctor) usualSocket() string {
	unnamed := *d.settings
	unnamed.Socket = ""
	connection := d.Open(&unnamed)
	defer connection.Close()
	if path, err := connection.Socket(); err == nil && exists(path) {
		return path
	}
	return ""
}

// forbidden says who may use a socket.
func forbidden(path string) Finding {
	name, group := "USER", "libvirt"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if info, err := os.Stat(path); err == nil {
		if g, err := user.LookupGroupId(strconv.Itoa(int(info.Sys().(*syscall.Stat_t).Gid))); err == nil {
			group = g.Name
		}
	}
	return failure(command("usermod", "-a", "-G", group, name),
		"%s may not use %s: those of the group %s may, after their next login", name, path, group)
}

// modular looks for the daemons that the QEMU daemon needs beside it where each
// kind of thing has one of its own.
//
// https://libvirt.org/daemons.html#modular-driver-daemons
func modular(path string) Finding {
	if filepath.Base(path) != "virtqemud-sock" {
		return fine("")
	}
	var missing, starts []string
	for _, name := range []string{"virtstoraged", "virtnetworkd"} {
		conn, err := net.DialTimeout("unix", filepath.Join(filepath.Dir(path), name+"-sock"), time.Second)
		if err == nil {
			conn.Close()
			continue
		}
		missing = append(missing, name)
		if systemd() {
			starts = append(starts, command("systemctl", "enable", "--now", name+".socket"))
		} else {
			starts = append(starts, command(name, "--daemon"))
		}
	}
	if len(missing) == 0 {
		return fine("")
	}
	return failure(script(starts...), "virtqemud runs, but not %s beside it", strings.Join(missing, " and "))
}

// start returns what starts libvirt's daemon.
func start() string {
	switch {
	case !systemd():
		return command("libvirtd", "--daemon")
	case !unit("libvirtd.service") && unit("virtqemud.socket"):
		return command("systemctl", "enable", "--now", "virtqemud.socket", "virtstoraged.socket", "virtnetworkd.socket")
	}
	return command("systemctl", "enable", "--now", "libvirtd")
}

// restart returns what ends a daemon that does not answer, and starts it again.
// Guests run on.
func restart() string {
	switch {
	case !systemd():
		return script(`pid=$(cat /run/libvirtd.pid) && kill -KILL "$pid" && tail -f --pid "$pid" /dev/null`, command("libvirtd", "--daemon"))
	case !unit("libvirtd.service") && unit("virtqemud.socket"):
		return command("systemctl", "restart", "virtqemud", "virtstoraged", "virtnetworkd")
	}
	return command("systemctl", "restart", "libvirtd")
}

// unit reports whether systemd has a unit of that name.
func unit(name string) bool {
	return exists("/etc/systemd/system/"+name) || exists("/usr/lib/systemd/system/"+name) || exists("/lib/systemd/system/"+name)
}

// oldest is the oldest libvirt with all that the driver uses: the firmware's
// features in a domain's document, and isolated ports. See
// https://libvirt.org/formatdomain.html#bios-bootloader.
const oldest = "7.2.0"

// checkVersions looks at the versions of libvirt and QEMU.
func (d *Doctor) checkVersions(ctx context.Context, _ string) Finding {
	versions, err := d.hypervisor.Versions(ctx)
	switch {
	case err != nil:
		return unknown(err)
	case older(versions.Libvirt, oldest):
		return warning("", "libvirt %s is older than %s: images with UEFI do not start. Upgrade the host", versions.Libvirt, oldest)
	}
	return fine("libvirt %s, QEMU %s", versions.Libvirt, versions.Hypervisor)
}

// older compares two versions of three numbers.
func older(a, b string) bool {
	parse := func(text string) (n [3]int) {
		fmt.Sscanf(text, "%d.%d.%d", &n[0], &n[1], &n[2])
		return n
	}
	x, y := parse(a), parse(b)
	for i := range x {
		if x[i] != y[i] {
			return x[i] < y[i]
		}
	}
	return false
}

// probation is for how long a domain must run to show that KVM works.
const probation = time.Second

// kvmDevice is how the kernel offers KVM; see
// https://www.kernel.org/doc/html/latest/virt/kvm/api.html.
const kvmDevice = "/dev/kvm"

// checkKVM looks whether guests can run on the host's processor: that libvirt
// offers it is not enough, so it is tried.
func (d *Doctor) checkKVM(ctx context.Context, _ string) Finding {
	emulate := d.file.set(nil, "virt_type", `"qemu"`)
	host, err := d.hypervisor.Capabilities(ctx, "kvm", "")
	if err != nil {
		return d.withoutKVM(ctx, emulate)
	}
	fault, err := d.tryKVM(ctx, host)
	switch {
	case err != nil:
		return unknown(err)
	case fault == "" && d.settings.VirtType == settings.VirtQEMU:
		return fine("works, but virt_type says that guests are emulated")
	case fault == "":
		return fine("works: a guest runs on it")
	case d.settings.VirtType == settings.VirtQEMU:
		return fine("offered and does not work, but virt_type says that guests are emulated")
	case strings.Contains(fault, "ermission denied"):
		return failure(script(command("chgrp", "kvm", kvmDevice), command("chmod", "0660", kvmDevice)),
			"QEMU's user may not open %s: %s", kvmDevice, fault)
	}
	return failure(emulate, "offered, but a guest on it does not run: %s", fault)
}

// withoutKVM says what is so on a host whose libvirt does not offer KVM, and why
// it may not.
func (d *Doctor) withoutKVM(ctx context.Context, emulate string) Finding {
	if d.settings.VirtType == settings.VirtQEMU {
		return fine("not offered, and virt_type says that guests are emulated")
	}
	what := warning
	if d.settings.VirtType == settings.VirtKVM {
		what = failure
	}
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	module := module(string(cpu))
	switch {
	case exists(kvmDevice):
		return what(emulate, "there is %s, but libvirt does not offer it: QEMU cannot use it", kvmDevice)
	case module != "":
		return what(command("modprobe", module), "the processor can, but there is no %s: the module %s is not loaded, or the firmware forbids it",
			kvmDevice, module)
	}
	return what(emulate, "the processor cannot: guests are emulated, which is slow")
}

// module returns the kernel's module for the virtualisation that a processor
// has, by /proc/cpuinfo.
func module(cpuinfo string) string {
	for _, flag := range strings.Fields(cpuinfo) {
		switch flag {
		case "vmx":
			return "kvm_intel"
		case "svm":
			return "kvm_amd"
		}
	}
	return ""
}

// tryKVM runs a guest without a disk for a moment, and returns what goes wrong.
func (d *Doctor) tryKVM(ctx context.Context, host hypervisor.Capabilities) (fault string, err error) {
	// Two doctors at the same time are not in each other's way.
	name := fmt.Sprintf("libvirt-driver-doctor-%d", os.Getpid())
	text, err := domainxml.Probe(name, domainxml.Host{
		VirtType: host.VirtType, Arch: host.Arch, MachineType: host.MachineType, HostPassthrough: host.HostPassthrough,
	})
	if err != nil {
		return "", err
	}
	// One that a doctor left who was killed has ended with its connection.
	defer os.Remove(filepath.Join("/var/log/libvirt/qemu", name+".log"))
	if err := d.hypervisor.Try(ctx, name, text); err != nil {
		if ctx.Err() != nil || errors.Is(err, hypervisor.ErrUnreachable) {
			return "", err
		}
		return words(err), nil
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer cancel()
		d.hypervisor.DestroyDomain(ctx, name)
	}()
	for begun := time.Now(); time.Since(begun) < probation; {
		state, err := d.hypervisor.State(ctx, name)
		switch {
		case err != nil:
			return "", err
		case state.Kind != hypervisor.Running:
			return fmt.Sprintf("it is %s at once", state), nil
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return "", nil
}

// words returns QEMU's own of a failure to start it.
func words(err error) string {
	text := err.Error()
	for line := range strings.Lines(text) {
		if _, said, ok := strings.Cut(line, "qemu-system-"); ok {
			_, said, _ = strings.Cut(said, ": ")
			return oneLine(said)
		}
	}
	return oneLine(text)
}

// checkMemory looks whether an image's guest fits into the host, and how many.
func (d *Doctor) checkMemory(ctx context.Context, name string) Finding {
	memory, err := d.hypervisor.Memory(ctx)
	if err != nil {
		return unknown(err)
	}
	image, reserved := d.settings.Images[name], d.settings.ReserveMemory
	needed := image.Memory + driver.Overhead
	const step = 64 << 20
	switch {
	case reserved+driver.Overhead+step > memory.Total:
		return failure(d.file.set(nil, "reserve_memory", `"64 MiB"`), "reserve_memory keeps %s of the host's %s: no guest fits",
			size(reserved), size(memory.Total))
	case needed+reserved > memory.Total:
		// As much as an image has by itself, or half of what there is.
		most := min(2<<30, max(step, (memory.Total-reserved-driver.Overhead)/2/step*step))
		return failure(d.setImage(name, "memory", strconv.Quote(settings.FormatSize(most))),
			"a guest takes %s and %s are reserved, but the host has %s: it never fits", size(needed), size(reserved), size(memory.Total))
	}
	fit := int((memory.Total - reserved) / needed)
	switch {
	case fit < d.jobs.n:
		return warning(d.jobs.fewer(fit), "%s for %s: %d fit into the host's %s, the others of %d jobs wait their turn",
			size(needed), "each guest", fit, size(memory.Total), d.jobs.n)
	case needed+reserved > memory.Available:
		return warning("", "a guest takes %s, but only %s of the host's memory are available now", size(needed), size(memory.Available))
	}
	return fine("%s for each guest, %d fit into the host's %s", size(needed), fit, size(memory.Total))
}
