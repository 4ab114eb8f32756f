package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// maxFile is the size in bytes of the largest file that is read.
const maxFile = 1 << 20

// Load reads the settings from the file path, or with "" from [DefaultPath],
// which need not exist. The error holds a line for each problem of the file, the
// first 20 by their place in it.
func Load(path string) (*Settings, error) {
	if path != "" {
		return load(path)
	}
	s, err := load(DefaultPath)
	if errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	return s, err
}

func load(path string) (*Settings, error) {
	doc, err := read(path)
	if err != nil {
		return nil, err
	}
	return parse(path, doc)
}

// read returns what is in the file path.
func read(path string) ([]byte, error) {
	failed := func(err error, remedy string) ([]byte, error) {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err // its text has the path, which the line starts with
		}
		return nil, fmt.Errorf("%s: cannot read the settings: %w; %s", path, err, remedy)
	}

	// Before opening it, as that waits for ever on a named pipe.
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return failed(err, "create the file, or name none to use the defaults")
	case err != nil:
		return failed(err, "let the driver's user reach the file")
	case !info.Mode().IsRegular():
		return failed(errors.New("not a regular file"), "name a file")
	}
	f, err := os.Open(path)
	if err != nil {
		return failed(err, "let the driver's user read the file")
	}
	defer f.Close()
	doc, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return failed(err, "check the file and its disk")
	}
	if len(doc) > maxFile {
		return failed(fmt.Errorf("larger than %s", FormatSize(maxFile)), "name a settings file")
	}
	return doc, nil
}

// parse returns the settings that doc, the content of file, stands for.
func parse(file string, doc []byte) (*Settings, error) {
	doc = bytes.TrimPrefix(doc, []byte("\ufeff")) // some Windows editors write it
	l := &loader{problems: problems{file: file}, lines: indexLines(doc)}
	// Into a map and not into structs: the decoder would stop at the first value
	// of a wrong type, and would take keys in any case.
	if err := toml.Unmarshal(doc, &l.root); err != nil {
		l.syntax(err)
		return nil, l.err()
	}
	s := l.settings()
	if err := l.err(); err != nil {
		return nil, err
	}
	return s, nil
}

// loader turns one decoded file into settings.
type loader struct {
	problems
	lines *lines
	root  map[string]any
}

// report notes what is wrong with the key at path.
func (l *loader) report(path keyPath, wrong, remedy string) {
	l.add(l.lines.of(path), path.String(), wrong, remedy)
}

// syntax notes why the decoder gave up.
func (l *loader) syntax(err error) {
	const key = "syntax"
	de := (*toml.DecodeError)(nil)
	if !errors.As(err, &de) {
		l.add(1, key, quote(err.Error()), "write TOML, see https://toml.io")
		return
	}
	line, column := de.Position()
	// Only what is defined twice comes with a key.
	if len(de.Key()) > 0 {
		path, first := l.lines.earlier(line)
		wrong := "defines a key twice"
		if first > 0 {
			wrong = fmt.Sprintf("is already defined on line %d", first)
		}
		l.add(line, path.String(), wrong, "keep one of the two")
		return
	}
	wrong := strings.TrimPrefix(de.Error(), "toml: ")
	remedy := "see https://toml.io for how to write it"
	switch {
	case strings.HasPrefix(wrong, "expected keyword"), strings.HasSuffix(wrong, "at start of value"):
		wrong = "not a value"
		remedy = `write a text in quotes ("..."), a number, true or false`
	case strings.HasPrefix(wrong, "unable to parse float"):
		wrong = "not a number that fits" // the decoder repeats all of it
	}
	l.add(line, key, fmt.Sprintf("%s at column %d", wrong, column), remedy)
}

