package sshexec

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

// A counter counts the bytes that are written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// A signal is a writer that tells when a text has come by.
type signal struct {
	text string
	buf  lockedBuffer
	seen chan struct{}
	once sync.Once
}

func newSignal(text string) *signal {
	return &signal{text: text, seen: make(chan struct{})}
}

func (s *signal) give() { s.once.Do(func() { close(s.seen) }) }

func (s *signal) Write(p []byte) (int, error) {
	s.buf.Write(p)
	if strings.Contains(s.buf.String(), s.text) {
		s.give()
	}
	return len(p), nil
}

// A runs runs scripts: a Client, or a RelayClient.
type runs interface {
	Run(context.Context, Command) error
}

// run runs a script of one of the tests' servers within a minute.
func run(t *testing.T, c runs, shell, script string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var o, e bytes.Buffer
	err = c.Run(ctx, Command{Shell: shell, Script: strings.NewReader(script), Stdout: &o, Stderr: &e})
	return o.String(), e.String(), err
}

// job has the form of what GitLab Runner generates for a job with the given
// commands.
func job(commands string) string {
	quoted := strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\n", `\n`).Replace(commands)
	return "#!/usr/bin/env bash\n\ntrap 'exit 1' TERM\n\n" +
		`case "$(set -o)" in *"pipefail"*) set -o pipefail;; esac; set -o errexit` + "\nset +o noclobber\n" +
		"(trap 'exit 1' TERM; eval $'" + quoted + "') < /dev/null\nexit 0\n"
}

func TestRunExit(t *testing.T) {
	c := startServer(t, nil).dial(t)
	for _, shell := range []string{"bash", "sh"} {
		for _, tt := range []struct {
			script string
			code   int
			signal string
		}{
			{"", 0, ""},
			{"true", 0, ""},
			{"exit 0", 0, ""},
			{"exit 7", 7, ""},
			{"exit 2", 2, ""},
			{"exit 255\n", 255, ""},
			{"false\n", 1, ""},
			{"exit 3\nnever ( reached", 3, ""},
			{"sh -c 'exit 9'", 9, ""},
			{"sh -c 'kill -9 $$'", 137, ""},
			{"kill -9 $$", 137, "KILL"},
			{"kill -TERM $$; sleep 9", 143, "TERM"},
			{"kill -SEGV $$; sleep 9", 139, "SEGV"},
			{"trap 'exit 5' TERM; kill -TERM $$; sleep 1", 5, ""},
			{"echo 'no end", 2, ""},
			{"if true; then echo", 2, ""},
		} {
			_, _, err := run(t, c, shell, tt.script)
			var exit *ExitError
			if tt.code == 0 {
				if err != nil {
					t.Errorf("%s %q: %v", shell, tt.script, err)
				}
			} else if !errors.As(err, &exit) || exit.Code != tt.code || exit.Signal != tt.signal {
				t.Errorf("%s %q: %v, want status %d, signal %q", shell, tt.script, err, tt.code, tt.signal)
			}
			if errors.Is(err, ErrLost) {
				t.Errorf("%s %q: %v", shell, tt.script, err)
			}
		}
	}
}

func TestRunJob(t *testing.T) {
	c := startServer(t, nil).dial(t)
	for _, tt := range []struct {
		commands       string
		code           int
		stdout, stderr string
	}{
		{"echo hello\necho it\\'s >&2\ncat\n", 0, "hello\n", "it's\n"},
		{"echo before\nfalse\necho after\n", 1, "before\n", ""},
		{"echo before\nfalse | true\necho after\n", 1, "before\n", ""},
		{"echo before\nexit 42\n", 42, "before\n", ""},
		{"X=1\n[ -t 0 ] || echo no terminal\necho $LIBVIRT_DRIVER_SCRIPT.$BASH_SUBSHELL\n", 0, "no terminal\n.1\n", ""},
	} {
		stdout, stderr, err := run(t, c, "bash", job(tt.commands))
		var exit *ExitError
		errors.As(err, &exit)
		if (err == nil) != (tt.code == 0) || exit != nil && exit.Code != tt.code {
			t.Errorf("%q: error %v, want status %d", tt.commands, err, tt.code)
		}
		if stdout != tt.stdout || stderr != tt.stderr {
			t.Errorf("%q: stdout %q, stderr %q", tt.commands, stdout, stderr)
		}
	}
}

