package hypervisor

import (
	"context"
	"encoding/xml"
	"errors"
	"syscall"

	"github.com/digitalocean/go-libvirt"
)

// Memory is how a host's memory stands, in bytes.
type Memory struct {
	// Total is what the host has.
	Total uint64
	// Guests is what each domain that runs may take, by name, whether it has taken
	// it yet or not.
	Guests map[string]uint64
	// Available is what is free or holds only caches.
	Available uint64
}

// Memory returns how the host's memory stands.
//
// https://libvirt.org/html/libvirt-libvirt-host.html#virNodeGetMemoryStats
func (c *Connection) Memory(ctx context.Context) (Memory, error) {
	const kib = 1024
	var m Memory
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		m = Memory{Guests: map[string]uint64{}}
		// How many fields there are is the answer to asking for none.
		const allCells = -1
		_, fields, err := rpc.NodeGetMemoryStats(0, allCells, 0)
		if err != nil {
			return err
		}
		stats, _, err := rpc.NodeGetMemoryStats(fields, allCells, 0)
		if err != nil {
			return err
		}
		for _, stat := range stats {
			switch stat.Field {
			case "total":
				m.Total = stat.Value * kib
			case "free", "buffers", "cached":
				m.Available += stat.Value * kib
			}
		}
		running, _, err := rpc.ConnectListAllDomains(1, libvirt.ConnectListDomainsActive)
		if err != nil {
			return err
		}
		for _, domain := range running {
			_, most, _, _, _, err := rpc.DomainGetInfo(domain)
			if is(err, libvirt.ErrNoDomain) {
				continue // ended meanwhile
			}
			if err != nil {
				return err
			}
			m.Guests[domain.Name] = most * kib
		}
		return nil
	})
	return m, wrap(err, "read the host's memory")
}

// PoolSpace returns how many bytes a pool can still take. ErrNotFound when
// there is no such pool, ErrInactive when it is not running.
//
// https://libvirt.org/html/libvirt-libvirt-storage.html#virStoragePoolGetInfo
func (c *Connection) PoolSpace(ctx context.Context, pool string) (uint64, error) {
	var space uint64
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		p, err := rpc.StoragePoolLookupByName(pool)
		if err != nil {
			return err
		}
		state, _, _, available, err := rpc.StoragePoolGetInfo(p)
		if err != nil {
			return err
		}
		if libvirt.StoragePoolState(state) != libvirt.StoragePoolRunning {
			return ErrInactive
		}
		text, err := rpc.StoragePoolGetXMLDesc(p, 0)
		if err != nil {
			return err
		}
		if space, err = folderSpace(text); err != nil {
			space = available
		}
		return nil
	})
	return space, wrap(err, "read the space of pool %s", pool)
}

// folderSpace returns what the file system of a pool of files has left. Of such
// a pool libvirt itself knows only what it was when it last made, deleted or
// looked for a volume there, while guests fill their disks and others come and
// go; and making it look has it stop the pool when it stumbles.
func folderSpace(pool string) (uint64, error) {
	var p struct {
		XMLName xml.Name `xml:"pool"`
		Type    string   `xml:"type,attr"`
		Path    string   `xml:"target>path"`
	}
	if err := xml.Unmarshal([]byte(pool), &p); err != nil {
		return 0, err
	}
	if p.Path == "" || p.Type != "dir" && p.Type != "fs" && p.Type != "netfs" {
		return 0, errors.New("not a pool of files")
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(p.Path, &fs); err != nil {
		return 0, err
	}
	return fs.Bavail * uint64(fs.Frsize), nil
}
