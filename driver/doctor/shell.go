package doctor

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"

	"libvirt-driver/driver/settings"
)

// Remedies are for bash. What stands in them comes from settings and from
// libvirt, so every word is quoted. A line has at most lineWidth columns where
// words allow.
const lineWidth = 94

// command writes one command.
func command(words ...string) string {
	var b strings.Builder
	column := 0
	for i, word := range words {
		word = quote(word)
		switch {
		case i == 0:
		case column+1+len(word) > lineWidth:
			b.WriteString(" \\\n    ")
			column = 4
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}

// script writes several commands, each on its own line. One that fails is the
// last.
func script(commands ...string) string {
	return strings.Join(commands, " &&\n")
}

var plain = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`) })

// quote writes a word so that bash takes it as it is.
func quote(word string) string {
	switch {
	case plain().MatchString(word):
		return word
	case !strings.Contains(word, "'"):
		return "'" + word + "'"
	case !strings.ContainsAny(word, "\"$`\\!"):
		return `"` + word + `"`
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// virsh writes a command of virsh, for the libvirt that the settings name.
func (d *Doctor) virsh(words ...string) string {
	uri := d.settings.URI
	if d.settings.Socket != "" {
		uri += "?socket=" + d.settings.Socket
	}
	if uri == "qemu:///system" && os.Geteuid() == 0 {
		return command(append([]string{"virsh"}, words...)...)
	}
	return command(append([]string{"virsh", "-c", uri}, words...)...)
}

// own writes a command of the driver.
func (d *Doctor) own(words ...string) string {
	program, err := os.Executable()
	if err != nil {
		program = "libvirt-driver"
	}
	if d.Config != "" {
		words = append([]string{"--config", d.Config}, words...)
	}
	return command(append([]string{program}, words...)...)
}

// systemd reports whether systemd runs this host's services.
//
// https://www.freedesktop.org/software/systemd/man/latest/sd_booted.html
func systemd() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

// file is the settings file.
type file struct {
	path string
	doc  []byte
	lost bool // there is none
}

// set writes the command that gives a key of the settings a value, in TOML, and
// the command that opens an editor where that takes a person.
func (f file) set(table []string, key, value string) string {
	edit, ok := settings.Change(f.doc, table, key, value)
	if !ok {
		return command("editor", f.path)
	}
	if f.lost || len(f.doc) == 0 || edit.Line > strings.Count(string(f.doc), "\n") && !edit.Replace {
		words := []string{"printf", `%s\n`}
		if len(f.doc) > 0 && f.doc[len(f.doc)-1] != '\n' {
			words = append(words, "") // the end of the last line
		}
		words = append(words, strings.Split(edit.Text, "\n")...)
		write := command(words...) + " >>" + quote(f.path)
		if f.lost {
			return script(command("install", "-D", "-m", "0644", "/dev/null", f.path), write)
		}
		return write
	}
	// To sed a backslash is not a backslash.
	text := strings.ReplaceAll(edit.Text, `\`, `\\`)
	switch {
	case edit.Replace:
		text = fmt.Sprintf("%dc %s", edit.Line, text)
	case edit.Line == 0:
		text = "1i " + text
	default:
		text = fmt.Sprintf("%da %s", edit.Line, text)
	}
	return command("sed", "-i", text, f.path)
}

// setImage writes the command that gives a key of an image a value.
func (d *Doctor) setImage(image, key, value string) string {
	if d.settings.BuiltIn {
		return d.file.set([]string{"defaults"}, key, value)
	}
	return d.file.set([]string{"images", image}, key, value)
}