// everyByte returns all bytes but NUL, which no shell keeps in a script, in an
// order in which they are all at the start of invalid UTF-8 too.
func everyByte() string {
	var b []byte
	for i := 1; i < 256; i++ {
		b = append(b, byte(i))
	}
	for i := 255; i > 0; i-- {
		b = append(b, byte(i))
	}
	return strings.ReplaceAll(string(b), "'", "")
}

// TestRunSameAsStdin compares the shells with what they do when they read the
// same script from a pipe, as everybody else runs it.
func TestRunSameAsStdin(t *testing.T) {
	s := startServer(t, nil)
	direct := s.dial(t)
	relays, places := map[string]*Relay{}, map[string]relayAt{}
	for _, shell := range []string{"bash", "sh"} {
		relays[shell], places[shell] = spareOn(t, s, shell)
	}
	for name, script := range map[string]string{
		"every byte":              "printf %s '" + everyByte() + "'\n",
		"no newline at the end":   "printf a; printf b",
		"newlines at the end":     "printf a\n\n\n\n",
		"NUL":                     "echo a\x00b\n",
		"carriage returns":        "echo a\r\necho b\r\n",
		"here-document":           "cat <<EOF\na $((1+1))\nb\nEOF\necho c\n",
		"open here-document":      "cat <<EOF\na\nb\n",
		"comment at the end":      "echo a # b",
		"message with line":       "echo\n\n/nowhere/nothing a\necho $? $LINENO\n",
		"errexit":                 "set -e\necho a\n(false)\necho b\n",
		"error in the middle":     "echo a\nfi\necho b\n",
		"exit trap":               "trap 'echo bye $?' EXIT\nexit 4\n",
		"exit in eval":            "eval 'exit 6'\necho b\n",
		"name and arguments":      "echo \"$0|$#|$*\"\n",
		"functions":               "f() { echo f; return 3; }\nf\n",
		"unset variable in a job": job("set -u\necho $NOTHING_OF_THAT_NAME\n"),
		"unset variable":          "set -u\necho $NOTHING_OF_THAT_NAME\necho b\n",
		"last background status":  "(exit 3) &\nwait $!\n",
	} {
		for _, shell := range []string{"bash", "sh"} {
			if shell == "sh" && strings.HasPrefix(script, "#!/usr/bin/env bash") {
				continue
			}
			var o, e bytes.Buffer
			stdin := exec.Command(shell)
			stdin.Stdin = strings.NewReader(script)
			stdin.Stdout, stdin.Stderr = &o, &e
			stdin.Run()
			want := stdin.ProcessState.ExitCode()
			if shell == "bash" && name == "unset variable" {
				want = 127 // see bashLoader
			}
			waiting := relays[shell].await(t)
			for way, c := range map[string]runs{"at once": direct, "by one that waited": dialRelay(t, places[shell])} {
				stdout, stderr, err := run(t, c, shell, script)
				var exit *ExitError
				code := 0
				if errors.As(err, &exit) {
					code = exit.Code
				} else if err != nil {
					t.Errorf("%s, %s, %s: %v", name, shell, way, err)
					continue
				}
				if stdout != o.String() {
					t.Errorf("%s, %s, %s: stdout %q, want %q", name, shell, way, stdout, o.String())
				}
				// The messages of what is in an eval say so.
				if strings.ReplaceAll(stderr, " eval:", "") != e.String() {
					t.Errorf("%s, %s, %s: stderr %q, want %q", name, shell, way, stderr, e.String())
				}
				if code != want {
					t.Errorf("%s, %s, %s: status %d, want %d", name, shell, way, code, want)
				}
			}
			if relays[shell].waits() == waiting {
				t.Errorf("%s, %s: the shell that waited waits still", name, shell)
			}
		}
	}
}

