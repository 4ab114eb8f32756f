package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	return side{name, runner.Scripts(dir)}
}

func testBench(t *testing.T) *bench {
	return &bench{
		watch: func() (func() (boot, error), error) {
			return func() (boot, error) { return boot{}, nil }, nil
		},
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
	m, err := b.compare(t.Context(), 3, [2]side{
		scripts(t, "A", log, nil), scripts(t, "B", log, map[string]string{"run": "/bin/true"}),
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
	if want := "AB" + "BA" + "AB" + "BA" + "AB"; order.String() != want {
		t.Errorf("jobs ran in the order %s, want %s", &order, want)
	}
	// Twice in each job, but for the two that are traced.
	if want := (2*8 + 2) * len(subStages); runs != want {
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
	for side, want := range []int{0, 1} {
		trace := m.traced[side][0].runs[0].Trace
		if trace == nil || trace.Processes != want || trace.PeakRSS == 0 {
			t.Errorf("side %d: trace of run %+v, want %d processes", side, trace, want)
		}
	}
	if lines := strings.Count(b.progress.(*bytes.Buffer).String(), "\n"); lines != 10 {
		t.Errorf("%d lines of progress, want 10", lines)
	}
}

// A job that fails ends the comparison with the call, its end and its output,
// and its machine is removed.
func TestCompareFails(t *testing.T) {
	for _, stage := range []string{"prepare", "run", "cleanup"} {
		log := filepath.Join(t.TempDir(), "log")
		failing := scripts(t, "A", log, map[string]string{stage: "echo no room >&2\nexit $SYSTEM_FAILURE_EXIT_CODE"})
		_, err := testBench(t).compare(t.Context(), 1, [2]side{failing, failing})
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
	if _, err := testBench(t).compare(ctx, 1, [2]side{slow, slow}); !errors.Is(err, why) || strings.Contains(err.Error(), "exit") {
		t.Errorf("compare ended with %v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("compare took %v to end", took)
	}
	if got, want := strings.Join(readLog(t, log), " "), "A-prepare A-cleanup"; got != want {
		t.Errorf("calls %q, want %q", got, want)
	}
}
