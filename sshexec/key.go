package sshexec

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/crypto/ssh"
)

// maxKeySize is far above the size of any private key, in bytes; what is larger
// is some other file.
const maxKeySize = 1 << 20

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
		return nil, fmt.Errorf("read SSH key %s: the key is protected by a passphrase, which nobody is there to enter: remove it with ssh-keygen -p -f %s, or use another key", path, path)
	}
	if _, _, _, _, e := ssh.ParseAuthorizedKey(text); e == nil {
		return nil, fmt.Errorf("read SSH key %s: this is a public key: name the private key's file", path)
	}
	if bytes.HasPrefix(text, []byte("PuTTY-User-Key-File")) {
		return nil, fmt.Errorf("read SSH key %s: this is a PuTTY key: convert it with puttygen -O private-openssh", path)
	}
	return nil, fmt.Errorf("read SSH key %s: not a private key: %w", path, err)
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