// TestRunBytes sends every byte there is both ways, on both streams.
func TestRunBytes(t *testing.T) {
	c := startServer(t, nil).dial(t)
	want := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{1})
	random.Read(want)
	copy(want, "line\r\n\x00\xff\xfe\xc3\x28\r\n")
	path := t.TempDir() + "/data"
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	var o, e bytes.Buffer
	err := c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("cat " + path + "; cat " + path + " >&2"), Stdout: &o, Stderr: &e})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(o.Bytes(), want) {
		t.Errorf("stdout: %d bytes, not those that were sent", o.Len())
	}
	if !bytes.Equal(e.Bytes(), want) {
		t.Errorf("stderr: %d bytes, not those that were sent", e.Len())
	}
}

// TestRunLargeScript runs 1 MB of script, in the one long line that GitLab
// Runner makes of a job, and in many.
func TestRunLargeScript(t *testing.T) {
	c := startServer(t, nil).dial(t)
	var lines strings.Builder
	for i := 0; lines.Len() < 1<<20; i++ {
		fmt.Fprintf(&lines, "V%d=%d\n", i, i)
		if i%1000 == 0 {
			fmt.Fprintf(&lines, "echo $V%d\n", i)
		}
	}
	var want strings.Builder
	for i := 0; strings.Contains(lines.String(), fmt.Sprintf("echo $V%d\n", i)); i += 1000 {
		fmt.Fprintln(&want, i)
	}
	for _, tt := range []struct{ shell, script string }{{"bash", job(lines.String())}, {"bash", lines.String()}, {"sh", lines.String()}} {
		stdout, _, err := run(t, c, tt.shell, tt.script)
		if err != nil {
			t.Error(err)
		}
		if stdout != want.String() {
			t.Errorf("%s: %d bytes of output, want %d", tt.shell, len(stdout), want.Len())
		}
	}
	// The rest is fine unread.
	for range 5 {
		if _, _, err := run(t, c, "bash", "exit 0\n"+strings.Repeat("# filler\n", 1<<18)); err != nil {
			t.Error(err)
		}
	}
}

// TestRunStreams sees that output comes while the script runs.
func TestRunStreams(t *testing.T) {
	c := startServer(t, nil).dial(t)
	dir := t.TempDir()
	first := newSignal("first")
	go func() {
		<-first.seen
		os.WriteFile(dir+"/go", nil, 0o600)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	script := "printf first\nwhile [ ! -e " + dir + "/go ]; do sleep 0.05; done\necho second"
	if err := c.Run(ctx, Command{Shell: "bash", Script: strings.NewReader(script), Stdout: first}); err != nil {
		t.Error(err)
	}
	if got := first.buf.String(); got != "firstsecond\n" {
		t.Errorf("stdout %q", got)
	}
}

// measuredEnv makes the test binary a process that does nothing but relay what
// a script writes, and that says how much memory that took.
const measuredEnv = "SSHEXEC_MEASURED"

func runMeasured() {
	args := strings.Split(os.Getenv(measuredEnv), "|")
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	key, err := LoadKey(args[2])
	fail(err)
	c, err := Dial(context.Background(), Target{Address: args[0], User: args[1], Key: key, HostKey: args[3]})
	fail(err)
	fail(c.Run(context.Background(), Command{Shell: "bash", Script: strings.NewReader(args[4]), Stdout: os.Stdout, Stderr: os.Stderr}))
	status, err := os.ReadFile("/proc/self/status")
	fail(err)
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	fmt.Fprint(os.Stderr, strings.Fields(after)[0])
}

func TestRunMemory(t *testing.T) {
	s := startServer(t, nil)
	const size = 200_000_000
	script := fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", size)
	for _, pace := range []string{"fast", "slow"} {
		t.Run(pace, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), measuredEnv+"="+strings.Join([]string{s.addr, s.user, s.keyPath, s.hostPub, script}, "|"))
			var used bytes.Buffer
			cmd.Stderr = &used
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if pace == "slow" {
				// A log that takes nothing for a while must not fill up memory.
				time.Sleep(3 * time.Second)
			}
			n, _ := io.Copy(io.Discard, out)
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v: %s", err, used.String())
			}
			if n != size {
				t.Errorf("%d bytes of output, want %d", n, size)
			}
			kib, err := strconv.Atoi(used.String())
			if err != nil {
				t.Fatalf("%v: %s", err, used.String())
			}
			t.Logf("%.1f MiB resident at most, %v", float64(kib)/1024, time.Since(begin).Round(time.Millisecond))
			if kib<<10 > maxMeasured {
				t.Errorf("%d KiB resident at most, want at most %d", kib, maxMeasured>>10)
			}
		})
	}
}

