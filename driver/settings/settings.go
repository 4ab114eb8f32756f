// Package settings turns the administrator's config.toml into typed, validated
// settings, and answers what a job may have of them: which image its name
// stands for ([Settings.Image]) and which size its guest may get
// ([Image.Resize]).
//
// Errors come in two kinds. Those of [Load] are about the file: one line per
// problem, FILE:LINE: KEY: what is wrong; remedy, and for a file that cannot be
// read FILE: what is wrong; remedy. Those of [Settings.Image] and
// [Image.Resize] are about what a job asked for; all of them match
// [ErrJobFault].
package settings

import (
	"maps"
	"slices"
	"time"
)

// DefaultPath is where the settings are read from when no other file is named.
const DefaultPath = "/etc/libvirt-driver/config.toml"

// Settings is everything that config.toml says, with defaults filled in.
type Settings struct {
	// URI is the libvirt URI of this host's hypervisor: "qemu:///system",
	// "qemu:///session" or "test:///default".
	// See https://libvirt.org/uri.html.
	URI string
	// Socket is the absolute path of libvirtd's UNIX socket, or "" for the
	// usual one.
	Socket string
	// VirtType is how guests' processors are run.
	VirtType VirtType
	// LogDir is the absolute path of the folder for the logs of guests' serial
	// consoles.
	LogDir string
	// ReserveMemory and ReserveDisk are what no guest may take of the host's
	// memory and of a pool's space, in bytes; 0 reserves nothing.
	ReserveMemory, ReserveDisk uint64
	// KeepConnection keeps the SSH connection of prepare open for the job's
	// sub-stages.
	KeepConnection bool
	// EarlyCleanup lets cleanup return when the machine can neither run nor be
	// reached any more, before it is removed.
	EarlyCleanup bool
	// DefaultImage names the image of jobs that name none; it is a key of
	// Images, or "" when such jobs are refused.
	DefaultImage string
	// Timeouts bounds the waits for a guest.
	Timeouts Timeouts
	// Images holds the images by name. It is never empty.
	Images map[string]Image
	// BuiltIn tells that no image is configured: Images holds only the built-in
	// image "default", which serves every job whatever image it names.
	BuiltIn bool
	// Aliases map what jobs write to images, in the file's order: the first
	// match wins.
	Aliases []Alias
}

// Timeouts bounds the waits for a guest, each from 1 s to 24 h.
type Timeouts struct {
	Address time.Duration // for the guest to get an address
	SSH     time.Duration // then for the guest to answer SSH
	Destroy time.Duration // for cleanup to have removed everything
	Turn    time.Duration // for the host to have room for a guest, before it is started
}

// Alias lets jobs name an image in other words.
type Alias struct {
	// Match is a glob over a job's image, in the syntax of [path.Match]: a '*'
	// stops at a '/'.
	Match string
	// Image is a key of Settings.Images.
	Image string
}

// Image describes the guests that are made from one base volume.
type Image struct {
	// Name is the image's key in Settings.Images.
	Name string
	// Volume names the base volume in Pool: 1 to 255 bytes without '/'.
	Volume string
	// Format is the base volume's format; it is never probed.
	Format Format
	// Pool and Network name the storage pool of the base volume and the
	// overlays, and the network of the guests: 1 to 255 bytes without '/'.
	Pool, Network string

	// VCPUs is the number of virtual processors, 1 to 512.
	VCPUs uint
	// Memory is in bytes, 64 MiB to 16 TiB.
	Memory uint64
	// Disk is the overlay's capacity in bytes, 64 MiB to 16 TiB; 0 means the
	// base volume's own. Nothing here knows the base volume's capacity: a Disk
	// below it is for the caller to refuse.
	Disk uint64
	// MaxVCPUs, MaxMemory and MaxDisk are what a job may ask for, in the same
	// units; 0 means no more than VCPUs, Memory and Disk. With Disk 0 as well a
	// job may not ask for a disk at all.
	MaxVCPUs           uint
	MaxMemory, MaxDisk uint64

	// Firmware is what the guest boots with.
	Firmware Firmware
	// Machine overrides the machine type, such as "pc"; "" means the best that
	// the host offers.
	Machine string
	// CPU overrides the processor: "host-passthrough", "host-model", "maximum"
	// or a model's name; "" means the best that the host offers.
	CPU string
	// Kernel and Initrd are absolute paths on the host and Cmdline the kernel's
	// command line, for direct kernel boot; without Kernel all are "".
	Kernel, Initrd, Cmdline string

	// User is who logs in over SSH.
	User string
	// Key is the absolute path on the host of User's private key, which has no
	// passphrase. Only HostKeyPinned uses it.
	Key string
	// HostKey is how the driver knows the guest's SSH host key, and the guest
	// the driver's key.
	HostKey HostKey
	// Shell runs the job's scripts in the guest.
	Shell Shell
	// Address is where the guest's address is found.
	Address AddressSource
	// Isolated keeps the guest from reaching other isolated guests of its
	// network.
	Isolated bool
	// Filter names the libvirt network filter that the guest's packets pass; ""
	// means none.
	Filter string
	// DiskRate and NetworkRate, which is each way's, are in bytes per second, 64
	// KiB to 16 TiB, and DiskIOPS in operations per second, 10 to 10,000,000; 0
	// means no limit.
	DiskRate, NetworkRate uint64
	DiskIOPS              uint
	// Standby is how many machines the standby service keeps ready, 0 to 512.
	Standby uint
	// Start is how guests start.
	Start Start
	// BuildsDir and CacheDir are absolute paths in the guest. With Shell pwsh or
	// powershell they may start with a drive, as in "C:\builds".
	BuildsDir, CacheDir string
}

