package main

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"time"
)

const (
	cyan  = "\x1b[36;1m"
	green = "\x1b[32;1m"
	red   = "\x1b[31;1m"
	faint = "\x1b[2m"
	reset = "\x1b[0m"
)

var (
	// https://docs.gitlab.com/ci/jobs/job_logs/#custom-collapsible-sections
	marker = regexp.MustCompile(`^(?:\x1b\[0K)?section_(start|end):[0-9]+:([A-Za-z0-9_.-]+)(\[[^\]]*\])?\r(\x1b\[0K)?`)
	colour = regexp.MustCompile(`\x1b\[[0-9;]*[mK]`)
)

// renderer shows a job log on a terminal the way GitLab's page shows it: section
// markers become headings and what the section took, colours stay. Whole lines
// are shown as they come.
type renderer struct {
	out   io.Writer
	plain bool // without colours

	rest    []byte
	started map[string]time.Time
	heading bool // the next line is a section's title
	closed  bool // this line has begun with a section's end
}

func (r *renderer) Write(p []byte) (int, error) {
	r.rest = append(r.rest, p...)
	for {
		i := bytes.IndexByte(r.rest, '\n')
		if i < 0 {
			return len(p), r.markers()
		}
		err := r.line(r.rest[:i])
		r.rest = r.rest[i+1:]
		if err != nil {
			return len(p), err
		}
	}
}

// markers takes the markers at the beginning of a line that is not complete yet,
// so that a section's end shows when it comes.
func (r *renderer) markers() error {
	for {
		m := marker.FindSubmatch(r.rest)
		if m == nil || len(m[4]) == 0 { // the marker's own last byte may be still to come
			return nil
		}
		r.rest = r.rest[len(m[0]):]
		if err := r.mark(string(m[1]), string(m[2])); err != nil {
			return err
		}
	}
}

func (r *renderer) mark(what, name string) error {
	if what == "start" {
		if r.started == nil {
			r.started = map[string]time.Time{}
		}
		r.started[name], r.heading = time.Now(), true
		return nil
	}
	r.heading, r.closed = false, true
	started, ok := r.started[name]
	if !ok {
		return nil
	}
	return r.print(fmt.Appendf(nil, "%s└ %.1f s%s", faint, time.Since(started).Seconds(), reset))
}

// line shows a line without its newline.
func (r *renderer) line(line []byte) error {
	for m := marker.FindSubmatch(line); m != nil; m = marker.FindSubmatch(line) {
		line = line[len(m[0]):]
		if err := r.mark(string(m[1]), string(m[2])); err != nil {
			return err
		}
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	closed := r.closed
	r.closed = false
	if closed && len(line) == 0 {
		return nil
	}
	if r.heading {
		r.heading = false
		line = append([]byte(cyan+"▾ "+reset), line...)
	}
	return r.print(line)
}

func (r *renderer) print(line []byte) error {
	line = bytes.ReplaceAll(line, []byte("\x1b[0K"), nil) // erases nothing in a log that only grows
	if r.plain {
		line = colour.ReplaceAll(line, nil)
	}
	_, err := fmt.Fprintf(r.out, "%s\n", line)
	return err
}

// flush shows a last line that has no newline.
func (r *renderer) flush() error {
	line := r.rest
	r.rest = nil
	if len(line) == 0 {
		return nil
	}
	return r.line(line)
}