// TestRunBackground sees that processes which the script leaves behind hold
// neither its stage nor its output.
func TestRunBackground(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	for _, tt := range []struct {
		name, script string
		min, max     time.Duration
		lingering    bool
	}{
		{"none", "echo out; exit 7", 0, drainSilence, false},
		{"silent", "sleep 100 & echo out; exit 7", drainSilence, drainSilence + 2*time.Second, true},
		{"on stderr only", "sleep 100 >/dev/null & echo out; exit 7", drainSilence, drainSilence + 2*time.Second, true},
		{"detached", "sleep 100 >/dev/null 2>&1 & echo out; exit 7", 0, drainSilence, false},
		{"soon over", "(sleep 1; echo late) & echo out; exit 7", time.Second, drainSilence, false},
		{"never silent", "while sleep 0.2; do echo; done & echo out; exit 7", drainLimit, drainLimit + 3*time.Second, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := s.dial(t)
			var o bytes.Buffer
			lingering := 0
			begin := time.Now()
			err := c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader(tt.script), Stdout: &o, Lingering: func() { lingering++ }})
			took := time.Since(begin)
			var exit *ExitError
			if !errors.As(err, &exit) || exit.Code != 7 {
				t.Errorf("error %v, want status 7", err)
			}
			if took < tt.min || took > tt.max {
				t.Errorf("took %v, want %v to %v", took, tt.min, tt.max)
			}
			if lingering > 1 || (lingering == 1) != tt.lingering {
				t.Errorf("told %d times of lingering processes", lingering)
			}
			if !strings.HasPrefix(o.String(), "out\n") || tt.name == "soon over" && o.String() != "out\nlate\n" {
				t.Errorf("stdout %q", o.String())
			}
			// The connection is good for more.
			if stdout, _, err := run(t, c, "bash", "echo again"); err != nil || stdout != "again\n" {
				t.Errorf("next script: stdout %q, error %v", stdout, err)
			}
		})
	}
}

// slowWriter is a log that takes its time.
type slowWriter struct {
	delay time.Duration
	bytes.Buffer
}

func (s *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(s.delay)
	return s.Buffer.Write(p)
}

// TestRunSlowWriter sees that the time in which our own side is slow does not
// count as the guest's silence.
func TestRunSlowWriter(t *testing.T) {
	t.Parallel()
	c := startServer(t, nil).dial(t)
	w := &slowWriter{delay: drainSilence + time.Second}
	err := c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("printf a; sleep 0.5; printf b; sleep 0.1 & exit 0"), Stdout: w,
		Lingering: func() { t.Error("told of lingering processes") }})
	if err != nil || w.String() != "ab" {
		t.Errorf("stdout %q, error %v", w.String(), err)
	}
}

type brokenWriter struct{ n int }

var errBroken = errors.New("log is full")

func (b *brokenWriter) Write(p []byte) (int, error) {
	b.n++
	return 0, errBroken
}

// TestRunWriteError sees that a log that fails is not the script's failure, does
// not disturb it, and does not go unnoticed.
func TestRunWriteError(t *testing.T) {
	c := startServer(t, nil).dial(t)
	const script = "head -c 10000000 /dev/zero; echo still here >&2; exit "
	for _, code := range []int{0, 9} {
		w := new(brokenWriter)
		var e bytes.Buffer
		err := c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader(script + strconv.Itoa(code)), Stdout: w, Stderr: &e})
		var exit *ExitError
		switch {
		case code == 0 && (!errors.Is(err, errBroken) || errors.As(err, &exit) || errors.Is(err, ErrLost)):
			t.Errorf("error %v, want that of the writer", err)
		case code != 0 && (!errors.As(err, &exit) || exit.Code != code):
			t.Errorf("error %v, want status %d", err, code)
		}
		if e.String() != "still here\n" {
			t.Errorf("stderr %q", e.String())
		}
		if w.n != 1 {
			t.Errorf("%d writes, want none after the first failed", w.n)
		}
	}
}

