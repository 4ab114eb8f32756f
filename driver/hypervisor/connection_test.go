package hypervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// daemon listens where libvirtd would and treats each connection as told. It
// stands for what no real libvirtd can be made to do.
func daemon(t testing.TB, treat func(net.Conn)) *Connection {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go treat(conn)
		}
	}()
	return short(New("qemu:///system", path))
}

// short shortens the waits that are constants of the product.
func short(c *Connection) *Connection {
	c.grace = 50 * time.Millisecond
	return c
}

// within fails the test when call takes longer than a few seconds.
func within(t testing.TB, call func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		t.Fatal("hangs")
		return nil
	}
}

func TestSilentDaemonIsLeftAtTheDeadline(t *testing.T) {
	c := daemon(t, func(net.Conn) {})
	told := errors.New("stage is over")
	ctx, cancel := context.WithTimeoutCause(context.Background(), 100*time.Millisecond, told)
	defer cancel()
	err := within(t, func() error { _, err := c.State(ctx, "machine"); return err })
	if !errors.Is(err, told) || !strings.Contains(err.Error(), "did not answer") || !strings.Contains(err.Error(), "machine") {
		t.Errorf("error: %v", err)
	}
}

func TestOneCallThatConnectsDoesNotHoldAnotherBeyondItsTime(t *testing.T) {
	dialled := make(chan struct{}, 10)
	c := daemon(t, func(net.Conn) { dialled <- struct{}{} })
	long, end := context.WithCancel(context.Background())
	first := make(chan error, 1)
	go func() { _, err := c.State(long, "first"); first <- err }()
	<-dialled
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	err := within(t, func() error { _, err := c.State(ctx, "second"); return err })
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "second") {
		t.Errorf("error: %v", err)
	}
	within(t, func() error { c.Close(); return nil })
	end()
	if err := within(t, func() error { return <-first }); !errors.Is(err, context.Canceled) {
		t.Errorf("the first's error: %v", err)
	}
}

func TestDaemonThatHangsUpIsTriedAgainThenUnreachable(t *testing.T) {
	calls := make(chan struct{}, 1000)
	c := daemon(t, func(conn net.Conn) { calls <- struct{}{}; conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err := within(t, func() error { _, err := c.State(ctx, "machine"); return err })
	if !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error: %v", err)
	}
	if len(calls) < 2 {
		t.Errorf("dialled %d times", len(calls))
	}
}

// A length below a header's makes go-libvirt panic, a huge one allocate it.
func TestImpossiblePacketsCloseTheConnection(t *testing.T) {
	for _, length := range []uint32{0, 4, 27, maxPacket + 1, 1<<32 - 1} {
		c := daemon(t, func(conn net.Conn) {
			conn.Write(binary.BigEndian.AppendUint32(nil, length))
		})
		err := within(t, func() error { _, err := c.State(context.Background(), "machine"); return err })
		if !errors.Is(err, errNonsense) || !strings.Contains(err.Error(), fmt.Sprintf("%d bytes", length)) {
			t.Errorf("length %d: error: %v", length, err)
		}
	}
}

func TestTornPacketEndsAtTheDeadline(t *testing.T) {
	c := daemon(t, func(conn net.Conn) {
		conn.Write(binary.BigEndian.AppendUint32(nil, 100))
		conn.Write([]byte("torn"))
	})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err := within(t, func() error { _, err := c.State(ctx, "machine"); return err })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error: %v", err)
	}
}

func TestNoDaemonIsSaidWithARemedy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	c := short(New("qemu:///system", path))
	var told []error
	c.Away = func(err error) { told = append(told, err) }
	ctx, cancel := context.WithTimeout(t.Context(), 2*noticed)
	defer cancel()
	err := within(t, func() error { _, err := c.State(ctx, "machine"); return err })
	if len(told) != 1 || !errors.Is(told[0], ErrUnreachable) {
		t.Errorf("told while waiting: %v", told)
	}
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "systemctl start") {
		t.Errorf("error: %v", err)
	}
}

func TestSocketIsTheFirstThatExists(t *testing.T) {
	saved := Sockets
	defer func() { Sockets = saved }()
	dir := t.TempDir()
	Sockets = []string{filepath.Join(dir, "libvirt-sock"), filepath.Join(dir, "virtqemud-sock")}
	c := New("qemu:///system", "")
	if got, err := c.path(); got != Sockets[0] || err != nil {
		t.Errorf("with none: %s, %v", got, err)
	}
	if err := os.WriteFile(Sockets[1], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := c.path(); got != Sockets[1] || err != nil {
		t.Errorf("with the modular daemon's alone: %s, %v", got, err)
	}
}

func TestASessionsSocketIsTheUsersOwn(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	want := []string{dir + "/libvirt/libvirt-sock", dir + "/libvirt/virtqemud-sock"}
	if got, err := sessionSockets(1000); !slices.Equal(got, want) || err != nil {
		t.Errorf("with XDG_RUNTIME_DIR: %q, %v", got, err)
	}
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("XDG_CACHE_HOME", dir)
	if got, err := sessionSockets(1000); !slices.Equal(got, want) || err != nil {
		t.Errorf("with XDG_CACHE_HOME alone: %q, %v", got, err)
	}
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("HOME", "")
	if got, err := sessionSockets(1000); err == nil || !strings.Contains(err.Error(), "XDG_RUNTIME_DIR is not set") {
		t.Errorf("with no folder at all: %q, %v", got, err)
	}
	if got, err := sessionSockets(0); !slices.Equal(got, Sockets) || err != nil {
		t.Errorf("root's: %q, %v", got, err)
	}

	// The one that path takes is of the user who runs it.
	t.Setenv("XDG_RUNTIME_DIR", dir)
	sockets, err := sessionSockets(os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := New("qemu:///session", "").path(); !slices.Contains(sockets, got) || err != nil {
		t.Errorf("a session's: %s, %v; want one of %q", got, err, sockets)
	}
	if got, err := New("qemu:///session", "/named").path(); got != "/named" || err != nil {
		t.Errorf("named: %s, %v", got, err)
	}
}
