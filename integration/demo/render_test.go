package main

import (
	"bytes"
	"strings"
	"testing"
)

const sampleLog = "\x1b[0KRunning\x1b[0;m\n" +
	"section_start:1700000000:prepare_executor\r\x1b[0K\x1b[0K\x1b[36;1mPreparing\x1b[0;m\x1b[0;m\n" +
	"one\r\n\x1b[0Ksection_start:1700000001:console[collapsed=true]\r\x1b[0KConsole\nboot\n\x1b[0Ksection_end:1700000001:console\r\x1b[0K\n\x1b[32;1mtwo\x1b[0;m\n" +
	"section_end:1700000015:prepare_executor\r\x1b[0Ksection_start:1700000015:step_script\r\x1b[0K\x1b[0KExecuting\x1b[0;m\n" +
	"section_end is a word\nsection_end:1700000016:step_script\r\x1b[0K\x1b[32;1mJob succeeded\x1b[0;m\nlast"

func TestRenderer(t *testing.T) {
	const want = "Running\n▾ Preparing\none\n▾ Console\nboot\n└ 0.0 s\ntwo\n└ 0.0 s\n▾ Executing\nsection_end is a word\n└ 0.0 s\nJob succeeded\nlast\n"
	for _, size := range []int{1, 2, 3, 7, len(sampleLog)} {
		var out bytes.Buffer
		r := &renderer{out: &out, plain: true}
		for rest := sampleLog; rest != ""; {
			n := min(size, len(rest))
			if _, err := r.Write([]byte(rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := r.flush(); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Errorf("in writes of %d:\n%q\nwant:\n%q", size, out.String(), want)
		}
	}
}

// A section's end shows when it comes, not with the next line.
func TestRendererShowsEndsAtOnce(t *testing.T) {
	var out bytes.Buffer
	r := &renderer{out: &out}
	r.Write([]byte("section_start:1:x\r\x1b[0K\x1b[0KTitle\x1b[0;m\nsection_end:2:x\r\x1b[0K"))
	if want := "\x1b[36;1m▾ \x1b[0mTitle\x1b[0;m\n\x1b[2m└ 0.0 s\x1b[0m\n"; out.String() != want {
		t.Errorf("shown: %q, want %q", out.String(), want)
	}
}

func TestCompare(t *testing.T) {
	before := []sight{{kind: "domains"}, {kind: "volumes", items: []string{"base.qcow2"}}, {kind: "leases"}}
	var out bytes.Buffer
	if left := compare(&out, before, before); len(left) > 0 || !strings.Contains(out.String(), "The job has left nothing.") {
		t.Errorf("left %q:\n%s", left, out.String())
	}
	lease := describe("leases", strings.Fields("2024-05-01 10:00:00   52:54:00:12:34:56   ipv4   192.168.122.5/24   guest   01:52:54"))
	after := []sight{{kind: "domains", items: []string{"runner-1"}}, before[1], {kind: "leases", items: []string{lease}}}
	left := compare(&out, before, after)
	if got, want := strings.Join(left, ", "), "domain runner-1, lease guest 52:54:00:12:34:56 192.168.122.5/24"; got != want {
		t.Errorf("left %q, want %q", got, want)
	}
}
