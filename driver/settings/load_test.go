package settings

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// load reads doc from a file called config.toml.
func loadDoc(t *testing.T, doc string) (*Settings, error) {
	t.Helper()
	t.Chdir(t.TempDir())
	if err := os.WriteFile("config.toml", []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load("config.toml")
}

// defaultImage returns the image that an [images.NAME] table with only a volume
// stands for.
func defaultImage(name, volume string) Image {
	return Image{
		Name: name, Volume: volume, Format: FormatQCOW2, Pool: "default", Network: "default",
		VCPUs: 2, Memory: 2048 << 20,
		User: "gitlab-runner", Key: "/root/.ssh/id_rsa", HostKey: HostKeyPinned, Shell: ShellBash, Address: AddressAuto, Start: StartBoot,
		Isolated: true, Filter: "clean-traffic",
		BuildsDir: "/home/gitlab-runner/builds", CacheDir: "/home/gitlab-runner/cache",
	}
}

func TestDefault(t *testing.T) {
	want := &Settings{
		URI: "qemu:///system", VirtType: VirtAuto, LogDir: "/var/log/libvirt/qemu",
		ReserveMemory: 512 << 20, ReserveDisk: 1 << 30, KeepConnection: true, EarlyCleanup: true,
		Timeouts: Timeouts{Address: 300 * time.Second, SSH: 300 * time.Second, Destroy: 300 * time.Second, Turn: 30 * time.Minute},
		Images:   map[string]Image{"default": defaultImage("default", "gitlab-runner-base.qcow2")},
		BuiltIn:  true,
	}
	if got := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("Default() = %+v\nwant %+v", got, want)
	}
	for _, doc := range []string{"", "# nothing\n", "[images]\n[timeouts]\n[defaults]\n", "\ufeffuri = \"qemu:///system\"\r\n"} {
		if got, err := loadDoc(t, doc); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("file %q = %+v, %v\nwant %+v", doc, got, err, want)
		}
	}
	Default().Images["default"] = Image{}
	if got := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("Default() after a caller changed the last one = %+v\nwant %+v", got, want)
	}
}

