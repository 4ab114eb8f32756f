package sshexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestDial(t *testing.T) {
	s := startServer(t, nil)
	key, err := LoadKey(s.keyPath)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Dial(t.Context(), Target{Address: s.addr, User: s.user, Key: key, HostKey: s.hostPub})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if got := c.HostKey(); got != s.hostPub {
		t.Errorf("host key %q, want %q", got, s.hostPub)
	}
	kex := c.ssh.(interface {
		Algorithms() ssh.NegotiatedAlgorithms
	}).Algorithms().KeyExchange
	if kex != ssh.KeyExchangeECDHP256 {
		t.Errorf("key exchange %s, want the cheapest", kex)
	}
}

// TestClosedClient sees that what happens after Close fails and says so.
func TestClosedClient(t *testing.T) {
	c := startServer(t, nil).dial(t)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{"Ping": c.Ping(t.Context()), "Run": c.Run(t.Context(), Command{Shell: "sh"})} {
		if !errors.Is(err, ErrLost) || !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// TestPingLoginShell sees that an account that lets the key in but cannot run
// anything is told from one that can.
func TestPingLoginShell(t *testing.T) {
	s := startServer(t, []string{"ForceCommand echo This account is not available.; exit 3"})
	err := s.dial(t).Ping(t.Context())
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 3 || !strings.Contains(err.Error(), "account is not available") {
		t.Errorf("error %v, want status 3 and what the guest said", err)
	}
}

func TestDialKeyRejected(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config string
		offers string
	}{
		{"unknown key", "", "publickey"},
		{"no attempts left", "MaxAuthTries 1", "publickey"},
		{"keys not allowed", "PubkeyAuthentication no\nPasswordAuthentication yes", "password"},
		{"user not allowed", "AllowUsers somebody-else", "publickey"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, []string{tt.config})
			target := s.target()
			_, target.Key = writeKey(t, t.TempDir(), "other", newKey(t, "rsa"))
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := Dial(ctx, target)
			if !errors.Is(err, ErrKeyRejected) || errors.Is(err, ErrUnreachable) {
				t.Fatalf("error %v, want ErrKeyRejected", err)
			}
			for _, want := range []string{s.addr, s.user, ssh.FingerprintSHA256(target.Key.PublicKey()), tt.offers} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in: %v", want, err)
				}
			}
		})
	}
}

// TestDialLoginTurnedAway sees that a server which takes the key and then hangs
// up, as PAM makes it do while a guest boots, is one to try again, and that what
// it had to say is told.
func TestDialLoginTurnedAway(t *testing.T) {
	key := newKey(t, "ed25519")
	_, signer := writeKey(t, t.TempDir(), "host", key)
	addr := fakeServer(t, func(conn net.Conn) {
		config := &ssh.ServerConfig{
			BannerCallback: func(ssh.ConnMetadata) string { return "System is booting up.\n" },
			PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) {
				conn.Close()
				return nil, nil
			},
		}
		config.AddHostKey(signer)
		ssh.NewServerConn(conn, config)
	})
	_, err := Dial(t.Context(), Target{Address: addr, User: "ci", Key: signer})
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "System is booting up.") {
		t.Errorf("error %v, want ErrUnreachable and the banner", err)
	}
}

func TestDialRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	_, key := writeKey(t, t.TempDir(), "id", newKey(t, "ed25519"))
	_, err = Dial(t.Context(), Target{Address: l.Addr().String(), User: "ci", Key: key})
	if !errors.Is(err, ErrUnreachable) || !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("error %v, want ErrUnreachable, ECONNREFUSED and the address", err)
	}
}

// TestDialMistakes sees that what no later attempt can mend is not reported as
// worth one.
func TestDialMistakes(t *testing.T) {
	s := startServer(t, []string{"KexAlgorithms diffie-hellman-group18-sha512"})
	for name, change := range map[string]func(*Target){
		"no key":            func(t *Target) { t.Key = nil },
		"no port":           func(t *Target) { t.Address = "127.0.0.1" },
		"broken host key":   func(t *Target) { t.HostKey = "ssh-ed25519 AAAA" },
		"two host keys":     func(t *Target) { t.HostKey += "\n" + t.HostKey },
		"DSA host key":      func(t *Target) { t.HostKey = dsaKey },
		"nothing in common": func(*Target) {},
	} {
		target := s.target()
		change(&target)
		c, err := Dial(t.Context(), target)
		if err == nil {
			c.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		for _, is := range []error{ErrUnreachable, ErrKeyRejected, ErrHostKey} {
			if errors.Is(err, is) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// dsaKey is a well-formed key of a type that nobody should use any more.
var dsaKey = "ssh-dss " + "AAAAB3NzaC1kc3MAAAADAQABAAAAAwEAAQAAAAMBAAEAAAADAQAB"

// fakeServer serves each connection with serve, for what a real server cannot
// be brought to do. Connections are closed at the end of the test.
func fakeServer(t *testing.T, serve func(net.Conn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		close(done)
	})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				<-done
				conn.Close()
			}()
			go serve(conn)
		}
	}()
	return l.Addr().String()
}

