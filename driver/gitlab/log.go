package gitlab

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Log writes the driver's own lines for the job log. Its rules: everything
// goes to one stream, since the runner does not keep the order between two;
// one line for one step, with what it took; a line that needs attention is in
// colour; only titles, a section's too, begin with a capital; and what others
// have said, libvirt, QEMU or a guest, is only ever text (see [Harmless]).
type Log struct {
	w     io.Writer
	plain bool
}

// NewLog returns a Log that writes to w, in colours unless plain is set.
// GitLab shows ANSI colours in a job log.
func NewLog(w io.Writer, plain bool) *Log {
	return &Log{w: w, plain: plain}
}

const (
	bold   = "\x1b[1m"
	cyan   = "\x1b[36m"
	yellow = "\x1b[33;1m"
	red    = "\x1b[31;1m"
	reset  = "\x1b[0m"
)

func (l *Log) paint(colour, text string) string {
	text = Harmless(text)
	if l.plain {
		return text
	}
	return colour + text + reset
}

// Title opens a stage's part of the log.
func (l *Log) Title(format string, args ...any) {
	fmt.Fprintln(l.w, l.paint(bold, fmt.Sprintf(format, args...)))
}

// Step reports a step that is done, in columns: its name, what came of it,
// and the seconds it took.
func (l *Log) Step(name string, took time.Duration, format string, args ...any) {
	fmt.Fprintf(l.w, "  %s %-68s %6.2f s\n", l.paint(cyan, fmt.Sprintf("%-8s", name)), Harmless(fmt.Sprintf(format, args...)), took.Seconds())
}

// Note reports something that the job's owner should know.
func (l *Log) Note(format string, args ...any) {
	fmt.Fprintln(l.w, l.paint(yellow, "note: "+fmt.Sprintf(format, args...)))
}

// Error reports why the stage failed.
func (l *Log) Error(err error) {
	fmt.Fprintln(l.w, l.paint(red, "libvirt-driver: "+err.Error()))
}

// Section writes lines in a section that the job log can fold away. The name
// is for machines: letters, digits, '_', '.' and '-'. See
// https://docs.gitlab.com/ci/jobs/job_logs/#custom-collapsible-sections.
func (l *Log) Section(name, title string, lines []string) {
	now := time.Now().Unix()
	if l.plain {
		fmt.Fprintln(l.w, Harmless(title))
	} else {
		fmt.Fprintf(l.w, "\x1b[0Ksection_start:%d:%s\r\x1b[0K%s\n", now, name, l.paint(bold, title))
	}
	fmt.Fprintln(l.w, Harmless(strings.Join(lines, "\n")))
	if !l.plain {
		fmt.Fprintf(l.w, "\x1b[0Ksection_end:%d:%s\r\x1b[0K\n", now, name)
	}
}

// escapes are the control sequences of terminals: CSI, OSC and the like, and
// single characters after ESC.
var escapes = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])`)
})

// Harmless returns text with everything removed that a terminal or GitLab's job
// log could take for more than text: control sequences, and with them colours
// and the marks of sections; control characters; characters that change the
// direction of others. Lines stay lines. Of a line that a carriage return
// begins anew only the end is left, as on a terminal.
//
// See https://docs.gitlab.com/ci/jobs/job_logs/#custom-collapsible-sections for
// the marks: each ends in a carriage return and a control sequence.
func Harmless(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if strings.Contains(text, "\x1b") {
		text = escapes().ReplaceAllString(text, "")
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		line = strings.TrimRight(line, "\r")
		line = line[strings.LastIndexByte(line, '\r')+1:]
		lines[i] = strings.Map(func(r rune) rune {
			switch {
			case r == '\t':
				return ' '
			case unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp):
				return -1
			}
			return r
		}, line)
	}
	return strings.Join(lines, "\n")
}
