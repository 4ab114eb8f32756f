package driver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"libvirt-driver/sshexec"
)

// A keeper is a process of the driver's own that holds one SSH connection to a
// job's guest open, from prepare to cleanup, and runs the scripts of the job's
// sub-stages on it: the handshake and the login are most of what a sub-stage
// would cost. This file is that process; keeper.go is what stages know of it.
//
// prepare starts it, has it knock at the guest until it is let in, and then
// lets it go. What the two say to each other are JSON values over two pipes.

// knock is what prepare asks of a keeper: to try to get a shell, or to go on
// without prepare.
type knock struct {
	Address string        `json:"address,omitempty"`
	User    string        `json:"user,omitempty"`
	Key     string        `json:"key,omitempty"` // the file's path
	Own     string        `json:"own,omitempty"` // the key itself, in place of the file
	HostKey string        `json:"host_key,omitempty"`
	Limit   time.Duration `json:"limit,omitempty"`
	Door    *sshexec.Door `json:"door,omitempty"`
	Shell   string        `json:"shell,omitempty"` // what will run scripts
	Keep    bool          `json:"keep,omitempty"`
}

// answer is what came of a knock: why there is no shell, or else the guest's host
// key, and the token that the relay expects.
type answer struct {
	sshexec.Verdict
	HostKey string `json:"host_key,omitempty"`
	Relay   string `json:"relay,omitempty"`
}

// Keep is the keeper's whole life. It returns when the connection is lost, or
// when calls end before it was told to go on by itself, as they do when prepare
// dies. dir is the folder for locks.
func Keep(ctx context.Context, dir, domain string, calls io.ReadCloser, answers io.WriteCloser) error {
	leave, err := register(dir, domain)
	if err != nil {
		return err
	}
	defer leave()
	syscall.Umask(0o077) // the socket is for this user alone, whatever became of its folder
	l, err := net.ListenUnix(sshexec.RelayNetwork, &net.UnixAddr{Name: relayPath(dir, domain), Net: sshexec.RelayNetwork})
	if err != nil {
		return fmt.Errorf("make a socket for sub-stages: %w", err)
	}
	defer l.Close() // removes the socket, too

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	knocks, kept := listen(ctx, cancel, calls)
	reply := json.NewEncoder(answers)
	keys := sshexec.Keyring{}
	for {
		var k knock
		select {
		case k = <-knocks:
		case <-ctx.Done():
			return nil
		}
		var client *sshexec.Client
		shell, err := k.try(ctx, keys, func(ctx context.Context, target sshexec.Target) (_ Shell, err error) {
			client, err = sshexec.Dial(ctx, target)
			return client, err
		})
		if err != nil {
			if err := reply.Encode(answer{Verdict: sshexec.Judge(err)}); err != nil {
				return err
			}
			continue
		}
		defer shell.Close()
		relay := client.NewRelay(k.Shell)
		served := make(chan error, 1)
		go func() { served <- relay.Serve(ctx, l) }()
		if err := reply.Encode(answer{HostKey: client.HostKey(), Relay: relay.Token()}); err != nil {
			return err
		}
		select {
		case <-kept:
			calls.Close()
			answers.Close()
		case <-ctx.Done():
		}
		return <-served
	}
}

// listen passes on what prepare asks for until it says to go on without it,
// which closes kept. Calls that end before that end the keeper.
func listen(ctx context.Context, end func(), calls io.Reader) (knocks <-chan knock, kept <-chan struct{}) {
	asked, told := make(chan knock), make(chan struct{})
	go func() {
		for in := json.NewDecoder(calls); ; {
			var k knock
			if in.Decode(&k) != nil {
				end()
				return
			}
			if k.Keep {
				close(told)
				return
			}
			select {
			case asked <- k:
			case <-ctx.Done():
				return
			}
		}
	}()
	return asked, told
}

// try tries to get a shell, and that it takes commands.
func (k knock) try(ctx context.Context, keys sshexec.Keyring, connect func(context.Context, sshexec.Target) (Shell, error)) (Shell, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, k.Limit, fmt.Errorf("no session after %v", k.Limit))
	defer cancel()
	target, err := k.target(keys)
	if err != nil {
		return nil, err
	}
	shell, err := connect(ctx, target)
	if err != nil {
		return nil, err
	}
	if k.Door != nil {
		return shell, nil // commands were taken before the guest was saved
	}
	if err := shell.Ping(ctx); err != nil {
		shell.Close()
		// Where a login is not possible yet, it may be later.
		return nil, fmt.Errorf("%w: %w", sshexec.ErrUnreachable, err)
	}
	return shell, nil
}

// target returns what a connection takes.
func (k knock) target(keys sshexec.Keyring) (sshexec.Target, error) {
	target := sshexec.Target{Address: k.Address, User: k.User, HostKey: k.HostKey, Door: k.Door}
	if k.Own == "" {
		key, err := keys.Load(k.Key)
		target.Key = key
		return target, err
	}
	own, err := sshexec.ParseKeyPair(k.Own)
	if err != nil {
		return target, fmt.Errorf("the key that was made for the job: %w", err)
	}
	target.Key = own.Signer()
	return target, nil
}
