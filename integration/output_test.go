//go:build integration

package integration

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// numbers is how many lines, each with its number, make 200 MB.
const numbers = 23_460_000

func Test200MBOfOutputComeByteForByteInBoundedMemory(t *testing.T) {
	t.Parallel()
	expected, length := sha256.New(), int64(0)
	for block, i := make([]byte, 0, 1<<20), 1; i <= numbers; i++ {
		block = append(strconv.AppendInt(block, int64(i), 10), '\n')
		if len(block) > 1<<20-32 || i == numbers {
			length += int64(len(block))
			expected.Write(block)
			block = block[:0]
		}
	}
	if length < 200_000_000 {
		t.Fatalf("the test makes %d bytes", length)
	}

	log := sha256.New()
	ex := debian.executor(t, func(c *runner.Config) { c.Log, c.KeepOutput, c.Trace = log, -1, true })
	r := ex.Run(t.Context(), "build_script", fmt.Sprintf("seq 1 %d", numbers))
	want(t, ex, r, 0)
	if r.StdoutBytes != length || r.StderrBytes != 0 {
		t.Errorf("%d bytes on stdout and %d on stderr, not %d and 0", r.StdoutBytes, r.StderrBytes, length)
	}
	if got, want := log.Sum(nil), expected.Sum(nil); !bytes.Equal(got, want) {
		t.Errorf("the job log's hash is %x, not %x", got, want)
	}
	const most = 40 << 20
	if r.Trace.OwnRSS == 0 || r.Trace.OwnRSS >= most || r.Trace.Processes != 0 {
		t.Errorf("the driver's peak memory is %d bytes (at most %d), it started %d processes (0)", r.Trace.OwnRSS, most, r.Trace.Processes)
	}
	t.Logf("%d bytes in %v, the driver's peak memory %.1f MiB", r.StdoutBytes, r.Duration(), float64(r.Trace.OwnRSS)/(1<<20))
}

func TestOutputIsNotTouched(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	escaped := func(b []byte) string {
		var s strings.Builder
		for _, c := range b {
			fmt.Fprintf(&s, `\x%02x`, c)
		}
		return s.String()
	}
	for _, test := range []struct{ name, script, stdout, stderr string }{
		{"every byte there is, on both streams", "printf '" + escaped(every) + "'; printf '" + escaped(every) + "' >&2", string(every), string(every)},
		{"text that is no UTF-8", "printf 'caf\\xe9 \\xff\\xfe \\xc3\\n'", "caf\xe9 \xff\xfe \xc3\n", ""},
		{"text that is no UTF-8, in the script itself", "echo 'caf\xe9 \xff\xfe \xc3'", "caf\xe9 \xff\xfe \xc3\n", ""},
		{"CRLF", "printf 'one\\r\\ntwo\\r\\n'", "one\r\ntwo\r\n", ""},
		{"CRLF in the script itself", "echo one\r\necho two\r\n", "one\r\ntwo\r\n", ""},
		{"a last line without an end", "printf one; printf two >&2", "one", "two"},
		{"stdout and stderr", "echo out; echo err >&2; echo out again", "out\nout again\n", "err\n"},
		{"nothing", ":", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := ex.Run(t.Context(), "build_script", test.script)
			want(t, ex, r, 0)
			if string(r.Stdout) != test.stdout || string(r.Stderr) != test.stderr {
				t.Errorf("stdout %q, stderr %q; not %q and %q", r.Stdout, r.Stderr, test.stdout, test.stderr)
			}
		})
	}
}

func TestAScriptOf1MBArrivesByteForByte(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	// Characters that a shell on the way would take for something else.
	const characters = "abc XYZ 0189 $`\"\\!#&*(){}[]<>|;~?%'=\t"
	random := rand.New(rand.NewPCG(1, 2))
	var text strings.Builder
	for text.Len() < 1<<20 {
		for range 100 {
			text.WriteByte(characters[random.IntN(len(characters))])
		}
		text.WriteByte('\n')
	}
	script := "sha256sum <<'the end'\n" + text.String() + "the end\nexit 3\n"
	r := ex.Run(t.Context(), "build_script", script)
	want(t, ex, r, 1)
	wantExitCode(t, ex, 3)
	if expected := fmt.Sprintf("%x  -\n", sha256.Sum256([]byte(text.String()))); string(r.Stdout) != expected {
		t.Errorf("the guest read %q, not %q", r.Stdout, expected)
	}
}

func TestOutputStreamsWhileTheScriptRuns(t *testing.T) {
	t.Parallel()
	ex, other := debian.executor(t, nil), debian.executor(t, nil)
	call := ex.StartRun("build_script", "echo first; echo problem >&2; until [ -e /tmp/streamed ]; do sleep 0.1; done; echo last")
	waitFor(t, call, "first\n")
	waitFor(t, call, "problem\n")
	select {
	case <-call.Done():
		t.Error("the script did not wait")
	default:
	}
	want(t, other, other.Run(t.Context(), "step_other", "touch /tmp/streamed"), 0)
	r := call.Wait(t.Context())
	want(t, ex, r, 0)
	if string(r.Stdout) != "first\nlast\n" {
		t.Errorf("stdout is %q", r.Stdout)
	}
}

// The runner waits for the end of the driver's output, so the driver must not wait for that of whatever a script
// leaves running.
func TestABackgroundProcessThatHoldsTheOutputDoesNotHoldTheStage(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	r := ex.Run(t.Context(), "build_script", "sleep 3600 & echo $!; exit 5")
	want(t, ex, r, 1)
	wantExitCode(t, ex, 5)
	wantWithin(t, r, 30*time.Second)
	if r.Held() > 2*time.Second {
		t.Errorf("the driver's output was held open for %v after its end", r.Held())
	}
	want(t, ex, ex.Run(t.Context(), "after_script", "kill "+string(r.Stdout)), 0)
}

func TestAScriptFindsItsStandardInputEmptyAndNoTerminal(t *testing.T) {
	t.Parallel()
	ex := debian.executor(t, nil)
	r := ex.Run(t.Context(), "build_script", "wc --bytes; tty; echo \"terminal ${SSH_TTY-none}\"")
	want(t, ex, r, 0)
	if string(r.Stdout) != "0\nnot a tty\nterminal none\n" {
		t.Errorf("stdout is %q", r.Stdout)
	}
}
