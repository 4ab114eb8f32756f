package sshexec

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// keyExchanges are the key exchanges proposed, most wanted first. On an emulated
// guest the handshake is what a connection costs, and this one crosses only a
// virtual bridge of the host. So P-256 comes first, which takes OpenSSH 30 ms less
// there than Curve25519, and the post-quantum hybrid, which the ssh package would
// put first, last.
var keyExchanges = []string{
	ssh.KeyExchangeECDHP256,
	ssh.KeyExchangeCurve25519,
	ssh.KeyExchangeECDHP384,
	ssh.KeyExchangeECDHP521,
	ssh.KeyExchangeDH14SHA256,
	ssh.KeyExchangeMLKEM768X25519,
}

// Dial connects to t, verifies its host key and logs in with its key. Whatever
// the other side does, Dial returns by the end of ctx, and it has no time limit
// of its own: give each attempt a context of its own, as a guest's first
// seconds on the network can leave a connection without any answer.
//
// The error wraps [ErrUnreachable] when a later attempt may succeed,
// [ErrKeyRejected] or [ErrHostKey] when the guest answered and that was the
// outcome. Any other error is a mistake in t, or a server with which there is
// no common algorithm.
func Dial(ctx context.Context, t Target) (*Client, error) {
	return dial(ctx, t, keepAliveInterval, keepAliveLimit)
}

func dial(ctx context.Context, t Target, interval, limit time.Duration) (*Client, error) {
	if t.Key == nil {
		return nil, fmt.Errorf("connect to %s: no SSH key given", t.Address)
	}
	if _, _, err := net.SplitHostPort(t.Address); err != nil {
		return nil, fmt.Errorf("connect to %q: %w", t.Address, err)
	}
	pin, err := newHostKeyPin(t.HostKey)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t.Address, err)
	}

	network, address := "tcp", t.Address
	if t.Door != nil {
		network, address = "unix", t.Door.Server
	}
	raw, err := connect(ctx, network, address)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", ended(ctx), err)
		}
		return nil, fmt.Errorf("connect to %s: %w: %w", t.Address, ErrUnreachable, err)
	}
	conn := watch(raw)
	unhook := context.AfterFunc(ctx, func() { conn.Close() })
	l := login{Target: t}
	if t.Door != nil {
		opening, end := context.WithCancel(ctx)
		defer end()
		l.opened = make(chan struct{})
		go func() {
			l.shut = t.Door.open(opening)
			close(l.opened)
			if l.shut != nil {
				conn.Close() // there is nothing to wait for
			}
		}()
	}
	sc, chans, reqs, err := ssh.NewClientConn(conn, t.Address, l.config(pin))
	inTime := unhook()
	if err != nil && l.isShut(ctx) {
		return nil, fmt.Errorf("connect to %s: %w: by the door %s: %w", t.Address, ErrUnreachable, t.Door.Shell, l.shut)
	}
	if !inTime {
		// The context ended, so the connection is closed even if it was just made.
		if err == nil {
			sc.Close()
		}
		return nil, fmt.Errorf("log in to %s as %q: %w: %w%s", t.Address, t.User, ErrUnreachable, ended(ctx), l.banner())
	}
	if err != nil {
		return nil, l.failure(err)
	}

	c := &Client{
		addr:    t.Address,
		hostKey: pin.key,
		windows: strings.Contains(string(sc.ServerVersion()), "OpenSSH_for_Windows"),
		conn:    conn,
		ssh:     sc,
		dead:    make(chan struct{}),
	}
	go func() {
		for ch := range chans {
			ch.Reject(ssh.Prohibited, "nothing may be opened from here")
		}
	}()
	go func() {
		for r := range reqs { // to the connection's end
			r.Reply(false, nil)
		}
		c.lose(sc.Wait())
		close(c.dead)
	}()
	go c.keepAlive(interval, limit)
	if t.Door != nil {
		go c.nudge()
	}
	return c, nil
}

