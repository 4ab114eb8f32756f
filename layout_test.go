package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// mayImport says which of the project's packages each one may import: main
// imports driver, driver the leaves, and leaves nothing of the project. doctor is
// between the two: it looks at what driver works with, and has driver boot a
// guest. main puts a stage together, so it knows the leaves by name too.
var mayImport = map[string][]string{
	".":                 {"driver", "driver/doctor", "driver/gitlab", "driver/hypervisor", "driver/settings", "sshexec"},
	"driver":            {"driver/gitlab", "driver/hypervisor", "driver/settings", "domainxml", "sshexec"},
	"driver/doctor":     {"driver", "driver/gitlab", "driver/hypervisor", "driver/settings", "domainxml", "sshexec"},
	"driver/gitlab":     nil,
	"driver/hypervisor": nil,
	"driver/settings":   nil,
	"domainxml":         nil,
	"sshexec":           nil,
}

// kept says who alone may import a package that makes for a room of its own.
var kept = map[string][]string{
	"github.com/digitalocean/go-libvirt": {"driver/hypervisor"},
	"libvirt.org/go/libvirtxml":          {"driver/hypervisor", "domainxml"},
	"golang.org/x/crypto/ssh":            {"sshexec"},
	"github.com/urfave/cli/v2":           {"."},
	"github.com/pelletier/go-toml/v2":    {"driver/settings"},
	// The driver never runs another program.
	"os/exec": {},
}

func TestImportsPointOneWay(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir(".", func(file string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (file == "integration" || file == "dist" || strings.HasPrefix(file, ".") && file != "."):
			return fs.SkipDir
		case !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go"):
			return nil
		}
		pkg := path.Dir(filepath.ToSlash(file))
		allowed, known := mayImport[pkg]
		if !known {
			t.Errorf("%s: package %s has no place in the layout", file, pkg)
		}
		seen[pkg] = true
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if own, ok := strings.CutPrefix(imported, "libvirt-driver/"); ok && !slices.Contains(allowed, own) {
				t.Errorf("%s imports %s", file, own)
			}
			for guarded, by := range kept {
				if (imported == guarded || strings.HasPrefix(imported, guarded+"/")) && !slices.Contains(by, pkg) {
					t.Errorf("%s imports %s", file, imported)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range mayImport {
		if !seen[pkg] {
			t.Errorf("package %s is missing", pkg)
		}
	}
}

// The threat model is worth what its tests are.
func TestTheThreatModelNamesTestsThatExist(t *testing.T) {
	text, err := os.ReadFile("docs/explanation/threats.md")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	err = filepath.WalkDir(".", func(file string, entry fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(file, "_test.go") {
			return err
		}
		code, err := os.ReadFile(file)
		source.Write(code)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`").FindAllStringSubmatch(string(text), -1)
	if len(names) < 30 {
		t.Errorf("the threat model names %d tests", len(names))
	}
	for _, name := range names {
		if !strings.Contains(source.String(), "func "+name[1]+"(") {
			t.Errorf("there is no test %s", name[1])
		}
	}
}
