//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// newDisk mounts a small file system. Its options are tmpfs's.
func newDisk(t *testing.T, options string) string {
	t.Helper()
	dir := newFolder(t)
	command(t, "mount", "-t", "tmpfs", "-o", "mode=711,"+options, "disk", dir)
	t.Cleanup(func() { command(t, "umount", "--lazy", dir) })
	return dir
}

// fill leaves no space on the disk of a folder until the file that it returns is removed.
func fill(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "filled")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return name
}

// hostFaults queues what goes wrong on the host beside libvirtd.
func (f *faults) hostFaults() {
	f.fullPools()
	f.stoppedNetworks()
	f.fullDisks()
}

const full = "no space left on device"

func (f *faults) fullPools() {
	onSmallPool := func(t *testing.T) (dir, image string) {
		dir = newDisk(t, "size=8M")
		command(t, "cp", filepath.Join(images, "tiny.qcow2"), dir)
		return dir, fmt.Sprintf("pool = %q", newPool(t, dir))
	}
	prepare := f.row("pool full", "prepare")
	f.add(prepare, 1, func(t *testing.T, x *trial) {
		dir, image := onSmallPool(t)
		s := newSettings(t, "reserve_disk = 0\n"+tiny(image))
		fill(t, dir)
		ex := x.start(t, s.runner(t))
		x.wantLost(t, ex.Prepare(t.Context()), 30*time.Second, "create disk", x.machine()+".qcow2", "No space left on device")
	})
	f.add(prepare, 1, func(t *testing.T, x *trial) {
		_, image := onSmallPool(t)
		ex := x.start(t, newSettings(t, "reserve_disk = \"64 MiB\"\n"+tiny(image, "[timeouts]", `turn = "20s"`)).runner(t))
		x.wait(func() {
			x.wantLost(t, ex.Prepare(t.Context()), 40*time.Second, "no room after 20s (timeouts.turn)", "64 MiB are reserved (reserve_disk)")
		})
	})
	f.add(f.row("pool full, with room later", "prepare"), 1, func(t *testing.T, x *trial) {
		dir := newDisk(t, "size=80M")
		command(t, "cp", filepath.Join(images, "tiny.qcow2"), dir)
		filled := fill(t, dir)
		image := fmt.Sprintf("network = %q\npool = %q", f.network.name, newPool(t, dir))
		ex := x.start(t, newSettings(t, "reserve_disk = \"64 MiB\"\n"+tiny(image)).runner(t))
		call := ex.StartPrepare()
		waitFor(t, call, "waiting for room on the host")
		if err := os.Remove(filled); err != nil {
			t.Fatal(err)
		}
		want(t, ex, x.end(t, call), 0)
		x.wantOwn(t, ex)
	})
	// QEMU pauses a guest that cannot write to its disk because the host's is full.
	f.add(f.row("pool full", "run"), 1, func(t *testing.T, x *trial) {
		_, image := onSmallPool(t)
		s := newSettings(t, "reserve_disk = 0\n"+f.tiny(image))
		x.lose(t, x.script(t, s.runner(t), "sudo dd if=/dev/urandom of=/dev/vda bs=1M count=32\nsync"), nil, "paused", "is paused (I/O error on its disk)")
	})
	f.add(f.row("pool full", "cleanup"), 1, func(t *testing.T, x *trial) {
		dir, image := onSmallPool(t)
		s := newSettings(t, "reserve_disk = 0\n"+f.tiny(image))
		ex := x.prepared(t, s.runner(t))
		fill(t, dir)
		want(t, ex, ex.Cleanup(t.Context()), 0)
		x.count(t)
	})
}

func (f *faults) stoppedNetworks() {
	f.add(f.row("network stopped while prepare waits", "prepare"), 2, func(t *testing.T, x *trial) {
		net := newNetwork(t, true)
		lacks, sign := "udhcpc", "  machine " // no address comes
		if x.n > 0 {
			lacks, sign = "sshd", "  address " // no shell comes
		}
		image := fmt.Sprintf("network = %q\n%s", net.name, first("sed -i /"+lacks+"/d /etc/inittab"))
		call := x.start(t, newSettings(t, tiny(image)).runner(t)).StartPrepare()
		waitFor(t, call, sign)
		virsh(t, "net-destroy", net.name)
		x.forgotten = net.macs()
		stopped := time.Now()
		r := x.end(t, call)
		x.wantLost(t, r, patience, "network "+net.name+": not active")
		if took := r.Ended.Sub(stopped); took > 45*time.Second {
			t.Errorf("prepare went on for %v", took)
		}
		virsh(t, "net-start", net.name)
	})
	// Nobody takes the lease back while there is no DHCP server.
	f.add(f.row("network stopped before", "cleanup"), 1, func(t *testing.T, x *trial) {
		net := newNetwork(t, true)
		ex := x.prepared(t, newSettings(t, tiny(fmt.Sprintf("network = %q", net.name))).runner(t))
		virsh(t, "net-destroy", net.name)
		x.forgotten = net.macs()
		r := ex.Cleanup(t.Context())
		want(t, ex, r, 0)
		wantWithin(t, r, 30*time.Second)
		virsh(t, "net-start", net.name)
	})
}

