package settings

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

const (
	mib = 1 << 20

	minVCPUs, maxVCPUs = 1, 512
	minSize, maxSize   = 64 * mib, 16 << 40
)

// ErrJobFault matches every error about what a job asked for, as opposed to
// what the administrator set: trying again cannot help.
var ErrJobFault = errors.New("the job asks for what it cannot have")

// Size is what a job asks for, as it wrote it: numbers of virtual processors
// ("4") and sizes ("4096", "4 GiB"). "" leaves the image's own.
type Size struct{ VCPUs, Memory, Disk string }

// LimitError tells that a job asks for more than the administrator lets it.
type LimitError struct {
	Field string // "vcpus", "memory" or "disk"
	Value string // as the job wrote it
	Limit string // the most it may ask for; "" when it may not ask at all
	Image string // the image that sets the limit
}

// Error tells, on one line, the field, the value, the limit and what to do.
func (e *LimitError) Error() string {
	if e.Limit == "" {
		return fmt.Sprintf("%s: %s cannot be had, image %s lets no job choose; do not set it, or ask the administrator for a max_%[1]s",
			e.Field, quote(e.Value), quote(e.Image))
	}
	return fmt.Sprintf("%s: %s is over the limit of image %s, which is %s; ask for %[4]s or less",
		e.Field, quote(e.Value), quote(e.Image), e.Limit)
}

// Is reports that the error matches [ErrJobFault].
func (e *LimitError) Is(target error) bool { return target == ErrJobFault }

// ValueError tells that what a job asks for is not a number or size that a
// guest can have.
type ValueError struct {
	Field string // "vcpus", "memory" or "disk"
	Value string // as the job wrote it
	Limit string // the most that it may ask for
	wrong string
	want  string
}

// Error tells, on one line, the field, the value and what may be asked for.
func (e *ValueError) Error() string {
	return fmt.Sprintf("%s: %s %s; ask for %s", e.Field, quote(e.Value), e.wrong, e.want)
}

// Is reports that the error matches [ErrJobFault].
func (e *ValueError) Is(target error) bool { return target == ErrJobFault }

// Resize returns the image with the size that a job wants, or a [*LimitError]
// or [*ValueError] about the first thing it cannot have. Sizes are written as in
// config.toml.
func (i Image) Resize(want Size) (Image, error) {
	if want.VCPUs != "" {
		n, err := i.resizeVCPUs(want.VCPUs)
		if err != nil {
			return Image{}, err
		}
		i.VCPUs = n
	}
	if want.Memory != "" {
		n, err := i.resize("memory", want.Memory, max(i.Memory, i.MaxMemory))
		if err != nil {
			return Image{}, err
		}
		i.Memory = n
	}
	if want.Disk != "" {
		n, err := i.resize("disk", want.Disk, max(i.Disk, i.MaxDisk))
		if err != nil {
			return Image{}, err
		}
		i.Disk = n
	}
	return i, nil
}

func (i Image) resizeVCPUs(want string) (uint, error) {
	most := max(i.VCPUs, i.MaxVCPUs)
	limit := strconv.FormatUint(uint64(most), 10)
	n, err := strconv.ParseUint(want, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && n > uint64(most):
		return 0, &LimitError{Field: "vcpus", Value: want, Limit: limit, Image: i.Name}
	case err != nil:
		return 0, &ValueError{Field: "vcpus", Value: want, Limit: limit,
			wrong: "is not a whole number", want: "1 to " + limit}
	case n < minVCPUs:
		return 0, &ValueError{Field: "vcpus", Value: want, Limit: limit,
			wrong: "is too few", want: "1 to " + limit}
	}
	return uint(n), nil
}

func (i Image) resize(field, want string, most uint64) (uint64, error) {
	if most == 0 {
		return 0, &LimitError{Field: field, Value: want, Image: i.Name}
	}
	limit := FormatSize(most)
	n, ok := parseSize(want)
	switch {
	case !ok:
		return 0, &ValueError{Field: field, Value: want, Limit: limit,
			wrong: "is not a size", want: "a number of MiB, or one with a unit such as GiB, up to " + limit}
	case n > most:
		return 0, &LimitError{Field: field, Value: want, Limit: limit, Image: i.Name}
	case n < minSize:
		return 0, &ValueError{Field: field, Value: want, Limit: limit,
			wrong: "is too small", want: FormatSize(minSize) + " to " + limit}
	}
	return n, nil
}

// units are those of sizes, the largest first. They mean what they do to libvirt:
// https://libvirt.org/formatdomain.html#memory-allocation.
var units = [...]struct {
	name  string
	bytes uint64
}{
	{"EiB", 1 << 60}, {"EB", 1e18},
	{"PiB", 1 << 50}, {"PB", 1e15},
	{"TiB", 1 << 40}, {"TB", 1e12},
	{"GiB", 1 << 30}, {"GB", 1e9},
	{"MiB", 1 << 20}, {"MB", 1e6},
	{"KiB", 1 << 10}, {"KB", 1e3},
	{"B", 1},
}

// sizeSyntax is compiled when it is needed, as every expression is: most calls need
// none.
var sizeSyntax = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) *([KMGTPEkmgtpe]?[Ii]?[Bb]?)$`)
})

// parseSize returns the bytes that text stands for, [math.MaxUint64] if they
// are too many to count. A bare number is MiB, and a lone letter stands for the
// power of 1024; case does not matter.
func parseSize(text string) (size uint64, ok bool) {
	m := sizeSyntax().FindStringSubmatch(text)
	if m == nil {
		return 0, false
	}
	number, _ := strconv.ParseFloat(m[1], 64) // infinity if it is too large
	name := strings.ToLower(m[2])
	switch {
	case name == "":
		name = "mib"
	case strings.HasSuffix(name, "i"):
		name += "b"
	case !strings.HasSuffix(name, "b"):
		name += "ib"
	}
	for _, unit := range units {
		if !strings.EqualFold(name, unit.name) {
			continue
		}
		if bytes := number * float64(unit.bytes); bytes < math.MaxUint64 {
			return uint64(bytes), true
		}
		return math.MaxUint64, true
	}
	return 0, false
}

// FormatSize writes size exactly, in the unit that gives the smallest number.
func FormatSize(size uint64) string {
	for _, u := range units {
		if size >= u.bytes && size%u.bytes == 0 {
			return strconv.FormatUint(size/u.bytes, 10) + " " + u.name
		}
	}
	return "0 B"
}
