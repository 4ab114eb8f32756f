//go:build integration

package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// release builds the release of a copy of the tree into a new folder, for these architectures or for all.
func release(t *testing.T, tree, cache string, architectures ...string) string {
	t.Helper()
	folder := t.TempDir()
	cmd := exec.Command(filepath.Join(tree, "packaging", "release.sh"), append([]string{folder}, architectures...)...)
	cmd.Env = append(os.Environ(), "VERSION=v0.0.0-test", "SOURCE_DATE_EPOCH=1700000000")
	if cache != "" {
		cmd.Env = append(cmd.Env, "GOCACHE="+cache)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return folder
}

// Two builds from different paths are the same bytes, and so is one with nothing cached; what they hold is static. To
// build everything from nothing takes a minute, and so that is done for one architecture.
func TestReleaseIsReproducibleAndStatic(t *testing.T) {
	tree, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	if err := os.CopyFS(other, os.DirFS(tree)); err != nil {
		t.Fatal(err)
	}
	first, second := release(t, tree, ""), release(t, other, "")
	anew := release(t, other, t.TempDir(), "arm64")
	archives, err := filepath.Glob(filepath.Join(first, "*.tar.gz"))
	if err != nil || len(archives) != 5 {
		t.Fatalf("archives %v, %v", archives, err)
	}
	sums, err := os.ReadFile(filepath.Join(first, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	for _, archive := range archives {
		name := filepath.Base(archive)
		a, err := os.ReadFile(archive)
		if err != nil {
			t.Fatal(err)
		}
		same := []string{second}
		if strings.Contains(name, "arm64") {
			same = append(same, anew)
		}
		for _, folder := range same {
			b, err := os.ReadFile(filepath.Join(folder, name))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(a, b) {
				t.Errorf("%s differs between two builds", name)
			}
		}
		if want := fmt.Sprintf("%x  %s\n", sha256.Sum256(a), name); !strings.Contains(string(sums), want) {
			t.Errorf("SHA256SUMS has no %q", want)
		}
		inspect(t, name, a)
	}
}

// inspect checks what an archive holds.
func inspect(t *testing.T, name string, archive []byte) {
	t.Helper()
	unzipped, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"libvirt-driver": true, "config.toml": true, "runner-config.toml": true,
		"libvirt-driver-gc.service": true, "libvirt-driver-gc.timer": true,
		"libvirt-driver-standby.service": true}
	for files := tar.NewReader(unzipped); ; {
		header, err := files.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		base := filepath.Base(header.Name)
		delete(want, base)
		if base != "libvirt-driver" {
			continue
		}
		binary, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		program, err := elf.NewFile(bytes.NewReader(binary))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, p := range program.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s is dynamically linked: it has a %v", name, p.Type)
			}
		}
		if !bytes.Contains(binary, []byte("v0.0.0-test")) {
			t.Errorf("%s is not stamped with its version", name)
		}
	}
	for file := range want {
		t.Errorf("%s lacks %s", name, file)
	}
}