// fullDisks fills what the driver itself writes to.
func (f *faults) fullDisks() {
	onDisk := func(t *testing.T) (runner.Config, string) {
		dir := newDisk(t, "size=64k")
		cfg := f.config(t, "")
		cfg.TempDir = dir
		return cfg, dir
	}
	f.add(f.row("job's temporary folder full", "prepare"), 1, func(t *testing.T, x *trial) {
		cfg, dir := onDisk(t)
		ex := x.start(t, cfg)
		filled := fill(t, dir)
		x.wantLost(t, ex.Prepare(t.Context()), time.Minute, ex.Dir(), full)
		if err := os.Remove(filled); err != nil {
			t.Fatal(err)
		}
	})
	run := f.row("job's temporary folder full: no exit code file", "run")
	f.add(run, 1, func(t *testing.T, x *trial) {
		cfg, dir := onDisk(t)
		ex := x.prepared(t, cfg)
		call := ex.StartRun("build_script", "echo begun; sleep 5; exit 7")
		waitFor(t, call, "begun\n")
		filled := fill(t, dir)
		r := x.end(t, call)
		want(t, ex, r, 2, "hand over the script's exit code 7", ex.ExitCodeFile(), full)
		if err := os.Remove(filled); err != nil {
			t.Fatal(err)
		}
		x.wantOwn(t, ex)
	})
	f.add(f.row("job's temporary folder full", "cleanup"), 1, func(t *testing.T, x *trial) {
		cfg, dir := onDisk(t)
		ex := x.prepared(t, cfg)
		filled := fill(t, dir)
		want(t, ex, ex.Cleanup(t.Context()), 0)
		x.count(t)
		if err := os.Remove(filled); err != nil {
			t.Fatal(err)
		}
	})

	// In a mount namespace of the call's own, as all others share the folder.
	noLocks := func(argv []string) []string {
		const script = `mkdir -p /run/libvirt-driver && mount -t tmpfs -o nr_inodes=1 locks /run/libvirt-driver && exec "$@"`
		return append([]string{"unshare", "--mount", "sh", "-c", script, "sh"}, argv...)
	}
	withoutLocks := func(cfg runner.Config) runner.Config {
		cfg.Prepare, cfg.Run, cfg.Cleanup = noLocks(cfg.Prepare), noLocks(cfg.Run), noLocks(cfg.Cleanup)
		return cfg
	}
	for _, stage := range []string{"prepare", "run", "cleanup"} {
		f.add(f.row("lock folder full", stage), 1, func(t *testing.T, x *trial) {
			whole := f.config(t, "")
			broken := withoutLocks(whole)
			var call *runner.Call
			switch stage {
			case "prepare":
				call = x.start(t, broken).StartPrepare()
			case "run":
				broken.Prepare = whole.Prepare
				call = x.prepared(t, broken).StartRun("build_script", "true")
			case "cleanup":
				broken.Prepare = whole.Prepare
				call = x.prepared(t, broken).StartCleanup()
			}
			x.wantLost(t, x.end(t, call), 15*time.Second, "/run/libvirt-driver/"+x.machine(), full)
			// The disk has room again.
			ex, err := runner.New(whole, x.job)
			if err != nil {
				t.Fatal(err)
			}
			x.ex = ex
		})
	}

	logs := f.row("folder for the guests' consoles full", "prepare, run")
	f.add(logs, 1, func(t *testing.T, x *trial) {
		dir := newDisk(t, "size=64k")
		fill(t, dir)
		ex := x.prepared(t, newSettings(t, fmt.Sprintf("log_dir = %q\n", dir)+f.tiny("")).runner(t))
		x.wantOwn(t, ex)
	})
	f.add(logs, 1, func(t *testing.T, x *trial) {
		dir := newDisk(t, "size=64k,nr_inodes=1")
		ex := x.start(t, newSettings(t, fmt.Sprintf("log_dir = %q\n", dir)+f.tiny("")).runner(t))
		x.wantLost(t, ex.Prepare(t.Context()), 30*time.Second, "start machine", dir, "No space left on device")
	})
}
