package sshexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// A Door is a way into a guest that takes no network: a socket of the host behind
// which, in the guest, a shell of root's waits. It says [Greeting] on a line when
// someone connects, and then reads a line with the time at which it is sent, in
// seconds since 1970, and the words. It says [Open] on a line and leaves the
// connection to an SSH server, or says on one line why it does not. Anyone who may
// connect to the socket can do that, so it must be for the driver alone.
type Door struct {
	// Socket is the absolute path of the UNIX socket.
	Socket string `json:"socket"`
	// Words are what the shell waits for, in lines.
	Words string `json:"words"`
}

// What is said at a [Door].
const (
	Greeting = "libvirt-driver: the door"
	Open     = "libvirt-driver: open"
)

// ErrShut says that the door was found, but did not open.
var ErrShut = errors.New("the door stays shut")

// maxDoorLine is how long a line may be that is said at a door, in bytes.
const maxDoorLine = 4096

// open goes through the door at the other end of conn up to where SSH begins.
func (d *Door) open(conn net.Conn) error {
	if err := await(conn, Greeting); err != nil {
		return err
	}
	now := time.Now()
	if _, err := fmt.Fprintf(conn, "%d.%06d\n%s", now.Unix(), now.Nanosecond()/1000, d.Words); err != nil {
		return err
	}
	line, err := readLine(conn)
	switch {
	case err != nil:
		return fmt.Errorf("the door did not open: %w", err)
	case line != Open:
		return fmt.Errorf("%w: %.200q", ErrShut, line)
	}
	return nil
}

// await reads up to and with a line.
func await(conn net.Conn, want string) error {
	for {
		line, err := readLine(conn)
		if err != nil {
			return fmt.Errorf("no word from the door: %w", err)
		}
		if line == want {
			return nil
		}
	}
}

// readLine reads a line and not a byte beyond it.
func readLine(r io.Reader) (string, error) {
	var line bytes.Buffer
	for one := make([]byte, 1); line.Len() < maxDoorLine; line.Write(one) {
		if _, err := io.ReadFull(r, one); err != nil {
			return "", err
		}
		if one[0] == '\n' {
			return strings.TrimSuffix(line.String(), "\r"), nil
		}
	}
	return "", fmt.Errorf("a line of more than %d bytes", maxDoorLine)
}

// connect returns a connection on which an SSH server is about to speak, or
// does so already.
func (t Target) connect(ctx context.Context) (net.Conn, error) {
	network, address := "tcp", t.Address
	if t.Door != nil {
		network, address = "unix", t.Door.Socket
	}
	conn, err := connect(ctx, network, address)
	if err != nil || t.Door == nil {
		return conn, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := t.Door.open(conn); err != nil {
		conn.Close()
		return nil, fmt.Errorf("by the door %s: %w", address, err)
	}
	return conn, nil
}
