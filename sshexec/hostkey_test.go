package sshexec

import (
	"context"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func encryptedOpenSSH(t *testing.T) string {
	t.Helper()
	block, err := ssh.MarshalPrivateKeyWithPassphrase(newKey(t, "ed25519"), "", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(block))
}

// TestHostKeyFirstSeen goes the way of a new guest: the first connection takes
// the key, the second holds to it.
func TestHostKeyFirstSeen(t *testing.T) {
	s := startServer(t, nil, "rsa", "ecdsa", "ed25519")
	target := s.target()
	target.HostKey = ""
	for range 2 {
		c, err := Dial(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if !strings.HasPrefix(c.HostKey(), "ssh-ed25519 ") {
			t.Errorf("host key %q, want the ed25519 one", c.HostKey())
		}
		target.HostKey = c.HostKey()
	}
}

// TestHostKeyPinned pins each type of key on a server that has all of them and
// would choose another one by itself.
func TestHostKeyPinned(t *testing.T) {
	for _, types := range [][]string{{"ed25519", "rsa", "ecdsa"}, {"rsa", "ed25519", "ecdsa"}, {"ecdsa", "rsa", "ed25519"}} {
		t.Run(types[0], func(t *testing.T) {
			s := startServer(t, nil, types...)
			c := s.dial(t)
			if c.HostKey() != s.hostPub {
				t.Errorf("host key %q, want %q", c.HostKey(), s.hostPub)
			}
			if err := c.Ping(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestHostKeyOldRSA sees that an RSA key works with a server that knows only
// one of its two signatures.
func TestHostKeyOldRSA(t *testing.T) {
	s := startServer(t, []string{"HostKeyAlgorithms rsa-sha2-256"}, "rsa")
	s.dial(t)
}

// TestHostKeyImpostor lets another server answer in the place of the expected
// one.
func TestHostKeyImpostor(t *testing.T) {
	real := startServer(t, nil)
	for _, keyType := range []string{"ed25519", "ecdsa", "rsa"} {
		t.Run(keyType, func(t *testing.T) {
			impostor := startServer(t, nil, keyType)
			target := impostor.target()
			target.HostKey = real.hostPub
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := Dial(ctx, target)
			if !errors.Is(err, ErrHostKey) || errors.Is(err, ErrUnreachable) {
				t.Fatalf("error %v, want ErrHostKey", err)
			}
			for _, pub := range []string{real.hostPub, impostor.hostPub} {
				key, _, _, _, _ := ssh.ParseAuthorizedKey([]byte(pub))
				if want := ssh.FingerprintSHA256(key); !strings.Contains(err.Error(), want) {
					t.Errorf("%s is not in: %v", want, err)
				}
			}
			if strings.Contains(impostor.log.String(), "Accepted publickey") {
				t.Error("logged in all the same")
			}
		})
	}
}

// TestHostKeyRekey sees that a key that was taken at first sight is held to
// within its connection too.
func TestHostKeyRekey(t *testing.T) {
	s := startServer(t, []string{"RekeyLimit 200K"})
	target := s.target()
	target.HostKey = ""
	c, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var n counter
	if err := c.Run(t.Context(), Command{Shell: "sh", Script: strings.NewReader("head -c 2000000 /dev/zero"), Stdout: &n}); err != nil || n != 2000000 {
		t.Errorf("%d bytes, error %v", n, err)
	}
	pin, _ := newHostKeyPin("")
	first, _, _, _, _ := ssh.ParseAuthorizedKey([]byte(s.hostPub))
	_, other := writeKey(t, t.TempDir(), "other", newKey(t, "ed25519"))
	if err := pin.check("guest", nil, first); err != nil {
		t.Error(err)
	}
	if err := pin.check("guest", nil, other.PublicKey()); !errors.Is(err, ErrHostKey) {
		t.Errorf("second key: error %v, want ErrHostKey", err)
	}
}

func TestCheckHostKey(t *testing.T) {
	pair, err := NewKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	key, print, err := CheckHostKey(pair.Public() + " root@guest\n")
	if err != nil || key != pair.Public() || print != pair.String() {
		t.Errorf("%q, %q, %v", key, print, err)
	}
	for _, text := range []string{"", "\n", "ssh-ed25519", pair.Public()[:40], pair.Public() + "\n" + pair.Public(), pair.Private()} {
		if _, _, err := CheckHostKey(text); err == nil {
			t.Errorf("%.80q is taken for a host key", text)
		}
	}
}