// TestRunScriptError sees that a script that cannot be read to its end is not
// executed and not the script's failure.
func TestRunScriptError(t *testing.T) {
	c := startServer(t, nil).dial(t)
	broken := errors.New("disk error")
	var o bytes.Buffer
	script := io.MultiReader(strings.NewReader("echo executed\n"), iotest.ErrReader(broken))
	err := c.Run(t.Context(), Command{Shell: "bash", Script: script, Stdout: &o})
	var exit *ExitError
	if !errors.Is(err, broken) || errors.As(err, &exit) {
		t.Errorf("error %v, want that of the reader", err)
	}
	if stdout, _, err := run(t, c, "bash", "echo next"); err != nil || stdout != "next\n" || o.String() != "" {
		t.Errorf("next script: stdout %q and %q, error %v", o.String(), stdout, err)
	}
}

// TestRunIncompleteScript sees that the shells execute nothing of a script whose
// end does not reach them, wherever it is cut.
func TestRunIncompleteScript(t *testing.T) {
	const script = "echo executed\n# the rest\n\n\n"
	marker := newMarker()
	for _, shell := range []string{"bash", "sh"} {
		line, err := new(Client).invocation(shell, marker)
		if err != nil {
			t.Fatal(err)
		}
		input := new(Client).input(shell, marker, []byte(script))
		for cut := 0; cut <= len(input); cut++ {
			cmd := exec.Command("sh", "-c", line)
			cmd.Stdin = bytes.NewReader(input[:cut])
			out, err := cmd.Output()
			if complete := cut == len(input); complete != (string(out) == "executed\n") || complete && err != nil || len(out) > 0 != complete {
				t.Errorf("%s, %d of %d bytes: stdout %q, error %v", shell, cut, len(input), out, err)
			}
		}
	}
}

func TestRunShell(t *testing.T) {
	c := startServer(t, nil).dial(t)
	for _, shell := range []string{"", "fish", "bash;reboot", "/bin/bash"} {
		_, _, err := run(t, c, shell, "true")
		var exit *ExitError
		if err == nil || errors.As(err, &exit) || !strings.Contains(err.Error(), "bash, sh, pwsh or powershell") {
			t.Errorf("shell %q: %v", shell, err)
		}
	}
	// A shell that is not there is, to the guest's login shell, a command not found.
	_, stderr, err := run(t, c, "pwsh", "exit 0")
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 127 || !strings.Contains(stderr, "pwsh") {
		t.Errorf("stderr %q, error %v", stderr, err)
	}
}

// TestRunRefused sees what comes of a server that gives no session.
func TestRunRefused(t *testing.T) {
	c := startServer(t, []string{"MaxSessions 0"}).dial(t)
	for name, err := range map[string]error{"Ping": c.Ping(t.Context()), "Run": c.Run(t.Context(), Command{Shell: "sh"})} {
		var exit *ExitError
		if err == nil || errors.As(err, &exit) || errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "refused a session") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRunLost kills the server in the middle of a script.
func TestRunLost(t *testing.T) {
	s := startServer(t, nil)
	c := s.dial(t)
	ready := newSignal("ready")
	go func() {
		<-ready.seen
		s.kill()
	}()
	err := c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("printf ready; sleep 60"), Stdout: ready})
	var exit *ExitError
	if !errors.Is(err, ErrLost) || errors.As(err, &exit) || !strings.Contains(err.Error(), s.addr) {
		t.Errorf("error %v, want ErrLost and the address", err)
	}
	if ready.buf.String() != "ready" {
		t.Errorf("stdout %q", ready.buf.String())
	}
	if err := c.Run(t.Context(), Command{Shell: "bash"}); !errors.Is(err, ErrLost) {
		t.Errorf("next script: %v", err)
	}
}

