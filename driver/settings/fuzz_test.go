package settings

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
)

// A file loads, and then all that is promised of the settings holds, or every
// line of the error starts with the file's name, and none is long.
func FuzzLoad(f *testing.F) {
	f.Add([]byte("[images.a]\nvolume = \"v\"\n"))

	path := filepath.Join(f.TempDir(), "config.toml")
	f.Fuzz(func(t *testing.T, doc []byte) {
		if err := os.WriteFile(path, doc, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Load(path)
		if err != nil {
			for line := range strings.Lines(err.Error() + "\n") {
				line = strings.TrimSuffix(line, "\n")
				if !strings.HasPrefix(line, path+":") {
					t.Errorf("line %q does not start with the file's name", line)
				}
				// What may be long are the names of all images.
				what, _, _ := strings.Cut(line, "; write one of ")
				if len(what) > 1000 || strings.ContainsFunc(line, unicode.IsControl) {
					t.Errorf("line %q is long or has control characters", line)
				}
			}
			return
		}
		checkSettings(t, s)
	})
}

// checkSettings reports what is not as the doc comments promise.
func checkSettings(t *testing.T, s *Settings) {
	t.Helper()
	for name, d := range map[string]time.Duration{"address": s.Timeouts.Address, "ssh": s.Timeouts.SSH, "destroy": s.Timeouts.Destroy} {
		if d < time.Second || d > 24*time.Hour {
			t.Errorf("timeout %s = %v", name, d)
		}
	}
	if !strings.HasPrefix(s.LogDir, "/") || s.Socket != "" && s.Socket[0] != '/' {
		t.Errorf("LogDir = %q, Socket = %q", s.LogDir, s.Socket)
	}
	if len(s.Images) == 0 || s.BuiltIn && len(s.Images) != 1 {
		t.Errorf("%d images, BuiltIn = %v", len(s.Images), s.BuiltIn)
	}
	for name, img := range s.Images {
		if name == "" || name != img.Name {
			t.Errorf("image %q is called %q", name, img.Name)
		}
		for _, object := range []string{img.Volume, img.Pool, img.Network} {
			if object == "" || strings.ContainsAny(object, "/\n\x00") {
				t.Errorf("image %q: bad name %q", name, object)
			}
		}
		if img.VCPUs < 1 || img.VCPUs > 512 || img.MaxVCPUs != 0 && img.MaxVCPUs < img.VCPUs || img.MaxVCPUs > 512 {
			t.Errorf("image %q: %d vCPUs of %d", name, img.VCPUs, img.MaxVCPUs)
		}
		if img.Memory < 64<<20 || img.Memory > 16<<40 || img.MaxMemory != 0 && img.MaxMemory < img.Memory || img.MaxMemory > 16<<40 {
			t.Errorf("image %q: memory %d of %d", name, img.Memory, img.MaxMemory)
		}
		if img.Disk != 0 && img.Disk < 64<<20 || img.Disk > 16<<40 || img.MaxDisk != 0 && img.MaxDisk < img.Disk || img.MaxDisk > 16<<40 {
			t.Errorf("image %q: disk %d of %d", name, img.Disk, img.MaxDisk)
		}
		if img.Kernel == "" && img.Initrd+img.Cmdline != "" {
			t.Errorf("image %q: initrd %q and cmdline %q without kernel", name, img.Initrd, img.Cmdline)
		}
		if img.Key[0] != '/' || img.BuildsDir == "" || img.CacheDir == "" || img.User == "" {
			t.Errorf("image %q: key %q, builds %q, cache %q, user %q", name, img.Key, img.BuildsDir, img.CacheDir, img.User)
		}
		if got, err := s.Image(name); err != nil || got.Name != name {
			t.Errorf("Image(%q) = %q, %v", name, got.Name, err)
		}
	}
	for _, a := range s.Aliases {
		if _, ok := s.Images[a.Image]; !ok || a.Match == "" {
			t.Errorf("alias %q for %q", a.Match, a.Image)
		}
	}
	if s.DefaultImage != "" {
		if img, err := s.Image(""); err != nil || img.Name != s.DefaultImage {
			t.Errorf("Image(\"\") = %q, %v; want %q", img.Name, err, s.DefaultImage)
		}
	}
}

// Whatever a job asks for, it gets a configured image within its limits or is
// told on one short line that the fault is its own.
func FuzzImage(f *testing.F) {
	f.Add("debian:*", "debian:12", "2", "2048", "10 GiB")
	f.Add("[a-z]*", "", "8", "2,5 GiB", "20GB")
	f.Fuzz(func(t *testing.T, match, name, vcpus, memory, disk string) {
		a := defaultImage("a", "v")
		a.MaxVCPUs, a.MaxMemory, a.Disk, a.MaxDisk = 4, 4<<30, 10<<30, 20<<30
		b := defaultImage("b", "v")
		s := &Settings{
			DefaultImage: "b",
			Images:       map[string]Image{"a": a, "b": b},
			Aliases:      []Alias{{match, "a"}},
		}
		if glob(match) != "" {
			s.Aliases = nil // such a file is refused
		}

		img, err := s.Image(name)
		if err != nil {
			checkJobFault(t, err, new(*UnknownImageError))
			if name == "" || name == "a" || name == "b" {
				t.Errorf("Image(%q): %v", name, err)
			}
			return
		}
		if want, ok := s.Images[name]; ok && img != want || name == "" && img != b {
			t.Errorf("Image(%q) = %q", name, img.Name)
		}
		if img != a && img != b {
			t.Errorf("Image(%q) = %+v, which is not configured", name, img)
		}

		got, err := img.Resize(Size{VCPUs: vcpus, Memory: memory, Disk: disk})
		if err != nil {
			if limit := (*LimitError)(nil); errors.As(err, &limit) {
				checkJobFault(t, err, new(*LimitError))
			} else {
				checkJobFault(t, err, new(*ValueError))
			}
			return
		}
		if got.VCPUs < 1 || got.VCPUs > max(img.VCPUs, img.MaxVCPUs) ||
			got.Memory < 64<<20 || got.Memory > max(img.Memory, img.MaxMemory) ||
			got.Disk > max(img.Disk, img.MaxDisk) || got.Disk != img.Disk && got.Disk < 64<<20 {
			t.Errorf("Resize(%q, %q, %q) = %d, %d, %d of %+v", vcpus, memory, disk, got.VCPUs, got.Memory, got.Disk, img)
		}
		got.VCPUs, got.Memory, got.Disk = img.VCPUs, img.Memory, img.Disk
		if got != img {
			t.Errorf("Resize changed more than the size: %+v\nwas %+v", got, img)
		}
	})
}

func checkJobFault(t *testing.T, err error, as any) {
	t.Helper()
	if !errors.As(err, as) || !errors.Is(err, ErrJobFault) {
		t.Errorf("error %v is a %T, not a %T", err, err, as)
	}
	// Quoted, a byte takes at most four, two values of 60 bytes at most 480.
	text := err.Error()
	if unknown := (*UnknownImageError)(nil); errors.As(err, &unknown) {
		text = strings.ReplaceAll(text, list(unknown.Allowed), "")
	}
	if len(text) > 800 || strings.ContainsFunc(text, unicode.IsControl) {
		t.Errorf("error is not one short line: %q", err)
	}
}

// A size that is read is written so that it is read as the same.
func FuzzSize(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string, size uint64) {
		for _, n := range []uint64{size, size &^ (1<<20 - 1)} {
			if again, ok := parseSize(FormatSize(n)); n < 1<<53 && (again != n || !ok) {
				t.Errorf("%d is written %q and read %d, %v", n, FormatSize(n), again, ok)
			}
		}
		if n, ok := parseSize(text); ok && (text == "" || text[0] < '0' || text[0] > '9' || strings.ContainsFunc(text, unicode.IsControl)) {
			t.Errorf("%q is read as %d", text, n)
		}
	})
}
