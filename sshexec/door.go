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

// A Door is a way into a guest that takes no network: two sockets of the host. Behind
// one of them, in the guest, an SSH server stands still. Behind the other is a shell
// of root's, which says [Greeting] on a line when someone connects, and then reads a
// line with the time at which it is sent, in seconds since 1970, and the words. It has
// the server go on, and says [Open] on a line once that lets in who is to be let in, or
// else why it does not. Anyone who may connect to the sockets can do that, so they must
// be for the driver alone.
type Door struct {
	// Server and Shell are the absolute paths of the UNIX sockets.
	Server string `json:"server"`
	Shell  string `json:"shell"`
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

// reminder is how long the shell of a door may be left with what it was told.
const reminder = time.Second

// maxDoorLine is how long a line may be that is said at a door, in bytes.
const maxDoorLine = 4096

// open says the words and returns when the server lets the key in.
func (d *Door) open(ctx context.Context) error {
	conn, err := connect(ctx, "unix", d.Shell)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return d.talk(conn)
}

func (d *Door) talk(conn net.Conn) error {
	if err := await(conn, Greeting); err != nil {
		return err
	}
	now := time.Now()
	if _, err := fmt.Fprintf(conn, "%d.%06d\n%s", now.Unix(), now.Nanosecond()/1000, d.Words); err != nil {
		return err
	}
	// A channel of Linux may not notice the words until something more comes, see
	// nudge. The shell does not read beyond them.
	ticker := time.NewTicker(reminder)
	defer ticker.Stop()
	answered := make(chan struct{})
	defer close(answered)
	go func() {
		for {
			select {
			case <-ticker.C:
				io.WriteString(conn, "\n")
			case <-answered:
				return
			}
		}
	}()
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
