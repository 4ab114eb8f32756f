package sshexec

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"
	"unicode/utf16"
)

// A Command is a script and what runs it.
type Command struct {
	// Shell is the shell on the guest that runs the script: "bash" (4.1 or
	// later), "sh", "pwsh" or "powershell". It is looked up in the account's
	// PATH. The account's own login shell starts it and has to be a POSIX one.
	Shell string

	// Script is read to its end, into memory, before the shell starts; nil is an
	// empty script. bash and sh execute it only when all of it has reached the
	// guest, and it finds its standard input empty.
	Script io.Reader

	// Stdout and Stderr get what the script writes, byte for byte and as it
	// comes, each from a goroutine of its own; nil discards. Nothing is kept
	// back: a Write that takes its time slows the script down. After the first
	// error of a Write the rest of that stream is discarded.
	Stdout, Stderr io.Writer

	// Lingering, if not nil, is called when the script has ended but processes
	// that it left behind still hold its output. Run waits for them only for as
	// long as something comes, and 10 seconds at most.
	Lingering func()
}

// Output may come after the exit status: what the pipes on the guest still
// held, and the words of processes that the script left behind, which could go
// on for ever. So the wait for its end is over when nothing has come for
// drainSilence, or after drainLimit. Time in which our own writers are busy
// does not count.
const (
	drainSilence = 3 * time.Second
	drainLimit   = 10 * time.Second
	drainTick    = 50 * time.Millisecond
)

// Run runs a script to its end. It returns
//
//   - nil when the script exited with status 0;
//   - an [*ExitError] when it ended otherwise;
//   - an error that wraps [ErrLost] when the connection ended first, and the
//     cause that [Client.Abort] was given, if any;
//   - an error that wraps ctx's error and cause when ctx ended first: then all
//     processes of the script have been ended, which takes some hundred
//     milliseconds if they obey and at most 9 seconds. The error tells if
//     something is left, and then the Client is closed. Only a Write that does
//     not return may still be under way;
//   - any other error when the script could not be read or started, or
//     succeeded while its output could not be written.
func (c *Client) Run(ctx context.Context, cmd Command) error {
	return c.run(ctx, c.startShell, cmd)
}

// run runs a script with the shell that start gets for it.
func (c *Client) run(ctx context.Context, start func(context.Context, string) (*shell, error), cmd Command) error {
	var script []byte
	if cmd.Script != nil {
		var err error
		if script, err = io.ReadAll(cmd.Script); err != nil {
			return fmt.Errorf("read the script: %w", err)
		}
	}
	s, err := start(ctx, cmd.Shell)
	if err != nil {
		return err
	}
	defer s.close()
	go s.feed(c.input(cmd.Shell, s.marker, script))
	out := s.copyOutput(cmd.Stdout, cmd.Stderr)
	defer out.mute()

	finished := false
	err = s.wait(ctx)
	if err == nil {
		finished, err = out.drain(ctx)
	}
	if err != nil {
		left := c.stop(s.session, s.marker)
		out.wait(lastOutput)
		if left != nil {
			c.lose(err)
		}
		return &stoppedError{c.addr, err, left}
	}
	if !s.hasExited() {
		return fmt.Errorf("script on %s: %w", c.addr, c.lost())
	}
	if !finished && cmd.Lingering != nil {
		cmd.Lingering()
	}
	if s.exit != nil {
		return fmt.Errorf("script on %s: %w", c.addr, s.exit)
	}
	if err := out.writeError(); err != nil {
		return fmt.Errorf("script on %s succeeded, but its output could not be written: %w", c.addr, err)
	}
	return nil
}

// A stoppedError says that a script was stopped, and why.
type stoppedError struct {
	addr  string
	cause error
	left  error // says what may still run; nil for nothing
}

func (e *stoppedError) Error() string {
	text := fmt.Sprintf("script on %s stopped: %v", e.addr, e.cause)
	if e.left != nil {
		text += ": " + e.left.Error()
	}
	return text
}

func (e *stoppedError) Unwrap() []error {
	if e.left == nil {
		return []error{e.cause}
	}
	return []error{e.cause, e.left}
}

// leftBy returns what the script may have left that was to be stopped and ended so.
func leftBy(err error) error {
	var stopped *stoppedError
	if errors.As(err, &stopped) {
		return stopped.left
	}
	return nil
}

// A shell is one on the guest that waits for its script, or runs it. The marker is
// in its environment.
type shell struct {
	*session
	marker string
}

// startShell starts a shell.
func (c *Client) startShell(ctx context.Context, name string) (*shell, error) {
	marker := newMarker()
	line, err := c.invocation(name, marker)
	if err != nil {
		return nil, err
	}
	s, err := c.start(ctx, line)
	if err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, c.addr, err)
	}
	return &shell{s, marker}, nil
}

// drain waits for the end of the output of a command that has ended, and
// reports whether it came.
func (o *output) drain(ctx context.Context) (finished bool, err error) {
	ticker := time.NewTicker(drainTick)
	defer ticker.Stop()
	begin := time.Now()
	for spent := time.Duration(0); spent < drainLimit; {
		select {
		case <-o.done:
			return true, nil
		case <-ctx.Done():
			return false, ended(ctx)
		case <-ticker.C:
		}
		silence, writing := o.silence()
		if writing {
			continue
		}
		if min(silence, time.Since(begin)) >= drainSilence {
			return false, nil
		}
		spent += drainTick
	}
	return false, nil
}