// TestDialEndsWithContext sees that nothing the other side does, or does not do,
// holds Dial longer than its context.
func TestDialEndsWithContext(t *testing.T) {
	_, hostKey := writeKey(t, t.TempDir(), "host", newKey(t, "ed25519"))
	never := make(chan struct{})
	t.Cleanup(func() { close(never) })
	trickle := func(conn net.Conn, text string) {
		for i := 0; ; i = (i + 1) % len(text) {
			if _, err := conn.Write([]byte{text[i]}); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	// An sshd that stops in the middle: the real one, through a relay that passes
	// on the first bytes of what it says.
	real := startServer(t, nil)
	stopAfter := func(n int64) func(net.Conn) {
		return func(conn net.Conn) {
			up, err := net.Dial("tcp", real.addr)
			if err != nil {
				return
			}
			defer up.Close()
			go io.Copy(up, conn)
			io.CopyN(conn, up, n)
			<-never
		}
	}
	for name, serve := range map[string]func(net.Conn){
		"says nothing":                         func(conn net.Conn) { <-never },
		"reads nothing":                        func(conn net.Conn) { conn.(*net.TCPConn).SetReadBuffer(1); <-never },
		"trickles a banner":                    func(conn net.Conn) { trickle(conn, "not yet\r\n") },
		"trickles a packet":                    func(conn net.Conn) { io.WriteString(conn, "SSH-2.0-slow\r\n"); trickle(conn, "\x00\x00\x7f\x00\x04") },
		"stops after the version":              stopAfter(30),
		"stops in key exchange":                stopAfter(500),
		"stops before the end of key exchange": stopAfter(1300),
		"never answers the key": func(conn net.Conn) {
			config := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) {
				<-never
				return nil, errors.New("too late")
			}}
			config.AddHostKey(hostKey)
			ssh.NewServerConn(conn, config)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := fakeServer(t, serve)
			ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
			defer cancel()
			begin := time.Now()
			_, err := Dial(ctx, Target{Address: addr, User: real.user, Key: real.key})
			if took := time.Since(begin); took > 2*time.Second || took < 400*time.Millisecond {
				t.Errorf("took %v, want 500ms", took)
			}
			if !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want ErrUnreachable and the deadline", err)
			}
		})
	}
}

// TestDialCancelled sees that the cause of a cancelled context is kept.
func TestDialCancelled(t *testing.T) {
	addr := fakeServer(t, func(net.Conn) {})
	_, key := writeKey(t, t.TempDir(), "id", newKey(t, "ed25519"))
	cause := errors.New("the guest powered off")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(100*time.Millisecond, func() { cancel(cause) })
	_, err := Dial(ctx, Target{Address: addr, User: "ci", Key: key})
	if !errors.Is(err, cause) || !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the cause and context.Canceled", err)
	}
}

// TestServerGetsNothing sees that the server can open no channel and gets no
// request fulfilled.
func TestServerGetsNothing(t *testing.T) {
	_, hostKey := writeKey(t, t.TempDir(), "host", newKey(t, "ed25519"))
	result := make(chan error, 1)
	addr := fakeServer(t, func(conn net.Conn) {
		config := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) {
			return nil, nil
		}}
		config.AddHostKey(hostKey)
		sc, chans, reqs, err := ssh.NewServerConn(conn, config)
		if err != nil {
			result <- err
			return
		}
		go ssh.DiscardRequests(reqs)
		go func() {
			for range chans {
			}
		}()
		for _, channel := range []string{"auth-agent@openssh.com", "forwarded-tcpip", "x11", "session"} {
			var refusal *ssh.OpenChannelError
			if _, _, err := sc.OpenChannel(channel, nil); !errors.As(err, &refusal) {
				result <- fmt.Errorf("channel %s: %v", channel, err)
				return
			}
		}
		ok, _, err := sc.SendRequest("tcpip-forward", true, nil)
		if ok || err != nil {
			result <- fmt.Errorf("request: %v, %v", ok, err)
			return
		}
		result <- nil
	})
	c, err := Dial(t.Context(), Target{Address: addr, User: "ci", Key: hostKey})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// TestKeepAlive stops a real server in the middle of a script: everything is
