package sshexec

import (
	"bytes"
	"fmt"
	"net"
	"slices"

	"golang.org/x/crypto/ssh"
)

// hostKeyAlgorithms are the signatures that a server may prove its host key
// with, most wanted first. SHA-1 and certificates are not among them: a
// certificate is not a key that can be pinned.
var hostKeyAlgorithms = []string{
	ssh.KeyAlgoED25519,
	ssh.KeyAlgoECDSA256,
	ssh.KeyAlgoECDSA384,
	ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoRSASHA512,
	ssh.KeyAlgoRSASHA256,
}

// A hostKeyPin accepts one host key: the one it was made with or, when it was
// made without, the first one it is shown.
type hostKeyPin struct {
	key ssh.PublicKey
}

// newHostKeyPin parses a key in the format of an authorized_keys file. An empty
// text gives a pin that takes the first key.
func newHostKeyPin(text string) (*hostKeyPin, error) {
	if text == "" {
		return &hostKeyPin{}, nil
	}
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("parse the expected host key %.80q: %w", text, err)
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("parse the expected host key %.80q: more than one key", text)
	}
	if !slices.Contains(hostKeyAlgorithms, signatures(key.Type())[0]) {
		return nil, fmt.Errorf("parse the expected host key %.80q: keys of type %s are not supported", text, key.Type())
	}
	return &hostKeyPin{key}, nil
}

// algorithms returns the host key algorithms to propose. A server that holds
// keys of several types uses the first proposal it has a key for, so the
// pinned key's type comes first. The other types follow only so that an
// impostor without such a key shows what it has instead of failing to agree,
// and can be named: check accepts nothing but the pinned key.
func (p *hostKeyPin) algorithms() []string {
	if p.key == nil {
		return hostKeyAlgorithms
	}
	first := signatures(p.key.Type())
	others := slices.DeleteFunc(slices.Clone(hostKeyAlgorithms), func(a string) bool {
		return slices.Contains(first, a)
	})
	return append(first, others...)
}

// signatures returns the signature algorithms for a type of key. Only RSA keys
// have algorithms that are not called as the key is (RFC 8332).
func signatures(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{keyType}
}

// check is an [ssh.HostKeyCallback]. It is called at every key exchange, so the
// first key is held to for the rest of the connection too.
func (p *hostKeyPin) check(addr string, _ net.Addr, key ssh.PublicKey) error {
	if p.key == nil {
		p.key = key
		return nil
	}
	if !bytes.Equal(key.Marshal(), p.key.Marshal()) {
		return fmt.Errorf("%w: %s showed %s, expected %s", ErrHostKey, addr, fingerprint(key), fingerprint(p.key))
	}
	return nil
}

// fingerprint names a public key as ssh-keygen -l does.
func fingerprint(key ssh.PublicKey) string {
	return key.Type() + " " + ssh.FingerprintSHA256(key)
}
