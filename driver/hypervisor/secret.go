package hypervisor

import (
	"bytes"
	"context"
	"strconv"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"
)

// CreateSecret creates a raw volume that holds content and that only QEMU's
// user, and root, can read. It is so before the content is in it. A volume of
// that name that is already there is replaced: whoever calls this owns the name.
//
// https://libvirt.org/formatstorage.html#target-elements
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStorageVolUpload
func (c *Connection) CreateSecret(ctx context.Context, pool, name string, content []byte) (Volume, error) {
	v := Volume{Pool: pool, Name: name, Capacity: uint64(len(content))}
	what := func(err error) error { return wrap(err, "create volume %s in pool %s", name, pool) }
	permissions, err := c.private(ctx)
	if err != nil {
		return v, what(err)
	}
	doc := libvirtxml.StorageVolume{
		Name:     name,
		Capacity: &libvirtxml.StorageVolumeSize{Unit: "bytes", Value: v.Capacity},
		Target: &libvirtxml.StorageVolumeTarget{
			Format:      &libvirtxml.StorageVolumeTargetFormat{Type: "raw"},
			Permissions: permissions,
		},
	}
	return v, what(c.do(ctx, func(rpc *libvirt.Libvirt) error {
		vol, path, err := createAnew(rpc, pool, doc)
		if err != nil {
			return err
		}
		v.Path = path
		return rpc.StorageVolUpload(vol, bytes.NewReader(content), 0, uint64(len(content)), 0)
	}))
}

// WipeVolume overwrites a volume with zeros, on the disk as well.
//
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStorageVolWipe
func (c *Connection) WipeVolume(ctx context.Context, pool, name string) error {
	return wrap(c.volume(ctx, pool, name, func(rpc *libvirt.Libvirt, vol libvirt.StorageVol) error {
		return rpc.StorageVolWipe(vol, 0)
	}), "wipe volume %s of pool %s", name, pool)
}

// private returns the permissions of a file that only QEMU can read. Where
// libvirt names no user for QEMU, that is libvirtd's own.
func (c *Connection) private(ctx context.Context) (*libvirtxml.StorageVolumeTargetPermissions, error) {
	permissions := &libvirtxml.StorageVolumeTargetPermissions{Mode: "0600"}
	uid, gid, ok, err := c.User(ctx)
	if ok {
		permissions.Owner, permissions.Group = strconv.Itoa(uid), strconv.Itoa(gid)
	}
	return permissions, err
}
