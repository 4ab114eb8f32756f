package hypervisor

import (
	"context"
	"time"

	"github.com/digitalocean/go-libvirt"
)

// Domain is a domain as a list of them shows it.
type Domain struct {
	Name  string
	State State
	// Metadata is the element in the namespace that was asked for.
	Metadata string
}

// Domains returns the domains, running or not, that carry an element in
// namespace.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virConnectListAllDomains
func (c *Connection) Domains(ctx context.Context, namespace string) ([]Domain, error) {
	var domains []Domain
	err := c.do(ctx, func(rpc *libvirt.Libvirt) error {
		domains = nil
		found, _, err := rpc.ConnectListAllDomains(1, 0)
		if err != nil {
			return err
		}
		for _, domain := range found {
			text, err := rpc.DomainGetMetadata(domain, int32(libvirt.DomainMetadataElement), libvirt.OptString{namespace}, libvirt.DomainAffectCurrent)
			if is(err, libvirt.ErrNoDomain) || is(err, libvirt.ErrNoDomainMetadata) {
				continue // undefined meanwhile, or not of this kind
			}
			if err != nil {
				return err
			}
			state, reason, err := rpc.DomainGetState(domain, 0)
			if is(err, libvirt.ErrNoDomain) {
				continue
			}
			if err != nil {
				return err
			}
			domains = append(domains, Domain{domain.Name, newState(libvirt.DomainState(state), reason), text})
		}
		return nil
	})
	return domains, wrap(err, "list domains")
}

// DefineDomain defines a domain from its XML, or defines it anew.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainDefineXMLFlags
func (c *Connection) DefineDomain(ctx context.Context, name, xml string) error {
	return wrap(c.do(ctx, func(rpc *libvirt.Libvirt) error {
		_, err := rpc.DomainDefineXMLFlags(xml, 0)
		return err
	}), "define domain %s", name)
}

// StartDomain starts a defined domain. One that runs is left as it is. It tries
// again where libvirt has chosen a port for the guest that still has the network
// filter of an earlier one: the next has another name.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainCreateWithFlags
func (c *Connection) StartDomain(ctx context.Context, name string) error {
	const tries = 5
	for try := 1; ; try++ {
		err := c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
			state, _, err := rpc.DomainGetState(domain, 0)
			if err != nil || libvirt.DomainState(state) == libvirt.DomainRunning {
				return err
			}
			_, err = rpc.DomainCreateWithFlags(domain, 0)
			return err
		})
		if !filterRemains(err) || try == tries || ctx.Err() != nil {
			return wrap(err, "start domain %s", name)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// SuspendDomain lets a domain's processors stand still. A domain that does not
// run, or is not there, is left as it is.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainSuspend
func (c *Connection) SuspendDomain(ctx context.Context, name string) error {
	err := c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		return rpc.DomainSuspend(domain)
	})
	if is(err, libvirt.ErrNoDomain) || is(err, libvirt.ErrOperationInvalid) {
		return nil
	}
	return wrap(err, "suspend domain %s", name)
}

// DestroyDomain ends a domain at once, as pulling the plug does. A domain that
// does not run, or is not there, is left as it is.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainDestroyFlags
func (c *Connection) DestroyDomain(ctx context.Context, name string) error {
	err := c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		return rpc.DomainDestroyFlags(domain, 0)
	})
	if is(err, libvirt.ErrNoDomain) || is(err, libvirt.ErrOperationInvalid) {
		return nil
	}
	return wrap(err, "destroy domain %s", name)
}

// UndefineDomain removes a domain's definition, and with it the NVRAM, the
// saved state and what libvirt knows of snapshots and checkpoints. A domain
// that is not there is no error.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainUndefineFlags
func (c *Connection) UndefineDomain(ctx context.Context, name string) error {
	const everything = libvirt.DomainUndefineManagedSave | libvirt.DomainUndefineSnapshotsMetadata |
		libvirt.DomainUndefineCheckpointsMetadata | libvirt.DomainUndefineNvram
	err := c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		return rpc.DomainUndefineFlags(domain, everything)
	})
	if is(err, libvirt.ErrNoDomain) {
		return nil
	}
	return wrap(err, "undefine domain %s", name)
}

// Metadata returns the element that a domain carries in namespace, without
// the namespace. found tells whether the domain exists; the text is empty when
// it carries none.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainGetMetadata
func (c *Connection) Metadata(ctx context.Context, name, namespace string) (text string, found bool, err error) {
	err = c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		text, err = rpc.DomainGetMetadata(domain, int32(libvirt.DomainMetadataElement), libvirt.OptString{namespace}, libvirt.DomainAffectCurrent)
		return err
	})
	switch {
	case is(err, libvirt.ErrNoDomain):
		return "", false, nil
	case is(err, libvirt.ErrNoDomainMetadata):
		return "", true, nil
	}
	return text, err == nil, wrap(err, "read metadata of domain %s", name)
}

// SetMetadata replaces the element that a running domain carries in namespace,
// for this run and for its definition.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainSetMetadata
func (c *Connection) SetMetadata(ctx context.Context, name, namespace, prefix, text string) error {
	return wrap(c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		return rpc.DomainSetMetadata(domain, int32(libvirt.DomainMetadataElement), libvirt.OptString{text},
			libvirt.OptString{prefix}, libvirt.OptString{namespace}, libvirt.DomainAffectLive|libvirt.DomainAffectConfig)
	}), "write metadata of domain %s", name)
}

// State returns what state a domain is in.
//
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainGetState
func (c *Connection) State(ctx context.Context, name string) (State, error) {
	var s State
	err := c.domain(ctx, name, func(rpc *libvirt.Libvirt, domain libvirt.Domain) error {
		state, reason, err := rpc.DomainGetState(domain, 0)
		s = newState(libvirt.DomainState(state), reason)
		return err
	})
	if is(err, libvirt.ErrNoDomain) {
		return State{Kind: Gone}, nil
	}
	return s, wrap(err, "read state of domain %s", name)
}

// domain runs call on the domain of that name. Its errors are libvirt's own.
func (c *Connection) domain(ctx context.Context, name string, call func(*libvirt.Libvirt, libvirt.Domain) error) error {
	return c.do(ctx, func(rpc *libvirt.Libvirt) error {
		domain, err := rpc.DomainLookupByName(name)
		if err != nil {
			return err
		}
		return call(rpc, domain)
	})
}
