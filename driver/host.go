package driver

import (
	"context"
	"net/netip"

	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

// Host is a host with the driver's machines on it, as stages and an
// administrator's commands see it.
type Host struct {
	Settings   *settings.Settings
	Hypervisor Hypervisor
	// LockDir is the folder for the locks of machines; see [LockDir].
	LockDir string
	// Log takes the driver's own lines.
	Log *gitlab.Log
	// Version is the driver's own.
	Version string
}

// Hypervisor is what the stages need of libvirt. [hypervisor.Connection] has it.
type Hypervisor interface {
	Capabilities(ctx context.Context, virtType, machine string) (hypervisor.Capabilities, error)

	Memory(ctx context.Context) (hypervisor.Memory, error)
	PoolSpace(ctx context.Context, pool string) (uint64, error)

	Volume(ctx context.Context, pool, name string) (hypervisor.Volume, error)
	CreateOverlay(ctx context.Context, name string, base hypervisor.Volume, format string, capacity uint64) (hypervisor.Volume, error)
	DeleteVolume(ctx context.Context, pool, name string) (found bool, err error)

	Versions(ctx context.Context) (hypervisor.Versions, error)

	CreateFile(ctx context.Context, pool, name string) (hypervisor.Volume, error)
	SaveDomain(ctx context.Context, name, path string) error
	RestoreDomain(ctx context.Context, name, path, xml string) error
	Channels(ctx context.Context, domain string) (paths map[string]string, err error)

	Volumes(ctx context.Context, pool string) ([]hypervisor.Volume, error)
	CreateSecret(ctx context.Context, pool, name string, content []byte) (hypervisor.Volume, error)
	WipeVolume(ctx context.Context, pool, name string) error

	Domains(ctx context.Context, namespace string) ([]hypervisor.Domain, error)
	DefineDomain(ctx context.Context, name, xml string) error
	StartDomain(ctx context.Context, name string) error
	SuspendDomain(ctx context.Context, name string) error
	DestroyDomain(ctx context.Context, name string) error
	UndefineDomain(ctx context.Context, name string) error
	Metadata(ctx context.Context, name, namespace string) (text string, found bool, err error)
	SetMetadata(ctx context.Context, name, namespace, prefix, text string) error
	State(ctx context.Context, name string) (hypervisor.State, error)
	Watch(ctx context.Context, name string, done func(hypervisor.State) bool) (hypervisor.State, error)

	Discover(ctx context.Context, network, mac string) error
	Reserve(ctx context.Context, network, mac string) (netip.Addr, error)
	Unreserve(ctx context.Context, network, mac string) error
	Noticed(ctx context.Context, mac string) (<-chan struct{}, error)
	KeepsLeases(ctx context.Context, network string) (bool, error)
	Leases(ctx context.Context, network, mac string) ([]hypervisor.Lease, error)
	ReleaseLeases(ctx context.Context, network, mac string) error
	Addresses(ctx context.Context, domain, mac string, source hypervisor.AddressSource) ([]netip.Addr, error)
	FilterAddress(ctx context.Context, domain, mac string, address netip.Addr) error

	ReadGuestFile(ctx context.Context, domain, path string) ([]byte, error)
	AuthorizeKey(ctx context.Context, domain, user, key string) error

	Close()
}
