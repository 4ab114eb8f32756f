package sshexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// A Relay is a small SSH server in front of a Client: whoever connects to it
// gets the sessions of the Client's one connection, without the handshake and
// the login that a connection to the guest costs. It serves processes of this
// host, which its UNIX socket lets in or not; its own host key shows them that
// they have found the right one.
type Relay struct {
	client *Client
	config *ssh.ServerConfig
	key    *KeyPair
	shell  string

	waiting sync.Mutex // held while a shell is started, too
	spare   *spare     // nil when none waits
}

// NewRelay returns a relay for c, with a host key of its own. Before each script it
// has a shell wait on the guest, see [Command.Shell]; none if it is empty.
func (c *Client) NewRelay(shell string) (*Relay, error) {
	key, err := NewKeyPair()
	if err != nil {
		return nil, err
	}
	// The guest's version tells a Client what kind of server is at the end.
	config := &ssh.ServerConfig{NoClientAuth: true, ServerVersion: string(c.ssh.ServerVersion())}
	config.AddHostKey(key.Signer())
	return &Relay{client: c, config: config, key: key, shell: shell}, nil
}

// HostKey returns the relay's own host key, in the format of [Target.HostKey].
func (r *Relay) HostKey() string { return r.key.Public() }

// Serve serves all who connect to l until the connection to the guest is lost,
// which is the error that it returns, or ctx ends. Then l and all of its
// connections are closed.
func (r *Relay) Serve(ctx context.Context, l net.Listener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	go func() {
		<-r.client.dead
		cancel()
	}()
	go r.renew()
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			conns.Go(func() { r.serve(ctx, conn) })
		case r.client.down():
			return r.client.lost()
		default:
			return err
		}
	}
}

// lostRequest is how a Relay tells its clients, before it closes their
// connections, why that to the guest is down.
const lostRequest = "lost@libvirt-driver"

// serve serves one connection.
func (r *Relay) serve(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer func() { go r.renew() }() // whoever it was may have run a script
	unhook := context.AfterFunc(ctx, func() { conn.Close() })
	server, channels, requests, err := ssh.NewServerConn(conn, r.config)
	if !unhook() || err != nil {
		return // whoever it was has gone
	}
	defer context.AfterFunc(ctx, func() {
		if r.client.down() {
			server.SendRequest(lostRequest, false, []byte(r.client.why().Error()))
		}
		conn.Close()
	})()
	go r.answer(requests)
	var sessions sync.WaitGroup
	defer sessions.Wait()
	for asked := range channels {
		switch asked.ChannelType() {
		case "session":
			sessions.Go(func() { r.session(asked) })
		case spareChannel:
			sessions.Go(func() { r.offer(asked) })
		default:
			asked.Reject(ssh.Prohibited, "only sessions are relayed")
		}
	}
}

// answer answers what a connection itself is asked: for a sign of life, which is to
// be the guest's. Where that has none to give the connection ends without an answer.
func (r *Relay) answer(requests <-chan *ssh.Request) {
	for request := range requests {
		var err error
		if request.Type == signOfLife {
			_, _, err = r.client.ssh.SendRequest(signOfLife, true, nil)
		}
		if err == nil {
			request.Reply(false, nil)
		}
	}
}

// session relays a new session.
func (r *Relay) session(asked ssh.NewChannel) {
	far, told, err := r.client.ssh.OpenChannel("session", nil)
	if err != nil {
		reason := ssh.ConnectionFailed
		var refusal *ssh.OpenChannelError
		if errors.As(err, &refusal) {
			reason = refusal.Reason
		}
		asked.Reject(reason, err.Error())
		return
	}
	join(asked, far, told, "")
}

// offer relays the session of the shell that waits.
func (r *Relay) offer(asked ssh.NewChannel) {
	s := r.take(string(asked.ExtraData()))
	if s == nil {
		asked.Reject(ssh.ResourceShortage, "no shell waits")
		return
	}
	join(asked, s.ch, s.told, fmt.Sprintf(spareGreeting, s.marker, time.Since(s.begun).Milliseconds()))
}

// join relays one session: what it is asked to do, its streams, and how it ended.
// The greeting comes first.
func join(asked ssh.NewChannel, far ssh.Channel, told <-chan *ssh.Request, greeting string) {
	defer far.Close()
	near, requests, err := asked.Accept()
	if err != nil {
		go ssh.DiscardRequests(told)
		return
	}
	defer near.Close()
	io.WriteString(near, greeting)

	var asking sync.Mutex // held while a request waits for its answer
	go func() {
		pass(requests, far, &asking, "exec", "signal")
		far.Close() // whoever asked for the session is done with it
	}()
	go func() {
		io.Copy(far, near)
		far.CloseWrite()
	}()
	var back sync.WaitGroup
	back.Go(func() { pass(told, near, new(sync.Mutex), "exit-status", "exit-signal") })
	var output sync.WaitGroup
	output.Go(func() { io.Copy(near, far) })
	output.Go(func() { io.Copy(near.Stderr(), far.Stderr()) })
	output.Wait()
	near.CloseWrite()
	back.Wait()
	// A command can be over before the answer that it has begun is passed on.
	asking.Lock()
}

// pass passes on the requests of these types, and refuses others. It holds busy
// until a request has its answer.
func pass(requests <-chan *ssh.Request, to ssh.Channel, busy *sync.Mutex, types ...string) {
	for request := range requests {
		busy.Lock()
		ok := slices.Contains(types, request.Type)
		if ok {
			ok, _ = to.SendRequest(request.Type, request.WantReply, request.Payload)
		}
		request.Reply(ok, nil)
		busy.Unlock()
	}
}

// down reports whether the connection is down.
func (c *Client) down() bool {
	select {
	case <-c.dead:
		return true
	default:
		return false
	}
}
