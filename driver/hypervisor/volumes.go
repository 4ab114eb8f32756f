package hypervisor

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"
)

// Volume is a volume of a storage pool.
type Volume struct {
	Pool, Name string
	// Path is the volume's file on the host.
	Path string
	// Capacity is what a guest sees, in bytes, and Allocation what it takes of
	// the host's disk. Allocation is not known of a volume that was just created.
	Capacity, Allocation uint64
	// Modified is when the volume was last written to. Not known of one that was
	// just created.
	Modified time.Time
}

// Volume looks a volume up by name. A pool that does not know it is refreshed
// first, since a file that was put there by other means than libvirt appears
// only then. ErrNotFound when the pool or the volume is not there, ErrInactive
// when the pool is not running.
//
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStorageVolLookupByName
func (c *Connection) Volume(ctx context.Context, pool, name string) (Volume, error) {
	var v Volume
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		p, err := rpc.StoragePoolLookupByName(pool)
		if err != nil {
			return err
		}
		vol, err := rpc.StorageVolLookupByName(p, name)
		if is(err, libvirt.ErrNoStorageVol) {
			if err := rpc.StoragePoolRefresh(p, 0); err != nil {
				return err
			}
			vol, err = rpc.StorageVolLookupByName(p, name)
		}
		if err != nil {
			return err
		}
		text, err := rpc.StorageVolGetXMLDesc(vol, 0)
		if err != nil {
			return err
		}
		v, err = parseVolume(pool, text)
		return err
	})
	return v, wrap(err, "volume %s in pool %s", name, pool)
}

// Volumes returns all volumes of a pool. A pool that does not exist has none;
// ErrInactive when it is not running.
//
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStoragePoolListAllVolumes
func (c *Connection) Volumes(ctx context.Context, pool string) ([]Volume, error) {
	var volumes []Volume
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		volumes = nil
		p, err := rpc.StoragePoolLookupByName(pool)
		if err != nil {
			return err
		}
		found, _, err := rpc.StoragePoolListAllVolumes(p, 1, 0)
		if err != nil {
			return err
		}
		for _, vol := range found {
			text, err := rpc.StorageVolGetXMLDesc(vol, 0)
			if is(err, libvirt.ErrNoStorageVol) {
				continue // deleted meanwhile
			}
			if err != nil {
				return err
			}
			v, err := parseVolume(pool, text)
			if err != nil {
				return fmt.Errorf("volume %s: %w", vol.Name, err)
			}
			volumes = append(volumes, v)
		}
		return nil
	})
	if is(err, libvirt.ErrNoStoragePool) {
		return nil, nil
	}
	return volumes, wrap(err, "list volumes of pool %s", pool)
}

// lastDate is when the year 9999 ends, in seconds since 1970.
const lastDate = 253402300800

func parseVolume(pool, text string) (Volume, error) {
	var doc libvirtxml.StorageVolume
	if err := doc.Unmarshal(text); err != nil {
		return Volume{}, err
	}
	v := Volume{Pool: pool, Name: doc.Name}
	if doc.Capacity != nil {
		v.Capacity = doc.Capacity.Value
	}
	if doc.Allocation != nil {
		v.Allocation = doc.Allocation.Value
	}
	if target := doc.Target; target != nil {
		v.Path = target.Path
		if target.Timestamps != nil {
			// Seconds with a fraction, since 1970. A file may claim any time; one that
			// is no date is as good as none.
			seconds, err := strconv.ParseFloat(target.Timestamps.Mtime, 64)
			if err == nil && seconds >= 0 && seconds < lastDate {
				v.Modified = time.Unix(int64(seconds), 0)
			}
		}
	}
	return v, nil
}

