package hypervisor

import (
	"context"
	"encoding/xml"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"
)

// CreateFile creates an empty raw volume that only its owner can read, for what
// libvirt itself writes to its path. A volume of that name that is already there
// is replaced: whoever calls this owns the name.
//
// https://libvirt.org/formatstorage.html#target-elements
func (c *Connection) CreateFile(ctx context.Context, pool, name string) (Volume, error) {
	v := Volume{Pool: pool, Name: name}
	doc := libvirtxml.StorageVolume{
		Name:     name,
		Capacity: &libvirtxml.StorageVolumeSize{Unit: "bytes", Value: 0},
		Target: &libvirtxml.StorageVolumeTarget{
			Format:      &libvirtxml.StorageVolumeTargetFormat{Type: "raw"},
			Permissions: &libvirtxml.StorageVolumeTargetPermissions{Mode: "0600"},
		},
	}
	err := c.do(ctx, func(rpc *libvirt.Libvirt) (err error) {
		_, v.Path, err = createAnew(rpc, pool, doc)
		return err
	})
	return v, wrap(err, "create volume %s in pool %s", name, pool)
}

// SaveDomain writes the memory of a running domain to the file at path on the
// host, and ends the domain. It is defined as before. One that does not run any
// more is left as it is: what is in the file then shows when it is restored.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainSaveFlags
func (c *Connection) SaveDomain(ctx context.Context, name, path string) error {
	return wrap(c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		state, _, err := rpc.DomainGetState(domain, 0)
		if err != nil || libvirt.DomainState(state) == libvirt.DomainShutoff {
			return err
		}
		return rpc.DomainSaveFlags(domain, path, nil, 0)
	}), "save domain %s", name)
}

// RestoreDomain starts a defined domain from the file at path that SaveDomain
// wrote. xml is the domain as it shall be; it may differ from the one that was
// saved in what its guest cannot see, as the files behind its disks. One that
// runs is left as it is.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainRestoreFlags
func (c *Connection) RestoreDomain(ctx context.Context, name, path, xml string) error {
	return wrap(c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		state, _, err := rpc.DomainGetState(domain, 0)
		if err != nil || libvirt.DomainState(state) == libvirt.DomainRunning {
			return err
		}
		return rpc.DomainRestoreFlags(path, libvirt.OptString{xml}, uint32(libvirt.DomainSaveRunning))
	}), "restore domain %s from %s", name, path)
}

// Channels returns the paths of the UNIX sockets of a running domain's virtio
// channels by their names.
//
// https://libvirt.org/formatdomain.html#channel
func (c *Connection) Channels(ctx context.Context, domain string) (map[string]string, error) {
	var text string
	err := c.domain(ctx, domain, func(rpc *libvirt.Libvirt, domain libvirt.Domain) (err error) {
		text, err = rpc.DomainGetXMLDesc(domain, 0)
		return err
	})
	var doc struct {
		XMLName  xml.Name `xml:"domain"`
		Channels []struct {
			Type   string `xml:"type,attr"`
			Source struct {
				Path string `xml:"path,attr"`
			} `xml:"source"`
			Target struct {
				Type string `xml:"type,attr"`
				Name string `xml:"name,attr"`
			} `xml:"target"`
		} `xml:"devices>channel"`
	}
	if err == nil {
		err = xml.Unmarshal([]byte(text), &doc)
	}
	if err != nil {
		return nil, wrap(err, "find the channels of domain %s", domain)
	}
	paths := map[string]string{}
	for _, c := range doc.Channels {
		if c.Type == "unix" && c.Target.Type == "virtio" && c.Source.Path != "" {
			paths[c.Target.Name] = c.Source.Path
		}
	}
	return paths, nil
}
