// Package sshexec runs scripts on a guest over SSH: it dials, authenticates
// with one key, verifies the host key, feeds a script to a shell, streams what
// the script writes and says how it ended.
//
// The package asks for one thing of an SSH server, a session that executes a
// command. It never requests agent, port or X11 forwarding or a terminal, and
// refuses whatever channel or request the server opens towards it.
//
// The errors tell four cases apart, because a caller treats each differently:
//
//   - [ErrUnreachable]: nobody answered yet; dialing again later makes sense.
//   - [ErrKeyRejected] and [ErrHostKey]: somebody answered, and waiting longer
//     will not help.
//   - [ErrLost]: the connection ended before the script did; nothing is known
//     about the script.
//   - [*ExitError]: the script itself ended, and so.
package sshexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

var (
	// ErrUnreachable says that no SSH server answered all the way: the
	// connection was refused, found no route, ran into the context's end, or was
	// closed in the middle of the handshake, as by a guest that is still booting.
	ErrUnreachable = errors.New("no answer from an SSH server")

	// ErrKeyRejected says that the server answered and did not accept the key.
	ErrKeyRejected = errors.New("the server refused the key")

	// ErrHostKey says that the server is not the one it was expected to be.
	ErrHostKey = errors.New("the server's host key is not the expected one")

	// ErrRefused says that the server has no session to give, as when as many
	// as it allows to a connection are still open. Nothing has been run.
	ErrRefused = errors.New("the server refused a session")

	// ErrLost says that the connection ended before the exit status of a command
	// had come.
	ErrLost = errors.New("connection to the guest lost")
)

// Target says where a guest's SSH server is and how to log in to it.
type Target struct {
	Address string     // host:port
	User    string     // the account on the guest
	Key     ssh.Signer // the only key that is offered, see [LoadKey] and [NewKeyPair]

	// HostKey is the one host key that is accepted, in the format of an
	// authorized_keys or .pub file. Empty means that no key is known yet: then
	// the first connection accepts the key that it is shown, and the caller
	// keeps [Client.HostKey] for every later one.
	HostKey string

	// Door, if any, leads to the server in place of Address, which then only names
	// it.
	Door *Door
}

// A Client is an authenticated connection to a guest's SSH server. It is meant for
// one script, or for a [Relay]: what is given up in the middle may close it.
type Client struct {
	addr    string
	hostKey ssh.PublicKey
	windows bool // the server runs on Windows: no POSIX shell, no /proc

	conn *watchedConn
	ssh  ssh.Conn
	dead chan struct{} // closed once the connection is down

	ending
}

// An ending is why a connection was closed; the first cause counts.
type ending struct {
	mu    sync.Mutex
	cause error
}

// end closes the connection unless it was closed already.
func (e *ending) end(conn io.Closer, cause error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cause != nil {
		return nil
	}
	e.cause = cause
	return conn.Close()
}

// HostKey returns the host key that was verified or, when [Target.HostKey] was
// empty, the one that was seen, in the format of an authorized_keys file
// without a comment.
func (c *Client) HostKey() string {
	return authorizedKey(c.hostKey)
}

// Ping runs an empty command and so shows that the guest gives real sessions:
// a server accepts keys some time before a login is possible, and an account
// without a usable shell is accepted too. The end of ctx closes the Client.
func (c *Client) Ping(ctx context.Context) error {
	s, err := c.start(ctx, "exit 0")
	if err != nil {
		return fmt.Errorf("open a session on %s: %w", c.addr, err)
	}
	defer s.close()
	var said excerpt
	out := s.copyOutput(&said, &said)
	defer out.mute()
	s.feed(nil)
	if err := s.wait(ctx); err != nil {
		c.lose(err)
		return fmt.Errorf("wait for an empty command on %s: %w", c.addr, err)
	}
	if !s.hasExited() {
		return fmt.Errorf("wait for an empty command on %s: %w", c.addr, c.lost())
	}
	if s.exit != nil {
		out.wait(lastOutput)
		return fmt.Errorf("run an empty command on %s: %w (the guest said %q): check the account's login shell", c.addr, s.exit, said.String())
	}
	return nil
}

// Alive asks the server for a sign of life. It is far cheaper than Ping, and shows
// no more than that the guest and its server still are where they were. The end of
// ctx closes the Client.
func (c *Client) Alive(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { c.lose(context.Cause(ctx)) })()
	if _, _, err := c.ssh.SendRequest(signOfLife, true, nil); err != nil {
		return fmt.Errorf("ask %s for a sign of life: %w", c.addr, c.lost())
	}
	return nil
}

// Abort closes the connection at once, as [Client.Close] does, and makes what
// is running on it fail with an error that wraps both [ErrLost] and cause. It is
// for a caller that knows better than the network that the guest is gone.
func (c *Client) Abort(cause error) {
	c.lose(cause)
}

// Close closes the connection. A script that is still running on it is not
// ended on the guest: cancel [Client.Run] for that.
func (c *Client) Close() error {
	return c.lose(net.ErrClosed)
}

// lose closes the connection and keeps the first cause it was given.
func (c *Client) lose(cause error) error { return c.end(c.conn, cause) }

// lost returns the error of a command whose channel ended without an exit
// status.
func (c *Client) lost() error {
	// The channels of a connection that broke are closed just before the
	// connection says why.
	select {
	case <-c.dead:
	case <-time.After(time.Second):
		return fmt.Errorf("%w: the server ended the session without an exit status", ErrLost)
	}
	return fmt.Errorf("%w: %w", ErrLost, c.why())
}

// why returns why the connection is down.
func (c *Client) why() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(c.cause, io.EOF) {
		return fmt.Errorf("the guest closed it: %w", c.cause)
	}
	return c.cause
}

// ended returns the error of an operation that the end of ctx stopped. It wraps
// the context's cause as well as its error.
func ended(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return fmt.Errorf("%w (%w)", cause, err)
}

// A watchedConn knows when its peer was last heard of, and what it was told.
type watchedConn struct {
	net.Conn
	start time.Time
	heard atomic.Int64  // nanoseconds after start
	said  atomic.Int64  // how many writes there were
	told  chan struct{} // holds a token when there was one
}

func watch(conn net.Conn) *watchedConn {
	return &watchedConn{Conn: conn, start: time.Now(), told: make(chan struct{}, 1)}
}

func (w *watchedConn) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	w.said.Add(1)
	w.tell()
	return n, err
}

// tell lets whoever waits for it know that there was a write.
func (w *watchedConn) tell() {
	select {
	case w.told <- struct{}{}:
	default:
	}
}

func (w *watchedConn) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.start)))
	}
	return n, err
}

// silence returns how long nothing has come from the peer.
func (w *watchedConn) silence() time.Duration {
	return time.Since(w.start) - time.Duration(w.heard.Load())
}
