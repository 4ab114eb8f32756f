package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/sshexec"
)

const (
	// brief is how long a script may take before libvirt is asked whether its guest
	// still runs: most take less, and to ask is a tenth of what a sub-stage costs.
	brief = time.Second
	// reconnect is how long a sub-stage tries to get into a guest that prepare
	// has already been in.
	reconnect = time.Minute
	// fate is how long a stage waits to learn what became of a guest that has
	// just been lost: one that powers off closes its connections first.
	fate = 10 * time.Second
)

// Run runs one sub-stage's script in the job's machine. How it gets there was
// settled in prepare: that the settings have changed since is not the job's
// fault, nor any reason to end it.
func (s *Stage) Run(ctx context.Context, script string) error {
	job, err := s.identify()
	if err != nil {
		return err
	}
	machine := job.Machine()
	done, err := s.atWork(machine)
	if err != nil {
		return err
	}
	defer done()
	text, err := os.Open(script)
	if err != nil {
		return fmt.Errorf("open the script: %w", err)
	}
	defer text.Close()

	contact, err := s.contact(ctx, machine)
	if err != nil {
		return err
	}
	domain := cmp.Or(contact.Domain, machine)
	watched, stop := s.followed(ctx, domain, brief, func(state hypervisor.State) bool {
		return state.Kind != hypervisor.Running && !state.ByHand
	})
	defer stop()
	shell, err := s.enter(watched, domain, contact)
	if err != nil {
		return s.explain(ctx, watched, domain, err)
	}
	err = s.perform(ctx, watched, shell, contact.Shell, text)
	if errors.Is(err, sshexec.ErrRefused) && contact.Relay != "" {
		// Processes that earlier scripts left behind hold as many sessions as the
		// guest's server allows to one connection.
		shell.Close()
		contact.Relay = ""
		if shell, err = s.enter(watched, domain, contact); err != nil {
			return s.explain(ctx, watched, domain, err)
		}
		err = s.perform(ctx, watched, shell, contact.Shell, text)
	}
	defer shell.Close()
	if errors.Is(err, sshexec.ErrLost) && contact.Relay != "" {
		// A keeper that hangs has the runner's files open, and the runner waits for
		// their end.
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), fate)
		defer cancel()
		if err := s.endKeeper(ending, domain); err != nil {
			s.Log.Note("%v", err)
		}
	}
	var exit *sshexec.ExitError
	switch {
	case errors.As(err, &exit) && s.alive(watched, shell):
		if exit.Signal != "" {
			s.Log.Note("the script was ended by signal %s", exit.Signal)
		}
		return &gitlab.BuildError{Err: exit, ExitCode: exit.Code}
	case err != nil:
		return s.explain(ctx, watched, domain, err)
	}
	return nil
}

// perform runs the script. It is cut short when the guest is known to be lost.
func (s *Stage) perform(ctx, watched context.Context, guest Shell, shell string, script io.ReadSeeker) error {
	if _, err := script.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("read the script: %w", err)
	}
	defer context.AfterFunc(watched, func() {
		if ctx.Err() == nil {
			guest.Abort(context.Cause(watched))
		}
	})()
	return guest.Run(ctx, sshexec.Command{
		Shell:  shell,
		Script: script,
		Stdout: s.Stdout,
		Stderr: s.Stderr,
		Lingering: func() {
			s.Log.Note("the script has ended, but a process that it left in the background keeps its output open: not waited for")
		},
	})
}

// enter opens a connection to the guest that prepare was in: by way of the
// machine's keeper where there is one.
func (mk *Maker) enter(ctx context.Context, domain string, contact contact) (Shell, error) {
	if contact.Relay != "" {
		if shell, err := mk.enterRelay(ctx, domain, contact); err == nil {
			return shell, nil
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, reconnect, fmt.Errorf("no session after %v", reconnect))
	defer cancel()
	target, err := knock{
		Address: contact.Address, User: contact.User, Key: contact.Key, Own: contact.Own, HostKey: contact.HostKey,
	}.target(sshexec.Keyring{})
	if err != nil {
		return nil, err
	}
	for try := 0; ; try++ {
		shell, err := mk.Connect(ctx, target)
		switch {
		case err == nil:
			return shell, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case errors.Is(err, sshexec.ErrHostKey), errors.Is(err, sshexec.ErrKeyRejected):
			return nil, err
		}
		pause(ctx, backoff(try))
	}
}

// alive reports whether the guest still runs commands. A script that fails may
// be a guest on its way down, which ends its scripts before it stops; and that
// is never the job's failure.
func (s *Stage) alive(ctx context.Context, shell Shell) bool {
	ctx, cancel := context.WithTimeout(ctx, reconnect)
	defer cancel()
	err := shell.Ping(ctx)
	return err == nil || errors.Is(err, sshexec.ErrRefused) // who refuses is alive
}

// explain says why a sub-stage was cut short: it was told to stop, or the guest
// is lost, or else the connection alone.
func (s *Stage) explain(ctx, watched context.Context, domain string, err error) error {
	if ctx.Err() != nil {
		return err
	}
	select {
	case <-watched.Done():
	case <-time.After(fate):
	case <-ctx.Done():
	}
	var lost *guestLost
	if errors.As(context.Cause(watched), &lost) {
		s.showConsole(domain)
		return lost
	}
	asking, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	state, unknown := s.Hypervisor.State(asking, domain)
	switch {
	case unknown != nil:
		return fmt.Errorf("the connection to the guest failed, and libvirtd does not say whether it still runs: %w", err)
	case state.Kind != hypervisor.Running: // as that of a cleanup which takes long
		return fmt.Errorf("%w, and the connection to it failed: %w", &guestLost{domain, state}, err)
	}
	return fmt.Errorf("the guest still runs, but the connection to it failed: %w", err)
}
