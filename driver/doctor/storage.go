package doctor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// The checks of pools and base volumes.

// checkPool looks whether a pool is there and runs.
func (d *Doctor) checkPool(ctx context.Context, name string) Finding {
	pool, err := d.hypervisor.Pool(ctx, name)
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		target := "/var/lib/libvirt/images"
		if name != "default" {
			target = "/var/lib/libvirt/" + name
		}
		return failure(script(d.virsh("pool-define-as", name, "dir", "--target", target), d.virsh("pool-build", name),
			d.virsh("pool-start", name), d.virsh("pool-autostart", name)), "there is no such pool")
	case err != nil:
		return unknown(err)
	case !pool.Active && pool.Path != "" && !exists(pool.Path):
		return failure(script(d.virsh("pool-build", name), d.virsh("pool-start", name)), "does not run, and its folder %s is not there", pool.Path)
	case !pool.Active:
		return failure(d.virsh("pool-start", name), "does not run")
	case !pool.Autostart:
		return warning(d.virsh("pool-autostart", name), "runs, but will not after a restart of the host")
	}
	return fine("runs, over %s", pool.Path)
}

// checkSpace looks whether a pool has room for a job.
func (d *Doctor) checkSpace(ctx context.Context, name string) Finding {
	pool, err := d.hypervisor.Pool(ctx, name)
	reserved := d.settings.ReserveDisk
	switch {
	case err != nil || !pool.Active:
		return Finding{Level: Skipped, Found: "the pool does not run"}
	case pool.Available < reserved && pool.Available < 1<<30:
		return failure(script(d.own("gc"), command("du", "-ahx", "--max-depth", "1", pool.Path)+" | sort -h"),
			"%s left, and %s are reserved (reserve_disk): jobs wait", size(pool.Available), size(reserved))
	case pool.Available < reserved:
		return failure(d.file.set(nil, "reserve_disk", `"1 GiB"`),
			"%s left, and %s are reserved (reserve_disk): jobs wait", size(pool.Available), size(reserved))
	}
	return fine("%s left, %s of it reserved", size(pool.Available), size(reserved))
}

// checkVolume looks whether an image's base volume is what the settings say,
// and stands alone.
func (d *Doctor) checkVolume(ctx context.Context, name string) Finding {
	image := d.settings.Images[name]
	volume, err := d.hypervisor.Volume(ctx, image.Pool, image.Volume)
	switch {
	case errors.Is(err, hypervisor.ErrNotFound):
		return d.missingVolume(ctx, image)
	case errors.Is(err, hypervisor.ErrInactive):
		return Finding{Level: Skipped, Found: "the pool does not run"}
	case err != nil:
		return unknown(err)
	}
	head, err := d.head(ctx, image, volume.Path)
	if err != nil {
		return unknown(err)
	}
	flat := volume.Path + ".flat"
	flatten := func(from string) string {
		return script(command("qemu-img", "convert", "-f", from, "-O", "qcow2", volume.Path, flat), command("mv", flat, volume.Path),
			d.virsh("pool-refresh", image.Pool))
	}
	switch {
	case head.format != string(image.Format) && (head.format == "qcow2" || head.format == "raw"):
		return failure(d.setImage(name, "format", strconv.Quote(head.format)), "%s is %s, and the settings say %s: no guest would boot",
			image.Volume, head.format, image.Format)
	case head.format != string(image.Format):
		return failure(flatten(head.format), "%s is %s, and the settings say %s", image.Volume, head.format, image.Format)
	case head.dataFile:
		return failure(flatten("qcow2"), "%s keeps its data in another file, which no guest's disk may", image.Volume)
	case head.backing != "":
		return failure(flatten("qcow2"), "%s is itself an overlay, on %s: a base volume must stand alone", image.Volume, oneLine(head.backing))
	case head.encrypted:
		return failure("", "%s is encrypted, and nobody is there to enter the passphrase", image.Volume)
	case head.corrupt:
		return failure(command("qemu-img", "check", "-f", "qcow2", "-r", "all", volume.Path), "%s is marked as corrupt", image.Volume)
	case image.Disk != 0 && image.Disk < volume.Capacity:
		return failure(d.setImage(name, "disk", `""`), "disk says %s, but %s has %s, and a disk can only grow",
			size(image.Disk), image.Volume, size(volume.Capacity))
	}
	if found, ok := d.reachable(volume.Path); !ok {
		return found
	}
	return fine("%s, %s of %s, stands alone", image.Volume, head.format, size(volume.Capacity))
}

