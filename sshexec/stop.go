package sshexec

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// Ending a script takes stopLimit at most. Its processes get one TERM, and
// stopGrace until KILL for their traps, GitLab's generated scripts have one, and
// for the commands that the traps start to tidy up, which get none. In between
// and afterwards they are counted every stopPause.
const (
	stopLimit = 8 * time.Second
	stopGrace = 3 * time.Second
	stopPause = 100 * time.Millisecond
)

// ageSlack is by how much the guest's clock may have been ahead of ours since
// the script began.
const ageSlack = 5 * time.Second

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
	// There was no second session, no shell in it, or nothing that it could find.
	return stopBySignal(ctx, s)
}

var errUncertain = errors.New("it may still run on the guest")

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
	age := time.Since(s.begun) + ageSlack
	fmt.Fprintln(helper.ch, marker, age.Milliseconds()/10)

	n, word := 0, "TERM" // n is how many processes there were in the last round
	empty := 0           // how many rounds in a row found none
	for begin := time.Now(); ; {
		if time.Since(begin) >= stopGrace {
			word = "KILL"
		} else if n > 0 {
			word = "count"
		}
		fmt.Fprintln(helper.ch, word)
		answered := false
		for !answered && answers.Scan() { // past what the login shell may print
			if alive, ok := parseAlive(answers.Text()); ok {
				n, answered = alive, true
			}
		}
		empty++
		switch {
		case !answered && n > 0:
			return &leftError{n}
		case !answered:
			return errUncertain
		case n > 0:
			empty = 0
		case s.over() && empty > 1:
			// Twice, as a process in the middle of an exec shows no environment.
			return nil
		case !s.over() && word == "KILL":
			// A command without a marker: there is no /proc, or the login shell does
			// not know how to set one.
			s.signal(word)
		}
		select {
		case <-time.After(stopPause):
		case <-ctx.Done(): // then there is no answer either
		}
	}
}

// parseAlive reads an answer of the stop script: how many processes there are.
func parseAlive(line string) (n int, ok bool) {
	text, ok := strings.CutPrefix(line, "alive ")
	n, err := strconv.Atoi(text)
	if !ok || err != nil || n < 0 {
		return 0, false
	}
	return n, true
}

// stopBySignal ends the process group of the command in s, if the server is so
// kind.
func stopBySignal(ctx context.Context, s *session) error {
	for _, step := range []struct {
		signal string
		wait   time.Duration
	}{{"TERM", stopGrace}, {"KILL", stopLimit}} {
		if !s.over() {
			s.signal(step.signal)
		}
		select {
		case <-s.exited:
		case <-s.gone:
		case <-ctx.Done():
		case <-time.After(step.wait):
		}
	}
	if !s.hasExited() {
		return errUncertain
	}
	return nil
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