// newMarker returns a word that no other process on the guest has in its
// environment.
func newMarker() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Both shells below read the whole script before they execute it. Left to
// itself, bash reads a script on a pipe byte by byte, one system call each, as
// its children may want the rest. On an emulated guest a script of 50 kB then
// takes 0.1 s longer, and one that is larger than the pipe wakes the server up
// for every byte: 1 MB takes half a minute instead of a second. And the first
// half of a script whose connection breaks is better not executed at all.
//
// bash reads it with its read builtin, which costs no process: a line with the
// number of bytes, and then as many characters of the C locale. A login shell that
// is bash does so itself, as starting another one takes 55 ms on an emulated guest.
// The variable is gone before the script begins, in its first line, so that lines
// keep their numbers. What a script can tell from a bash that reads its standard
// input itself: xtrace has one more plus sign, syntax errors say "eval:", its
// standard input is empty instead of its own rest, what ~/.bashrc has set without
// exporting it is there, and an error of an expansion outside of any subshell
// ends it with status 127, not 1. GitLab Runner's scripts have a job's commands in
// a subshell, where there is no such difference.
//
// Other shells cannot be told to stop reading at the end of a line, so sh gets
// its script from cat, which takes some 30 ms more on an emulated guest. The
// marker at the script's end tells that it is complete, and keeps the shell from
// dropping newlines there.
//
// A shell may have waited for its script ([Relay]), and does not count that in
// SECONDS.
const (
	bashLoader = `read -r LIBVIRT_DRIVER_SCRIPT && ` +
		`IFS= LC_ALL=C read -rN "$LIBVIRT_DRIVER_SCRIPT" LIBVIRT_DRIVER_SCRIPT || exit; SECONDS=0; ` +
		`eval "unset -v LIBVIRT_DRIVER_SCRIPT; $LIBVIRT_DRIVER_SCRIPT"`
	shLoader = `'LIBVIRT_DRIVER_SCRIPT=$(cat) || exit; ` +
		`[ "$LIBVIRT_DRIVER_SCRIPT" != "${LIBVIRT_DRIVER_SCRIPT%"$LIBVIRT_DRIVER_RUN"}" ] || exit; ` +
		`[ -z "${SECONDS+x}" ] || SECONDS=0; ` +
		`eval "unset -v LIBVIRT_DRIVER_SCRIPT; ${LIBVIRT_DRIVER_SCRIPT%"$LIBVIRT_DRIVER_RUN"}"'`

	powershellFlags = " -NoProfile -NoLogo -NonInteractive -InputFormat text -OutputFormat text -ExecutionPolicy Bypass "
)

// invocation returns what the account's login shell is to execute, made of
// constants and the marker only. The marker is in the environment of the command,
// and so in that of its children.
func (c *Client) invocation(shell, marker string) (line string, err error) {
	if c.windows {
		return windowsCommandLine(shell)
	}
	line = "export LIBVIRT_DRIVER_RUN=" + marker + "; "
	switch shell {
	case "bash":
		return line + "case ${BASH-} in */bash) ;; *) exec bash -c '" + bashLoader + "';; esac; " + bashLoader, nil
	case "sh":
		return line + "exec sh -c " + shLoader, nil
	case "pwsh", "powershell":
		return line + "exec " + shell + powershellFlags + "-Command -", nil
	}
	return "", fmt.Errorf("shell %q is not supported: choose bash, sh, pwsh or powershell", shell)
}

// input returns what a shell that was started so expects on its standard input.
func (c *Client) input(shell, marker string, script []byte) []byte {
	switch {
	case c.windows:
		return script
	case shell == "bash":
		script = bytes.ReplaceAll(script, []byte{0}, nil) // as bash does; read would not count them
		return append(fmt.Appendln(nil, len(script)), script...)
	case shell == "sh":
		return append(script, marker...)
	}
	return script
}

// windowsCommandLine returns the command line for the cmd.exe or PowerShell of a
// Windows guest. PowerShell there takes its standard input to be in the
// console's code page unless told otherwise before it starts to read.
func windowsCommandLine(shell string) (string, error) {
	if shell != "pwsh" && shell != "powershell" {
		return "", fmt.Errorf("shell %q is not supported on a guest with Windows: choose pwsh or powershell", shell)
	}
	setup := "$OutputEncoding = [Console]::InputEncoding = [Console]::OutputEncoding = New-Object System.Text.UTF8Encoding\r\n" +
		shell + " -NoProfile -NoLogo -NonInteractive -Command -\r\nexit $LASTEXITCODE\r\n"
	var utf16le []byte
	for _, u := range utf16.Encode([]rune(setup)) {
		utf16le = binary.LittleEndian.AppendUint16(utf16le, u)
	}
	return shell + powershellFlags + "-EncodedCommand " + base64.StdEncoding.EncodeToString(utf16le), nil
}
