package sshexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A relayAt is where a relay is.
type relayAt struct{ path, token string }

// startRelay serves a connection to the server until the test's end and returns
// how to reach it, and what Serve returned, later. No shell waits.
func startRelay(t *testing.T, s *server) (relayAt, <-chan error) {
	t.Helper()
	return serveRelay(t, s.dial(t).NewRelay(""))
}

func serveRelay(t *testing.T, relay *Relay) (relayAt, <-chan error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "relay")
	l, err := net.ListenUnix(RelayNetwork, &net.UnixAddr{Name: path, Net: RelayNetwork})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	ctx, end := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		served <- relay.Serve(ctx, l)
	}()
	t.Cleanup(func() {
		end()
		<-over
	})
	return relayAt{path, relay.Token()}, served
}

func dialRelay(t *testing.T, at relayAt) piped {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := DialRelay(ctx, at.path, at.token)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return piped{c}
}

// A piped RelayClient takes any script and any writers. That it hears the end of the output shows that the relay has
// closed what it was handed.
type piped struct{ *RelayClient }

func (p piped) Run(ctx context.Context, cmd Command) error {
	in, script, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	source := cmd.Script
	go func() {
		defer script.Close()
		if source != nil {
			io.Copy(script, source)
		}
	}()
	cmd.Script = in
	var copied sync.WaitGroup
	defer copied.Wait()
	for _, w := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		r, mine, err := os.Pipe()
		if err != nil {
			return err
		}
		defer mine.Close()
		to := *w
		if to == nil {
			to = io.Discard
		}
		copied.Go(func() {
			io.Copy(to, r)
			r.Close()
		})
		*w = mine
	}
	return p.RelayClient.Run(ctx, cmd)
}

// TestRelayIsLikeAConnection runs scripts one after another, each from a
// connection of its own, as sub-stages do.
func TestRelayIsLikeAConnection(t *testing.T) {
	s := startServer(t, nil)
	at, _ := startRelay(t, s)
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
		c := dialRelay(t, at)
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

func TestRelayStopsATree(t *testing.T) {
	s := startServer(t, nil)
	for _, script := range []string{tree, stubborn} {
		at, _ := startRelay(t, s)
		_, took, err := cancelWhenReady(t, dialRelay(t, at), script)
		if !errors.Is(err, context.Canceled) || took > 9*time.Second {
			t.Errorf("error %v after %v", err, took)
		}
		s.waitNoCommands(t) // as without a relay: who stopped them needs a moment to end
		if strings.Contains(fmt.Sprint(err), "still run") {
			continue // on a busy machine it can take too long, and ends the connection then
		}
		if _, _, err := run(t, dialRelay(t, at), "bash", "exit 0"); err != nil {
			t.Errorf("the next script: %v", err)
		}
	}
}

// TestRelayEndsWithItsConnection kills the server in the middle of a script.
func TestRelayEndsWithItsConnection(t *testing.T) {
	s := startServer(t, nil)
	at, served := startRelay(t, s)
	ready := newSignal("ready")
	go func() {
		<-ready.seen
		s.kill()
	}()
	err := dialRelay(t, at).Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("printf ready; sleep 60"), Stdout: ready})
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
	if _, err := DialRelay(t.Context(), at.path, at.token); !errors.Is(err, ErrUnreachable) {
		t.Errorf("a later connection: %v", err)
	}
}

// TestAlive asks for a sign of life directly and by way of a relay: it is the guest that is to give it.
func TestAlive(t *testing.T) {
	s := startServer(t, nil)
	at, _ := startRelay(t, s)
	for _, c := range []interface{ Alive(context.Context) error }{s.dial(t), dialRelay(t, at)} {
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
	at, _ = startRelay(t, s)
	clients := []interface{ Alive(context.Context) error }{s.dial(t), dialRelay(t, at)}
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
	at, _ := startRelay(t, startServer(t, []string{"MaxSessions 0"}))
	err := dialRelay(t, at).Run(t.Context(), Command{Shell: "sh"})
	if !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

// TestRelayTellsStrangersNothing tries all that a relay's client would not do.
func TestRelayTellsStrangersNothing(t *testing.T) {
	s := startServer(t, nil)
	at, _ := startRelay(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for _, token := range []string{"", "another", at.token + "x"} {
		if _, err := DialRelay(ctx, at.path, token); !errors.Is(err, ErrUnreachable) || ctx.Err() != nil {
			t.Errorf("with token %q: %v", token, err)
		}
	}
	for _, said := range []string{"", "{", "null", `{"do": "run"}`, `{"token": 1}`, strings.Repeat("x", 2*maxRequest)} {
		conn, err := net.Dial(RelayNetwork, at.path)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		conn.Write([]byte(said))
		if n, err := conn.Read(make([]byte, 100)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%.20q is answered by %d bytes: %v", said, n, err)
		}
		conn.Close()
	}
	for _, asked := range []request{{}, {Do: "run", Shell: "bash"}, {Do: "forward"}, {Do: strings.Repeat("\x00", 150)}} {
		c := dialRelay(t, at)
		err := send(c.conn, asked)
		var verdict Verdict
		if err == nil {
			verdict, err = c.await(nil)
		}
		if err != nil || verdict.Err() == nil {
			t.Errorf("%+v: %v, %v", asked, verdict, err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
	s.waitNoCommands(t)
}

// TestRelayClosesWhatItWasHanded counts the files of this process, which is both sides.
func TestRelayClosesWhatItWasHanded(t *testing.T) {
	at, _ := startRelay(t, startServer(t, nil))
	files := func() int {
		open, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(open)
	}
	c := dialRelay(t, at)
	before := files()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, asked := range []request{{Do: "ping"}, {Do: "nothing"}, {Do: "run", Shell: "sh"}, {Do: "run", Shell: "cobol"}} {
		if err := send(c.conn, asked, null, null, null); err != nil {
			t.Fatal(err)
		}
		if _, err := c.await(nil); err != nil {
			t.Fatal(err)
		}
	}
	if now := files(); now != before+1 {
		t.Errorf("%d files are open, and were %d and one", now, before)
	}
}

// TestRelayStopsWhatNobodyWaitsFor has a client vanish in the middle of a script, as one does that is killed.
func TestRelayStopsWhatNobodyWaitsFor(t *testing.T) {
	s := startServer(t, nil)
	at, _ := startRelay(t, s)
	c := dialRelay(t, at)
	ready := newSignal("ready")
	ran := make(chan error)
	go func() {
		ran <- c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("echo ready; yes"), Stdout: ready})
	}()
	<-ready.seen
	c.Close()
	if err := <-ran; !errors.Is(err, ErrLost) {
		t.Errorf("the script: %v", err)
	}
	s.waitNoCommands(t)
	if _, _, err := run(t, dialRelay(t, at), "bash", "exit 0"); err != nil {
		t.Errorf("the next script: %v", err)
	}
}

// TestRelayThatSaysNothing has a client wait for one that stands still.
func TestRelayThatSaysNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "relay")
	l, err := net.ListenUnix(RelayNetwork, &net.UnixAddr{Name: path, Net: RelayNetwork})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second/2, errors.New("too slow"))
	defer cancel()
	if _, err := DialRelay(ctx, path, "token"); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "too slow") {
		t.Errorf("%v", err)
	}
}
