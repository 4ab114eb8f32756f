package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/sshexec"
)

const (
	// reconnect is how long a sub-stage tries to get into a guest that prepare
	// has already been in.
	reconnect = time.Minute
	// fate is how long a stage waits to learn what became of a guest that has
	// just been lost: one that powers off closes its connections first.
	fate = 10 * time.Second
)

// Run runs one sub-stage's script in the job's machine.
func (s *Stage) Run(ctx context.Context, script string) error {
	m, err := s.plan()
	if err != nil {
		return err
	}
	done, err := s.atWork(m.name)
	if err != nil {
		return err
	}
	defer done()
	text, err := os.Open(script)
	if err != nil {
		return fmt.Errorf("open the script: %w", err)
	}
	defer text.Close()

	contact, err := s.contact(ctx, m)
	if err != nil {
		return err
	}
	watched, stop := s.followed(ctx, m.name, func(state hypervisor.State) bool {
		return state.Kind != hypervisor.Running && !state.ByHand
	})
	defer stop()
	shell, err := s.enter(watched, m, contact)
	if err != nil {
		return s.explain(ctx, watched, m, err)
	}
	defer shell.Close()
	defer context.AfterFunc(watched, func() {
		if ctx.Err() == nil {
			shell.Abort(context.Cause(watched))
		}
	})()
	err = shell.Run(ctx, sshexec.Command{
		Shell:  string(m.image.Shell),
		Script: text,
		Stdout: s.Stdout,
		Stderr: s.Stderr,
		Lingering: func() {
			s.Log.Note("the script has ended, but a process that it left in the background keeps its output open: not waited for")
		},
	})
	var exit *sshexec.ExitError
	switch {
	case errors.As(err, &exit) && s.alive(watched, shell):
		if exit.Signal != "" {
			s.Log.Note("the script was ended by signal %s", exit.Signal)
		}
		return &gitlab.BuildError{Err: exit, ExitCode: exit.Code}
	case err != nil:
		return s.explain(ctx, watched, m, err)
	}
	return nil
}

// enter opens a connection to the guest that prepare was in.
func (s *Stage) enter(ctx context.Context, m machine, contact contact) (Shell, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, reconnect, fmt.Errorf("no session after %v", reconnect))
	defer cancel()
	key, err := sshexec.LoadKey(m.image.Key)
	if err != nil {
		return nil, err
	}
	target := sshexec.Target{Address: contact.Address, User: m.image.User, Key: key, HostKey: contact.HostKey}
	for try := 0; ; try++ {
		shell, err := s.Connect(ctx, target)
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
	return shell.Ping(ctx) == nil
}

// explain says why a sub-stage was cut short: it was told to stop, or the guest
// is lost, or else the connection alone.
func (s *Stage) explain(ctx, watched context.Context, m machine, err error) error {
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
		s.showConsole(m.name)
		return lost
	}
	asking, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, unknown := s.Hypervisor.State(asking, m.name); unknown != nil {
		return fmt.Errorf("the connection to the guest failed, and libvirtd does not say whether it still runs: %w", err)
	}
	return fmt.Errorf("the guest still runs, but the connection to it failed: %w", err)
}
