package sshexec

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"time"
)

// Ending a script takes stopLimit at most. Its processes get stopGrace from
// TERM to KILL, for traps and for what they want to tidy up; GitLab's generated
// scripts trap TERM. In between and afterwards they are counted every stopPause.
const (
	stopLimit = 8 * time.Second
	stopGrace = 3 * time.Second
	stopPause = 100 * time.Millisecond
)

// stopScript runs on the guest, see there. SSH's own signal request reaches the
// command's process group alone, and not even that where the server does not
// separate privileges, so it is only the second choice.
//
//go:embed stop.sh
var stopScript string

// stop ends the script that runs in s, all of its processes, and leaves the
// rest of the guest alone. The error says what may still be running.
func (c *Client) stop(s *session, marker string) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	if c.windows {
		return stopBySignal(ctx, s)
	}
	err := c.stopTree(ctx, s, marker)
	var left *leftError
	if err == nil || errors.As(err, &left) || errors.Is(err, ErrLost) {
		return err
	}
	// No second session, or no shell in it.
	return stopBySignal(ctx, s)
}

// A leftError says how many processes of a script could not be ended.
type leftError struct{ n int }

func (e *leftError) Error() string {
	return fmt.Sprintf("%d of its processes still run on the guest", e.n)
}

// stopTree ends the processes that carry marker, and theirs, by way of a second
// session. Its connection is closed at the end of ctx, as nothing else ends the
// wait for a guest that does not answer.
func (c *Client) stopTree(ctx context.Context, s *session, marker string) error {
	helper, err := c.start(ctx, "exec sh -c '"+stopScript+"'")
	if err != nil {
		return err
	}
	defer helper.close()
	unhook := context.AfterFunc(ctx, func() { c.lose(ctx.Err()) })
	defer unhook()
	go io.Copy(io.Discard, helper.ch.Stderr())
	answers := bufio.NewScanner(helper.ch)
	fmt.Fprintln(helper.ch, marker)

	n := 0 // how many processes there were in the last round
	for begin := time.Now(); ; {
		signal := "TERM"
		if time.Since(begin) >= stopGrace {
			signal = "KILL"
		}
		fmt.Fprintln(helper.ch, signal)
		answered := false
		for !answered && answers.Scan() { // past what the login shell may print
			_, err := fmt.Sscanf(answers.Text(), "alive %d", &n)
			answered = err == nil
		}
		switch {
		case !answered && n > 0:
			return &leftError{n}
		case !answered:
			return errors.New("no answer from sh on the guest")
		case n == 0 && s.over():
			return nil
		case n == 0 && signal == "KILL":
			// A command without a marker: there is no /proc, or the login shell does
			// not know how to set one.
			s.signal(signal)
		}
		select {
		case <-time.After(stopPause):
		case <-ctx.Done():
			return &leftError{n}
		}
	}
}

// stopBySignal ends the process group of the command in s, if the server is so
// kind.
func stopBySignal(ctx context.Context, s *session) error {
	for _, step := range []struct {
		signal string
		wait   time.Duration
	}{{"TERM", stopGrace}, {"KILL", stopLimit}} {
		if s.over() {
			return nil
		}
		s.signal(step.signal)
		select {
		case <-s.exited:
			return nil
		case <-s.gone:
			return nil
		case <-ctx.Done():
		case <-time.After(step.wait):
		}
	}
	return errors.New("it may still run on the guest")
}

// over reports whether the command itself has ended, or can no longer be heard
// of.
func (s *session) over() bool {
	select {
	case <-s.gone:
		return true
	default:
		return s.hasExited()
	}
}
