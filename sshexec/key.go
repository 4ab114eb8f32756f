package sshexec

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/crypto/ssh"
)

// maxKeySize is far above the size of any private key, in bytes; what is larger
// is some other file.
const maxKeySize = 1 << 20

// ErrPassphrase says that a private key is protected by a passphrase.
var ErrPassphrase = errors.New("the key is protected by a passphrase")

// LoadKey reads the private key in the file path: RSA, ECDSA or Ed25519, in
// OpenSSH's, PKCS#1, PKCS#8 or SEC 1 PEM form, without a passphrase. The errors
// name the file, never its content. The file's permissions are not judged.
func LoadKey(path string) (ssh.Signer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read SSH key: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKeySize+1))
	if err != nil {
		return nil, fmt.Errorf("read SSH key: %w", err)
	}
	if len(text) > maxKeySize {
		return nil, fmt.Errorf("read SSH key %s: not a private key: larger than %d bytes", path, maxKeySize)
	}
	key, err := ssh.ParsePrivateKey(text)
	if err == nil {
		return key, nil
	}
	if encrypted(text, err) {
		return nil, fmt.Errorf("read SSH key %s: %w, which nobody is there to enter: remove it with ssh-keygen -p -f %s, or use another key", path, ErrPassphrase, path)
	}
	if _, _, _, _, e := ssh.ParseAuthorizedKey(text); e == nil {
		return nil, fmt.Errorf("read SSH key %s: this is a public key: name the private key's file", path)
	}
	if bytes.HasPrefix(text, []byte("PuTTY-User-Key-File")) {
		return nil, fmt.Errorf("read SSH key %s: this is a PuTTY key: convert it with puttygen -O private-openssh", path)
	}
	return nil, fmt.Errorf("read SSH key %s: not a private key: %w", path, err)
}

// A Keyring holds the keys that it has loaded, by their files' paths: to read an
// RSA key takes milliseconds, and a guest that boots is knocked at many times.
type Keyring map[string]ssh.Signer

// Load is [LoadKey] for a key that has not been loaded.
func (r Keyring) Load(path string) (ssh.Signer, error) {
	if key, ok := r[path]; ok {
		return key, nil
	}
	key, err := LoadKey(path)
	if err == nil {
		r[path] = key
	}
	return key, err
}

// A KeyPair is a key that was made here, for one job.
type KeyPair struct {
	signer ssh.Signer
	// text is the private key in OpenSSH's PEM form.
	text string
}

// NewKeyPair makes an ECDSA key on the curve P-256, for logging in. OpenSSH
// verifies its signatures with OpenSSL's machine code: on an emulated guest that
// takes 0.1 s less than those of an Ed25519 key.
func NewKeyPair() (*KeyPair, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), nil)
	if err != nil {
		return nil, fmt.Errorf("make an SSH key: %w", err)
	}
	return newKeyPair(private)
}

// NewHostKeyPair makes an Ed25519 key, for a guest's SSH server: the one kind for
// which every server looks, and which it prefers.
func NewHostKeyPair() (*KeyPair, error) {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, fmt.Errorf("make an SSH host key: %w", err)
	}
	return newKeyPair(private)
}

func newKeyPair(private crypto.PrivateKey) (*KeyPair, error) {
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return nil, fmt.Errorf("make an SSH key: %w", err)
	}
	return ParseKeyPair(string(pem.EncodeToMemory(block)))
}

// ParseKeyPair reads what [KeyPair.Private] returned. Its error says nothing of
// the text.
func ParseKeyPair(text string) (*KeyPair, error) {
	signer, err := ssh.ParsePrivateKey([]byte(text))
	if err != nil {
		return nil, errors.New("not a private SSH key")
	}
	return &KeyPair{signer, text}, nil
}

// Private returns the private key in OpenSSH's PEM form, without a passphrase.
func (k *KeyPair) Private() string { return k.text }

// Public returns the public key in the format of an authorized_keys or .pub
// file, without a comment.
func (k *KeyPair) Public() string { return authorizedKey(k.signer.PublicKey()) }

// Signer returns the key for [Target.Key].
func (k *KeyPair) Signer() ssh.Signer { return k.signer }

// String returns the fingerprint that ssh-keygen -l shows. It keeps the private
// half out of whatever prints the pair.
func (k *KeyPair) String() string { return ssh.FingerprintSHA256(k.signer.PublicKey()) }

// CheckHostKey reports whether text is one host key that [Target.HostKey] takes,
// in the format of a .pub file, and returns it without its comment, and the
// fingerprint that ssh-keygen -l shows.
func CheckHostKey(text string) (key, print string, err error) {
	if strings.TrimSpace(text) == "" {
		return "", "", errors.New("no host key")
	}
	pin, err := newHostKeyPin(text)
	if err != nil {
		return "", "", err
	}
	return authorizedKey(pin.key), ssh.FingerprintSHA256(pin.key), nil
}

func authorizedKey(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// encrypted reports whether text, whose parsing failed with err, is a private
// key under a passphrase.
func encrypted(text []byte, err error) bool {
	var missing *ssh.PassphraseMissingError
	if errors.As(err, &missing) {
		return true
	}
	block, _ := pem.Decode(text)
	return block != nil && block.Type == "ENCRYPTED PRIVATE KEY" // PKCS#8
}