func TestLoad(t *testing.T) {
	got, err := loadDoc(t, `
uri = "test:///default"
socket = "/run/libvirt/libvirt-sock"
virt_type = "qemu"
keep_connection = false
early_cleanup = false
log_dir = "/var/log/guests"
default_image = "debian:12"
reserve_memory = "4 GiB"
reserve_disk = 0

[defaults]
volume = "base.qcow2"
vcpus = 4
max_vcpus = 8
memory = 4096
user = "root"

[timeouts]
address = "90s"
ssh = "5m"
destroy = "1h"
turn = "2h"

[images."debian:12"]

[images.big]
volume = "big.raw"
format = "raw"
pool = "fast"
network = "isolated"
vcpus = 8
memory = "8G"
disk = "40 GB"
max_vcpus = 0
max_memory = "12288"
max_disk = 65536
firmware = "uefi"
machine = "q35"
cpu = "Skylake-Server-v5"
kernel = "/boot/vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0 root=/dev/vda1"
user = "CI_User"
key = "/etc/libvirt-driver/id_ed25519"
host_key = "agent"
shell = "sh"
address = "lease"
isolated = false
filter = ""
disk_rate = "100 MB"
disk_iops = 500
network_rate = 10
builds_dir = "/srv/builds"
cache_dir = "/srv/cache"

[images.windows]
user = "Administrator"
shell = "pwsh"
builds_dir = 'C:\builds'
cache_dir = "d:/cache"
host_key = "injected"
start = "boot"

[[aliases]]
match = "debian:*"
image = "debian:12"

[[aliases]]
match = "win*"
image = "windows"
`)
	if err != nil {
		t.Fatal(err)
	}

	debian := defaultImage("debian:12", "base.qcow2")
	debian.VCPUs, debian.MaxVCPUs, debian.Memory = 4, 8, 4<<30
	debian.User, debian.BuildsDir, debian.CacheDir = "root", "/root/builds", "/root/cache"
	windows := debian
	windows.Name, windows.User, windows.Shell = "windows", "Administrator", ShellPwsh
	windows.BuildsDir, windows.CacheDir = `C:\builds`, "d:/cache"
	windows.HostKey = HostKeyInjected
	big := Image{
		Name: "big", Volume: "big.raw", Format: FormatRaw, Pool: "fast", Network: "isolated",
		VCPUs: 8, Memory: 8 << 30, Disk: 40e9, MaxVCPUs: 0, MaxMemory: 12 << 30, MaxDisk: 64 << 30,
		Firmware: FirmwareUEFI, Machine: "q35", CPU: "Skylake-Server-v5",
		Kernel: "/boot/vmlinuz", Initrd: "/boot/initrd.img", Cmdline: "console=ttyS0 root=/dev/vda1",
		User: "CI_User", Key: "/etc/libvirt-driver/id_ed25519", HostKey: HostKeyAgent, Shell: ShellSh, Address: AddressLease, Start: StartBoot,
		DiskRate: 100e6, DiskIOPS: 500, NetworkRate: 10 << 20,
		BuildsDir: "/srv/builds", CacheDir: "/srv/cache",
	}
	want := &Settings{
		URI: "test:///default", Socket: "/run/libvirt/libvirt-sock", VirtType: VirtQEMU, LogDir: "/var/log/guests",
		DefaultImage:  "debian:12",
		Timeouts:      Timeouts{Address: 90 * time.Second, SSH: 5 * time.Minute, Destroy: time.Hour, Turn: 2 * time.Hour},
		ReserveMemory: 4 << 30, ReserveDisk: 0,
		Images:  map[string]Image{"debian:12": debian, "big": big, "windows": windows},
		Aliases: []Alias{{"debian:*", "debian:12"}, {"win*", "windows"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if pools, want := got.Pools(), []string{"default", "fast"}; !reflect.DeepEqual(pools, want) {
		t.Errorf("Pools() = %q, want %q", pools, want)
	}
}

// The same settings written in TOML's other ways.
func TestLoadInline(t *testing.T) {
	got, err := loadDoc(t, `
timeouts.ssh = "1m"
defaults = { volume = "v", builds_dir = "/b" }
images = { a = { vcpus = 3 }, "b/c" = {} }
aliases = [
  { match = "x", image = "a" },
  { match = "y", image = "b/c" },
]
`)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.BuiltIn = false
	want.Timeouts.SSH = time.Minute
	a := defaultImage("a", "v")
	a.VCPUs, a.BuildsDir = 3, "/b"
	bc := defaultImage("b/c", "v")
	bc.BuildsDir = "/b"
	want.Images = map[string]Image{"a": a, "b/c": bc}
	want.Aliases = []Alias{{"x", "a"}, {"y", "b/c"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// With no image configured, [defaults] is all about the built-in one.
func TestLoadBuiltIn(t *testing.T) {
	got, err := loadDoc(t, "[defaults]\nvolume = \"other.qcow2\"\nuser = \"ci\"\n")
	if err != nil {
		t.Fatal(err)
	}
	want := defaultImage("default", "other.qcow2")
	want.User, want.BuildsDir, want.CacheDir = "ci", "/home/ci/builds", "/home/ci/cache"
	if !got.BuiltIn || !reflect.DeepEqual(got.Images, map[string]Image{"default": want}) {
		t.Errorf("BuiltIn = %v, Images = %+v\nwant %+v", got.BuiltIn, got.Images, want)
	}
}

func TestLoadErrors(t *testing.T) {
	long := strings.Repeat("x", 1000)
	tests := []struct {
		name string
		doc  string
		want string // without "config.toml:" before each line
	}{
		// TOML
		{"no closing quote", "uri = \"qemu", `
1: syntax: unterminated basic string at column 11; see https://toml.io for how to write it`},
		{"text without quotes", "\n[images.a]\nvolume = base.qcow2\n", `
3: syntax: not a value at column 10; write a text in quotes ("..."), a number, true or false`},
		{"almost true", "uri = tru", `
1: syntax: not a value at column 7; write a text in quotes ("..."), a number, true or false`},
		{"no value", "uri =\nsocket = \"\"\n", `
1: syntax: not a value at column 6; write a text in quotes ("..."), a number, true or false`},
		{"two on a line", "uri = \"\" socket = \"\"", `
1: syntax: expected newline but got U+0073 's' at column 10; see https://toml.io for how to write it`},
		{"not UTF-8", "uri = \"\xff\"", `
1: syntax: invalid UTF-8 character in basic string at column 8; see https://toml.io for how to write it`},
		{"large integer", "[defaults]\nvcpus = 99999999999999999999", `
2: syntax: decimal number is too large to fit in a 64-bit signed integer at column 9; see https://toml.io for how to write it`},
		{"large float", "[defaults]\nvcpus = 1e" + strings.Repeat("9", 100), `
2: syntax: not a number that fits at column 9; see https://toml.io for how to write it`},
		{"key twice", "uri = \"qemu:///system\"\n\nuri = \"qemu:///session\"\n", `
3: uri: is already defined on line 1; keep one of the two`},
		{"key twice in a table", "[images.a]\nvolume = \"a\"\nvcpus = 1\nvolume = \"b\"\n", `
4: images.a.volume: is already defined on line 2; keep one of the two`},
		{"key twice in an alias", "[images.a]\nvolume = \"a\"\n[[aliases]]\nmatch = \"a\"\n[[aliases]]\nmatch = \"b\"\nimage = \"a\"\nmatch = \"c\"\n", `
8: aliases.match: is already defined on line 6; keep one of the two`},
		{"table twice", "[images.\"a:1\"]\nvolume = \"a\"\n[timeouts]\n[images.\"a:1\"]\nvcpus = 1\n", `
4: images."a:1": is already defined on line 1; keep one of the two`},
		{"table after key", "timeouts.ssh = \"1s\"\n[timeouts]\n", `
2: timeouts: is already defined on line 1; keep one of the two`},
		{"array after table", "[aliases]\n[[aliases]]\n", `
2: aliases: is already defined on line 1; keep one of the two`},
		{"table after array", "[[aliases]]\n[aliases]\n", `
2: aliases: is already defined on line 1; keep one of the two`},
		{"key in a value", "[timeouts]\nssh = \"1s\"\nssh.x = 1\n", `
3: timeouts.ssh: is already defined on line 2; keep one of the two`},
		{"key twice within a line", "[images.a]\nvolume = \"a\"\n[defaults]\nx = {a = 1, a = 2}\n", `
4: defaults.x: defines a key twice; keep one of the two`},

		// Keys
		{"unknown key", "colour = 1\n", `
1: colour: is not a known key; remove it, the keys here are default_image, early_cleanup, keep_connection, log_dir, reserve_disk, reserve_memory, socket, uri, virt_type, timeouts, defaults, images, aliases`},
		{"misspelt keys", "URI = \"\"\nvirttype = \"\"\n[timeouts]\nadress = \"1s\"\n[default]\n[defaults]\nmax_memroy = 1\nvcpu = 1\n[alias]\nx = 1\n[image.a]\n", `
1: URI: is not a known key; did you mean uri?
2: virttype: is not a known key; did you mean virt_type?
4: timeouts.adress: is not a known key; did you mean address?
5: default: is not a known key; did you mean defaults?
7: defaults.max_memroy: is not a known key; did you mean max_memory?
8: defaults.vcpu: is not a known key; did you mean vcpus?
9: alias: is not a known key; did you mean aliases?
11: image: is not a known key; did you mean images?`},
		{"misplaced keys", "vcpus = 1\nssh = \"1s\"\nmatch = \"x\"\n[timeouts]\nuri = \"\"\n[images]\nvolume = \"x\"\n", `
1: vcpus: is not a known key; move it to [defaults] or to the table of an image
2: ssh: is not a known key; move it to [timeouts]
3: match: is not a known key; move it to a table [[aliases]]
5: timeouts.uri: is not a known key; move it to the top of the file, before the first table
7: images.volume: is not a known key; move it to [defaults] or to the table of an image`},
		{"name with dots", "[images.debian-12.5]\nvolume = \"x\"\n", `
1: images.debian-12.5: is not a known key; put quotes around a name with dots, as in [images."debian-12.5"]`},
		{"strange keys", "\"\" = 1\n\"a\\nb\" = 1\n" + long + " = 1\n[timeouts]\n'a b'.c = 1\n", `
1: "": is not a known key; remove it, the keys here are default_image, early_cleanup, keep_connection, log_dir, reserve_disk, reserve_memory, socket, uri, virt_type, timeouts, defaults, images, aliases
2: "a\nb": is not a known key; remove it, the keys here are default_image, early_cleanup, keep_connection, log_dir, reserve_disk, reserve_memory, socket, uri, virt_type, timeouts, defaults, images, aliases
3: "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"...: is not a known key; remove it, the keys here are default_image, early_cleanup, keep_connection, log_dir, reserve_disk, reserve_memory, socket, uri, virt_type, timeouts, defaults, images, aliases
5: timeouts."a b": is not a known key; remove it, the keys here are address, destroy, ssh, turn`},

		// Types
		{"types", `uri = 1
socket = 1.5
virt_type = true
log_dir = 1979-05-27
default_image = [1]
[timeouts]
address = 300
ssh = 07:32:00
destroy = {}
[defaults]
volume = 1979-05-27T07:32:00Z
vcpus = "2"
memory = 2.5
disk = false
max_vcpus = 1.0
max_disk = 1979-05-27T07:32:00
`, `
1: uri: is an integer, not a string; write "qemu:///system", "qemu:///session" or "test:///default"
2: socket: is a float, not a string; write an absolute path, or "" for the usual socket
3: virt_type: is a boolean, not a string; write "auto", "kvm" or "qemu"
4: log_dir: is a date, not a string; write an absolute path
5: default_image: is an array, not a string; write the NAME of an [images.NAME] table
7: timeouts.address: is an integer, not a string; write a duration from 1s to 24h, such as "300s" or "5m"
8: timeouts.ssh: is a time, not a string; write a duration from 1s to 24h, such as "300s" or "5m"
9: timeouts.destroy: is a table, not a string; write a duration from 1s to 24h, such as "300s" or "5m"
11: defaults.volume: is a date-time, not a string; write the name of a volume in the pool
12: defaults.vcpus: is a string, not an integer; write a whole number from 1 to 512
13: defaults.memory: is a float, not a string or an integer; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB)
14: defaults.disk: is a boolean, not a string or an integer; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none
15: defaults.max_vcpus: is a float, not an integer; write a whole number from 1 to 512, or 0 for none
16: defaults.max_disk: is a date-time, not a string or an integer; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none`},
		{"tables that are none", "timeouts = 1\ndefaults = \"x\"\nimages = [1]\naliases = {}\n", `
1: timeouts: is an integer, not a table; write its keys below a line [timeouts]
2: defaults: is a string, not a table; write its keys below a line [defaults]
3: images: is an array, not a table; write its keys below a line [images.NAME]
4: aliases: is a table, not an array of tables; write each alias below a line [[aliases]]`},
		{"image that is none", "aliases = [\n\n1]\n[images]\na = 1\n[[images.b]]\n", `
3: aliases: has an integer in it; write each alias below a line [[aliases]]
5: images.a: is an integer, not a table; write its keys below a line [images.a]
6: images.b: is an array, not a table; write its keys below a line [images.b]`},

		// Values
		{"values at the top", "uri = \"qemu+ssh://root@host/system\"\nsocket = \"libvirt-sock\"\nvirt_type = \"KVM\"\nlog_dir = \"\"\n", `
1: uri: "qemu+ssh://root@host/system" is not supported; write "qemu:///system", "qemu:///session" or "test:///default"
2: socket: "libvirt-sock" is not an absolute path; write an absolute path, or "" for the usual socket
3: virt_type: "KVM" is not supported; write "auto", "kvm" or "qemu"
4: log_dir: "" is not an absolute path; write an absolute path`},
		{"long socket", "socket = \"/" + long + "\"\n", `
1: socket: "/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"... is too long for a socket, which is 107 bytes; write an absolute path, or "" for the usual socket`},
		{"cut between characters", "socket = \"" + strings.Repeat("é", 100) + "\"\nlog_dir = \"x" + strings.Repeat("é", 100) + "\"\n", `
1: socket: "éééééééééééééééééééééééééééééé"... is too long for a socket, which is 107 bytes; write an absolute path, or "" for the usual socket
2: log_dir: "xééééééééééééééééééééééééééééé"... is not an absolute path; write an absolute path`},
		{"durations", "[timeouts]\naddress = \"999ms\"\nssh = \"24h1s\"\ndestroy = \"300\"\n", `
2: timeouts.address: "999ms" is out of range; write a duration from 1s to 24h, such as "300s" or "5m"
3: timeouts.ssh: "24h1s" is out of range; write a duration from 1s to 24h, such as "300s" or "5m"
4: timeouts.destroy: "300" is not a duration; write a duration from 1s to 24h, such as "300s" or "5m"`},
		{"names", "[defaults]\nvolume = \"\"\npool = \"../etc\"\nnetwork = \"..\"\nmachine = \"pc q35\"\ncpu = \"-max\"\nuser = \"0day\"\n[images.a]\nvolume = \"" + long + "\"\npool = \"a\\nb\"\n", `
2: defaults.volume: "" is empty; write the name of a volume in the pool
3: defaults.pool: "../etc" is a path; write the name of a storage pool
4: defaults.network: ".." is a folder; write the name of a network
5: defaults.machine: "pc q35" is not a name; write a machine type such as "pc", or "" for the best
6: defaults.cpu: "-max" is not a name; write "host-passthrough", "host-model", "maximum" or a model's name, or "" for the best
7: defaults.user: "0day" is not a user name; write up to 32 letters, digits and the characters _.- with a letter or _ first
9: images.a.volume: "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"... is too long; write the name of a volume in the pool
10: images.a.pool: "a\nb" has a control character; write the name of a storage pool`},
		{"numbers", "[defaults]\nvcpus = 0\nmemory = 63\ndisk = \"17 TiB\"\nmax_vcpus = 513\nmax_memory = -1\nmax_disk = \"2,5 GiB\"\n[images.a]\nvcpus = -1\nmemory = 9223372036854775807\ndisk = \"10 MiB\"\nmax_memory = \"1" + strings.Repeat("0", 400) + "\"\n[images.b]\nmemory = \"\"\n", `
2: defaults.vcpus: 0 is out of range; write a whole number from 1 to 512
3: defaults.memory: 63 (MiB) is out of range; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB)
4: defaults.disk: "17 TiB" is out of range; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none
5: defaults.max_vcpus: 513 is out of range; write a whole number from 1 to 512, or 0 for none
6: defaults.max_memory: -1 (MiB) is out of range; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none
7: defaults.max_disk: "2,5 GiB" is not a size; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none
9: images.a.vcpus: -1 is out of range; write a whole number from 1 to 512
10: images.a.memory: 9223372036854775807 (MiB) is out of range; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB)
11: images.a.disk: "10 MiB" is out of range; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none
12: images.a.max_memory: "100000000000000000000000000000000000000000000000000000000000"... is out of range; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB), or "" for none
14: images.b.memory: "" is not a size; write a size from 64 MiB to 16 TiB, such as "2 GiB" or 2048 (MiB)`},
		{"choices", "[defaults]\nformat = \"vmdk\"\nfirmware = \"efi\"\nshell = \"zsh\"\naddress = \"dns\"\nhost_key = \"\"\n", `
2: defaults.format: "vmdk" is not supported; write "qcow2" or "raw"
3: defaults.firmware: "efi" is not supported; write "bios", "uefi" or ""
4: defaults.shell: "zsh" is not supported; write "bash", "sh", "pwsh" or "powershell"
5: defaults.address: "dns" is not supported; write "auto", "lease", "agent" or "arp"
6: defaults.host_key: "" is not supported; write "pinned", "agent" or "injected"`},
		{"paths", "[defaults]\nkernel = \"vmlinuz\"\ninitrd = \"~/initrd\"\ncmdline = \"a\\u0000b\"\nkey = \"\"\nbuilds_dir = \"builds\"\ncache_dir = \"C:cache\"\n", `
2: defaults.kernel: "vmlinuz" is not an absolute path; write an absolute path, or "" to boot from the disk
3: defaults.initrd: "~/initrd" is not an absolute path; write an absolute path, or "" for none
4: defaults.cmdline: "a\x00b" has a control character; write it on one line
5: defaults.key: "" is not an absolute path; write an absolute path
6: defaults.builds_dir: "builds" is not an absolute path; write an absolute path in the guest, or "" for builds in the user's home
7: defaults.cache_dir: "C:cache" is not an absolute path; write an absolute path in the guest, or "" for cache in the user's home`},
		{"image names", "[images]\n\"\" = {volume = \"v\"}\n\".a\" = {volume = \"v\"}\n\"a:\" = {volume = \"v\"}\n\"a b\" = {volume = \"v\"}\n[images." + strings.Repeat("a", 64) + "]\nvolume = \"v\"\n", `
2: images."": is not a name for an image; write up to 63 letters, digits and the characters ._-:/ with a letter or digit first and no : or / last
3: images.".a": is not a name for an image; write up to 63 letters, digits and the characters ._-:/ with a letter or digit first and no : or / last
4: images."a:": is not a name for an image; write up to 63 letters, digits and the characters ._-:/ with a letter or digit first and no : or / last
5: images."a b": is not a name for an image; write up to 63 letters, digits and the characters ._-:/ with a letter or digit first and no : or / last
6: images."aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"...: is not a name for an image; write up to 63 letters, digits and the characters ._-:/ with a letter or digit first and no : or / last`},

		// Keys together
		{"no volume", "[images.a]\n\n[images.b]\nvcpus = 4\n", `
1: images.a.volume: is missing; name the base volume here or in [defaults]
3: images.b.volume: is missing; name the base volume here or in [defaults]`},
		{"no kernel", "[images.a]\nvolume = \"v\"\ninitrd = \"/i\"\ncmdline = \"quiet\"\n", `
3: images.a.initrd: needs kernel, which is not set; set kernel, or leave out initrd
4: images.a.cmdline: needs kernel, which is not set; set kernel, or leave out cmdline`},
		{"no kernel by default", "[defaults]\nvolume = \"v\"\ninitrd = \"/i\"\n[images.a]\n[images.b]\n[images.c]\nkernel = \"/k\"\n", `
3: defaults.initrd: needs kernel, which is not set; set kernel, or leave out initrd`},
		{"no kernel and no images", "[defaults]\ncmdline = \"quiet\"\n", `
2: defaults.cmdline: needs kernel, which is not set; set kernel, or leave out cmdline`},
		{"from memory", "[images.a]\nvolume = \"v\"\nstart = \"memory\"\nfirmware = \"uefi\"\n[images.b]\nvolume = \"v\"\nshell = \"pwsh\"\nstart = \"memory\"\n", `
3: images.a.start: "memory" needs firmware that keeps no memory of its own, and it is uefi; set start to "boot", or firmware to "bios"
8: images.b.start: "memory" needs a guest with sh, and the shell is pwsh; set start to "boot"`},
		{"maxima", "[images.a]\nvolume = \"v\"\nvcpus = 4\nmax_vcpus = 2\nmemory = \"4 GiB\"\nmax_memory = \"3 GiB\"\ndisk = \"20 GB\"\nmax_disk = \"2500 MiB\"\n", `
4: images.a.max_vcpus: 2 is below vcpus, which is 4; raise it, or leave it out
6: images.a.max_memory: 3 GiB is below memory, which is 4 GiB; raise it, or leave it out
8: images.a.max_disk: 2500 MiB is below disk, which is 20 GB; raise it, or leave it out`},
		{"inherited maxima", "[defaults]\nvolume = \"v\"\nmax_vcpus = 4\n[images.a]\nvcpus = 8\n[images.b]\n", `
5: images.a.vcpus: 8 is over max_vcpus, which is 4 in [defaults]; lower it, or set max_vcpus here, too`},
		{"maximum below the built-in value", "[defaults]\nmax_memory = 1024\n", `
2: defaults.max_memory: 1 GiB is below memory, which is 2 GiB; raise it, or leave it out`},
		{"drive without PowerShell", "[images.a]\nvolume = \"v\"\nbuilds_dir = 'C:\\b'\ncache_dir = \"C:/c\"\n", `
3: images.a.builds_dir: "C:\\b" is no path for the shell bash; write a path that starts with /, or set shell to "pwsh" or "powershell"
4: images.a.cache_dir: "C:/c" is no path for the shell bash; write a path that starts with /, or set shell to "pwsh" or "powershell"`},

		// Names of images
		{"unknown images", "default_image = \"debain\"\n[images.debian]\nvolume = \"v\"\n[images.alpine]\nvolume = \"v\"\n[[aliases]]\nmatch = \"x\"\nimage = \"windows\"\n", `
1: default_image: "debain" is not a configured image; did you mean "debian"?
8: aliases.image: "windows" is not a configured image; write one of "alpine", "debian"`},
		{"no images", "default_image = \"default\"\n[[aliases]]\nmatch = \"*\"\nimage = \"default\"\n", `
1: default_image: "default" is not a configured image; add its table [images.NAME], or leave this out
4: aliases.image: "default" is not a configured image; add its table [images.NAME], or leave this out`},
		{"aliases", "[images.a]\nvolume = \"v\"\n[[aliases]]\n[[aliases]]\nmatch = \"\"\nimage = \"\"\n[[aliases]]\nmatch = \"[a\"\nimage = \"a\"\npattern = \"x\"\n", `
3: aliases.image: is missing; write both match and image
3: aliases.match: is missing; write both match and image
5: aliases.match: "" is empty; write a glob over the job's image, such as "debian:*"
6: aliases.image: "" is empty; write the NAME of an [images.NAME] table
8: aliases.match: "[a" is not a glob; write a glob over the job's image, such as "debian:*"
10: aliases.pattern: is not a known key; remove it, the keys here are image, match`},

		{"too many", strings.Repeat("[[aliases]]\n", 12), `
1: aliases.image: is missing; write both match and image
1: aliases.match: is missing; write both match and image
2: aliases.image: is missing; write both match and image
2: aliases.match: is missing; write both match and image
3: aliases.image: is missing; write both match and image
3: aliases.match: is missing; write both match and image
4: aliases.image: is missing; write both match and image
4: aliases.match: is missing; write both match and image
5: aliases.image: is missing; write both match and image
5: aliases.match: is missing; write both match and image
6: aliases.image: is missing; write both match and image
6: aliases.match: is missing; write both match and image
7: aliases.image: is missing; write both match and image
7: aliases.match: is missing; write both match and image
8: aliases.image: is missing; write both match and image
8: aliases.match: is missing; write both match and image
9: aliases.image: is missing; write both match and image
9: aliases.match: is missing; write both match and image
10: aliases.image: is missing; write both match and image
10: aliases.match: is missing; write both match and image
11: 4 more problems from here on; solve those above first`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := strings.ReplaceAll(tt.want, "\n", "\nconfig.toml:")[1:]
			s, err := loadDoc(t, tt.doc)
			if err == nil {
				t.Fatalf("no error, but %+v\nwant\n%s", s, want)
			}
			if s != nil {
				t.Errorf("settings with an error: %+v", s)
			}
			if got := err.Error(); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if errors.Is(err, ErrJobFault) {
				t.Error("the file's fault is taken for the job's")
			}
		})
	}
}

func TestLoadFile(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("folder", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo("pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("large.toml", []byte(strings.Repeat("#", maxFile+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"missing.toml":  "missing.toml: cannot read the settings: no such file or directory; create the file, or name none to use the defaults",
		"large.toml/.x": "large.toml/.x: cannot read the settings: not a directory; let the driver's user reach the file",
		"folder":        "folder: cannot read the settings: not a regular file; name a file",
		"pipe":          "pipe: cannot read the settings: not a regular file; name a file",
		"large.toml":    "large.toml: cannot read the settings: larger than 1 MiB; name a settings file",
	} {
		if s, err := Load(path); err == nil || err.Error() != want {
			t.Errorf("Load(%q) = %+v, %v\nwant %s", path, s, err, want)
		}
	}
	if _, err := Load("missing.toml"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v does not match fs.ErrNotExist", err)
	}

	if err := os.WriteFile("large.toml", []byte(strings.Repeat("#", maxFile)), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Load("large.toml"); err != nil || !reflect.DeepEqual(s, Default()) {
		t.Errorf("file of %d bytes: %+v, %v", maxFile, s, err)
	}
}

// Only the default file may be missing; what it holds on this host is not known.
func TestLoadDefaultPath(t *testing.T) {
	want, wantErr := Load(DefaultPath)
	if errors.Is(wantErr, fs.ErrNotExist) {
		want, wantErr = Default(), nil
	}
	got, err := Load("")
	if !reflect.DeepEqual(got, want) || (err == nil) != (wantErr == nil) {
		t.Errorf("Load(\"\") = %+v, %v\nwant %+v, %v", got, err, want, wantErr)
	}
}

// A small file must not be able to cost much: deep nesting, long paths, many
// problems.
func TestLoadHostile(t *testing.T) {
	const n = maxFile / 4
	for name, doc := range map[string]string{
		"dotted key":    strings.Repeat("a.", n) + "a = 1",
		"dotted header": "[" + strings.Repeat("a.", n) + "a]",
		"arrays":        "a = " + strings.Repeat("[", n),
		"tables":        "a = " + strings.Repeat("{a=", n/2),
		"problems":      strings.Repeat("[[aliases]]\n", n/4),
		"array":         "aliases = [" + strings.Repeat("1,", n) + "]",
	} {
		start := time.Now()
		_, err := loadDoc(t, doc)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		if len(err.Error()) > 10000 {
			t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
}

const sample = "../../packaging/config.toml"

var disabled = regexp.MustCompile(`(?m)^#([^ \n])`)

// enabled returns the sample with all its settings enabled.
func enabled(t *testing.T) string {
	t.Helper()
	doc, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	return disabled.ReplaceAllString(string(doc), "$1")
}

// As it is shipped the sample changes nothing.
func TestSample(t *testing.T) {
	path, err := filepath.Abs(sample)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Load(path); err != nil || !reflect.DeepEqual(got, Default()) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, Default())
	}
}

// What the sample gives as defaults are the defaults, and every key is there.
func TestSampleEnabled(t *testing.T) {
	doc := enabled(t)
	got, err := loadDoc(t, doc)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.BuiltIn = false
	want.Images = map[string]Image{"debian-12": defaultImage("debian-12", "gitlab-runner-base.qcow2")}
	want.Aliases = []Alias{{"debian:*", "debian-12"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}

	top, rest, _ := strings.Cut(doc, "\n[timeouts]\n")
	timeouts, rest, _ := strings.Cut(rest, "\n[defaults]\n")
	defaults, rest, _ := strings.Cut(rest, "\n[images.debian-12]\n")
	_, aliases, _ := strings.Cut(rest, "\n[[aliases]]\n")
	for _, part := range []struct {
		name, doc string
		keys      []string
	}{
		{"top", top, topKeys.names()},
		{"[timeouts]", timeouts, timeoutKeys.names()},
		{"[defaults]", defaults, imageKeys.names()},
		{"[[aliases]]", aliases, aliasKeys.names()},
	} {
		for _, key := range part.keys {
			if n := strings.Count("\n"+part.doc, "\n"+key+" = "); n != 1 {
				t.Errorf("%s has %s %d times, want once", part.name, key, n)
			}
		}
	}
}
