package settings

import (
	"bytes"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// keyPath is the way from the root of the document to a key, each element of an
// array of tables by its [element] name.
type keyPath []string

// maxDepth is as deep as the settings go: images, NAME, key. It also keeps a
// file with a million dots cheap.
const maxDepth = 4

// with returns p and one more part, in memory of its own.
func (p keyPath) with(part string) keyPath {
	return append(p[:len(p):len(p)], part)
}

// element names the nth element of an array in a keyPath. No key of the
// settings looks like it.
func element(n int) string { return "\x00" + strconv.Itoa(n) }

func (p keyPath) id() string { return strings.Join(p, "\x01") }

// String writes p as an administrator would in the file. Elements of arrays are
// left out: the line number tells which.
func (p keyPath) String() string {
	var parts []string
	for _, part := range p {
		switch {
		case strings.HasPrefix(part, "\x00"):
		case bare(part):
			parts = append(parts, part)
		default:
			parts = append(parts, quote(part))
		}
	}
	return strings.Join(parts, ".")
}

// bare reports whether a key needs no quotes in TOML and is short enough to be
// shown whole.
func bare(key string) bool {
	return key != "" && len(key) <= maxEcho && strings.Trim(key,
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-") == ""
}

// lines knows on which line of a document each key is. The decoder does not
// tell once it has decoded a value.
type lines struct {
	doc   []byte
	first map[string]int // line where a path is first mentioned, by its id
	defs  []definition
	count map[string]int // elements so far of each array of tables, by its id

	pos, line int // how far lines were counted
}

// definition is one place in the document where a key or a table is written.
type definition struct {
	path keyPath
	base int // how many parts of path are of the table that it is in
	line int
}

// indexLines reads doc up to its end or its first syntax error.
func indexLines(doc []byte) *lines {
	ix := &lines{doc: doc, first: make(map[string]int), count: make(map[string]int), line: 1}
	var p unstable.Parser
	p.Reset(doc)
	var table keyPath
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = ix.header(e)
		case unstable.KeyValue:
			ix.keyValue(table, e)
		}
	}
	return ix
}

// header notes a table's header and returns the path of what follows it.
func (ix *lines) header(e *unstable.Node) keyPath {
	var path keyPath
	line := 0
	for it := e.Key(); it.Next() && len(path) < maxDepth; {
		path = path.with(string(it.Node().Data))
		line = ix.at(it.Node())
		ix.mention(path, line)
		if n := ix.count[path.id()]; n > 0 && !it.IsLast() {
			path = path.with(element(n - 1))
		}
	}
	if e.Kind == unstable.ArrayTable {
		n := ix.count[path.id()]
		ix.count[path.id()]++
		path = path.with(element(n))
		ix.mention(path, line)
	}
	ix.defs = append(ix.defs, definition{path: path, line: line})
	return path
}

// keyValue notes the key of e, which is in the table path, and the keys within
// its value.
func (ix *lines) keyValue(path keyPath, e *unstable.Node) {
	base, line := len(path), 0
	for it := e.Key(); it.Next() && len(path) < maxDepth; {
		path = path.with(string(it.Node().Data))
		line = ix.at(it.Node())
		ix.mention(path, line)
	}
	ix.defs = append(ix.defs, definition{path, base, line})
	ix.value(path, e.Value(), line)
}

func (ix *lines) value(path keyPath, v *unstable.Node, line int) {
	if len(path) >= maxDepth {
		return
	}
	n := 0
	for it := v.Children(); it.Next(); n++ {
		switch child := it.Node(); {
		case v.Kind == unstable.InlineTable && child.Kind == unstable.KeyValue:
			ix.keyValue(path, child)
		case v.Kind == unstable.Array:
			elem := path.with(element(n))
			if child.Raw.Length > 0 { // arrays have none
				line = ix.at(child)
			}
			ix.mention(elem, line)
			ix.value(elem, child, line)
		}
	}
}

func (ix *lines) mention(path keyPath, line int) {
	if id := path.id(); ix.first[id] == 0 {
		ix.first[id] = line
	}
}

// at returns the line that a node with a raw range starts on. Nodes come in the
// document's order, so that all calls together count its lines once.
func (ix *lines) at(n *unstable.Node) int {
	to := int(n.Raw.Offset)
	if to < ix.pos {
		ix.pos, ix.line = 0, 1
	}
	ix.line += bytes.Count(ix.doc[ix.pos:to], []byte("\n"))
	ix.pos = to
	return ix.line
}

// of returns the line of path, or of the nearest table around it that is
// written down.
func (ix *lines) of(path keyPath) int {
	for ; len(path) > 0; path = path[:len(path)-1] {
		if line := ix.first[path.id()]; line > 0 {
			return line
		}
	}
	return 1
}

// earlier returns what a definition on line repeats and where that is, or what
// is defined on line and 0 if that repeats nothing before it.
func (ix *lines) earlier(line int) (path keyPath, first int) {
	for _, def := range slices.Backward(ix.defs) {
		if def.line != line {
			continue
		}
		for path = def.path; len(path) > def.base; path = path[:len(path)-1] {
			if first = ix.first[path.id()]; first < line {
				return path, first
			}
		}
		path = def.path
	}
	return path, 0
}
