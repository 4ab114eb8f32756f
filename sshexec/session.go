package sshexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// An ExitError says that a command ended otherwise than with status 0.
type ExitError struct {
	// Code is the exit status, 1 to 255, or 128 plus the number of the signal
	// that ended the command, 128 for a signal without a common number. Guests
	// with Windows have statuses up to 1<<32-1.
	Code int
	// Signal is the name of that signal without "SIG", such as "KILL", at most
	// 64 printable characters of ASCII, and empty when the command ended by
	// itself.
	Signal string
}

func (e *ExitError) Error() string {
	if e.Signal != "" {
		return "ended by signal " + e.Signal
	}
	return fmt.Sprintf("exited with status %d", e.Code)
}

// signalNumbers has the signals that RFC 4254, section 6.10 names, with their
// numbers on Linux. OpenSSH's server calls every other one "SIG@openssh.com".
var signalNumbers = map[string]int{
	"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "ABRT": 6, "FPE": 8, "KILL": 9,
	"USR1": 10, "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15,
}

// A session is one command on the guest.
//
// It uses a channel rather than [ssh.Session] because that one's Wait returns
// only at the end of the output, for which a process that the command left
// behind can be waited for in vain.
type session struct {
	ch     ssh.Channel
	begun  time.Time     // not later than the command
	exited chan struct{} // closed when the exit status has come
	exit   *ExitError    // nil for status 0; valid once exited is closed
	gone   chan struct{} // closed when nothing more will come
}

// start begins a command with the given command line. It is interpreted by the
// account's login shell, so nothing that a user chose may be in it. The end of
// ctx during start closes the Client.
func (c *Client) start(ctx context.Context, line string) (*session, error) {
	if ctx.Err() != nil {
		return nil, ended(ctx)
	}
	unhook := context.AfterFunc(ctx, func() { c.lose(context.Cause(ctx)) })
	s, err := c.open(line)
	if !unhook() {
		return nil, ended(ctx)
	}
	return s, err
}

func (c *Client) open(line string) (*session, error) {
	begun := time.Now()
	ch, requests, err := c.execute(line)
	if err != nil {
		return nil, err
	}
	return newSession(ch, requests, begun), nil
}

// execute has the server execute a command line.
func (c *Client) execute(line string) (ssh.Channel, <-chan *ssh.Request, error) {
	ch, requests, err := c.ssh.OpenChannel("session", nil)
	var refusal *ssh.OpenChannelError
	if errors.As(err, &refusal) {
		return nil, nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if err != nil {
		return nil, nil, c.lost()
	}
	ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Line string }{line}))
	if err == nil && ok {
		return ch, requests, nil
	}
	go ssh.DiscardRequests(requests)
	if err != nil {
		return nil, nil, c.lost()
	}
	ch.Close()
	return nil, nil, errors.New("the server refused to execute a command")
}

// newSession returns the session of a command that ch leads to.
func newSession(ch ssh.Channel, requests <-chan *ssh.Request, begun time.Time) *session {
	s := &session{ch: ch, begun: begun, exited: make(chan struct{}), gone: make(chan struct{})}
	go s.follow(requests)
	return s
}

// follow waits for the exit status and for the channel's end.
func (s *session) follow(reqs <-chan *ssh.Request) {
	defer close(s.gone)
	for r := range reqs {
		exit, ok := parseExit(r)
		r.Reply(ok, nil)
		if ok && !s.hasExited() {
			s.exit = exit
			close(s.exited)
		}
	}
}

// feed writes all there is to the command's standard input. A command that stops
// reading is no error.
func (s *session) feed(input []byte) {
	if _, err := s.ch.Write(input); err == nil {
		s.ch.CloseWrite()
	}
}

// wait waits until the exit status has come or nothing more will.
func (s *session) wait(ctx context.Context) error {
	select {
	case <-s.exited:
	case <-s.gone:
	case <-ctx.Done():
		return ended(ctx)
	}
	return nil
}

// hasExited reports whether the command's exit status has come.
func (s *session) hasExited() bool {
	select {
	case <-s.exited:
		return true
	default:
		return false
	}
}

