package hypervisor

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// Capabilities is what the host can offer to a guest of its own architecture.
type Capabilities struct {
	// VirtType is "kvm", or "qemu" for emulation.
	VirtType string
	// Arch is libvirt's name of the host's architecture.
	Arch string
	// MachineType is the machine type to use.
	MachineType string
	// HostPassthrough and MaximumCPU tell whether these CPU modes work.
	HostPassthrough, MaximumCPU bool
}

// modern is each architecture's machine type that QEMU develops for virtual
// machines. Where the host has none of it, QEMU's own default is taken.
var modern = map[string]string{
	"x86_64":  "q35",
	"aarch64": "virt",
	"riscv64": "virt",
	"ppc64le": "pseries",
	"s390x":   "s390-ccw-virtio",
}

// freshness is for how long an offer of the host's counts. To have one takes two
// documents of tens of kilobytes, and a stage needs it up to three times.
const freshness = 10 * time.Second

// A demand is what Capabilities is asked for, and an offer what it has answered.
type (
	demand struct{ virtType, machine string }
	offer  struct {
		Capabilities
		at time.Time
	}
)

// Capabilities asks what the host offers for a virtualisation type, "kvm" or
// "qemu"; with "auto", for KVM where the host has it. machine overrides the
// machine type unless empty. The answer may be some seconds old.
//
// https://libvirt.org/formatcaps.html
// https://libvirt.org/formatdomaincaps.html
func (c *Connection) Capabilities(ctx context.Context, virtType, machine string) (Capabilities, error) {
	asked := demand{virtType, machine}
	c.mu.Lock()
	last, known := c.offers[asked]
	c.mu.Unlock()
	if known && time.Since(last.at) < freshness {
		return last.Capabilities, nil
	}
	now := time.Now()
	caps, err := c.readCapabilities(ctx, virtType, machine)
	if err == nil {
		c.mu.Lock()
		c.offers[asked] = offer{caps, now}
		c.mu.Unlock()
	}
	return caps, err
}

func (c *Connection) readCapabilities(ctx context.Context, virtType, machine string) (Capabilities, error) {
	var hostText string
	err := c.do(ctx, func(rpc *libvirt.Libvirt) (err error) {
		hostText, err = rpc.ConnectGetCapabilities()
		return err
	})
	if err != nil {
		return Capabilities{}, wrap(err, "read the host's capabilities")
	}
	caps, err := choose(hostText, virtType, machine)
	if err != nil {
		return Capabilities{}, err
	}
	var text string
	err = c.do(ctx, func(rpc *libvirt.Libvirt) (err error) {
		text, err = rpc.ConnectGetDomainCapabilities(nil, libvirt.OptString{caps.Arch}, optional(caps.MachineType),
			libvirt.OptString{caps.VirtType}, 0)
		return err
	})
	if err != nil {
		return caps, wrap(err, "read the host's capabilities for %s guests of type %s, machine %q", caps.Arch, caps.VirtType, caps.MachineType)
	}
	return caps.complete(text)
}

// What is read of the two documents. libvirt's own types, which hold all of them,
// take twice the time.
type (
	hostCaps struct {
		XMLName xml.Name    `xml:"capabilities"`
		Arch    string      `xml:"host>cpu>arch"`
		Guests  []guestCaps `xml:"guest"`
	}
	guestCaps struct {
		OSType string `xml:"os_type"`
		Arch   struct {
			Name     string   `xml:"name,attr"`
			Machines []string `xml:"machine"`
			Domains  []struct {
				Type     string   `xml:"type,attr"`
				Machines []string `xml:"machine"`
			} `xml:"domain"`
		} `xml:"arch"`
	}
	domainCaps struct {
		XMLName xml.Name `xml:"domainCapabilities"`
		Machine string   `xml:"machine"`
		Modes   []struct {
			Name      string `xml:"name,attr"`
			Supported string `xml:"supported,attr"`
		} `xml:"cpu>mode"`
	}
)

// complete adds what the document of domain capabilities says.
func (c Capabilities) complete(text string) (Capabilities, error) {
	var doc domainCaps
	if err := xml.Unmarshal([]byte(text), &doc); err != nil {
		return c, fmt.Errorf("read the host's domain capabilities: %w", err)
	}
	if c.MachineType == "" {
		c.MachineType = doc.Machine
	}
	for _, mode := range doc.Modes {
		switch mode.Name {
		case "host-passthrough":
			c.HostPassthrough = mode.Supported == "yes"
		case "maximum":
			c.MaximumCPU = mode.Supported == "yes"
		}
	}
	return c, nil
}

// choose picks architecture, virtualisation type and machine type from the
// host's capabilities document. The machine type is empty for QEMU's default.
func choose(text, virtType, machine string) (Capabilities, error) {
	var host hostCaps
	if err := xml.Unmarshal([]byte(text), &host); err != nil {
		return Capabilities{}, fmt.Errorf("read the host's capabilities: %w", err)
	}
	if host.Arch == "" {
		return Capabilities{}, errors.New("read the host's capabilities: they name no processor")
	}
	caps := Capabilities{VirtType: virtType, Arch: host.Arch, MachineType: machine}
	for _, guest := range host.Guests {
		if guest.Arch.Name != caps.Arch || guest.OSType != "hvm" {
			continue
		}
		machines := guest.Arch.Machines
		var types []string
		for _, d := range guest.Arch.Domains {
			types = append(types, d.Type)
			machines = append(machines, d.Machines...)
		}
		switch {
		case virtType == "auto" && slices.Contains(types, "kvm"):
			caps.VirtType = "kvm"
		case virtType == "auto":
			caps.VirtType = "qemu"
		case !slices.Contains(types, virtType):
			return caps, fmt.Errorf("the host cannot run guests of type %s (it can: %v): see virt-host-validate, or set virt_type to auto", virtType, types)
		}
		if best := modern[caps.Arch]; caps.MachineType == "" && slices.Contains(machines, best) {
			caps.MachineType = best
		}
		return caps, nil
	}
	return caps, fmt.Errorf("the host has no emulator for its own architecture %s: install QEMU for it", caps.Arch)
}

func optional(text string) libvirt.OptString {
	if text == "" {
		return nil
	}
	return libvirt.OptString{text}
}
