package hypervisor

import "github.com/digitalocean/go-libvirt"

// procedure is a procedure of libvirt's protocol; see
// https://gitlab.com/libvirt/libvirt/-/blob/master/src/remote/remote_protocol.x
// and qemu_protocol.x beside it.
type procedure struct{ program, number uint32 }

const (
	remote = 0x20008086
	qemu   = 0x20008087
)

// lifecycleEvent is the one kind of event that is asked for.
var lifecycleEvent = procedure{remote, 318}

// answers has what go-libvirt decodes the answer to each call into that is made
// here, nil where it decodes nothing. A call that is not in it cannot be made.
var answers = map[procedure]any{
	{remote, 1}:   nil, // ConnectOpen
	{remote, 4}:   libvirt.ConnectGetVersionRet{},
	{remote, 7}:   libvirt.ConnectGetCapabilitiesRet{},
	{remote, 10}:  libvirt.DomainCreateXMLRet{},
	{remote, 14}:  libvirt.DomainGetXMLDescRet{},
	{remote, 16}:  libvirt.DomainGetInfoRet{},
	{remote, 23}:  libvirt.DomainLookupByNameRet{},
	{remote, 34}:  nil, // DomainSuspend
	{remote, 43}:  libvirt.NetworkGetXMLDescRet{},
	{remote, 44}:  libvirt.NetworkGetAutostartRet{},
	{remote, 46}:  libvirt.NetworkLookupByNameRet{},
	{remote, 60}:  libvirt.ConnectSupportsFeatureRet{},
	{remote, 66}:  libvirt.AuthListRet{},
	{remote, 70}:  libvirt.AuthPolkitRet{},
	{remote, 83}:  nil, // StoragePoolRefresh
	{remote, 84}:  libvirt.StoragePoolLookupByNameRet{},
	{remote, 87}:  libvirt.StoragePoolGetInfoRet{},
	{remote, 88}:  libvirt.StoragePoolGetXMLDescRet{},
	{remote, 89}:  libvirt.StoragePoolGetAutostartRet{},
	{remote, 93}:  libvirt.StorageVolCreateXMLRet{},
	{remote, 94}:  nil, // StorageVolDelete
	{remote, 95}:  libvirt.StorageVolLookupByNameRet{},
	{remote, 98}:  libvirt.StorageVolGetInfoRet{},
	{remote, 99}:  libvirt.StorageVolGetXMLDescRet{},
	{remote, 100}: libvirt.StorageVolGetPathRet{},
	{remote, 152}: libvirt.NetworkIsActiveRet{},
	{remote, 157}: libvirt.ConnectGetLibVersionRet{},
	{remote, 165}: nil, // StorageVolWipe
	{remote, 174}: nil, // DomainUpdateDeviceFlags
	{remote, 196}: libvirt.DomainCreateWithFlagsRet{},
	{remote, 208}: nil, // StorageVolUpload
	{remote, 209}: nil, // StorageVolDownload
	{remote, 212}: libvirt.DomainGetStateRet{},
	{remote, 228}: libvirt.NodeGetMemoryStatsRet{},
	{remote, 231}: nil, // DomainUndefineFlags
	{remote, 232}: nil, // DomainSaveFlags
	{remote, 233}: nil, // DomainRestoreFlags
	{remote, 234}: nil, // DomainDestroyFlags
	{remote, 264}: nil, // DomainSetMetadata
	{remote, 265}: libvirt.DomainGetMetadataRet{},
	{remote, 273}: libvirt.ConnectListAllDomainsRet{},
	{remote, 282}: libvirt.StoragePoolListAllVolumesRet{},
	{remote, 286}: libvirt.ConnectListAllNwfiltersRet{},
	{remote, 291}: nil, // NetworkUpdate
	{remote, 316}: libvirt.ConnectDomainEventCallbackRegisterAnyRet{},
	{remote, 317}: nil, // ConnectDomainEventCallbackDeregisterAny
	{remote, 341}: libvirt.NetworkGetDhcpLeasesRet{},
	{remote, 342}: libvirt.ConnectGetDomainCapabilitiesRet{},
	{remote, 350}: libvirt.DomainDefineXMLFlagsRet{},
	{remote, 353}: libvirt.DomainInterfaceAddressesRet{},
	{qemu, 3}:     agentAnswer{},
}

// agentAnswer is what answers QEMUDomainAgentCommand.
type agentAnswer struct{ Result libvirt.OptString }

// streams has the calls that data follows, in one direction or the other.
var streams = map[procedure]bool{
	{remote, 208}: true,
	{remote, 209}: true,
}

// failure is what go-libvirt decodes an error into.
type failure struct {
	Code, Domain uint32
	Flag         uint8
	Message      string
	Level        uint32
}