// TestRunAbort sees that a caller who knows that the guest is gone waits for
// nothing, and finds its own words in the error.
func TestRunAbort(t *testing.T) {
	s := startServer(t, nil)
	c := s.dial(t)
	ready := newSignal("ready")
	cause := errors.New("domain stopped: shut off by the guest")
	var aborted time.Time
	go func() {
		<-ready.seen
		for _, pid := range s.connections() {
			stopProcess(pid)
		}
		aborted = time.Now()
		c.Abort(cause)
	}()
	err := c.Run(t.Context(), Command{Shell: "bash", Script: strings.NewReader("printf ready; sleep 60"), Stdout: ready})
	if took := time.Since(aborted); took > time.Second {
		t.Errorf("took %v", took)
	}
	if !errors.Is(err, ErrLost) || !errors.Is(err, cause) {
		t.Errorf("error %v, want ErrLost and the cause", err)
	}
}

// TestRunConcurrent sees that scripts on one connection do not mix.
func TestRunConcurrent(t *testing.T) {
	c := startServer(t, nil).dial(t)
	var all sync.WaitGroup
	for i := range 5 {
		all.Go(func() {
			want := strings.Repeat(strconv.Itoa(i), 1<<20)
			stdout, _, err := run(t, c, "bash", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' %d; exit %d", len(want), i, i))
			var exit *ExitError
			errors.As(err, &exit)
			if (i == 0) != (err == nil) || exit != nil && exit.Code != i {
				t.Errorf("script %d: %v", i, err)
			}
			if sha256.Sum256([]byte(stdout)) != sha256.Sum256([]byte(want)) {
				t.Errorf("script %d: other output", i)
			}
		})
	}
	all.Wait()
}

// TestLoginShells runs a script by way of each kind of login shell: it is
// executed by bash as such, started anew or not, and marked.
func TestLoginShells(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	posix := t.TempDir() + "/sh" // bash by the name of sh is another shell
	if err := os.Symlink(bash, posix); err != nil {
		t.Fatal(err)
	}
	const script = "echo \"${BASH##*/} ${SHELLOPTS//*posix*/posix}\" | grep -v posix\n" +
		"env | grep ^LIBVIRT_DRIVER; echo \"<$LIBVIRT_DRIVER_SCRIPT>\"; cat; echo é; (exit 3)"
	for _, login := range []string{bash, "dash", posix} {
		line, err := new(Client).invocation("bash", "mark")
		if err != nil {
			t.Fatal(err)
		}
		shell := exec.Command(login, "-c", line)
		shell.Stdin = bytes.NewReader(new(Client).input("bash", "mark", []byte(script)))
		shell.Env = []string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"}
		out, err := shell.CombinedOutput()
		lines := strings.SplitN(string(out), "\n", 2)
		if !strings.HasPrefix(lines[0], "bash ") || len(lines) < 2 || lines[1] != "LIBVIRT_DRIVER_RUN=mark\n<>\né\n" {
			t.Errorf("%s: %q", login, out)
		}
		if shell.ProcessState.ExitCode() != 3 {
			t.Errorf("%s: %v, want status 3", login, err)
		}
	}
}

// TestCommandLine sees that what the guest's login shell gets is fixed but for
// the marker.
func TestCommandLine(t *testing.T) {
	for _, windows := range []bool{false, true} {
		c := &Client{windows: windows}
		for _, shell := range []string{"bash", "sh", "pwsh", "powershell"} {
			a, errA := c.invocation(shell, strings.Repeat("a", 32))
			b, errB := c.invocation(shell, strings.Repeat("b", 32))
			if windows && shell != "pwsh" && shell != "powershell" {
				if errA == nil || errB == nil {
					t.Errorf("%s on Windows: no error", shell)
				}
				continue
			}
			if errA != nil || errB != nil {
				t.Fatal(errA, errB)
			}
			if !windows {
				b = strings.ReplaceAll(b, strings.Repeat("b", 32), strings.Repeat("a", 32))
			}
			if a != b {
				t.Errorf("%q and %q", a, b)
			}
			// cmd.exe takes 8191 characters.
			if windows && (len(a) > 8000 || strings.ContainsAny(a, "&|<>^%\"'")) {
				t.Errorf("not for cmd.exe: %q", a)
			}
		}
	}
	a, b := newMarker(), newMarker()
	if len(a) != 32 || strings.Trim(a, "0123456789abcdef") != "" || a == b {
		t.Errorf("markers %q and %q", a, b)
	}
}