// VirtType is how guests' processors are run.
type VirtType string

// VirtAuto is KVM where the host offers it, else QEMU; VirtKVM runs on the
// host's processor; VirtQEMU is emulation (TCG).
const (
	VirtAuto VirtType = "auto"
	VirtKVM  VirtType = "kvm"
	VirtQEMU VirtType = "qemu"
)

// Format is a base volume's format.
type Format string

// FormatQCOW2 and FormatRaw are the formats that a base volume can have.
const (
	FormatQCOW2 Format = "qcow2"
	FormatRaw   Format = "raw"
)

// Firmware is what a guest boots with.
type Firmware string

// FirmwareDefault is what the architecture boots with: BIOS, or UEFI on aarch64
// and riscv64. FirmwareBIOS and FirmwareUEFI insist on one.
const (
	FirmwareDefault Firmware = ""
	FirmwareBIOS    Firmware = "bios"
	FirmwareUEFI    Firmware = "uefi"
)

// Shell runs a job's scripts in the guest. The values are those of GitLab
// Runner's shell setting, see https://docs.gitlab.com/runner/shells/.
type Shell string

// ShellBash, ShellSh, ShellPwsh (PowerShell Core) and ShellPowerShell (Windows
// PowerShell) are the shells that GitLab Runner writes scripts for.
const (
	ShellBash       Shell = "bash"
	ShellSh         Shell = "sh"
	ShellPwsh       Shell = "pwsh"
	ShellPowerShell Shell = "powershell"
)

// AddressSource is where a guest's address is found.
type AddressSource string

// AddressAuto is wherever the address shows up, AddressLease the network's DHCP
// leases, AddressAgent the guest agent, AddressARP the host's ARP table. See
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainInterfaceAddressesSource.
const (
	AddressAuto  AddressSource = "auto"
	AddressLease AddressSource = "lease"
	AddressAgent AddressSource = "agent"
	AddressARP   AddressSource = "arp"
)

// ByLease reports whether the network's leases are to be looked at.
func (a AddressSource) ByLease() bool { return a == AddressAuto || a == AddressLease }

// HostKey is how the driver knows a guest's SSH host key.
type HostKey string

// HostKeyPinned takes the key that the first connection shows, and no other
// after it. HostKeyAgent asks the guest agent for it beforehand. HostKeyInjected
// makes one for the job and gives it to the guest as it starts. With the latter
// two the key that logs in is made for the job, too.
const (
	HostKeyPinned   HostKey = "pinned"
	HostKeyAgent    HostKey = "agent"
	HostKeyInjected HostKey = "injected"
)

// Start is how an image's guests start.
type Start string

// StartBoot boots each guest. StartMemory restores guests from the memory of one
// that was saved when its shell was up.
const (
	StartBoot   Start = "boot"
	StartMemory Start = "memory"
)

// builtInName and builtInVolume are those of the image that serves every job
// when none is configured.
const (
	builtInName   = "default"
	builtInVolume = "gitlab-runner-base.qcow2"
)

// Default returns the settings that hold without any file.
func Default() *Settings {
	s := base()
	img := baseImage()
	img.Name, img.Volume = builtInName, builtInVolume
	img.fillDirs()
	s.Images = map[string]Image{img.Name: img}
	s.BuiltIn = true
	return s
}

// base returns the settings that hold where a file is silent, without images.
func base() *Settings {
	const wait = 300 * time.Second
	return &Settings{
		URI:            "qemu:///system",
		VirtType:       VirtAuto,
		LogDir:         "/var/log/libvirt/qemu",
		KeepConnection: true,
		EarlyCleanup:   true,
		ReserveMemory:  512 * mib,
		ReserveDisk:    1024 * mib,
		Timeouts:       Timeouts{Address: wait, SSH: wait, Destroy: wait, Turn: 30 * time.Minute},
	}
}

// baseImage returns what holds for an image about which a file is silent. It
// has no volume, and folders only after fillDirs.
func baseImage() Image {
	return Image{
		Format:  FormatQCOW2,
		Pool:    "default",
		Network: "default",
		VCPUs:   2,
		Memory:  2048 * mib,
		User:    "gitlab-runner",
		Key:     "/root/.ssh/id_rsa",
		HostKey: HostKeyPinned,
		Shell:   ShellBash,
		Start:   StartBoot,
		Address: AddressAuto, Isolated: true, Filter: "clean-traffic",
	}
}

// Home returns where User's home is taken to be in the guest.
func (i Image) Home() string {
	if i.User == "root" {
		return "/root"
	}
	return "/home/" + i.User
}

// fillDirs puts the folders that are not set into the user's home.
func (i *Image) fillDirs() {
	home := i.Home()
	if i.BuildsDir == "" {
		i.BuildsDir = home + "/builds"
	}
	if i.CacheDir == "" {
		i.CacheDir = home + "/cache"
	}
}

// Pools returns the names of all storage pools that an image may live in,
// sorted, each once.
func (s *Settings) Pools() []string {
	return s.names(func(i Image) string { return i.Pool })
}

// Networks returns the names of all networks that a guest may be on, sorted,
// each once.
func (s *Settings) Networks() []string {
	return s.names(func(i Image) string { return i.Network })
}

func (s *Settings) names(of func(Image) string) []string {
	names := make(map[string]bool)
	for _, image := range s.Images {
		names[of(image)] = true
	}
	return slices.Sorted(maps.Keys(names))
}