// still connected and nobody answers.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	c, err := dial(t.Context(), s.target(), 100*time.Millisecond, 600*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// A silent script is no dead guest.
	if err := c.Run(t.Context(), Command{Shell: "sh", Script: strings.NewReader("sleep 2")}); err != nil {
		t.Fatal(err)
	}
	ready := newSignal("ready")
	go func() {
		<-ready.seen
		for _, pid := range s.connections() {
			syscall.Kill(pid, syscall.SIGSTOP)
		}
	}()
	begin := time.Now()
	err = c.Run(t.Context(), Command{Shell: "sh", Script: strings.NewReader("echo ready; sleep 60"), Stdout: ready})
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("took %v", took)
	}
	if !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "nothing came from the guest for") {
		t.Errorf("error %v, want ErrLost and the silence", err)
	}
}

func TestLoadKey(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := dir + "/" + name
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, keyType := range []string{"ed25519", "ecdsa", "rsa"} {
		path, want := writeKey(t, dir, keyType, newKey(t, keyType))
		key, err := LoadKey(path)
		if err != nil {
			t.Errorf("%s: %v", keyType, err)
		} else if authorized(key.PublicKey()) != authorized(want.PublicKey()) {
			t.Errorf("%s: another key", keyType)
		}
	}
	_, signer := writeKey(t, dir, "id", newKey(t, "ed25519"))
	for _, tt := range []struct{ name, path, want string }{
		{"missing", dir + "/none", "no such file"},
		{"folder", dir, "is a directory"},
		{"passphrase", write("passphrase", encryptedOpenSSH(t)), "passphrase"},
		{"PKCS#8 passphrase", write("pkcs8", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"), "passphrase"},
		{"public", write("id.pub", authorized(signer.PublicKey())+" ci@host\n"), "public key"},
		{"PuTTY", write("id.ppk", "PuTTY-User-Key-File-3: ssh-ed25519\n"), "puttygen"},
		{"text", write("text", "hello\n"), "not a private key"},
		{"empty", write("empty", ""), "not a private key"},
		{"large", write("large", strings.Repeat("x", maxKeySize+1)), "larger"},
	} {
		_, err := LoadKey(tt.path)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) {
			t.Errorf("%s: error %v, want the path and %q", tt.name, err, tt.want)
		}
	}
}

func TestKeyPair(t *testing.T) {
	for kind, generate := range map[string]func() (*KeyPair, error){"ecdsa-sha2-nistp256": NewKeyPair, "ssh-ed25519": NewHostKeyPair} {
		a, err := generate()
		if err != nil {
			t.Fatal(err)
		}
		b, err := generate()
		if err != nil {
			t.Fatal(err)
		}
		if a.Private() == b.Private() || a.Public() == b.Public() {
			t.Errorf("%s: two keys are one", kind)
		}
		again, err := ParseKeyPair(a.Private())
		if err != nil || again.Public() != a.Public() || again.Private() != a.Private() {
			t.Errorf("%s: read back: %v, %v", kind, again, err)
		}
		if got := authorized(a.Signer().PublicKey()); got != a.Public() || !strings.HasPrefix(got, kind+" ") {
			t.Errorf("%s: public key %q, signer's %q", kind, a.Public(), got)
		}
		lines := strings.Split(strings.TrimSpace(a.Private()), "\n")
		secret := lines[len(lines)-3] // the private half is in the last line but one
		for _, verb := range []string{"%v", "%+v", "%s"} {
			if text := fmt.Sprintf(verb, a); strings.Contains(text, secret) || !strings.Contains(text, "SHA256:") {
				t.Errorf("%s prints %s", verb, text)
			}
		}
	}
	const torn = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n"
	if _, err := ParseKeyPair(torn); err == nil || strings.Contains(err.Error(), "c2VjcmV0") {
		t.Errorf("a torn key: %v", err)
	}
}

// TestNothingIsForwarded lets a real server allow all that it can forward, and
// looks at what it was asked for.
func TestNothingIsForwarded(t *testing.T) {
	t.Setenv("SSH_AUTH_SOCK", "/run/agent")
	t.Setenv("DISPLAY", ":0")
	s := startServer(t, []string{"LogLevel DEBUG3", "AllowAgentForwarding yes", "AllowTcpForwarding yes", "X11Forwarding yes", "PermitTunnel yes"})
	c := s.dial(t)
	var out strings.Builder
	err := c.Run(t.Context(), Command{Shell: "sh", Script: strings.NewReader(`echo "$SSH_AUTH_SOCK$DISPLAY$SSH_TTY."`), Stdout: &out})
	if err != nil || out.String() != ".\n" {
		t.Errorf("the script sees %q, %v", out.String(), err)
	}
	log := s.log.String()
	if !strings.Contains(log, "request exec") {
		t.Errorf("the log does not show requests:\n%s", log)
	}
	for _, request := range []string{"auth-agent-req", "x11-req", "pty-req", "tcpip-forward", "direct-tcpip", "streamlocal", "tun@openssh.com"} {
		if strings.Contains(log, request) {
			t.Errorf("asked for %s", request)
		}
	}
}
