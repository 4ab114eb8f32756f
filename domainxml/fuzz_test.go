package domainxml

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"libvirt.org/go/libvirtxml"
)

// written returns text as XML can carry it: what it has no characters for is
// replaced. See https://www.w3.org/TR/xml/#charsets.
func written(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' || r == '\n' || r == '\r' || r >= 0x20 && r <= 0xd7ff || r >= 0xe000 && r <= 0xfffd || r >= 0x10000 {
			return r
		}
		return utf8.RuneError
	}, text)
}

// shape returns the names of a document's elements and attributes, in order.
func shape(t *testing.T, text string) string {
	t.Helper()
	var names strings.Builder
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return names.String()
		}
		if err != nil {
			t.Fatalf("%v in %q", err, text)
		}
		switch e := token.(type) {
		case xml.StartElement:
			names.WriteString("<" + e.Name.Local)
			for _, a := range e.Attr {
				names.WriteString(" " + a.Name.Local)
			}
		case xml.EndElement:
			names.WriteString(">")
		case xml.Comment, xml.ProcInst, xml.Directive:
			t.Fatalf("%T in %q", e, text)
		}
	}
}

// Whatever text goes into a machine's document, its elements are those of any
// machine's, and the text comes back as it went in.
func FuzzMachine(f *testing.F) {
	f.Fuzz(func(t *testing.T, name, machineType, cpu, kernel, initrd, cmdline, path, base, network, console, image, page string, uefi, isolated bool) {
		fill := func(text func(string) string) Machine {
			m := machine()
			m.Name, m.Host.MachineType, m.Kernel, m.Initrd, m.Cmdline = text(name), text(machineType), text(kernel), text(initrd), text(cmdline)
			m.Disk.Path, m.Disk.BasePath, m.Network, m.ConsoleLog = text(path), text(base), text(network), text(console)
			m.Metadata.Image, m.Metadata.JobURL, m.Filter = text(image), text(page), text(network)
			m.CPU, m.UEFI, m.Isolated = cpu, uefi, isolated
			if (machine().cpu() == nil) == (m.cpu() == nil) && m.cpu().Model != nil {
				m.CPU = text(cpu)
			}
			return m
		}
		document, err := fill(func(text string) string { return text }).XML()
		if err != nil {
			t.Fatal(err)
		}
		plain, err := fill(func(text string) string {
			if text == "" {
				return ""
			}
			return "x"
		}).XML()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := shape(t, document), shape(t, plain); got != want {
			t.Fatalf("the document is\n%s\nnot\n%s", got, want)
		}
		var d libvirtxml.Domain
		if err := d.Unmarshal(document); err != nil {
			t.Fatal(err)
		}
		metadata, err := ParseMetadata(d.Metadata.XML)
		if err != nil {
			t.Fatal(err)
		}
		disk, nic := d.Devices.Disks[0], d.Devices.Interfaces[0]
		filter := ""
		if nic.FilterRef != nil {
			filter = nic.FilterRef.Filter
		}
		for what, pair := range map[string][2]string{
			"name": {d.Name, name}, "machine type": {d.OS.Type.Machine, machineType},
			"kernel": {d.OS.Kernel, kernel}, "initrd": {d.OS.Initrd, initrd}, "cmdline": {d.OS.Cmdline, cmdline},
			"disk": {disk.Source.File.File, path}, "base": {disk.BackingStore.Source.File.File, base},
			"network": {nic.Source.Network.Network, network}, "filter": {filter, network}, "console": {d.Devices.Serials[0].Log.File, console},
			"image": {metadata.Image, image}, "page": {metadata.JobURL, page},
		} {
			if pair[0] != written(pair[1]) {
				t.Errorf("%s %q comes back as %q", what, pair[1], pair[0])
			}
		}
		if metadata.Job != 3 || metadata.Project != 2 {
			t.Errorf("metadata %+v", metadata)
		}
	})
}

// What a domain carries is metadata or is not; what is, can be written again.
func FuzzMetadata(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		m, err := ParseMetadata(text)
		if err != nil {
			if m != (Metadata{}) {
				t.Errorf("half of it: %+v with %v", m, err)
			}
			return
		}
		element, err := m.Element()
		if err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		again, err := ParseMetadata(element)
		m.Created = m.Created.UTC().Truncate(time.Second)
		if err != nil || !again.Created.Equal(m.Created) {
			t.Fatalf("%+v becomes %+v, %v", m, again, err)
		}
		again.Created = m.Created
		if again != m {
			t.Errorf("%+v becomes %+v", m, again)
		}
	})
}
