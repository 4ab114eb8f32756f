//go:build integration

package integration

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// A guest is waited for as long as it runs, and no longer.
func TestPrepareFailsAtOnceWhenTheGuestStops(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		image, complaint string
		stop             func(t *testing.T, machine string)
	}{
		"powers off": {
			image:     `cmdline = "console=ttyS0 no_timer_check rdinit=/bin/poweroff -- -f"`,
			complaint: "is shut off (the guest powered off)",
		},
		"is destroyed": {
			complaint: "is shut off (destroyed)",
			stop:      func(t *testing.T, machine string) { virsh(t, "destroy", machine) },
		},
		"is paused": {
			complaint: "is paused (by a user)",
			stop:      func(t *testing.T, machine string) { virsh(t, "suspend", machine) },
		},
		"loses its QEMU": {
			complaint: "is shut off (QEMU or the guest crashed)",
			stop: func(t *testing.T, machine string) {
				if err := syscall.Kill(qemu(t, machine), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				untilState(t, machine, "shut off")
			},
		},
		"is removed": {
			complaint: "is gone",
			stop:      func(t *testing.T, machine string) { virsh(t, "undefine", machine); virsh(t, "destroy", machine) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			job := newJob(runner.Job{})
			ex, call := midway(t, newSettings(t, tiny(test.image)).runner(t), job, "  machine ")
			if test.stop != nil {
				test.stop(t, machineOf(job))
			}
			stopped := time.Now()
			r := call.Wait(t.Context())
			want(t, ex, r, 2, machineOf(job)+" "+test.complaint, "The last lines of the guest's console")
			if took := r.Ended.Sub(stopped); test.stop != nil && took > 15*time.Second {
				t.Errorf("prepare waited for %v more", took)
			}
			wantWithin(t, r, 2*time.Minute)
		})
	}
}

// What KVM does on this machine, whatever it offers.
const (
	works = "works" // a kernel without a disk comes to its end
	fails = "fails" // QEMU says that it cannot go on
	hangs = "hangs" // neither, which nobody can tell from a slow guest
)

// kvm tells which, of the processor that a machine has: with another, QEMU may fail elsewhere.
var kvm = sync.OnceValue(func() string {
	out, err := exec.Command("timeout", "20", "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nographic", "-no-reboot",
		"-kernel", filepath.Join(images, "tiny-vmlinux"), "-append", "console=ttyS0 panic=-1 root=/dev/none").CombinedOutput()
	const timedOut = 124
	var exit *exec.ExitError
	switch text := string(out); {
	case err == nil && strings.Contains(text, "Linux version"):
		return works
	case errors.As(err, &exit) && exit.ExitCode() == timedOut && !strings.Contains(text, "KVM internal error") && !strings.Contains(text, "kvm run failed"):
		return hangs
	}
	return fails
})

// Hosts that offer KVM but cannot use it, as nested virtualisation often does, pause the guest within seconds. Where
// KVM works the job's machine does, and where a guest hangs in it prepare waits no longer than it may.
func TestUnderKVMAGuestWorksOrPrepareSaysWhyNot(t *testing.T) {
	t.Parallel()
	does := kvm()
	t.Logf("KVM %s here", does)
	s := newSettings(t, strings.Replace(tiny("", "[timeouts]", `address = "40s"`), `virt_type = "qemu"`, `virt_type = "kvm"`, 1))
	ex := start(t, s.runner(t), newJob(runner.Job{}))
	r := ex.Prepare(t.Context())
	wantWithin(t, r, time.Minute)
	_, err := tryVirsh("domcapabilities", "--virttype", "kvm")
	switch {
	case does == works:
		want(t, ex, r, 0)
		output(t, ex, "true")
	case does == hangs:
		want(t, ex, r, 2, "  machine  started", "on KVM", "none after 40s (timeouts.address)", "The last lines of the guest's console")
	case err != nil:
		want(t, ex, r, 2, "the host cannot run guests of type kvm", "virt_type")
	case strings.Contains(string(r.Stderr), "  machine  started"):
		want(t, ex, r, 2, "is paused", `set virt_type = "qemu"`, "The last lines of the guest's console")
	default: // QEMU gave up before the guest's first instruction
		want(t, ex, r, 2, "start machine", `set virt_type = "qemu"`)
	}
}

