package settings

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/pelletier/go-toml/v2"
)

// Every key of the file, and what it may hold. What depends on more than one
// key is in validate.go.

const (
	wantPath     = `write an absolute path`
	wantDuration = `write a duration from 1s to 24h, such as "300s" or "5m"`
	wantImage    = `write the NAME of an [images.NAME] table`
)

// topKeys are the keys before the first table.
var topKeys = keys[Settings]{
	"uri": put(func(s *Settings) *string { return &s.URI },
		choice("qemu:///system", "qemu:///session", "test:///default")),
	"socket":          put(func(s *Settings) *string { return &s.Socket }, text(wantPath+`, or "" for the usual socket`, socketPath)),
	"virt_type":       put(func(s *Settings) *VirtType { return &s.VirtType }, choice(VirtAuto, VirtKVM, VirtQEMU)),
	"log_dir":         put(func(s *Settings) *string { return &s.LogDir }, text(wantPath, absPath)),
	"reserve_memory":  put(func(s *Settings) *uint64 { return &s.ReserveMemory }, size(0)),
	"reserve_disk":    put(func(s *Settings) *uint64 { return &s.ReserveDisk }, size(0)),
	"keep_connection": put(func(s *Settings) *bool { return &s.KeepConnection }, flag),
	"early_cleanup":   put(func(s *Settings) *bool { return &s.EarlyCleanup }, flag),
	"default_image":   put(func(s *Settings) *string { return &s.DefaultImage }, text(wantImage, anything)),
}

// timeoutKeys are the keys of [timeouts].
var timeoutKeys = keys[Timeouts]{
	"address": put(func(t *Timeouts) *time.Duration { return &t.Address }, duration),
	"ssh":     put(func(t *Timeouts) *time.Duration { return &t.SSH }, duration),
	"destroy": put(func(t *Timeouts) *time.Duration { return &t.Destroy }, duration),
	"turn":    put(func(t *Timeouts) *time.Duration { return &t.Turn }, duration),
}

// imageKeys are the keys of [defaults] and of every [images.NAME].
var imageKeys = keys[Image]{
	"volume":  put(func(i *Image) *string { return &i.Volume }, text("write the name of a volume in the pool", objectName)),
	"format":  put(func(i *Image) *Format { return &i.Format }, choice(FormatQCOW2, FormatRaw)),
	"pool":    put(func(i *Image) *string { return &i.Pool }, text("write the name of a storage pool", objectName)),
	"network": put(func(i *Image) *string { return &i.Network }, text("write the name of a network", objectName)),

	"vcpus":      put(func(i *Image) *uint { return &i.VCPUs }, count(minVCPUs)),
	"memory":     put(func(i *Image) *uint64 { return &i.Memory }, size(minSize)),
	"disk":       put(func(i *Image) *uint64 { return &i.Disk }, size(0)),
	"max_vcpus":  put(func(i *Image) *uint { return &i.MaxVCPUs }, count(0)),
	"max_memory": put(func(i *Image) *uint64 { return &i.MaxMemory }, size(0)),
	"max_disk":   put(func(i *Image) *uint64 { return &i.MaxDisk }, size(0)),

	"firmware": put(func(i *Image) *Firmware { return &i.Firmware }, choice(FirmwareBIOS, FirmwareUEFI, FirmwareDefault)),
	"machine": put(func(i *Image) *string { return &i.Machine },
		text(`write a machine type such as "pc", or "" for the best`, optional(modelName))),
	"cpu": put(func(i *Image) *string { return &i.CPU },
		text(`write "host-passthrough", "host-model", "maximum" or a model's name, or "" for the best`, optional(modelName))),
	"kernel":  put(func(i *Image) *string { return &i.Kernel }, text(wantPath+`, or "" to boot from the disk`, optional(absPath))),
	"initrd":  put(func(i *Image) *string { return &i.Initrd }, text(wantPath+`, or "" for none`, optional(absPath))),
	"cmdline": put(func(i *Image) *string { return &i.Cmdline }, text("write it on one line", oneLine)),

	"start": put(func(i *Image) *Start { return &i.Start }, choice(StartBoot, StartMemory)),

	"user": put(func(i *Image) *string { return &i.User },
		text("write up to 32 letters, digits and the characters _.- with a letter or _ first", userName)),
	"key":      put(func(i *Image) *string { return &i.Key }, text(wantPath, absPath)),
	"host_key": put(func(i *Image) *HostKey { return &i.HostKey }, choice(HostKeyPinned, HostKeyAgent, HostKeyInjected)),
	"shell":    put(func(i *Image) *Shell { return &i.Shell }, choice(ShellBash, ShellSh, ShellPwsh, ShellPowerShell)),
	"address":  put(func(i *Image) *AddressSource { return &i.Address }, choice(AddressAuto, AddressLease, AddressAgent, AddressARP)),
	"isolated": put(func(i *Image) *bool { return &i.Isolated }, flag),
	"filter": put(func(i *Image) *string { return &i.Filter },
		text(`write the name of a network filter, see virsh nwfilter-list, or "" for none`, optional(objectName))),
	"disk_rate":    put(func(i *Image) *uint64 { return &i.DiskRate }, rate),
	"disk_iops":    put(func(i *Image) *uint { return &i.DiskIOPS }, operations),
	"network_rate": put(func(i *Image) *uint64 { return &i.NetworkRate }, rate),
	"standby":      put(func(i *Image) *uint { return &i.Standby }, standby),
	"builds_dir": put(func(i *Image) *string { return &i.BuildsDir },
		text(wantPath+` in the guest, or "" for builds in the user's home`, optional(guestPath))),
	"cache_dir": put(func(i *Image) *string { return &i.CacheDir },
		text(wantPath+` in the guest, or "" for cache in the user's home`, optional(guestPath))),
}

