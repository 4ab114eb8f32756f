//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"libvirt-driver/driver/hypervisor"
)

// connect returns a connection of the driver's own kind to the private libvirtd.
func connect(t *testing.T, uri string) *hypervisor.Connection {
	t.Helper()
	c := hypervisor.New(uri, "")
	t.Cleanup(c.Close)
	return c
}

func TestAPoolsVolumesAreFoundMadeAndDeletedByName(t *testing.T) {
	t.Parallel()
	c, ctx, dir := connect(t, "qemu:///system"), t.Context(), newFolder(t)
	pool := newPool(t, dir)

	if _, err := c.Volume(ctx, "no-such-pool", "base"); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("a volume of a pool that does not exist: %v", err)
	}
	if _, err := c.Volume(ctx, pool, "base"); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("a volume that does not exist: %v", err)
	}
	// A file that is put there behind libvirt's back.
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, "base"), "3M")
	base, err := c.Volume(ctx, pool, "base")
	want := hypervisor.Volume{Pool: pool, Name: "base", Path: filepath.Join(dir, "base"), Capacity: 3 << 20,
		Allocation: base.Allocation, Modified: base.Modified}
	if err != nil || base != want || base.Allocation == 0 || time.Since(base.Modified) > time.Minute {
		t.Fatalf("the volume is %+v, %v; not %+v", base, err, want)
	}

	for _, test := range []struct {
		asked, gets uint64
	}{{0, 3 << 20}, {1 << 20, 3 << 20}, {5 << 20, 5 << 20}} { // the second and third replace those before
		overlay, err := c.CreateOverlay(ctx, "overlay", base, "qcow2", test.asked)
		if err != nil || overlay.Capacity != test.gets || overlay.Path != filepath.Join(dir, "overlay") {
			t.Errorf("an overlay of %d bytes: %+v, %v", test.asked, overlay, err)
		}
		wantImage(t, overlay.Path, overlayOf(int64(test.gets), base.Path, "qcow2"))
	}

	for _, there := range []bool{true, false} {
		if found, err := c.DeleteVolume(ctx, pool, "overlay"); err != nil || found != there {
			t.Errorf("delete the overlay: found %v, %v", found, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "overlay")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the overlay's file is there: %v", err)
	}

	virsh(t, "pool-destroy", pool)
	if _, err := c.Volume(ctx, pool, "base"); !errors.Is(err, hypervisor.ErrInactive) {
		t.Errorf("a volume of a pool that does not run: %v", err)
	}
}

func TestASecretVolumeIsQEMUsAloneAndCanBeWiped(t *testing.T) {
	t.Parallel()
	c, ctx, dir := connect(t, "qemu:///system"), t.Context(), newFolder(t)
	pool := newPool(t, dir)
	for _, content := range []string{"first and longer\n", "second\n"} { // the second replaces the first
		v, err := c.CreateSecret(ctx, pool, "secret", []byte(content))
		if err != nil || v.Path != filepath.Join(dir, "secret") {
			t.Fatalf("%+v, %v", v, err)
		}
		if text, err := os.ReadFile(v.Path); err != nil || string(text) != content {
			t.Errorf("the volume holds %q, %v", text, err)
		}
		if got := strings.TrimSpace(command(t, "stat", "--format", "%a %U:%G", v.Path)); got != "600 libvirt-qemu:libvirt-qemu" {
			t.Errorf("the volume is %s", got)
		}
	}
	if err := c.WipeVolume(ctx, pool, "secret"); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "secret")); err != nil || len(text) == 0 || len(bytes.Trim(text, "\x00")) > 0 {
		t.Errorf("after wiping the volume holds %q, %v", text, err)
	}
	if _, err := c.CreateSecret(ctx, "no-such-pool", "secret", []byte("x")); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("in a pool that does not exist: %v", err)
	}
	if err := c.WipeVolume(ctx, pool, "no-such-volume"); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("wipe a volume that does not exist: %v", err)
	}
}

