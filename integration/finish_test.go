//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"libvirt-driver/integration/runner"
)

// finisher returns the process ID of the process that finishes a machine's cleanup, 0 when there is none.
func finisher(t *testing.T, machine string) int {
	return own(t, "finish", machine)
}

func TestCleanupReturnsWhenNobodyCanUseTheMachineAnyMore(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	machine := machineOf(job)
	ex := prepared(t, newSettings(t, tiny("")).runner(t), job)
	ip := address(t, job)
	want(t, ex, ex.Cleanup(t.Context()), 0)
	if state, err := tryVirsh("domstate", machine); err == nil && strings.TrimSpace(state) == "running" {
		t.Error("the machine runs")
	}
	if pid := keeper(t, machine); pid != 0 {
		t.Errorf("process %d keeps a connection to it", pid)
	}
	if out, err := tryCommand("ping", "-c", "1", "-W", "1", ip); err == nil {
		t.Errorf("it can be reached: %s", out)
	}
	want(t, ex, again(t, ex).Cleanup(t.Context()), 0) // waits for its turn
	wantGone(t, machine)
}

func TestGCFinishesACleanupAtOnce(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	machine := machineOf(job)
	s := newSettings(t, tiny(""))
	ex := prepared(t, s.runner(t), job)
	// Killed on its way, with nobody's hands on the machine.
	pid := 0
	call := ex.StartCleanup()
	until(t, "there is a finisher", func() bool { pid = finisher(t, machine); return pid != 0 })
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	want(t, ex, call.Wait(t.Context()), 0)
	if !exists(t, machine) {
		t.Fatal("the finisher was faster than the test")
	}
	out := command(t, binary, "--config", string(s), "gc")
	if !strings.Contains(out, "removed "+machine+": its cleanup was not finished") {
		t.Errorf("gc says %q", out)
	}
	wantGone(t, machine)
}

func TestCleanupRemovesAllItselfWhereItIsToldTo(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, "early_cleanup = false\n"+tiny("")).runner(t), job)
	want(t, ex, ex.Cleanup(t.Context()), 0)
	if exists(t, machineOf(job)) || finisher(t, machineOf(job)) != 0 {
		t.Error("cleanup has left something to do")
	}
	if files, err := filepath.Glob(filepath.Join(images, machineOf(job)+"*")); err != nil || len(files) > 0 {
		t.Errorf("files are left: %v, %v", files, err)
	}
	if _, err := os.Stat("/run/libvirt-driver/" + machineOf(job) + ".stage"); err == nil {
		t.Error("the record of its stages is left")
	}
}
