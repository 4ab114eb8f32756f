package sshexec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// A RelayClient runs commands on a guest by way of a [Relay]. It is meant for one
// script, as a [Client] is.
type RelayClient struct {
	addr    string // the guest's
	hostKey string
	conn    *net.UnixConn
	text    []byte // for what is heard

	ending
}

// DialRelay connects to the relay at a socket that expects this token. A relay that
// is not there, or does not answer by the end of ctx, is [ErrUnreachable].
func DialRelay(ctx context.Context, path, token string) (*RelayClient, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, RelayNetwork, path)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w: %w", path, ErrUnreachable, err)
	}
	c := &RelayClient{conn: conn.(*net.UnixConn), text: make([]byte, maxReport)}
	defer context.AfterFunc(ctx, func() { c.end(c.conn, context.Cause(ctx)) })()
	err = send(c.conn, request{Token: token})
	var answer report
	if err == nil {
		answer, err = c.hear()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to %s: %w: %w", path, ErrUnreachable, err)
	}
	c.addr, c.hostKey = answer.Address, answer.HostKey
	return c, nil
}

// HostKey returns the guest's host key, as [Client.HostKey] does.
func (c *RelayClient) HostKey() string { return c.hostKey }

// Ping does what [Client.Ping] does.
func (c *RelayClient) Ping(ctx context.Context) error { return c.ask(ctx, "ping") }

// Alive does what [Client.Alive] does.
func (c *RelayClient) Alive(ctx context.Context) error { return c.ask(ctx, "alive") }

// Abort does what [Client.Abort] does.
func (c *RelayClient) Abort(cause error) { c.end(c.conn, cause) }

// Close closes the connection. A script that still runs is stopped.
func (c *RelayClient) Close() error { return c.end(c.conn, net.ErrClosed) }

// ask asks for something without an input and an output.
func (c *RelayClient) ask(ctx context.Context, what string) error {
	defer context.AfterFunc(ctx, func() { c.end(c.conn, context.Cause(ctx)) })()
	if err := send(c.conn, request{Do: what}); err != nil {
		return c.lost(err)
	}
	verdict, err := c.await(nil)
	if err != nil {
		return err
	}
	return verdict.Err()
}

// Run does what [Client.Run] does, but for what follows from that the relay itself
// reads the script and writes the output: all three are files of the operating
// system's.
func (c *RelayClient) Run(ctx context.Context, cmd Command) error {
	files, err := cmd.files()
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ended(ctx)
	}
	if err := send(c.conn, request{Do: "run", Shell: cmd.Shell}, files...); err != nil {
		return c.lost(err)
	}
	var verdict Verdict
	heard := make(chan error, 1)
	go func() {
		var err error
		verdict, err = c.await(cmd.Lingering)
		heard <- err
	}()
	select {
	case err = <-heard:
		if err == nil {
			err = verdict.Err()
		}
		return err
	case <-ctx.Done():
	}
	defer c.Close()
	send(c.conn, request{Do: "stop"})
	var left error
	select {
	case left = <-heard:
		if left == nil {
			left = verdict.Err()
		}
	case <-time.After(stopLimit + 2*lastOutput):
		left = c.lost(os.ErrDeadlineExceeded)
	}
	return &stoppedError{c.addr, ended(ctx), left}
}

// files returns the script and where its output goes.
func (cmd Command) files() ([]*os.File, error) {
	var files []*os.File
	for _, each := range []any{cmd.Script, cmd.Stdout, cmd.Stderr} {
		f, ok := each.(*os.File)
		if !ok {
			return nil, fmt.Errorf("a %T cannot be handed to the process that keeps the connection", each)
		}
		files = append(files, f)
	}
	return files, nil
}

// await waits for the verdict.
func (c *RelayClient) await(lingering func()) (Verdict, error) {
	for {
		said, err := c.hear()
		switch {
		case err != nil:
			return Verdict{}, err
		case said.Lingering && lingering != nil:
			lingering()
		case said.Verdict != nil:
			return *said.Verdict, nil
		}
	}
}

// hear waits for what the relay says next.
func (c *RelayClient) hear() (r report, err error) {
	c.conn.SetReadDeadline(time.Now().Add(keepAliveLimit))
	n, err := c.conn.Read(c.text)
	if err != nil {
		return r, c.lost(err)
	}
	return r, json.Unmarshal(c.text[:n], &r)
}

// lost returns the error of what was under way when err came.
func (c *RelayClient) lost(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.cause != nil:
		err = c.cause
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = errors.New("the process that keeps it does not answer")
	default:
		err = fmt.Errorf("the process that keeps it has ended: %w", err)
	}
	return fmt.Errorf("%w: %w", ErrLost, err)
}