func TestADomainIsFollowedFromItsDefinitionToItsEnd(t *testing.T) {
	t.Parallel()
	// libvirt's own test hypervisor starts and stops domains without a guest.
	c, ctx := connect(t, "test:///default"), t.Context()
	const namespace = "urn:test:followed"
	id := lastJob.Add(1) // it cannot be undefined there, and stays in libvirtd's memory
	name := fmt.Sprintf("followed-%d", id)
	xml := fmt.Sprintf("<domain type='test'><name>%s</name><uuid>11111111-2222-4333-8444-%012d</uuid><memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>", name, id)

	if state, err := c.State(ctx, name); err != nil || state.Kind != hypervisor.Gone {
		t.Errorf("before: %v, %v", state, err)
	}
	if _, found, err := c.Metadata(ctx, name, namespace); err != nil || found {
		t.Errorf("metadata of no domain: found %v, %v", found, err)
	}
	for range 2 { // all of it may be repeated
		if err := c.DefineDomain(ctx, name, xml); err != nil {
			t.Fatal(err)
		}
		if err := c.StartDomain(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	if text, found, err := c.Metadata(ctx, name, namespace); err != nil || !found || text != "" {
		t.Errorf("no metadata: %q, found %v, %v", text, found, err)
	}
	if err := c.SetMetadata(ctx, name, namespace, "prefix", "<a>1</a>"); err != nil {
		t.Error(err)
	}
	if text, found, err := c.Metadata(ctx, name, namespace); err != nil || !found || text != "<a>1</a>" {
		t.Errorf("metadata: %q, found %v, %v", text, found, err)
	}

	if state, err := c.Watch(ctx, name, func(hypervisor.State) bool { return true }); err != nil || state.Kind != hypervisor.Running {
		t.Errorf("watched for a moment: %v, %v", state, err)
	}
	watched := make(chan hypervisor.State, 1)
	looked := make(chan struct{}, 1)
	go func() {
		state, err := c.Watch(ctx, name, func(state hypervisor.State) bool {
			select {
			case looked <- struct{}{}:
			default:
			}
			return state.Kind != hypervisor.Running
		})
		if err != nil {
			t.Error(err)
		}
		watched <- state
	}()
	<-looked // and found that it runs: what comes now is an event
	for range 2 {
		if err := c.DestroyDomain(ctx, name); err != nil {
			t.Error(err)
		}
	}
	select {
	case state := <-watched:
		if state.Kind != hypervisor.Off || state.Reason != "destroyed" {
			t.Errorf("the domain is %v", state)
		}
	case <-time.After(time.Minute):
		t.Error("the domain's end has not been seen")
	}
	if err := c.UndefineDomain(ctx, "no-such-domain"); err != nil {
		t.Errorf("undefine no domain: %v", err)
	}
}

func TestLeasesAreKeptByNetworksThatHandOutAddresses(t *testing.T) {
	t.Parallel()
	c, ctx := connect(t, "qemu:///system"), t.Context()
	with, without, off := newNetwork(t, true), newNetwork(t, false), defineNetwork(t, true)
	for name, expected := range map[string]bool{with.name: true, without.name: false} {
		if keeps, err := c.KeepsLeases(ctx, name); err != nil || keeps != expected {
			t.Errorf("network %s keeps leases: %v, %v", name, keeps, err)
		}
	}
	if _, err := c.KeepsLeases(ctx, off.name); !errors.Is(err, hypervisor.ErrInactive) {
		t.Errorf("a network that does not run: %v", err)
	}
	if _, err := c.KeepsLeases(ctx, "no-such-network"); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("a network that does not exist: %v", err)
	}
	// One of the same name, made anew, is another network.
	xml := virsh(t, "net-dumpxml", "--inactive", with.name)
	virsh(t, "net-destroy", with.name)
	virsh(t, "net-undefine", with.name)
	if _, err := c.KeepsLeases(ctx, with.name); !errors.Is(err, hypervisor.ErrNotFound) {
		t.Errorf("a network that is gone: %v", err)
	}
	virsh(t, "net-define", document(t, "%s", regexp.MustCompile("<uuid>.*</uuid>").ReplaceAllString(xml, "")))
	virsh(t, "net-start", with.name)
	if keeps, err := c.KeepsLeases(ctx, with.name); err != nil || !keeps {
		t.Errorf("a network that was made anew keeps leases: %v, %v", keeps, err)
	}
	for _, name := range []string{with.name, without.name, off.name, "no-such-network"} {
		if err := c.ReleaseLeases(ctx, name, "52:54:00:00:00:01"); err != nil {
			t.Errorf("give back no lease of %s: %v", name, err)
		}
	}
}

// The first that a host's kernel learns of a guest is which port of the bridge leads to it, from its first packet.
func TestAGuestIsNoticedOnceTheKernelKnowsIt(t *testing.T) {
	t.Parallel()
	const mac, other = "52:54:00:aa:00:01", "52:54:00:aa:00:02"
	n := newNetwork(t, false)
	port, far := n.bridge+"p", n.bridge+"q"
	command(t, "ip", "link", "add", port, "type", "veth", "peer", "name", far)
	defer command(t, "ip", "link", "delete", port)
	command(t, "ip", "link", "set", far, "up")
	command(t, "ip", "link", "set", port, "master", n.bridge, "up")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	noticed, err := connect(t, "qemu:///system").Noticed(ctx, mac)
	if err != nil {
		t.Fatal(err)
	}
	for _, learned := range []struct {
		what string
		so   bool
	}{
		{"bridge fdb add " + other + " dev " + port + " master dynamic", false},
		{"ip neigh replace " + n.prefix + ".3 lladdr " + other + " dev " + n.bridge + " nud stale", false},
		{"bridge fdb add " + mac + " dev " + port + " master dynamic", true},
		{"ip neigh replace " + n.prefix + ".4 lladdr " + mac + " dev " + n.bridge + " nud stale", true},
	} {
		words := strings.Fields(learned.what)
		command(t, words[0], words[1:]...)
		select {
		case <-noticed:
			if !learned.so {
				t.Errorf("noticed by %s", learned.what)
			}
		case <-time.After(time.Second):
			if learned.so {
				t.Errorf("not noticed by %s", learned.what)
			}
		}
	}
}
