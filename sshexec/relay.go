package sshexec

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// A Relay runs commands over one Client for other processes of this host, each a
// [RelayClient], without the handshake and the login that a connection to the guest
// costs. Its UNIX socket lets them in or not, and by its token they know that they
// have found the right one. What a script writes goes from the Relay right to
// where its client wants it: the client hands its files over.
type Relay struct {
	client *Client
	token  string
	shell  string

	waiting sync.Mutex // held while a shell is started, too
	spare   *shell     // nil when none waits
}

// NewRelay returns a relay for c. Before each script it has a shell wait on the
// guest, see [Command.Shell]; none if it is empty.
func (c *Client) NewRelay(shell string) *Relay {
	return &Relay{client: c, token: newMarker(), shell: shell}
}

// Token returns the word that the relay expects of its clients.
func (r *Relay) Token() string { return r.token }

// Serve serves all who connect to l, whose network is [RelayNetwork], until the
// connection to the guest is lost, which is the error that it returns, or ctx ends.
// Then l and the Client are closed.
func (r *Relay) Serve(ctx context.Context, l *net.UnixListener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	defer r.client.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	go func() {
		<-r.client.dead
		l.Close()
	}()
	go r.renew()
	for {
		conn, err := l.AcceptUnix()
		switch {
		case err == nil:
			conns.Go(func() { r.serve(conn) })
		case r.client.down():
			return r.client.lost()
		default:
			return err
		}
	}
}

// RelayNetwork is the network of a Relay's socket, which keeps what is said on it
// in packets.
const RelayNetwork = "unixpacket"

// A request is what a client of a Relay says: first the token, and then what it
// wants done, one thing after another.
type request struct {
	Token string `json:"token,omitempty"`
	Do    string `json:"do,omitempty"`    // ping, alive, run, stop
	Shell string `json:"shell,omitempty"` // of run
}

// A report is what a Relay says: that it has understood the token, and whose guest
// this is; what becomes of a request; and in between, now and then, nothing, so
// that it is known to be there.
type report struct {
	Address   string   `json:"address,omitempty"`
	HostKey   string   `json:"host_key,omitempty"`
	Lingering bool     `json:"lingering,omitempty"`
	Verdict   *Verdict `json:"verdict,omitempty"`
}

// serve serves one client.
func (r *Relay) serve(conn *net.UnixConn) {
	defer conn.Close()
	asked := make(chan packet)
	gone := make(chan struct{})
	defer close(gone)
	go func() {
		defer close(asked)
		for {
			p, err := receive(conn)
			if err != nil {
				return
			}
			select {
			case asked <- p:
			case <-gone:
				p.close()
				return
			}
		}
	}()
	greeted := false
	for {
		select {
		case p, ok := <-asked:
			switch {
			case !ok:
				return
			case !greeted:
				p.close()
				if subtle.ConstantTimeCompare([]byte(p.Token), []byte(r.token)) == 0 {
					return
				}
				greeted = true
				send(conn, report{Address: r.client.addr, HostKey: r.client.HostKey()})
			default:
				verdict := Judge(r.attend(conn, p, asked))
				verdict.Text = verdict.Text[:min(len(verdict.Text), maxText)]
				send(conn, report{Verdict: &verdict})
			}
		case <-r.client.dead:
			return
		}
	}
}

// attend does what was asked for, until whoever asked wants it stopped, or has
// gone.
func (r *Relay) attend(conn *net.UnixConn, p packet, asked <-chan packet) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan error, 1)
	go func() {
		err := r.do(ctx, p, func() { send(conn, report{Lingering: true}) })
		p.close() // so that nobody who reads what was written waits for more
		done <- err
	}()
	ticker := time.NewTicker(keepAliveInterval)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			if ctx.Err() != nil {
				return leftBy(err)
			}
			return err
		case <-ticker.C:
			send(conn, report{})
		case other, ok := <-asked:
			stop()
			other.close()
			if !ok {
				p.close() // nobody wants what is still written
				asked = nil
			}
		}
	}
}

func (r *Relay) do(ctx context.Context, p packet, lingering func()) error {
	switch {
	case p.Do == "ping":
		return r.client.Ping(ctx)
	case p.Do == "alive":
		return r.client.Alive(ctx)
	case p.Do == "run" && len(p.files) == 3:
		defer func() { go r.renew() }()
		return r.client.run(ctx, r.startShell, Command{
			Shell: p.Shell, Script: p.files[0], Stdout: p.files[1], Stderr: p.files[2], Lingering: lingering,
		})
	}
	return fmt.Errorf("the process that keeps the connection does not know how to %q", p.Do)
}

// A packet is a request with the files that came with it.
type packet struct {
	request
	files []*os.File
}

func (p packet) close() {
	for _, f := range p.files {
		f.Close()
	}
}

// A request has maxRequest bytes at most, and a report maxReport; errors are cut
// short for that, as in JSON a byte may take six.
const (
	maxRequest = 1 << 10
	maxReport  = 16 << 10
	maxText    = maxReport/6 - 512
)

// send sends a packet. Who does not take it within [keepAliveLimit] has gone.
func send(conn *net.UnixConn, message any, files ...*os.File) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var numbers []int
	for _, f := range files {
		numbers = append(numbers, int(f.Fd()))
	}
	var rights []byte
	if len(files) > 0 {
		rights = syscall.UnixRights(numbers...)
	}
	conn.SetWriteDeadline(time.Now().Add(keepAliveLimit))
	_, _, err = conn.WriteMsgUnix(text, rights, nil)
	return err
}

// receive receives a client's packet.
func receive(conn *net.UnixConn) (p packet, err error) {
	text, rights := make([]byte, maxRequest), make([]byte, syscall.CmsgSpace(3*4))
	n, m, flags, _, err := conn.ReadMsgUnix(text, rights)
	if err != nil {
		return p, err
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:m])
	if err != nil {
		return p, err
	}
	for i := range messages {
		numbers, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			continue // not files
		}
		for _, number := range numbers {
			p.files = append(p.files, os.NewFile(uintptr(number), "of a client"))
		}
	}
	if flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("a packet of more than %d bytes, or with more than 3 files", maxRequest)
	} else {
		err = json.Unmarshal(text[:n], &p.request)
	}
	if err != nil {
		p.close()
	}
	return p, err
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