// CreateOverlay creates an empty qcow2 volume in base's pool that shows base,
// a volume of the given format, and grows it to capacity bytes where that is
// more than base has. A volume of that name that is already there is replaced:
// whoever calls this owns the name.
//
// https://libvirt.org/formatstorage.html#storage-volume-target-elements
// https://libvirt.org/formatstorage.html#backing-store-elements
func (c *Connection) CreateOverlay(ctx context.Context, name string, base Volume, format string, capacity uint64) (Volume, error) {
	v := Volume{Pool: base.Pool, Name: name, Capacity: max(capacity, base.Capacity)}
	doc := libvirtxml.StorageVolume{
		Name:     name,
		Capacity: &libvirtxml.StorageVolumeSize{Unit: "bytes", Value: v.Capacity},
		Target: &libvirtxml.StorageVolumeTarget{
			Format: &libvirtxml.StorageVolumeTargetFormat{Type: "qcow2"},
			// libvirt's default is 0.10. That has no way to note that what a guest
			// discards is not to be seen in the base again, so QEMU keeps it.
			Compat: "1.1",
		},
		BackingStore: &libvirtxml.StorageVolumeBackingStore{
			Path:   base.Path,
			Format: &libvirtxml.StorageVolumeTargetFormat{Type: format},
		},
	}
	err := c.do(ctx, func(rpc *libvirt.Libvirt) (err error) {
		_, v.Path, err = createAnew(rpc, base.Pool, doc)
		return err
	})
	return v, wrap(err, "create volume %s on %s in pool %s", name, base.Name, base.Pool)
}

// createAnew creates a volume in a pool, in place of one of that name, and
// returns its path, too.
func createAnew(rpc *libvirt.Libvirt, pool string, doc libvirtxml.StorageVolume) (vol libvirt.StorageVol, path string, err error) {
	text, err := doc.Marshal()
	if err != nil {
		return vol, "", fmt.Errorf("write volume XML of %s: %w", doc.Name, err)
	}
	p, err := rpc.StoragePoolLookupByName(pool)
	if err != nil {
		return vol, "", err
	}
	vol, err = rpc.StorageVolCreateXML(p, text, 0)
	if is(err, libvirt.ErrStorageVolExist) {
		if vol, err = rpc.StorageVolLookupByName(p, doc.Name); err != nil {
			return vol, "", err
		}
		if err := rpc.StorageVolDelete(vol, 0); err != nil {
			return vol, "", err
		}
		vol, err = rpc.StorageVolCreateXML(p, text, 0)
	}
	if err != nil {
		return vol, "", err
	}
	path, err = rpc.StorageVolGetPath(vol)
	return vol, path, err
}

// DeleteVolume deletes a volume and reports whether there was one. A pool that
// does not exist has none. ErrBusy when libvirt is still at work on the volume,
// ErrInactive when the pool is not running.
//
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStorageVolDelete
func (c *Connection) DeleteVolume(ctx context.Context, pool, name string) (bool, error) {
	found := false
	err := c.volume(ctx, pool, name, func(rpc *libvirt.Libvirt, vol libvirt.StorageVol) error {
		found = true
		return rpc.StorageVolDelete(vol, 0)
	})
	switch {
	case is(err, libvirt.ErrNoStoragePool), is(err, libvirt.ErrNoStorageVol):
		return found, nil
	case found && is(err, libvirt.ErrOperationInvalid):
		// Libvirt still makes it, for a prepare that has been killed meanwhile, and
		// says so with the error by which it says that a pool does not run.
		return found, fmt.Errorf("delete volume %s from pool %s: %w: %w", name, pool, ErrBusy, err)
	}
	return found, wrap(err, "delete volume %s from pool %s", name, pool)
}

// volume runs call on the volume of that name, as its pool knows it. Its errors
// are libvirt's own.
func (c *Connection) volume(ctx context.Context, pool, name string, call func(*libvirt.Libvirt, libvirt.StorageVol) error) error {
	return c.do(ctx, func(rpc *libvirt.Libvirt) error {
		p, err := rpc.StoragePoolLookupByName(pool)
		if err != nil {
			return err
		}
		vol, err := rpc.StorageVolLookupByName(p, name)
		if err != nil {
			return err
		}
		return call(rpc, vol)
	})
}
