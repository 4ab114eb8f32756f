//go:build integration

package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// A step of prepare fails, cleanup runs, the cause is repaired, and the next attempt at the same job gets one step
// further, until the last succeeds.
func TestPrepareGetsOneStepFurtherWithEveryRepair(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	command(t, "mount", "-t", "tmpfs", "-o", "mode=711", "pool", dir)
	t.Cleanup(func() { command(t, "umount", dir) })
	pool, key := filepath.Base(dir), filepath.Join(t.TempDir(), "key")
	net := defineNetwork(t, true)
	listen := net.silenceSSH(t)

	const address, ssh = "timeouts.address", "timeouts.ssh"
	values := map[string]string{
		"pool": pool, "volume": "base", "format": "qcow2", "machine": "no-such-machine", "network": "no-such-network",
		"kernel": filepath.Join(dir, "no-such-kernel"), "cmdline": "console=ttyS0 quiet no_timer_check rdinit=/bin/sh", "key": key,
		address: "3s", ssh: "3s",
	}
	s := newSettings(t, "")
	set := func(changes ...string) {
		for i := 0; i < len(changes); i += 2 {
			values[changes[i]] = changes[i+1]
		}
		image, timeouts := "", "[timeouts]\n"
		for key, value := range values {
			if name, ok := strings.CutPrefix(key, "timeouts."); ok {
				timeouts += fmt.Sprintf("%s = %q\n", name, value)
			} else {
				image += fmt.Sprintf("%s = %q\n", key, value)
			}
		}
		s.write(t, tiny(image, timeouts))
	}
	set()

	job := newJob(runner.Job{})
	ex := start(t, s.runner(t), job)
	for _, step := range []struct {
		complaint string
		repair    func()
	}{
		{"pool " + pool + ": not found", func() { definePool(t, pool, dir) }},
		{"start the pool: virsh pool-start " + pool, func() { virsh(t, "pool-start", pool) }},
		{"put the image there as base", func() {
			command(t, "qemu-img", "convert", "-O", "raw", filepath.Join(images, "tiny.qcow2"), filepath.Join(dir, "base"))
		}},
		{"not in qcow2 format", func() { set("format", "raw"); command(t, "mount", "-o", "remount,ro", dir) }},
		{"Read-only file system", func() { command(t, "mount", "-o", "remount,rw", dir) }},
		{"no-such-machine", func() { set("machine", "") }},
		{"no-such-network", func() { set("network", net.name) }},
		{"start the network: virsh net-start " + net.name, func() { virsh(t, "net-start", net.name) }},
		{"no-such-kernel", func() { set("kernel", filepath.Join(images, "tiny-vmlinux")) }},
		// The guest runs a shell on its console, and nothing else.
		{"none after 3s (timeouts.address)", func() { set("cmdline", "console=ttyS0 quiet no_timer_check", address, "300s") }},
		{"read SSH key: open " + key, func() { command(t, "cp", "/root/.ssh/id_rsa", key) }},
		{"none after 3s (timeouts.ssh)", func() { listen(); set(ssh, "300s") }},
	} {
		r := ex.Prepare(t.Context())
		want(t, ex, r, 2, step.complaint)
		cleanUp(t, ex, job)
		step.repair()
		ex = again(t, ex)
	}
	want(t, ex, ex.Prepare(t.Context()), 0)
	if got := output(t, ex, "echo the guest is there"); got != "the guest is there\n" {
		t.Errorf("a script writes %q", got)
	}
	cleanUp(t, ex, job) // while there is the pool
}

func TestAFailedPrepareIsTriedThreeTimesWithCleanupBetween(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, tiny("volume = \"no-such-volume\"")).runner(t)
	o := runJob(t, cfg, newJob(runner.Job{Script: []string{"true"}}))
	calls := strings.Join(stages(o), ", ")
	if o.FailureReason != runner.RunnerSystemFailure || calls != "config, prepare, cleanup, config, prepare, cleanup, config, prepare, cleanup" {
		t.Errorf("%s (%v) after %s", o.FailureReason, o.Err, calls)
	}
	if n := strings.Count(string(o.Log), "volume no-such-volume in pool default: not found"); n != 3 {
		t.Errorf("the log says %d times what is missing:\n%s", n, o.Log)
	}
}

// A runner that is killed, or a stage that is, cleans nothing up; the job's next attempt finds what is left.
func TestPrepareMakesRoomForItselfAfterPreparesThatWereKilled(t *testing.T) {
	t.Parallel()
	ex := start(t, newSettings(t, tiny("")).runner(t), newJob(runner.Job{}))
	for _, step := range []string{"Machine ", "  disk ", "  machine ", "  address "} {
		call := ex.StartPrepare()
		waitFor(t, call, step)
		kill(t, call)
		ex = again(t, ex)
	}
	want(t, ex, ex.Prepare(t.Context()), 0, "note: removed what an earlier attempt at this job left")
	if got := output(t, ex, "echo the guest is there"); got != "the guest is there\n" {
		t.Errorf("a script writes %q", got)
	}
}

func TestPrepareThatIsToldToStopFailsWithinSecondsAndCleanupLeavesNothing(t *testing.T) {
	t.Parallel()
	net := newNetwork(t, true)
	net.silenceSSH(t) // so that there is a moment in which the guest has an address and no more
	cfg := newSettings(t, tiny("network = \""+net.name+"\"")).runner(t)
	cfg.SystemFailure = 77
	job := newJob(runner.Job{})
	ex := start(t, cfg, job)
	for _, step := range []string{"Machine ", "  disk ", "  machine ", "  address "} {
		t.Run("after the line that begins with "+step, func(t *testing.T) {
			call := ex.StartPrepare()
			waitFor(t, call, step)
			told := time.Now()
			if err := call.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			r := call.Wait(t.Context())
			want(t, ex, r, 77, "terminated")
			if took := r.Ended.Sub(told); took > 10*time.Second {
				t.Errorf("prepare went on for %v", took)
			}
			cleanUp(t, ex, job)
			ex = again(t, ex)
		})
	}
}

// A guest may refuse the key for a moment while it boots; one that goes on refusing it is not waited for to the end.
func TestAKeyThatTheGuestRefusesFailsLongBeforeTheTimeout(t *testing.T) {
	t.Parallel()
	key := filepath.Join(t.TempDir(), "key")
	command(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	ex := start(t, newSettings(t, tiny(fmt.Sprintf("key = %q", key))).runner(t), newJob(runner.Job{}))
	begun := time.Now()
	r := ex.Prepare(t.Context())
	want(t, ex, r, 2, "image tiny refuses "+key, "the server refused the key", "authorized_keys", "The last lines of the guest's console")
	log := string(r.Stderr)
	if !strings.Contains(log, "  address ") {
		t.Errorf("the guest had no address\n%s", log)
	}
	if took := time.Since(begun); took > 2*time.Minute {
		t.Errorf("prepare took %v", took)
	}
}

func TestAnAccountThatTheGuestDoesNotHaveFailsLongBeforeTheTimeout(t *testing.T) {
	t.Parallel()
	ex := start(t, newSettings(t, tiny("user = \"nobody-here\"")).runner(t), newJob(runner.Job{}))
	r := ex.Prepare(t.Context())
	want(t, ex, r, 2, "the server refused the key", `"nobody-here"`)
	wantWithin(t, r, 2*time.Minute)
}