// settings reads the whole document.
func (l *loader) settings() *Settings {
	s := base()
	tables := map[string]bool{"timeouts": true, "defaults": true, "images": true, "aliases": true}
	top := make(map[string]any)
	for name, v := range l.root {
		if !tables[name] {
			top[name] = v
		}
	}
	readTable(l, nil, top, topKeys, s)
	readTable(l, keyPath{"timeouts"}, l.table(keyPath{"timeouts"}, l.root["timeouts"]), timeoutKeys, &s.Timeouts)

	defaults := baseImage()
	before := len(l.all)
	readTable(l, keyPath{"defaults"}, l.table(keyPath{"defaults"}, l.root["defaults"]), imageKeys, &defaults)
	l.images(s, defaults, len(l.all) == before)
	l.aliases(s)
	l.checkImageName(keyPath{"default_image"}, s, s.DefaultImage)
	return s
}

// images reads the image tables on top of defaults. Checks across keys would
// only repeat what is wrong with a single one, so an image has none while
// defaults or its own keys are not in order.
func (l *loader) images(s *Settings, defaults Image, inOrder bool) {
	at := keyPath{"images"}
	s.Images = make(map[string]Image)
	for name, v := range l.table(at, l.root["images"]) {
		before := len(l.all)
		img, at := defaults, at.with(name)
		img.Name = name
		if _, ok := v.(map[string]any); !ok && imageKeys[name] != nil {
			l.report(at, unknownKey, whereTo(keyPath{"images"}, name, v, nil))
			continue
		}
		if !isImageName(name) {
			l.report(at, "is not a name for an image",
				"write up to 63 letters, digits and the characters ._-:/ with a letter or digit first and no : or / last")
		}
		table := l.table(at, v)
		readTable(l, at, table, imageKeys, &img)
		if inOrder && len(l.all) == before {
			l.checkImage(at, table, &img)
		}
		s.Images[name] = img
	}
	if len(s.Images) > 0 {
		return
	}
	s.BuiltIn = true
	defaults.Name = builtInName
	if defaults.Volume == "" {
		defaults.Volume = builtInVolume
	}
	if inOrder {
		l.checkImage(keyPath{"defaults"}, nil, &defaults)
	}
	s.Images[builtInName] = defaults
}

// aliases reads the aliases' tables.
func (l *loader) aliases(s *Settings) {
	at := keyPath{"aliases"}
	v, ok := l.root["aliases"]
	if !ok {
		return
	}
	elements, ok := v.([]any)
	if !ok {
		l.report(at, "is "+kind(v)+", not an array of tables", "write each alias below a line [[aliases]]")
		return
	}
	for i, v := range elements {
		at := at.with(element(i))
		table, ok := v.(map[string]any)
		if !ok {
			l.report(at, "has "+kind(v)+" in it", "write each alias below a line [[aliases]]")
			continue
		}
		var a Alias
		readTable(l, at, table, aliasKeys, &a)
		for _, name := range aliasKeys.names() {
			if _, ok := table[name]; !ok {
				l.report(at.with(name), "is missing", "write both match and image")
			}
		}
		l.checkImageName(at.with("image"), s, a.Image)
		s.Aliases = append(s.Aliases, a)
	}
}

// table returns v, which is at path, as a table; empty if it is missing or, with
// a problem noted, something else.
func (l *loader) table(path keyPath, v any) map[string]any {
	t, ok := v.(map[string]any)
	if !ok && v != nil {
		l.report(path, "is "+kind(v)+", not a table", "write its keys below a line ["+tableName(path)+"]")
	}
	return t
}

// tableName returns the header of the table at path, or of the tables in it.
func tableName(path keyPath) string {
	if len(path) == 1 && path[0] == "images" {
		return "images.NAME"
	}
	return path.String()
}

// readTable reads the table at path into dst and notes keys that are not known.
func readTable[T any](l *loader, path keyPath, table map[string]any, known keys[T], dst *T) {
	for name, v := range table {
		at := path.with(name)
		set, ok := known[name]
		if !ok {
			l.report(at, unknownKey, whereTo(path, name, v, known.names()))
			continue
		}
		if f := set(dst, v); f != nil {
			l.report(at, f.wrong, f.remedy)
		}
	}
}
