package sshexec

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/crypto/ssh"
)

// A spare is a shell on the guest that waits for its script. To start one is most
// of what a short script costs, on an emulated guest a tenth of a second. So a
// [Relay] starts the next script's shell when the last one is done with, and not
// before: it is to find what that has changed.
type spare struct {
	ch     ssh.Channel
	told   <-chan *ssh.Request // has room for how the shell ended, which is all that comes
	marker string
	begun  time.Time
}

// spareChannel is the type of the channel by which a client of a Relay takes the
// shell that waits; which shell it needs goes with it. The first line that comes is
// spareGreeting, and the rest is the shell's.
const spareChannel = "spare@libvirt-driver"

// spareGreeting says the marker that the shell has in its environment, and for how
// many milliseconds it has been there.
const spareGreeting = "%s %d\n"

// startSpare starts a shell that waits. It returns nil where that is not possible:
// whoever needs one then will hear why.
func (c *Client) startSpare(shell string) *spare {
	marker := newMarker()
	line, err := c.invocation(shell, marker)
	if err != nil {
		return nil
	}
	begun := time.Now()
	ch, told, err := c.execute(line)
	if err != nil {
		return nil
	}
	return &spare{ch, told, marker, begun}
}

// over reports whether the shell has ended, as by TMOUT.
func (s *spare) over() bool {
	select {
	case <-s.told:
		return true
	default:
		return false
	}
}

// renew sees to it that a shell waits.
func (r *Relay) renew() {
	r.waiting.Lock()
	defer r.waiting.Unlock()
	if r.spare == nil {
		r.spare = r.client.startSpare(r.shell)
	}
}

// take hands out the shell that waits, and nil if there is none of this kind. One
// that is about to wait is waited for.
func (r *Relay) take(shell string) *spare {
	r.waiting.Lock()
	defer r.waiting.Unlock()
	s := r.spare
	r.spare = nil
	if s != nil && (shell != r.shell || s.over()) {
		s.ch.Close()
		return nil
	}
	return s
}

// takeSpare takes the shell that waits for a script, if the server is a Relay and
// has one. The end of ctx closes the Client.
func (c *Client) takeSpare(ctx context.Context, shell string) (s *session, marker string, ok bool) {
	if !c.relay || ctx.Err() != nil {
		return nil, "", false
	}
	defer context.AfterFunc(ctx, func() { c.lose(context.Cause(ctx)) })()
	ch, requests, err := c.ssh.OpenChannel(spareChannel, []byte(shell))
	if err != nil {
		return nil, "", false
	}
	var age int64
	line, err := readLine(ch)
	if err == nil {
		_, err = fmt.Sscanf(line+"\n", spareGreeting, &marker, &age)
	}
	if err != nil {
		go ssh.DiscardRequests(requests)
		ch.Close()
		return nil, "", false
	}
	return newSession(ch, requests, time.Now().Add(-time.Duration(age)*time.Millisecond)), marker, true
}
