package sshexec

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

const sshdPath = "/usr/sbin/sshd"

// TestMain looks for what the tests stand on: nothing here is worth anything
// without a real server. It is also the entry of the child process whose memory
// a test measures.
func TestMain(m *testing.M) {
	if os.Getenv(measuredEnv) != "" {
		runMeasured()
		return
	}
	if _, err := os.Stat(sshdPath); err != nil {
		fmt.Fprintf(os.Stderr, "these tests start OpenSSH's server on a loopback port: %v: apt-get install openssh-server\n", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// A server is a real OpenSSH server on a loopback port of its own, with keys,
// configuration and authorized_keys of its own. It serves the user who runs the
// tests, without the files of that user's home.
type server struct {
	addr    string
	user    string
	key     ssh.Signer // the key that is let in
	keyPath string
	hostPub string // the host key in authorized_keys format
	tag     string // in the environment of all commands that the server starts
	log     *lockedBuffer
	cmd     *exec.Cmd
	killing sync.Once
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newKey(t *testing.T, keyType string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	switch keyType {
	case "ed25519":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	case "ecdsa":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "rsa":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		t.Fatalf("no key type %q", keyType)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// writeKey writes a private key as ssh-keygen would and returns its path and
// its signer.
func writeKey(t *testing.T, dir, name string, key crypto.Signer) (string, ssh.Signer) {
	t.Helper()
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	return path, signer
}

func authorized(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// startServer starts a server whose host keys are of the given types, ed25519
// unless said otherwise; hostPub is the first one. Lines go to its
// configuration.
func startServer(t *testing.T, lines []string, keyTypes ...string) *server {
	t.Helper()
	if len(keyTypes) == 0 {
		keyTypes = []string{"ed25519"}
	}
	if os.Getuid() == 0 {
		// The server insists on its folder for the processes without privileges.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &server{user: u.Username, tag: "SSHEXEC_TEST=" + newMarker(), log: new(lockedBuffer)}
	s.keyPath, s.key = writeKey(t, dir, "id", newKey(t, "ed25519"))
	var config strings.Builder
	for i, keyType := range keyTypes {
		path, signer := writeKey(t, dir, "host_"+keyType, newKey(t, keyType))
		fmt.Fprintln(&config, "HostKey", path)
		if i == 0 {
			s.hostPub = authorized(signer.PublicKey())
		}
	}
	keys := filepath.Join(dir, "authorized_keys")
	if err := os.WriteFile(keys, []byte(authorized(s.key.PublicKey())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A port that was just free, as the server cannot choose one itself.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(s.addr)
	fmt.Fprintf(&config, "ListenAddress 127.0.0.1\nPort %s\nPidFile none\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nSetEnv %s HOME=%s\n", port, keys, s.tag, dir)
	for _, line := range lines {
		fmt.Fprintln(&config, line)
	}
	path := filepath.Join(dir, "sshd_config")
	if err := os.WriteFile(path, []byte(config.String()), 0o600); err != nil {
		t.Fatal(err)
	}

	s.cmd = exec.Command(sshdPath, "-D", "-e", "-f", path)
	s.cmd.Stderr = s.log
	s.cmd.WaitDelay = 5 * time.Second
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("the server's log:\n%s", s.log)
		}
	})
	for end := time.Now().Add(20 * time.Second); !strings.Contains(s.log.String(), "Server listening"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the server does not listen on %s:\n%s", s.addr, s.log)
		}
	}
	return s
}

// kill kills the server, its connections and their commands, as a guest that
// dies does.
func (s *server) kill() {
	s.killing.Do(func() {
		connections := s.connections() // while they have a parent to be known by
		s.cmd.Process.Kill()
		for _, pid := range connections {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		s.cmd.Wait()
		for _, p := range s.commands() {
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
	})
}

// commands returns the live processes that the server's sessions brought about
// and that kept their environment.
func (s *server) commands() []process {
	var found []process
	for _, p := range processes() {
		if p.state != "Z" && strings.Contains(p.env, s.tag) {
			found = append(found, p)
		}
	}
	return found
}

// waitNoCommands fails the test if commands of the server stay.
func (s *server) waitNoCommands(t *testing.T) {
	t.Helper()
	var left []process
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if left = s.commands(); len(left) == 0 {
			return
		}
	}
	for _, p := range left {
		t.Errorf("process %d (%s) is left", p.pid, p.name)
	}
}

// connections returns the pids of the server's processes below the listener.
func (s *server) connections() []int {
	var found []int
	parents := map[int]bool{s.cmd.Process.Pid: true}
	for grown := true; grown; {
		grown = false
		for _, p := range processes() {
			if parents[p.ppid] && !parents[p.pid] && strings.HasPrefix(p.name, "sshd") {
				parents[p.pid], grown = true, true
				found = append(found, p.pid)
			}
		}
	}
	return found
}

func (s *server) target() Target {
	return Target{Address: s.addr, User: s.user, Key: s.key, HostKey: s.hostPub}
}

// dial connects to the server, for tests that are about something else.
func (s *server) dial(t *testing.T) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := Dial(ctx, s.target())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

type process struct {
	pid, ppid int
	name      string
	state     string
	env       string
}

// processes returns what /proc shows of all processes.
func processes() []process {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var ps []process
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		fields := strings.Fields(string(stat[end+1:]))
		pid, _ := strconv.Atoi(filepath.Base(dir))
		ppid, _ := strconv.Atoi(fields[1])
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))
		ps = append(ps, process{pid, ppid, string(stat[open+1 : end]), fields[0], string(env)})
	}
	return ps
}
