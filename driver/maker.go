package driver

import (
	"context"

	"libvirt-driver/sshexec"
)

// Maker makes machines on a host and gets into their guests: for a stage, or so
// that they stand ready.
type Maker struct {
	Host
	// Connect opens an SSH session to a guest.
	Connect func(context.Context, sshexec.Target) (Shell, error)
	// ConnectRelay does so by way of a machine's keeper, which has its socket at
	// path and expects the token.
	ConnectRelay func(ctx context.Context, path, token string) (Shell, error)
	// StartKeeper starts the process that keeps the connection to a machine; see
	// [StartKeeper]. Without it every sub-stage makes a connection of its own.
	StartKeeper func(dir, machine string) (*Keeper, error)
}

// Shell is what the stages need of a guest. [sshexec.Client] and
// [sshexec.RelayClient] have it.
type Shell interface {
	// HostKey returns the key that the guest showed, in authorized_keys format.
	HostKey() string
	// Ping opens a session and ends it.
	Ping(context.Context) error
	// Alive asks for a sign of life, which costs the guest nothing.
	Alive(context.Context) error
	// Run runs a script to its end.
	Run(context.Context, sshexec.Command) error
	// Abort ends a Run at once: the guest is known to be lost, and why.
	Abort(error)
	Close() error
}
