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
				c.ssh.SendRequest("keepalive@openssh.com", true, nil)
				answered <- struct{}{}
			}()
		default: // the last request is still open
		}
	}
}
