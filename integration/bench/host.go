package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// host is the libvirt host as bench itself sees it, beside the two that it
// measures.
type host struct {
	rpc    *libvirt.Libvirt
	cancel context.CancelFunc // ends the subscription to events
	// bridge is the guests' network's, address the host's own there.
	bridge  *net.Interface
	address netip.Addr

	mu      sync.Mutex
	started time.Time // when libvirt last said that a domain has started
}

// connect connects to libvirtd and finds the network's bridge.
func connect(ctx context.Context, network string) (*host, error) {
	h := &host{rpc: libvirt.NewWithDialer(dialers.NewLocal())}
	if err := h.rpc.ConnectToURI(libvirt.QEMUSystem); err != nil {
		return nil, fmt.Errorf("connect to libvirtd: %w", err)
	}
	if err := h.findBridge(network); err != nil {
		h.rpc.Disconnect()
		return nil, fmt.Errorf("network %s: %w", network, err)
	}
	ctx, h.cancel = context.WithCancel(ctx)
	events, err := h.rpc.LifecycleEvents(ctx)
	if err != nil {
		h.close()
		return nil, fmt.Errorf("subscribe to libvirt's events: %w", err)
	}
	go func() {
		for e := range events {
			if libvirt.DomainEventType(e.Event) == libvirt.DomainEventStarted {
				h.mu.Lock()
				h.started = time.Now()
				h.mu.Unlock()
			}
		}
	}()
	return h, nil
}

func (h *host) close() {
	h.cancel()
	h.rpc.Disconnect()
}

// lastStart is when the last domain has started.
func (h *host) lastStart() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.started
}

func (h *host) findBridge(network string) error {
	n, err := h.rpc.NetworkLookupByName(network)
	if err != nil {
		return err
	}
	name, err := h.rpc.NetworkGetBridgeName(n)
	if err != nil {
		return err
	}
	if h.bridge, err = net.InterfaceByName(name); err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	addresses, err := h.bridge.Addrs()
	if err != nil {
		return fmt.Errorf("bridge %s: %w", name, err)
	}
	for _, a := range addresses {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().Is4() {
			h.address = prefix.Addr()
			return nil
		}
	}
	return fmt.Errorf("bridge %s has no IPv4 address", name)
}

// facts are what the figures depend on.
func (h *host) facts(ctx context.Context, o options) ([]string, error) {
	library, err := h.rpc.ConnectGetLibVersion()
	if err != nil {
		return nil, fmt.Errorf("libvirt's version: %w", err)
	}
	qemu, err := h.rpc.ConnectGetVersion()
	if err != nil {
		return nil, fmt.Errorf("QEMU's version: %w", err)
	}
	driver, err := exec.CommandContext(ctx, o.driver, "version").Output()
	if err != nil {
		return nil, fmt.Errorf("the driver's version: %w", err)
	}
	var kernel syscall.Utsname
	if err := syscall.Uname(&kernel); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	how := "emulated (TCG)"
	if o.virtType == "kvm" {
		how = "on KVM"
	}
	return []string{
		fmt.Sprintf("machine: %d cores (%s), %s memory", runtime.NumCPU(),
			cpuModel(procField("/proc/cpuinfo", "model name")), gibibytes(procField("/proc/meminfo", "MemTotal"))),
		fmt.Sprintf("host: Linux %s, libvirt %s, QEMU %s", utsname(kernel.Release[:]), version(library), version(qemu)),
		fmt.Sprintf("guests: %s, of gitlab-runner-base.qcow2, 2 vCPUs and 2 GiB: all sides' defaults", how),
		"driver: " + strings.TrimSpace(string(driver)) + ", whose calls to libvirtd pass through bench",
		loadAverage("at the beginning"),
	}, nil
}

// version is a version as libvirt encodes it.
func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

func utsname(s []int8) string {
	var b strings.Builder
	for _, c := range s {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}

// procField is a field's first value in a file of "name: value" lines; "" when
// there is none.
func procField(file, name string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(text) {
		if key, value, ok := bytes.Cut(line, []byte(":")); ok && string(bytes.TrimSpace(key)) == name {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

func cpuModel(name string) string {
	if name == "" {
		return runtime.GOARCH
	}
	return strings.Join(strings.Fields(name), " ")
}

// gibibytes is for meminfo's kB, which are KiB.
func gibibytes(kib string) string {
	var n float64
	if _, err := fmt.Sscanf(kib, "%f kB", &n); err != nil {
		return "unknown"
	}
	return fmt.Sprintf("%.1f GiB", n/(1<<20))
}

// loadAverage tells how quiet the host was: https://man7.org/linux/man-pages/man5/proc_loadavg.5.html
func loadAverage(when string) string {
	text, err := os.ReadFile("/proc/loadavg")
	fields := strings.Fields(string(text))
	if err != nil || len(fields) < 3 {
		return "load " + when + ": unknown"
	}
	return fmt.Sprintf("load %s: %s over the last 1, 5 and 15 minutes", when, strings.Join(fields[:3], ", "))
}