// answering is how long a connection may take to be answered before another is
// tried.
const answering = 500 * time.Millisecond

// connect connects to an address. What is sent to a guest whose network is not
// up is lost, and the kernel would send it again after one second, then two,
// then four, in which the guest may have come up.
func connect(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{Timeout: answering}
	for {
		conn, err := dialer.DialContext(ctx, network, address)
		var late net.Error
		if ctx.Err() != nil || !errors.As(err, &late) || !late.Timeout() {
			return conn, err
		}
	}
}

// A login is what is learned during one attempt to log in.
type login struct {
	Target
	offered bool          // the server got to see the key
	methods []string      // what the server would accept, last time it said so
	said    excerpt       // the server's banner, which is where PAM explains itself
	opened  chan struct{} // closed when it is known whether the door is open; nil without one
	shut    error         // why it is not, then
}

// isShut reports whether the login has failed because the door stays shut.
func (l *login) isShut(ctx context.Context) bool {
	if l.opened == nil {
		return false
	}
	if ctx.Err() != nil {
		<-l.opened // it says what it has been waiting for
	}
	select {
	case <-l.opened:
		return l.shut != nil
	default:
		return false
	}
}

func (l *login) config(pin *hostKeyPin) *ssh.ClientConfig {
	var auth []ssh.AuthMethod
	if l.Key != nil {
		auth = append(auth, ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			if l.opened != nil {
				if <-l.opened; l.shut != nil {
					return nil, l.shut
				}
			}
			l.offered = true
			return []ssh.Signer{l.Key}, nil
		}))
	}
	return &ssh.ClientConfig{
		Config: ssh.Config{KeyExchanges: keyExchanges},
		User:   l.User,
		Auth:   auth,
		// Called before each attempt; two nils leave the choice to Auth.
		AuthCallback: func(a *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
			l.methods = a.AllowedMethods
			return nil, nil
		},
		BannerCallback: func(text string) error {
			l.said.Write([]byte(text))
			return nil
		},
		HostKeyAlgorithms: pin.algorithms(),
		HostKeyCallback:   pin.check,
	}
}

// failure turns the error of a handshake that ended before the context did
// into one that says what a caller can do about it.
func (l *login) failure(err error) error {
	var disagree *ssh.AlgorithmNegotiationError
	switch {
	case errors.Is(err, ErrHostKey):
		return fmt.Errorf("log in to %s: %w", l.Address, err)
	case errors.As(err, &disagree):
		return fmt.Errorf("log in to %s: %w", l.Address, err)
	case l.refused(err):
		return fmt.Errorf("log in to %s as %q: %w: offered %s, the server accepts %s%s: put the public key into the account's authorized_keys in the image, or choose the account and key that the image has: %w",
			l.Address, l.User, ErrKeyRejected, fingerprint(l.Key.PublicKey()), strings.Join(l.methods, ", "), l.banner(), err)
	}
	return fmt.Errorf("log in to %s as %q: %w: %w%s", l.Address, l.User, ErrUnreachable, err, l.banner())
}

// refused reports whether the server said no to the key. A connection that
// just closes is no such word: the PAM modules that turn logins away while a
// guest boots end in that. The ssh package has no types for either of the two
// ways in which a server says it, so their texts have to do.
func (l *login) refused(err error) bool {
	text := err.Error()
	if strings.Contains(text, "ssh: unable to authenticate") {
		return l.offered || !slices.Contains(l.methods, "publickey")
	}
	// OpenSSH with MaxAuthTries 1 disconnects where it would refuse.
	return l.offered && strings.Contains(text, "ssh: disconnect, reason")
}

// banner returns what the server said of itself, for the end of a message.
func (l *login) banner() string {
	if text := l.said.String(); text != "" {
		return fmt.Sprintf(" (the server said %q)", text)
	}
	return ""
}
