//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

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

// What cleanup hands on is what it has read itself.
func TestAFinisherDoesNotNeedTheSettingsFile(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	machine := machineOf(job)
	s := newSettings(t, tiny(""))
	ex := prepared(t, s.runner(t), job)

	// Cleanup waits for the machine's lock, with the settings read: the file's time of access tells.
	lock, err := os.OpenFile("/run/libvirt-driver/"+machine+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-48 * time.Hour).Truncate(time.Second)
	if err := os.Chtimes(string(s), old, old); err != nil {
		t.Fatal(err)
	}
	call := ex.StartCleanup()
	until(t, "the settings have been read", func() bool {
		info, err := os.Stat(string(s))
		return err == nil && time.Unix(info.Sys().(*syscall.Stat_t).Atim.Unix()).After(old)
	})
	time.Sleep(200 * time.Millisecond) // to the end of the file
	s.write(t, "no such setting")
	lock.Close()
	want(t, ex, call.Wait(t.Context()), 0)
	wantGone(t, machine)
	s.write(t, tiny("")) // for the cleanup at the test's end
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
