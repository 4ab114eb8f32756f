package settings

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// Edit is a change to a settings file that gives one key a value.
type Edit struct {
	// Line is the line that is changed, from 1; 0 is the place before the first
	// line, and a Line after the last one the end of the file.
	Line int
	// Replace tells that Text takes the line's place; otherwise it goes after
	// it.
	Replace bool
	// Text is one line or more, without the last newline.
	Text string
}

// Change returns how to give key the value, in TOML, in a table of the settings
// file doc: nil for the keys before the first table, {"defaults"}, or
// {"images", NAME}. ok is false where only a person can tell, as in a table
// that is written on one line.
func Change(doc []byte, table []string, key, value string) (edit Edit, ok bool) {
	lines := bytes.Split(doc, []byte("\n"))
	begins := func(line int, text string) bool {
		return line <= len(lines) && bytes.HasPrefix(bytes.TrimSpace(lines[line-1]), []byte(text))
	}
	text := key + " = " + value
	header := 0
	for _, def := range indexLines(doc).defs {
		switch {
		case slices.Equal(def.path, keyPath(table).with(key)):
			return Edit{def.line, true, text}, begins(def.line, key)
		case len(table) > 0 && slices.Equal(def.path, keyPath(table)):
			if !begins(def.line, "[") {
				return Edit{}, false
			}
			header = def.line
		}
	}
	switch {
	case header > 0:
		return Edit{header, false, text}, true
	case len(table) == 0:
		return Edit{0, false, text}, true
	}
	name := make([]string, len(table))
	for i, part := range table {
		if name[i] = part; !bare(part) {
			name[i] = strconv.Quote(part)
		}
	}
	return Edit{len(lines), false, "[" + strings.Join(name, ".") + "]\n" + text}, table[0] == "defaults"
}