// parseExit returns how a command ended, nil for status 0, and whether r says so
// at all.
func parseExit(r *ssh.Request) (*ExitError, bool) {
	switch r.Type {
	case "exit-status":
		var m struct{ Status uint32 }
		if ssh.Unmarshal(r.Payload, &m) != nil {
			return nil, false
		}
		if m.Status == 0 {
			return nil, true
		}
		return &ExitError{Code: int(m.Status)}, true
	case "exit-signal":
		var m struct {
			Signal     string
			CoreDumped bool
			Message    string
			Language   string
		}
		if ssh.Unmarshal(r.Payload, &m) != nil {
			return nil, false
		}
		return &ExitError{Code: 128 + signalNumbers[m.Signal], Signal: signalName(m.Signal)}, true
	}
	return nil, false
}

// signalName returns a signal's name as a server says it, or "unknown" for what
// is no name: RFC 4254, section 6.10 has names of its own as NAME@DOMAIN.
func signalName(text string) string {
	const longest = 64
	if text == "" || len(text) > longest || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "unknown"
	}
	return text
}

// signal asks the server to send a signal, such as "TERM", to the command.
// OpenSSH's sends it to the command's process group.
func (s *session) signal(name string) {
	s.ch.SendRequest("signal", false, ssh.Marshal(struct{ Name string }{name}))
}

// close ends the session, not the command.
func (s *session) close() {
	s.ch.Close()
}

// outputBuffer is the size of the buffer between the guest and each writer, in
// bytes: that of the largest packet.
const outputBuffer = 32 << 10

// An output copies what a command writes.
type output struct {
	done chan struct{} // closed at the end of both streams

	mu      sync.Mutex
	last    time.Time // when something last came or was last written
	writing int       // how many Write calls are under way
	muted   bool
	err     error // the first error of a Write
}

// copyOutput starts to copy the command's two streams; a nil writer discards.
func (s *session) copyOutput(stdout, stderr io.Writer) *output {
	o := &output{done: make(chan struct{}), last: time.Now()}
	var streams sync.WaitGroup
	streams.Go(func() { o.copy(stdout, s.ch) })
	streams.Go(func() { o.copy(stderr, s.ch.Stderr()) })
	go func() {
		streams.Wait()
		close(o.done)
	}()
	return o
}

// copy copies src to its end, whether or not dst takes it: a command must not
// fail, or wait, because of who listens.
func (o *output) copy(dst io.Writer, src io.Reader) {
	buf := make([]byte, outputBuffer)
	for {
		n, err := src.Read(buf)
		if n > 0 && o.beginWrite() {
			var werr error
			if dst != nil {
				_, werr = dst.Write(buf[:n])
			}
			if o.endWrite(werr); werr != nil {
				dst = nil
			}
		}
		if err != nil {
			return
		}
	}
}

func (o *output) beginWrite() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.last = time.Now()
	if o.muted {
		return false
	}
	o.writing++
	return true
}

func (o *output) endWrite(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.last = time.Now()
	o.writing--
	if o.err == nil {
		o.err = err
	}
}

// mute makes sure that no further Write begins.
func (o *output) mute() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.muted = true
}

// lastOutput bounds the wait for the end of an output of which only a rest can
// be on its way.
const lastOutput = time.Second

// wait waits for the end of both streams, for d at most.
func (o *output) wait(d time.Duration) {
	select {
	case <-o.done:
	case <-time.After(d):
	}
}

// silence returns how long nothing has come while nothing was being written
// either, and whether a Write is under way now.
func (o *output) silence() (d time.Duration, writing bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.writing > 0 {
		return 0, true
	}
	return time.Since(o.last), false
}

// writeError returns the first error of a Write.
func (o *output) writeError() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// An excerpt keeps the first bytes written to it, for a message.
type excerpt struct {
	mu   sync.Mutex
	text []byte
}

const maxExcerpt = 512

func (e *excerpt) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.text = append(e.text, p[:min(len(p), maxExcerpt-len(e.text))]...)
	return len(p), nil
}

func (e *excerpt) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return string(e.text)
}