// aliasKeys are the keys of every [[aliases]]; all of them are required.
var aliasKeys = keys[Alias]{
	"match": put(func(a *Alias) *string { return &a.Match }, text(`write a glob over the job's image, such as "debian:*"`, glob)),
	"image": put(func(a *Alias) *string { return &a.Image }, text(wantImage, something)),
}

// keys are the keys of a table that is read into a T.
type keys[T any] map[string]func(dst *T, v any) *fault

// names returns the keys' names, sorted.
func (k keys[T]) names() []string { return slices.Sorted(maps.Keys(k)) }

// put returns what reads a value into a field of a T.
func put[T, V any](field func(*T) *V, read func(v any) (V, *fault)) func(dst *T, v any) *fault {
	return func(dst *T, v any) *fault {
		got, f := read(v)
		if f == nil {
			*field(dst) = got
		}
		return f
	}
}

// text reads a string about which wrong has nothing to say.
func text(remedy string, wrong func(string) string) func(any) (string, *fault) {
	return func(v any) (string, *fault) {
		s, ok := v.(string)
		if !ok {
			return "", &fault{"is " + kind(v) + ", not a string", remedy}
		}
		if w := wrong(s); w != "" {
			return "", &fault{quote(s) + " " + w, remedy}
		}
		return s, nil
	}
}

// choice reads one of several strings.
func choice[V ~string](values ...V) func(any) (V, *fault) {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = strconv.Quote(string(v))
	}
	last := len(quoted) - 1
	read := text("write "+strings.Join(quoted[:last], ", ")+" or "+quoted[last], func(s string) string {
		if !slices.Contains(values, V(s)) {
			return "is not supported"
		}
		return ""
	})
	return func(v any) (V, *fault) {
		s, f := read(v)
		return V(s), f
	}
}

// count reads a number of virtual processors. With least 0, 0 is allowed and
// means none.
func count(least int64) func(any) (uint, *fault) {
	remedy := fmt.Sprintf("write a whole number from %d to %d", minVCPUs, maxVCPUs)
	if least == 0 {
		remedy += ", or 0 for none"
	}
	return func(v any) (uint, *fault) {
		n, ok := v.(int64)
		if !ok {
			return 0, &fault{"is " + kind(v) + ", not an integer", remedy}
		}
		if n < least || n > maxVCPUs {
			return 0, &fault{strconv.FormatInt(n, 10) + " is out of range", remedy}
		}
		return uint(n), nil
	}
}

// size reads a size in bytes. With least 0, "" and 0 are allowed and mean none.
func size(least uint64) func(any) (uint64, *fault) {
	remedy := fmt.Sprintf(`write a size from %s to %s, such as "2 GiB" or 2048 (MiB)`, FormatSize(minSize), FormatSize(maxSize))
	if least == 0 {
		remedy += `, or "" for none`
	}
	return amount(minSize, least == 0, remedy)
}

// amount reads a number of bytes from least to maxSize; with none, "" and 0 are
// allowed and mean none.
func amount(least uint64, none bool, remedy string) func(any) (uint64, *fault) {
	return func(v any) (uint64, *fault) {
		var n uint64
		var shown string
		switch v := v.(type) {
		case int64:
			shown = strconv.FormatInt(v, 10) + " (MiB)"
			if v < 0 || v > maxSize/mib {
				return 0, &fault{shown + " is out of range", remedy}
			}
			n = uint64(v) * mib
		case string:
			shown = quote(v)
			var ok bool
			if n, ok = parseSize(v); !ok && (v != "" || !none) {
				return 0, &fault{shown + " is not a size", remedy}
			}
		default:
			return 0, &fault{"is " + kind(v) + ", not a string or an integer", remedy}
		}
		if n == 0 && none {
			return 0, nil
		}
		if n < least || n > maxSize {
			return 0, &fault{shown + " is out of range", remedy}
		}
		return n, nil
	}
}

