package runner

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// Colours of Runner's own lines in a job log.
const (
	boldRed   = "\x1b[31;1m"
	boldGreen = "\x1b[32;1m"
	boldCyan  = "\x1b[36;1m"
	yellow    = "\x1b[0;33m"
	reset     = "\x1b[0;m"
	eraseLine = "\x1b[0K"
)

// jobLog is a job log in GitLab's form: lines with their colours, section
// markers (https://docs.gitlab.com/ci/jobs/job_logs/#custom-collapsible-sections),
// and [MASKED] in place of masked variables.
type jobLog struct {
	mu      sync.Mutex
	to      io.Writer
	phrases [][]byte
}

func newJobLog(masked []string, to io.Writer) *jobLog {
	l := &jobLog{to: to}
	for _, phrase := range masked {
		l.phrases = append(l.phrases, []byte(phrase))
	}
	// The longest first: one masked value may be the beginning of another.
	slices.SortFunc(l.phrases, func(a, b []byte) int { return cmp.Compare(len(b), len(a)) })
	return l
}

func (l *jobLog) write(p []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.to.Write(p)
	return err
}

// println writes one of the runner's own lines. A log that cannot be written to
// shows in the streams' errors.
func (l *jobLog) println(text string) {
	s := l.stream()
	_, _ = io.WriteString(s, eraseLine+text+reset+"\n")
	_ = s.Close()
}

func (l *jobLog) warning(text string) { l.println(yellow + "WARNING: " + text) }

// section begins a collapsible section; what it returns ends it.
func (l *jobLog) section(name, title string) (end func()) {
	mark := func(what string) {
		_ = l.write(fmt.Appendf(nil, "section_%s:%d:%s\r%s", what, time.Now().Unix(), name, eraseLine))
	}
	mark("start")
	l.println(boldCyan + title + reset)
	return func() { mark("end") }
}

// stream gives a writer for one output of a call. What may be the beginning of a
// masked value is held back until more comes, or Close.
func (l *jobLog) stream() *logStream { return &logStream{log: l} }

type logStream struct {
	log  *jobLog
	rest []byte
}

func (s *logStream) Write(p []byte) (int, error) {
	if len(s.log.phrases) == 0 {
		return len(p), s.log.write(p)
	}
	s.rest = append(s.rest, p...)
	for _, phrase := range s.log.phrases {
		if bytes.Contains(s.rest, phrase) {
			s.rest = bytes.ReplaceAll(s.rest, phrase, []byte("[MASKED]"))
		}
	}
	held := 0
	for _, phrase := range s.log.phrases {
		for n := min(len(phrase)-1, len(s.rest)); n > held; n-- {
			if bytes.HasSuffix(s.rest, phrase[:n]) {
				held = n
				break
			}
		}
	}
	out := s.rest[:len(s.rest)-held]
	err := s.log.write(out)
	s.rest = append([]byte(nil), s.rest[len(out):]...)
	return len(p), err
}

// Close writes what was held back.
func (s *logStream) Close() error {
	if len(s.rest) == 0 {
		return nil
	}
	err := s.log.write(s.rest)
	s.rest = nil
	return err
}
