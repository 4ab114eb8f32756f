package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// report is what a person reads: on a terminal of 100 columns, or as Markdown.
type report struct {
	title    string
	facts    []string
	sections []section
	// met counts the targets that are met, missed names the others.
	met    int
	missed []string
}

type section struct {
	caption string
	table   table
}

// table has a header and rows of as many cells: the first is text, the others
// are figures.
type table struct {
	header []string
	rows   [][]string
}

func (r *report) add(caption string, t table) {
	r.sections = append(r.sections, section{caption, t})
}

// verdict sums the targets up.
func (r *report) verdict() string {
	return fmt.Sprintf("%d of %d targets met", r.met, r.met+len(r.missed))
}

// text writes the report for a terminal.
func (r *report) text(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s\n", r.title)
	for _, fact := range r.facts {
		fmt.Fprintf(&b, "  %s\n", fact)
	}
	for _, s := range r.sections {
		fmt.Fprintf(&b, "\n%s\n", s.caption)
		s.table.text(&b)
	}
	if r.met+len(r.missed) > 0 {
		fmt.Fprintf(&b, "\n%s\n", r.verdict())
	}
	for _, missed := range r.missed {
		fmt.Fprintf(&b, "  missed: %s\n", missed)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// text writes the table in columns: the first to the left, the others to the
// right. Columns of empty cells are left out.
func (t table) text(b *strings.Builder) {
	lines := append([][]string{t.header}, t.rows...)
	width, used := make([]int, len(t.header)), make([]bool, len(t.header))
	for i, line := range lines {
		for c, cell := range line {
			width[c] = max(width[c], utf8.RuneCountInString(cell))
			used[c] = used[c] || i > 0 && cell != ""
		}
	}
	for _, line := range lines {
		var out strings.Builder
		for c, cell := range line {
			if !used[c] {
				continue
			}
			blanks := strings.Repeat(" ", width[c]-utf8.RuneCountInString(cell))
			if c == 0 {
				out.WriteString("  " + cell + blanks)
			} else {
				out.WriteString("  " + blanks + cell)
			}
		}
		b.WriteString(strings.TrimRight(out.String(), " ") + "\n")
	}
}

// markdown writes the report as Markdown.
func (r *report) markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s\n\n", r.title)
	for _, fact := range r.facts {
		fmt.Fprintf(&b, "- %s\n", fact)
	}
	for _, s := range r.sections {
		fmt.Fprintf(&b, "\n## %s\n\n", s.caption)
		s.table.markdown(&b)
	}
	if r.met+len(r.missed) > 0 {
		fmt.Fprintf(&b, "\n%s.\n", r.verdict())
	}
	for i, missed := range r.missed {
		if i == 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "- missed: %s\n", missed)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t table) markdown(b *strings.Builder) {
	line := func(cells []string) {
		b.WriteString("|")
		for _, cell := range cells {
			b.WriteString(" " + strings.ReplaceAll(cell, "|", `\|`) + " |")
		}
		b.WriteString("\n")
	}
	line(t.header)
	b.WriteString("|---|" + strings.Repeat("--:|", len(t.header)-1) + "\n")
	for _, cells := range t.rows {
		line(cells)
	}
}