func TestTheConsoleOfAGuestThatDoesNotBootIsInTheJobLog(t *testing.T) {
	t.Parallel()
	s := newSettings(t, tiny(`cmdline = "console=ttyS0 no_timer_check rdinit=/no-such-init root=/dev/none"`, "[timeouts]", `address = "25s"`))
	cfg := s.runner(t)
	cfg.Env = nil // in colours, and with a section that GitLab can fold away
	ex := start(t, cfg, newJob(runner.Job{}))
	want(t, ex, ex.Prepare(t.Context()), 2, "none after 25s (timeouts.address)", "Kernel panic", "section_start:", ":guest_console\r", "section_end:")
}

// lose runs a script in a machine of the test's own, during which the guest is lost, and checks that this is not the
// job's failure and that later sub-stages do not wait for the guest.
func lose(t *testing.T, text, script string, how func(machine string), complaint string) {
	t.Helper()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, text).runner(t), job)
	call := ex.StartRun("build_script", "set -e; echo begun\n"+script+"\nsleep 600")
	waitFor(t, call, "begun\n")
	lost := time.Now()
	if how != nil {
		how(machineOf(job))
	}
	r := call.Wait(t.Context())
	want(t, ex, r, 2, complaint)
	wantNoExitCode(t, ex)
	if took := r.Ended.Sub(lost); took > time.Minute {
		t.Errorf("the sub-stage went on for %v", took)
	}
	for _, stage := range []string{"after_script", "cleanup_file_variables"} {
		r := ex.Run(t.Context(), stage, "true")
		want(t, ex, r, 2, complaint)
		wantWithin(t, r, 15*time.Second)
	}
	cleanUp(t, ex, job)
}

func TestAGuestThatPowersOffInAScriptIsTheSystemsFailure(t *testing.T) {
	t.Parallel()
	lose(t, tiny(""), "sudo poweroff -f", nil, "is shut off (the guest powered off)")
}

func TestAGuestThatIsDestroyedInAScriptIsTheSystemsFailure(t *testing.T) {
	t.Parallel()
	lose(t, tiny(""), "", func(machine string) { virsh(t, "destroy", machine) }, "is shut off (destroyed)")
}

// The script's processes go first, and look as if they had failed by themselves.
func TestAGuestThatShutsDownInOrderInAScriptIsTheSystemsFailure(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, emulated).runner(t)
	job := newJob(runner.Job{Script: []string{"sudo systemctl poweroff", "sleep 600"}, AfterScript: []string{"true"}})
	o := runJob(t, cfg, job)
	if o.FailureReason != runner.RunnerSystemFailure || !strings.Contains(string(o.Log), "is shut off (the guest powered off)") {
		t.Errorf("the job ends with %s: %v\n%s", o.FailureReason, o.Err, o.Log)
	}
	after := false
	for _, r := range o.Calls {
		if after && r.Stage == "run" {
			wantWithin(t, r, 15*time.Second)
			if r.ExitCode != 2 {
				t.Errorf("%s exits with %d: %s", r.Name(), r.ExitCode, r.Stderr)
			}
		}
		after = after || r.SubStage == "build_script"
	}
}

// The runner does so when a sub-stage has ignored its SIGTERM for minutes.
func TestCleanupEndsAScriptThatStillRuns(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny("")).runner(t), job)
	call := ex.StartRun("build_script", "echo begun; sleep 600")
	waitFor(t, call, "begun\n")
	cleanUp(t, again(t, ex), job)
	want(t, ex, call.Wait(t.Context()), 2, machineOf(job)+" is ")
}