// missingVolume says what to do about a base volume that is not there.
func (d *Doctor) missingVolume(ctx context.Context, image settings.Image) Finding {
	pool, err := d.hypervisor.Pool(ctx, image.Pool)
	if err != nil {
		return Finding{Level: Skipped, Found: "the pool does not run"}
	}
	var names []string
	volumes, err := d.hypervisor.Volumes(ctx, image.Pool)
	if err != nil {
		return unknown(err)
	}
	for _, volume := range volumes {
		names = append(names, volume.Name)
	}
	if near := settings.Nearest(image.Volume, names); near != "" {
		return failure(d.setImage(image.Name, "volume", strconv.Quote(near)), "there is no volume %s in pool %s, but a %s",
			image.Volume, image.Pool, near)
	}
	return failure(script(command("cp", "--sparse=always", "IMAGE", filepath.Join(pool.Path, image.Volume)), d.virsh("pool-refresh", image.Pool)),
		"there is no volume %s in pool %s: put the image there", image.Volume, image.Pool)
}

// head reads the beginning of a volume; where the driver may not, libvirt tells
// what it knows.
func (d *Doctor) head(ctx context.Context, image settings.Image, path string) (head, error) {
	type result struct {
		bytes []byte
		err   error
	}
	done := make(chan result, 1)
	// A file server that is away must not hold the doctor up.
	go func() {
		bytes, err := readStart(path, headSize)
		done <- result{bytes, err}
	}()
	select {
	case <-ctx.Done():
		return head{}, fmt.Errorf("read %s: %w", path, context.Cause(ctx))
	case r := <-done:
		if r.err == nil {
			return readHead(r.bytes), nil
		}
		if !errors.Is(r.err, fs.ErrPermission) {
			return head{}, r.err
		}
	}
	format, backing, err := d.hypervisor.Layout(ctx, image.Pool, image.Volume)
	return head{format: format, backing: backing}, err
}

// readStart returns the first bytes of a file, at most size.
func readStart(path string, size int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, size))
}

// headSize is how much of a volume is read: a qcow2's header, its extensions
// and the name of its backing file are all in its first cluster, of which this
// is the usual size.
const headSize = 64 << 10

// head is what the beginning of a volume says.
type head struct {
	// format is QEMU's name for it; what is no known format is raw.
	format                       string
	backing                      string
	dataFile, encrypted, corrupt bool
}

// readHead reads the beginning of a volume.
//
// https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
func readHead(b []byte) head {
	for _, other := range []struct{ format, magic string }{
		{"vmdk", "KDMV"}, {"vmdk", "# Disk DescriptorFile"}, {"vhdx", "vhdxfile"}, {"vpc", "conectix"}, {"qed", "QED\x00"},
	} {
		if bytes.HasPrefix(b, []byte(other.magic)) {
			return head{format: other.format}
		}
	}
	const vdi = 0x40
	if len(b) > vdi+4 && binary.LittleEndian.Uint32(b[vdi:]) == 0xbeda107f {
		return head{format: "vdi"}
	}
	if !bytes.HasPrefix(b, []byte("QFI\xfb")) {
		return head{format: "raw"}
	}
	h := head{format: "qcow2"}
	if len(b) < 72 {
		return head{format: "qcow2", corrupt: true}
	}
	version := binary.BigEndian.Uint32(b[4:])
	if version == 1 {
		return head{format: "qcow"}
	}
	offset, length := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:])
	h.encrypted = binary.BigEndian.Uint32(b[32:]) != 0
	if offset != 0 {
		h.backing = "an unnamed file"
		if end := offset + uint64(length); length > 0 && end > offset && end <= uint64(len(b)) {
			h.backing = strings.ToValidUTF8(string(b[offset:end]), "?")
		}
	}
	if version >= 3 && len(b) >= 80 {
		const corrupt, dataFile = 1 << 1, 1 << 2
		features := binary.BigEndian.Uint64(b[72:])
		h.corrupt, h.dataFile = features&corrupt != 0, features&dataFile != 0
	}
	return h
}

// checkWriters looks for domains that may write to an image's base volume,
// which would break every disk on top of it.
func (d *Doctor) checkWriters(ctx context.Context, name string) Finding {
	image := d.settings.Images[name]
	volume, err := d.hypervisor.Volume(ctx, image.Pool, image.Volume)
	if err != nil {
		return Finding{Level: Skipped, Found: "the volume is not there"}
	}
	disks, err := d.hypervisor.Disks(ctx)
	if err != nil {
		return unknown(err)
	}
	for _, disk := range disks {
		if disk.Path != volume.Path && (disk.Pool != image.Pool || disk.Volume != image.Volume) {
			continue
		}
		detach := d.virsh("detach-disk", disk.Domain, disk.Target, "--config")
		if disk.State.Kind == hypervisor.Off || disk.State.Kind == hypervisor.Crashed {
			return failure(detach, "domain %s has %s as its disk %s: when it is started it breaks every guest's disk",
				disk.Domain, image.Volume, disk.Target)
		}
		down := fmt.Sprintf("until %s | grep -q 'shut off'; do sleep 1; done", d.virsh("domstate", disk.Domain))
		return failure(script(d.virsh("shutdown", disk.Domain), down, detach),
			"domain %s runs and writes to %s, its disk %s: that breaks every guest's disk", disk.Domain, image.Volume, disk.Target)
	}
	return fine("no domain may write to %s", image.Volume)
}
