package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// scripts makes a side of shell scripts. Each call's name goes to the log first.
func scripts(t *testing.T, name, log string, code map[string]string) side {
	t.Helper()
	dir := t.TempDir()
	for _, stage := range []string{"prepare", "run", "cleanup"} {
		text := fmt.Sprintf("#!/bin/sh\necho %s-%s >>%s\n%s\n", name, stage, log, code[stage])
		if err := os.WriteFile(filepath.Join(dir, stage+".sh"), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return side{name: name, commands: runner.Scripts(dir), boots: true}
}

func testBench(t *testing.T) *bench {
	return &bench{
		watch: func() (func() (boot, error), error) {
			return func() (boot, error) { return boot{}, nil }, nil
		},
		rpc:      func() []rpc { return nil },
		dir:      t.TempDir(),
		env:      os.Environ(),
		progress: &bytes.Buffer{},
	}
}

func readLog(t *testing.T, file string) []string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(text))
}

func TestCompare(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	b := testBench(t)
	m, err := b.compare(t.Context(), 3, []side{
		scripts(t, "A", log, nil), scripts(t, "B", log, map[string]string{"run": "/bin/true"}), scripts(t, "C", log, nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	var order strings.Builder
	runs := 0
	for _, call := range readLog(t, log) {
		switch name, stage, _ := strings.Cut(call, "-"); stage {
		case "prepare":
			order.WriteString(name)
		case "run":
			runs++
		}
	}
	// The warm-up, three rounds, the traced round.
	if want := "ABC" + "BCA" + "CAB" + "ABC" + "BCA"; order.String() != want {
		t.Errorf("jobs ran in the order %s, want %s", &order, want)
	}
	// Twice in each job and once more, but for the three that are traced.
	if want := (2*12+3)*len(subStages) + 12; runs != want {
		t.Errorf("%d run calls, want %d", runs, want)
	}
	for side, jobs := range m.timed {
		if len(jobs) != 3 {
			t.Errorf("side %d has %d timed jobs, want 3", side, len(jobs))
		}
		for _, j := range jobs {
			if len(j.runs) != len(subStages) || len(j.atRest) != len(subStages) || j.prepare.Trace != nil {
				t.Errorf("side %d: %d and %d runs, traced: %v", side, len(j.runs), len(j.atRest), j.prepare.Trace != nil)
			}
		}
	}
	for side, want := range []int{0, 1, 0} {
		trace := m.traced[side][0].runs[0].Trace
		if trace == nil || trace.Processes != want || trace.PeakRSS == 0 {
			t.Errorf("side %d: trace of run %+v, want %d processes", side, trace, want)
		}
	}
	if lines := strings.Count(b.progress.(*bytes.Buffer).String(), "\n"); lines != 15 {
		t.Errorf("%d lines of progress, want 15", lines)
	}
}

// The percentiles are of the driver's jobs alone, with nothing beside them.
func TestTail(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	b := testBench(t)
	m, err := b.tail(t.Context(), 2, []side{
		scripts(t, "A", log, map[string]string{"prepare": "exit 1"}), scripts(t, "B", log, nil), scripts(t, "C", log, nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	if calls := readLog(t, log); len(calls) != 2*3*(2+len(subStages)) {
		t.Errorf("%d calls: %q", len(calls), calls)
	}
	if len(m.timed[0]) != 0 || len(m.timed[1]) != 2 || len(m.timed[2]) != 2 {
		t.Errorf("%d, %d and %d jobs", len(m.timed[0]), len(m.timed[1]), len(m.timed[2]))
	}
	var r report
	m.addTail(&r)
	if len(r.sections) != 1 || !strings.Contains(r.sections[0].caption, "of 2 jobs") || len(r.sections[0].table.rows) != 2*5 {
		t.Errorf("report: %+v", r.sections)
	}
}

// A job that fails ends the comparison with the call, its end and its output,
// and its machine is removed.
func TestCompareFails(t *testing.T) {
	for _, stage := range []string{"prepare", "run", "cleanup"} {
		log := filepath.Join(t.TempDir(), "log")
		failing := scripts(t, "A", log, map[string]string{stage: "echo no room >&2\nexit $SYSTEM_FAILURE_EXIT_CODE"})
		_, err := testBench(t).compare(t.Context(), 1, []side{failing, failing})
		if err == nil {
			t.Errorf("%s fails, compare does not", stage)
			continue
		}
		for _, part := range []string{"warm-up", "A", stage, "exit status 2", "no room"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s fails: error %q does not say %q", stage, err, part)
			}
		}
		calls := readLog(t, log)
		if last := calls[len(calls)-1]; last != "A-cleanup" {
			t.Errorf("%s fails: the last call is %s", stage, last)
		}
	}
}

func TestCompareIsInterrupted(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	slow := scripts(t, "A", log, map[string]string{"prepare": "exec sleep 60"})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the test says so")
	defer cancel(why)
	go func() {
		for ctx.Err() == nil {
			if text, _ := os.ReadFile(log); bytes.Contains(text, []byte("A-prepare")) {
				cancel(why)
			}
			time.Sleep(time.Millisecond)
		}
	}()
	began := time.Now()
	if _, err := testBench(t).compare(ctx, 1, []side{slow, slow}); !errors.Is(err, why) || strings.Contains(err.Error(), "exit") {
		t.Errorf("compare ended with %v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("compare took %v to end", took)
	}
	if got, want := strings.Join(readLog(t, log), " "), "A-prepare A-cleanup"; got != want {
		t.Errorf("calls %q, want %q", got, want)
	}
}

// What a call leaves behind is waited for, and counted.
func TestAJobIsOverWithWhatItLeftBehind(t *testing.T) {
	if err := adoptAll(); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "log")
	begun := filepath.Join(t.TempDir(), "begun")
	leaving := scripts(t, "A", log, map[string]string{
		"prepare": "rm -f " + begun,
		"cleanup": `setsid sh -c 'touch ` + begun + `; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo A-left >>` + log + `' </dev/null >/dev/null 2>&1 &
while [ ! -e ` + begun + ` ]; do sleep 0.01; done`,
	})
	b := testBench(t)
	for _, k := range []kind{whole, traced} {
		j, err := b.job(t.Context(), leaving, k)
		if err != nil {
			t.Fatal(err)
		}
		if calls := readLog(t, log); calls[len(calls)-1] != "A-left" {
			t.Errorf("kind %v: the job is over after %v", k, calls)
		}
		if k != traced && (len(j.left) != 1 || j.left[0].cpu < 0.01 || j.left[0].peak == 0) {
			t.Errorf("left behind: %+v", j.left)
		}
	}
}

func TestServiceBesideAJob(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	up := filepath.Join(t.TempDir(), "up")
	program := filepath.Join(t.TempDir(), "driver")
	text := fmt.Sprintf("#!/bin/sh\ncase $1 in\nserve) trap 'echo service-ended >>%[1]s; exit 0' TERM; sleep 0.2; touch %[2]s; while :; do sleep 0.01; done ;;\n"+
		"drain) rm %[2]s; echo service-drained >>%[1]s ;;\nesac\n", log, up)
	if err := os.WriteFile(program, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	s := scripts(t, "A", log, nil)
	s.command = []string{program}
	s.beside = &service{run: []string{"serve"}, drain: []string{"drain"}, ready: func() bool {
		_, err := os.Stat(up)
		return err == nil
	}}
	b := testBench(t)
	if _, err := b.job(t.Context(), s, traced); err != nil {
		t.Fatal(err)
	}
	calls := readLog(t, log)
	if calls[0] != "A-prepare" || !slices.Equal(calls[len(calls)-3:], []string{"A-cleanup", "service-ended", "service-drained"}) {
		t.Errorf("calls %q", calls)
	}
	s.beside.run = []string{"fails"}
	if _, err := b.job(t.Context(), s, traced); err == nil || !strings.Contains(err.Error(), "[fails] has ended") {
		t.Errorf("a service that ends at once: %v", err)
	}
}

func TestSeveral(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	b := testBench(t)
	c, err := b.crowds(t.Context(), scripts(t, "A", log, map[string]string{"prepare": "sleep 0.2"}), []int{1, 4})
	if err != nil {
		t.Fatal(err)
	}
	cells := c.table()
	if got := strings.Join(cells.header, " "); got != "jobs at once 1 4" {
		t.Errorf("header %q", got)
	}
	for i, a := range c.timed {
		if len(a.jobs) != []int{1, 4}[i] || len(c.traced[i].jobs) != len(a.jobs) || a.gone.Before(a.ended) || between(a.began, a.ended) < 0.2 {
			t.Errorf("batch %+v", a)
		}
	}
	failing := scripts(t, "B", log, map[string]string{"run": "exit 1"})
	if _, err := b.crowds(t.Context(), failing, []int{2}); err == nil {
		t.Error("jobs at once fail, crowds does not")
	}
	if calls := readLog(t, log); calls[len(calls)-1] != "B-cleanup" {
		t.Errorf("the last call is %s", calls[len(calls)-1])
	}
}
