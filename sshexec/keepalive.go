package sshexec

import (
	"fmt"
	"time"
)

// A guest that dies takes no leave: nothing comes any more, and TCP alone
// notices that after a quarter of an hour. So the server is asked for a sign of
// life when it has been silent for keepAliveInterval, and the connection is
// lost when it has been silent for keepAliveLimit. Both are looked at once per
// interval, so losing a guest takes at most their sum.
const (
	keepAliveInterval = 15 * time.Second
	keepAliveLimit    = 60 * time.Second
)

// signOfLife is what a server is asked for. OpenSSH's answers that it does not know
// it, which is all that is needed.
const signOfLife = "keepalive@openssh.com"

// keepAlive watches over the connection until it is down.
func (c *Client) keepAlive(interval, limit time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	answered := make(chan struct{}, 1)
	answered <- struct{}{}
	for {
		select {
		case <-c.dead:
			return
		case <-ticker.C:
		}
		silence := c.conn.silence()
		if silence >= limit {
			c.lose(fmt.Errorf("nothing came from the guest for %v", silence.Round(time.Second/10)))
			return
		}
		if silence < interval {
			continue
		}
		select {
		case <-answered:
			// The request waits for its answer as long as the connection lives.
			go func() {
				c.ssh.SendRequest(signOfLife, true, nil)
				answered <- struct{}{}
			}()
		default: // the last request is still open
		}
	}
}

// patience is how long a guest behind a [Door] may be left with what it was told.
const patience = 200 * time.Millisecond

// nudge sees to it that a guest behind a [Door] reads what it is told. A virtio
// channel of Linux now and then tells nobody that something has come, and whoever
// waits for it goes on waiting until something else comes: of six hundred sub-stages
// right after a start from memory nine met that. So whenever nothing was said for a
// moment the guest is asked for a sign of life, and once it gives one it has read
// all there was.
//
// https://github.com/lmb/vimto/issues/29
func (c *Client) nudge() {
	for c.quiet() {
		said := c.conn.said.Load()
		asked := c.ask()
		select {
		case <-c.conn.told:
		default:
		}
		if c.conn.said.Load() != said+asked {
			c.conn.tell() // of what was said meanwhile
		}
	}
}

// quiet waits until something was said, and nothing more for a moment. It reports
// whether the connection is still up.
func (c *Client) quiet() bool {
	select {
	case <-c.conn.told:
	case <-c.dead:
		return false
	}
	for said := int64(-1); said != c.conn.said.Load(); {
		said = c.conn.said.Load()
		select {
		case <-time.After(patience):
		case <-c.dead:
			return false
		}
	}
	return true
}

// ask asks for a sign of life until there is one, or the connection is down. It
// returns how many times it asked.
func (c *Client) ask() (times int64) {
	answered := make(chan struct{})
	go func() {
		c.ssh.SendRequest(signOfLife, true, nil)
		close(answered)
	}()
	for pause := patience; ; pause = min(2*pause, keepAliveInterval) {
		times++
		select {
		case <-answered:
			return times
		case <-c.dead:
			return times
		case <-time.After(pause):
			// That has not been noticed, either. Only one answer can be waited for.
			c.ssh.SendRequest(signOfLife, false, nil)
		}
	}
}
