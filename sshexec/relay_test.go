package sshexec

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// startRelay serves a connection to the server until the test's end and returns
// how to reach it, and what Serve returned, later. No shell waits.
func startRelay(t *testing.T, s *server) (Target, <-chan error) {
	t.Helper()
	return serveRelay(t, newRelay(t, s.dial(t), ""))
}

func newRelay(t *testing.T, c *Client, shell string) *Relay {
	t.Helper()
	relay, err := c.NewRelay(shell)
	if err != nil {
		t.Fatal(err)
	}
	return relay
}

func serveRelay(t *testing.T, relay *Relay) (Target, <-chan error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "relay")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- relay.Serve(t.Context(), l) }()
	return Target{Address: path, HostKey: relay.HostKey()}, served
}

func dialTarget(t *testing.T, target Target) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := Dial(ctx, target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestRelayIsLikeAConnection runs scripts one after another, each from a
// connection of its own, as sub-stages do.
func TestRelayIsLikeAConnection(t *testing.T) {
	s := startServer(t, nil)
	target, _ := startRelay(t, s)
	for _, each := range []struct {
		script, stdout, stderr string
		code                   int
	}{
		{script: "echo out; echo err >&2", stdout: "out\n", stderr: "err\n"},
		{script: "exit 7", code: 7},
		{script: "kill -KILL $$", code: 137},
		{script: "cat", stdout: ""},
		{script: "printf '\\0\\377\\r\\n'", stdout: "\x00\xff\r\n"},
		{script: "head -c 20000000 /dev/zero; exit 3", stdout: strings.Repeat("\x00", 20000000), code: 3},
		{script: "head -c 3000000 /dev/zero >&2", stderr: strings.Repeat("\x00", 3000000)},
		{script: "# " + strings.Repeat("x", 3<<20) + "\necho long", stdout: "long\n"},
	} {
		c := dialTarget(t, target)
		if err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		stdout, stderr, err := run(t, c, "bash", each.script)
		var exit *ExitError
		code := 0
		if errors.As(err, &exit) {
			code = exit.Code
		} else if err != nil {
			t.Errorf("%.40q: %v", each.script, err)
		}
		if code != each.code || stdout != each.stdout || stderr != each.stderr {
			t.Errorf("%.40q: exit %d, %d bytes of stdout, %d of stderr", each.script, code, len(stdout), len(stderr))
		}
		c.Close()
	}
	if n := len(s.connections()); n > 2 { // sshd has two processes for one
		t.Errorf("the server has %d processes for connections", n)
	}
	s.waitNoCommands(t)
}

// A command that is over at once: all that its server has to say comes in one go, and whoever asked for it must get the
// answer that it has begun before its end. sshd is rarely as fast.
func TestRelayAnswersBeforeTheEnd(t *testing.T) {
	target, _ := serveRelay(t, newRelay(t, hasty(t), ""))
	for range 300 {
		c := dialTarget(t, target)
		if err := c.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// hasty starts an SSH server whose commands are over before they are answered, and returns a connection to it.
func hasty(t *testing.T) *Client {
	t.Helper()
	key, err := NewKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		config := &ssh.ServerConfig{NoClientAuth: true}
		config.AddHostKey(key.Signer())
		_, channels, requests, err := ssh.NewServerConn(raw, config)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(requests)
		for asked := range channels {
			ch, requests, err := asked.Accept()
			if err != nil {
				return
			}
			go func() {
				for request := range requests {
					request.Reply(true, nil)
					ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
					ch.Close()
				}
			}()
		}
	}()
	return dialTarget(t, Target{Address: l.Addr().String(), User: "anyone", Key: key.Signer()})
}

func TestRelayStopsATree(t *testing.T) {
	s := startServer(t, nil)
	target, _ := startRelay(t, s)
	for _, script := range []string{tree, stubborn} {
		_, took, err := cancelWhenReady(t, dialTarget(t, target), script)
		if !errors.Is(err, context.Canceled) || took > 9*time.Second {
			t.Errorf("error %v after %v", err, took)
		}
		s.waitNoCommands(t) // as without a relay: who stopped them needs a moment to end
	}
	if _, _, err := run(t, dialTarget(t, target), "bash", "exit 0"); err != nil {
		t.Errorf("the next script: %v", err)
	}
}

// TestRelayEndsWithItsConnection kills the server in the middle of a script.
func TestRelayEndsWithItsConnection(t *testing.T) {
	s := startServer(t, nil)
	target, served := startRelay(t, s)
	ready := newSignal("ready")
	go func() {
		<-ready.seen
		s.kill()
	}()
	err := dialTarget(t, target).Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("printf ready; sleep 60"), Stdout: ready})
	if !errors.Is(err, ErrLost) {
		t.Errorf("the script: %v", err)
	}
	select {
	case err := <-served:
		if !errors.Is(err, ErrLost) {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Serve goes on")
	}
	if _, err := Dial(t.Context(), target); !errors.Is(err, ErrUnreachable) {
		t.Errorf("a later connection: %v", err)
	}
}

// TestAlive asks for a sign of life directly and by way of a relay: it is the guest that is to give it.
func TestAlive(t *testing.T) {
	s := startServer(t, nil)
	target, _ := startRelay(t, s)
	for _, c := range []*Client{s.dial(t), dialTarget(t, target)} {
		if err := c.Alive(t.Context()); err != nil {
			t.Error(err)
		}
		for _, pid := range s.connections() {
			syscall.Kill(pid, syscall.SIGSTOP)
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second/2, errors.New("too slow"))
		defer cancel()
		if err := c.Alive(ctx); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "too slow") {
			t.Errorf("a guest that stands still: %v", err)
		}
		for _, pid := range s.connections() {
			syscall.Kill(pid, syscall.SIGCONT)
		}
	}
	clients := []*Client{s.dial(t), dialTarget(t, target)}
	for _, pid := range s.connections() {
		syscall.Kill(pid, syscall.SIGSTOP)
	}
	asked := make(chan error)
	for _, c := range clients {
		go func() { asked <- c.Alive(t.Context()) }()
	}
	time.Sleep(100 * time.Millisecond)
	s.kill()
	for range clients {
		if err := <-asked; !errors.Is(err, ErrLost) {
			t.Errorf("a guest that dies when it is asked: %v", err)
		}
	}
}

func TestRelaySaysThatThereAreNoMoreSessions(t *testing.T) {
	target, _ := startRelay(t, startServer(t, []string{"MaxSessions 0"}))
	err := dialTarget(t, target).Run(t.Context(), Command{Shell: "sh"})
	if !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

func TestRelayOffersNothingButSessions(t *testing.T) {
	target, _ := startRelay(t, startServer(t, nil))
	c := dialTarget(t, target)
	_, _, err := c.ssh.OpenChannel("direct-tcpip", ssh.Marshal(struct {
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}{"127.0.0.1", 22, "127.0.0.1", 1}))
	if err == nil {
		t.Error("a port was forwarded")
	}
	ch, requests, err := c.ssh.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(requests)
	for _, kind := range []string{"auth-agent-req@openssh.com", "x11-req", "pty-req", "subsystem", "shell", "env"} {
		if ok, err := ch.SendRequest(kind, true, nil); ok || err != nil {
			t.Errorf("%s: %t, %v", kind, ok, err)
		}
	}
}

func TestRelayWithAnotherKeyIsRefused(t *testing.T) {
	s := startServer(t, nil)
	target, _ := startRelay(t, s)
	target.HostKey = s.hostPub
	if _, err := Dial(t.Context(), target); !errors.Is(err, ErrHostKey) {
		t.Error(err)
	}
}
