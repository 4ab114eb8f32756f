package settings

import (
	"errors"
	"reflect"
	"testing"
)

func testSettings(t *testing.T) *Settings {
	t.Helper()
	s, err := loadDoc(t, `
[defaults]
volume = "v"
[images.debian-12]
[images."debian:sid"]
[images.alpine]
[[aliases]]
match = "debian:*"
image = "debian-12"
[[aliases]]
match = "debian:1?"
image = "alpine"
[[aliases]]
match = "*/*"
image = "alpine"
[[aliases]]
match = "alpine"
image = "debian-12"
`)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestImage(t *testing.T) {
	const allowed = `"*/*", "alpine", "debian-12", "debian:*", "debian:1?", "debian:sid"`
	tests := []struct {
		def, name string
		want      string // the image's name
		err       string
	}{
		{name: "debian-12", want: "debian-12"},
		{name: "debian:sid", want: "debian:sid"}, // before the alias
		{name: "alpine", want: "alpine"},
		{name: "debian:12", want: "debian-12"}, // first alias
		{name: "debian:", want: "debian-12"},
		{name: "docker.io/alpine", want: "alpine"},
		{name: "", err: `the job names no image and there is no default image; set image: to one of ` + allowed},
		{def: "debian:sid", name: "", want: "debian:sid"},
		{def: "debian:sid", name: "fedora", err: `image "fedora" is not configured; set image: to one of ` + allowed},
		{name: "Alpine", err: `image "Alpine" is not configured; set image: to one of ` + allowed},
		{name: "alpine ", err: `image "alpine " is not configured; set image: to one of ` + allowed},
		{name: "debian:a/b:c/d", err: `image "debian:a/b:c/d" is not configured; set image: to one of ` + allowed},
		{name: "../../etc/passwd", err: `image "../../etc/passwd" is not configured; set image: to one of ` + allowed},
		{name: "debian-12\x00\n\xff", err: `image "debian-12\x00\n\xff" is not configured; set image: to one of ` + allowed},
		{name: "0123456789012345678901234567890123456789012345678901234567890",
			err: `image "012345678901234567890123456789012345678901234567890123456789"... is not configured; set image: to one of ` + allowed},
	}
	s := testSettings(t)
	for _, tt := range tests {
		s.DefaultImage = tt.def
		got, err := s.Image(tt.name)
		if tt.err == "" {
			if err != nil || !reflect.DeepEqual(got, s.Images[tt.want]) || got.Name != tt.want {
				t.Errorf("Image(%q) = %q, %v; want %q", tt.name, got.Name, err, tt.want)
			}
			continue
		}
		if err == nil || err.Error() != tt.err {
			t.Errorf("Image(%q) = %q, %v\nwant %s", tt.name, got.Name, err, tt.err)
			continue
		}
		if unknown := (*UnknownImageError)(nil); !errors.As(err, &unknown) || unknown.Name != tt.name || len(unknown.Allowed) != 6 {
			t.Errorf("Image(%q): error %#v", tt.name, err)
		}
		if !errors.Is(err, ErrJobFault) {
			t.Errorf("Image(%q): error %v is not the job's fault", tt.name, err)
		}
	}
}

// A lone "*" is no image for jobs that name none: that is what default_image is
// for.
func TestImageAnyAlias(t *testing.T) {
	s, err := loadDoc(t, "[images.a]\nvolume = \"v\"\n[[aliases]]\nmatch = \"*\"\nimage = \"a\"\n")
	if err != nil {
		t.Fatal(err)
	}
	if img, err := s.Image("anything"); err != nil || img.Name != "a" {
		t.Errorf(`Image("anything") = %q, %v`, img.Name, err)
	}
	if img, err := s.Image(""); !errors.Is(err, ErrJobFault) {
		t.Errorf(`Image("") = %q, %v; want the job's fault`, img.Name, err)
	}
}

func TestImageBuiltIn(t *testing.T) {
	s := Default()
	for _, name := range []string{"", "default", "debian:12", "../x", "\xff"} {
		if img, err := s.Image(name); err != nil || !reflect.DeepEqual(img, s.Images["default"]) {
			t.Errorf("Image(%q) = %+v, %v; want the built-in image", name, img, err)
		}
	}
}
