package settings

import (
	"errors"
	"math"
	"reflect"
	"testing"
)

func TestResize(t *testing.T) {
	img := defaultImage("debian-12", "v")
	img.Disk = 20e9
	roomy := img
	roomy.MaxVCPUs, roomy.MaxMemory, roomy.MaxDisk = 8, 2500<<20, 100<<30
	noDisk := img
	noDisk.Disk = 0

	type size struct {
		vcpus        uint
		memory, disk uint64
	}
	tests := []struct {
		img  Image
		ask  Size
		want size
		err  string
		as   any
	}{
		{img: img, want: size{2, 2 << 30, 20e9}},
		{img: img, ask: Size{"1", "1024", "10GB"}, want: size{1, 1 << 30, 10e9}},
		{img: img, ask: Size{"2", "2 GiB", "20 GB"}, want: size{2, 2 << 30, 20e9}},
		{img: img, ask: Size{Memory: "64 MiB"}, want: size{2, 64 << 20, 20e9}},
		{img: roomy, want: size{2, 2 << 30, 20e9}},
		{img: roomy, ask: Size{"8", "2500", "100 GiB"}, want: size{8, 2500 << 20, 100 << 30}},
		{img: roomy, ask: Size{VCPUs: "1"}, want: size{1, 2 << 30, 20e9}},

		{img: img, ask: Size{VCPUs: "3"}, as: new(*LimitError),
			err: `vcpus: "3" is over the limit of image "debian-12", which is 2; ask for 2 or less`},
		{img: roomy, ask: Size{"9", "x", "x"}, as: new(*LimitError),
			err: `vcpus: "9" is over the limit of image "debian-12", which is 8; ask for 8 or less`},
		{img: roomy, ask: Size{VCPUs: "99999999999999999999"}, as: new(*LimitError),
			err: `vcpus: "99999999999999999999" is over the limit of image "debian-12", which is 8; ask for 8 or less`},
		{img: roomy, ask: Size{Memory: "2501"}, as: new(*LimitError),
			err: `memory: "2501" is over the limit of image "debian-12", which is 2500 MiB; ask for 2500 MiB or less`},
		{img: img, ask: Size{Memory: "999999 EiB"}, as: new(*LimitError),
			err: `memory: "999999 EiB" is over the limit of image "debian-12", which is 2 GiB; ask for 2 GiB or less`},
		{img: img, ask: Size{Disk: "20 GiB"}, as: new(*LimitError),
			err: `disk: "20 GiB" is over the limit of image "debian-12", which is 20 GB; ask for 20 GB or less`},
		{img: noDisk, ask: Size{Disk: "1 GiB"}, as: new(*LimitError),
			err: `disk: "1 GiB" cannot be had, image "debian-12" lets no job choose; do not set it, or ask the administrator for a max_disk`},

		{img: roomy, ask: Size{VCPUs: "0"}, as: new(*ValueError),
			err: `vcpus: "0" is too few; ask for 1 to 8`},
		{img: roomy, ask: Size{VCPUs: "-1"}, as: new(*ValueError),
			err: `vcpus: "-1" is not a whole number; ask for 1 to 8`},
		{img: roomy, ask: Size{VCPUs: " 2"}, as: new(*ValueError),
			err: `vcpus: " 2" is not a whole number; ask for 1 to 8`},
		{img: roomy, ask: Size{Memory: "lots\n"}, as: new(*ValueError),
			err: `memory: "lots\n" is not a size; ask for a number of MiB, or one with a unit such as GiB, up to 2500 MiB`},
		{img: roomy, ask: Size{Memory: "63 MiB"}, as: new(*ValueError),
			err: `memory: "63 MiB" is too small; ask for 64 MiB to 2500 MiB`},
		{img: roomy, ask: Size{Disk: "0"}, as: new(*ValueError),
			err: `disk: "0" is too small; ask for 64 MiB to 100 GiB`},
	}
	for _, tt := range tests {
		got, err := tt.img.Resize(tt.ask)
		if tt.err == "" {
			want := tt.img
			want.VCPUs, want.Memory, want.Disk = tt.want.vcpus, tt.want.memory, tt.want.disk
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("Resize(%q) = %+v, %v\nwant %+v", tt.ask, got, err, want)
			}
			continue
		}
		if err == nil || err.Error() != tt.err {
			t.Errorf("Resize(%q): error %v\nwant %s", tt.ask, err, tt.err)
			continue
		}
		if !errors.As(err, tt.as) || !errors.Is(err, ErrJobFault) {
			t.Errorf("Resize(%q): error is a %T that matches ErrJobFault: %v; want %T and true", tt.ask, err, errors.Is(err, ErrJobFault), tt.as)
		}
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]uint64{
		"0": 0, "1": 1 << 20, "2048": 2 << 30, "2048.5": 2048<<20 + 1<<19,
		"1 B": 1, "1b": 1,
		"1k": 1 << 10, "1 K": 1 << 10, "1Ki": 1 << 10, "1 KiB": 1 << 10, "1kb": 1e3, "1 KB": 1e3,
		"3M": 3 << 20, "3 Mi": 3 << 20, "3MiB": 3 << 20, "3mb": 3e6,
		"2G": 2 << 30, "2g": 2 << 30, "2GB": 2e9, "2 GiB": 2 << 30, "1.5  GiB": 3 << 29, "1.5 GB": 15e8,
		"1T": 1 << 40, "1TiB": 1 << 40, "1TB": 1e12, "1P": 1 << 50, "1 EB": 1e18,
		"16 EiB": math.MaxUint64, "99999999999999999999": math.MaxUint64, "99999999999.5 E": math.MaxUint64,
	} {
		if got, ok := parseSize(text); !ok || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, got, ok, want)
		}
	}
	for _, text := range []string{"", " ", "G", "-1", "+1", "1e3", "0x10", ".5", "5.", "1,000", "2,5 GiB", "1_000", "1 i", "1 iB", "1 GiBs", "1 bytes", "2 GiB ", " 2", "1\n", "1\tM", "१", "1 \u212a", "NaN", "Inf"} {
		if got, ok := parseSize(text); ok {
			t.Errorf("parseSize(%q) = %d, want it refused", text, got)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for size, want := range map[uint64]string{
		0: "0 B", 1: "1 B", 1000: "1 KB", 1024: "1 KiB", 1001: "1001 B",
		64 << 20: "64 MiB", 2 << 30: "2 GiB", 2500 << 20: "2500 MiB", 20e9: "20 GB", 16 << 40: "16 TiB", 1e12: "1 TB",
	} {
		got := FormatSize(size)
		if got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", size, got, want)
		}
		if back, ok := parseSize(got); !ok || back != size {
			t.Errorf("parseSize(%q) = %d, %v; want %d", got, back, ok, size)
		}
	}
}
