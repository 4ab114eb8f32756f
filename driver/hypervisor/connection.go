// Package hypervisor is the driver's libvirt: one connection to libvirtd over
// its UNIX socket, and on it the few things that a job's machine takes:
// volumes, domains, addresses, events.
//
// Every method obeys its context, whatever libvirtd does: libvirt's protocol
// has no time-outs of its own, so at the context's end the connection is
// closed under the call, a moment later. Every method is also safe to repeat,
// and while libvirtd is away, as during a restart or an upgrade, it is repeated
// until the context ends. So give each a context with a deadline.
package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// noticed is for how long libvirtd must have been away before anyone is told.
const noticed = time.Second

// Grace is how long a call that libvirtd is at work on may still take after its
// context has ended, so that no machine appears behind the back of the cleanup
// that follows.
const Grace = 3 * time.Second

// Sockets are where libvirtd is looked for when no socket is named: the
// monolithic daemon's (or virtproxyd's in its place), then the modular QEMU
// daemon's, which reaches storage and networks for its clients. See
// https://libvirt.org/daemons.html.
var Sockets = []string{"/var/run/libvirt/libvirt-sock", "/var/run/libvirt/virtqemud-sock"}

// sessionSockets returns where a user's own daemons listen, for the URI of a
// session. To root libvirt gives the system's daemon even then.
func sessionSockets(uid int) ([]string, error) {
	if uid == 0 {
		return Sockets, nil
	}
	// As GLib has it, which libvirt asks.
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		var err error
		if dir, err = os.UserCacheDir(); err != nil {
			return nil, fmt.Errorf("find the sockets of the user's own libvirtd: XDG_RUNTIME_DIR is not set: %w", err)
		}
	}
	dir = filepath.Join(dir, "libvirt")
	return []string{filepath.Join(dir, "libvirt-sock"), filepath.Join(dir, "virtqemud-sock")}, nil
}

// Connection is a connection to libvirtd that is made when it is first needed
// and made again when it is lost. It is safe for concurrent use.
type Connection struct {
	// Away, if not nil, is called when a call begins to wait for a libvirtd that
	// is away, with what is wrong: once for each time that it is.
	Away func(error)

	uri, socket string
	grace       time.Duration

	dialling    chan struct{} // holds a token while a call makes the session
	subscribing chan struct{} // and this one while a call looks after events
	events      *events

	mu       sync.Mutex
	current  *session
	told     bool                       // that libvirtd is away
	networks map[string]libvirt.Network // by their names, as they were last looked up
	offers   map[demand]offer
}

// session is one connection of Connection's life.
type session struct {
	rpc  *libvirt.Libvirt
	conn *framedConn
}

// New returns a Connection to the hypervisor of uri, such as
// "qemu:///system", behind the UNIX socket at path; with an empty path, behind
// the first of Sockets that exists or, for "qemu:///session", of the user's own.
// Nothing is dialled yet.
func New(uri, path string) *Connection {
	return &Connection{uri: uri, socket: path, grace: Grace, dialling: make(chan struct{}, 1), subscribing: make(chan struct{}, 1),
		networks: map[string]libvirt.Network{}, offers: map[demand]offer{}}
}

// Close closes the connection, at once: libvirtd needs no farewell.
func (c *Connection) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current != nil {
		c.current.conn.Close()
		c.current = nil
	}
}

// do runs call on a live connection, and again on a new one while libvirtd is
// away, until ctx ends. So call must be repeatable.
func (c *Connection) do(ctx context.Context, call func(*libvirt.Libvirt) error) error {
	begun := time.Now()
	pause := 20 * time.Millisecond
	for {
		err := c.once(ctx, call)
		if !errors.Is(err, ErrUnreachable) {
			return err
		}
		if time.Since(begun) >= noticed {
			c.tell(err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		}
	}
}

// tell calls Away, but once until there is a connection again.
func (c *Connection) tell(err error) {
	c.mu.Lock()
	told := c.told
	c.told = true
	c.mu.Unlock()
	if !told && c.Away != nil {
		c.Away(err)
	}
}

func (c *Connection) once(ctx context.Context, call func(*libvirt.Libvirt) error) error {
	s, err := c.session(ctx)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	answered := make(chan struct{})
	defer close(answered)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-answered:
		case <-time.After(c.grace):
			s.conn.Close()
		}
	})
	defer stop()
	err = call(s.rpc)
	switch {
	case err == nil || !lost(err):
		return err
	case s.conn.nonsense() != nil:
		c.forget(s)
		return s.conn.nonsense()
	case ctx.Err() != nil:
		c.forget(s)
		return fmt.Errorf("libvirtd did not answer: %w", context.Cause(ctx))
	default:
		c.forget(s)
		return fmt.Errorf("%w: it closed the connection: %w", ErrUnreachable, err)
	}
}

// session returns the current session, or dials one. The mutex is not held
// meanwhile: nobody waits for longer than their own context.
func (c *Connection) session(ctx context.Context) (*session, error) {
	select {
	case c.dialling <- struct{}{}:
		defer func() { <-c.dialling }()
	case <-ctx.Done():
		return nil, fmt.Errorf("connect to libvirtd: %w", context.Cause(ctx))
	}
	c.mu.Lock()
	current := c.current
	c.mu.Unlock()
	if current != nil {
		return current, nil
	}
	path, err := c.path()
	if err != nil {
		return nil, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("connect to libvirtd: %w: run the driver as root or as a member of the group that owns %s", err, path)
	case err != nil && ctx.Err() == nil:
		return nil, fmt.Errorf("%w: %w: is libvirtd running? (systemctl start libvirtd)", ErrUnreachable, err)
	case err != nil:
		return nil, fmt.Errorf("connect to libvirtd: %w", context.Cause(ctx))
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	framed := &framedConn{Conn: conn}
	rpc := libvirt.NewWithDialer(dialers.NewAlreadyConnected(framed))
	if err := rpc.ConnectToURI(libvirt.ConnectURI(c.uri)); err != nil {
		conn.Close()
		switch {
		case framed.nonsense() != nil:
			return nil, fmt.Errorf("open %s through %s: %w", c.uri, path, framed.nonsense())
		case ctx.Err() != nil:
			return nil, fmt.Errorf("libvirtd at %s did not answer: %w", path, context.Cause(ctx))
		case lost(err):
			return nil, fmt.Errorf("%w: it closed the connection at %s: %w", ErrUnreachable, path, err)
		}
		return nil, fmt.Errorf("open %s through %s: %w", c.uri, path, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.current, c.told = &session{rpc: rpc, conn: framed}, false
	return c.current, nil
}

// path returns the socket to dial.
func (c *Connection) path() (string, error) {
	if c.socket != "" {
		return c.socket, nil
	}
	sockets := Sockets
	if strings.HasSuffix(c.uri, "/session") {
		var err error
		if sockets, err = sessionSockets(os.Geteuid()); err != nil {
			return "", err
		}
	}
	for _, path := range sockets {
		if _, err := os.Stat(path); err == nil {
			return filepath.Clean(path), nil
		}
	}
	return sockets[0], nil
}

// forget drops a session that has been lost.
func (c *Connection) forget(s *session) {
	s.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == s {
		c.current = nil
	}
}

// lost reports whether a call failed because its connection did. EINVAL is
// what go-libvirt returns for a call on a closed connection.
func lost(err error) bool {
	for _, target := range []error{
		libvirt.ErrInterrupted, syscall.EINVAL, syscall.EPIPE, syscall.ECONNRESET, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