// rate reads a number of bytes per second, "" or 0 for no limit.
var rate = amount(64<<10, true,
	fmt.Sprintf(`write what it may be in a second, from 64 KiB to %s, such as "100 MiB" or 100 (MiB), or "" for no limit`, FormatSize(maxSize)))

// operations reads a number of operations per second, 0 for no limit.
func operations(v any) (uint, *fault) {
	const least, most, remedy = 10, 10_000_000, "write a whole number from 10 to 10000000, or 0 for no limit"
	n, ok := v.(int64)
	if !ok {
		return 0, &fault{"is " + kind(v) + ", not an integer", remedy}
	}
	if n != 0 && (n < least || n > most) {
		return 0, &fault{strconv.FormatInt(n, 10) + " is out of range", remedy}
	}
	return uint(n), nil
}

// standby reads a number of machines.
func standby(v any) (uint, *fault) {
	const most, remedy = 512, "write how many machines shall stand ready, from 0 to 512"
	n, ok := v.(int64)
	if !ok {
		return 0, &fault{"is " + kind(v) + ", not an integer", remedy}
	}
	if n < 0 || n > most {
		return 0, &fault{strconv.FormatInt(n, 10) + " is out of range", remedy}
	}
	return uint(n), nil
}

func flag(v any) (bool, *fault) {
	b, ok := v.(bool)
	if !ok {
		return false, &fault{"is " + kind(v) + ", not a boolean", "write true or false, without quotes"}
	}
	return b, nil
}

func duration(v any) (time.Duration, *fault) {
	s, ok := v.(string)
	if !ok {
		return 0, &fault{"is " + kind(v) + ", not a string", wantDuration}
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, &fault{quote(s) + " is not a duration", wantDuration}
	}
	if d < time.Second || d > 24*time.Hour {
		return 0, &fault{quote(s) + " is out of range", wantDuration}
	}
	return d, nil
}

// kind names the type of a TOML value for a message.
func kind(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case int64:
		return "an integer"
	case float64:
		return "a float"
	case bool:
		return "a boolean"
	case time.Time, toml.LocalDateTime:
		return "a date-time"
	case toml.LocalDate:
		return "a date"
	case toml.LocalTime:
		return "a time"
	case map[string]any:
		return "a table"
	default:
		return "an array"
	}
}

// The functions below say what is wrong with a string, or "".

func anything(string) string { return "" }

func something(s string) string {
	if s == "" {
		return "is empty"
	}
	return ""
}

// optional lets a string be empty.
func optional(wrong func(string) string) func(string) string {
	return func(s string) string {
		if s == "" {
			return ""
		}
		return wrong(s)
	}
}

// oneLine refuses control characters: XML cannot hold them, and none of the
// settings needs one.
func oneLine(s string) string {
	if strings.ContainsFunc(s, unicode.IsControl) {
		return "has a control character"
	}
	return ""
}

func absPath(s string) string {
	if s == "" || s[0] != '/' {
		return "is not an absolute path"
	}
	return oneLine(s)
}

// socketPath allows what fits sockaddr_un, see unix(7).
func socketPath(s string) string {
	if s == "" {
		return ""
	}
	if len(s) > 107 {
		return "is too long for a socket, which is 107 bytes"
	}
	return absPath(s)
}

// guestPath allows a Windows path, too; whether the guest's shell does is seen
// later.
func guestPath(s string) string {
	if hasDrive(s) {
		return oneLine(s)
	}
	return absPath(s)
}

// hasDrive reports whether s is an absolute path on Windows.
func hasDrive(s string) bool {
	return len(s) >= 3 && made(s[:1], letters) && s[1] == ':' && made(s[2:3], `\/`)
}

// objectName allows what libvirt and a file system take as a name.
func objectName(s string) string {
	switch {
	case s == "":
		return "is empty"
	case len(s) > 255:
		return "is too long"
	case strings.Contains(s, "/"):
		return "is a path"
	case s == "." || s == "..":
		return "is a folder"
	}
	return oneLine(s)
}

// The characters of names.
const (
	letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	digits  = "0123456789"
)

// made reports whether s is made of these characters alone.
func made(s, characters string) bool { return strings.Trim(s, characters) == "" }

// isImageName reports whether s can be an image's name.
func isImageName(s string) bool {
	return s != "" && len(s) <= 63 && made(s[:1], letters+digits) && made(s, letters+digits+"._-:/") && !made(s[len(s)-1:], ":/")
}

func modelName(s string) string {
	if s == "" || len(s) > 64 || !made(s[:1], letters+digits) || !made(s, letters+digits+"._+-") {
		return "is not a name"
	}
	return ""
}

func userName(s string) string {
	if s == "" || len(s) > 32 || !made(s[:1], letters+"_") || !made(s, letters+digits+"_.-") {
		return "is not a user name"
	}
	return ""
}

func glob(s string) string {
	if s == "" {
		return "is empty"
	}
	if _, err := path.Match(s, ""); err != nil {
		return "is not a glob"
	}
	return oneLine(s)
}
