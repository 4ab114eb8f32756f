//go:build integration

package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// first returns the setting by which the tiny guest executes shell commands before it starts.
func first(commands string) string {
	return fmt.Sprintf("cmdline = %q", cmdline+` rdinit=/bin/sh -- -c "`+commands+`; exec /init"`)
}

// guestFaults queues what goes wrong in a guest.
func (f *faults) guestFaults() {
	f.lostGuests()
	f.brokenServers()

	// Its cancelled scripts' processes are found by their age.
	clock := f.row("guest's clock years off", "prepare, run")
	f.add(clock, 1, f.clockOff("1999"))
	f.add(clock, 1, f.clockOff("2100"))
}

func (f *faults) clockOff(year string) func(*testing.T, *trial) {
	return func(t *testing.T, x *trial) {
		ex := x.prepared(t, f.config(t, first("date -s "+year+"-01-01")))
		if got := output(t, ex, "date +%Y"); got != year+"\n" {
			t.Errorf("the guest's year is %s", got)
		}
		x.wantOwn(t, ex)
		call := ex.StartRun("build_script", "sleep 4200 & echo begun; wait")
		waitFor(t, call, "begun\n")
		x.tell(t, call)
		if got := output(t, ex, sleepers+"sleepers 4200; echo none"); got != "none\n" {
			t.Errorf("after the script's end there are its processes: %s", got)
		}
	}
}

// script prepares a machine of its own and begins a script that does not end by itself.
func (x *trial) script(t *testing.T, cfg runner.Config, commands string) *runner.Call {
	t.Helper()
	call := x.prepared(t, cfg).StartRun("build_script", "set -e; echo begun\n"+commands+"\nsleep 600")
	waitFor(t, call, "begun\n")
	return call
}

// lose loses the guest of a script, and checks that this is not the job's failure, that the script's stage tells of it
// soon after libvirt does, and that later sub-stages do not wait for the guest.
func (x *trial) lose(t *testing.T, call *runner.Call, how func(), state, complaint string) {
	t.Helper()
	if how != nil {
		how()
	}
	var known time.Time
	x.wait(func() {
		untilState(t, x.machine(), state)
		known = time.Now()
	})
	r := x.end(t, call)
	x.wantLost(t, r, time.Hour, complaint)
	if took := r.Ended.Sub(known); took > 10*time.Second {
		t.Errorf("the sub-stage went on for %v", took)
	}
	for _, stage := range []string{"after_script", "cleanup_file_variables"} {
		x.wantLost(t, x.ex.Run(t.Context(), stage, "true"), 15*time.Second, complaint)
	}
}

// lostGuests are what ends, stops or restarts a guest while a script runs.
func (f *faults) lostGuests() {
	config := func(t *testing.T) runner.Config { return f.config(t, "") }

	paused := f.row("guest paused for good", "run")
	f.add(paused, 1, func(t *testing.T, x *trial) {
		call := x.script(t, config(t), "")
		virsh(t, "suspend", x.machine())
		x.wait(func() {
			x.wantLost(t, x.end(t, call), 2*time.Minute, "connection to the guest lost")
		})
	})
	f.add(paused, 1, func(t *testing.T, x *trial) {
		call := x.script(t, config(t), "")
		virsh(t, "suspend", x.machine())
		x.tell(t, call)
	})
	f.add(f.row("guest paused and resumed", "run"), 1, func(t *testing.T, x *trial) {
		ex := x.prepared(t, config(t))
		call := ex.StartRun("build_script", "echo begun; until [ -e /tmp/go ]; do sleep 0.1; done; echo done; exit 7")
		waitFor(t, call, "begun\n")
		virsh(t, "suspend", x.machine())
		if state := strings.TrimSpace(virsh(t, "domstate", x.machine())); state != "paused" {
			t.Errorf("the guest is %s", state)
		}
		virsh(t, "resume", x.machine())
		other := again(t, ex)
		want(t, other, other.Run(t.Context(), "step_other", "touch /tmp/go"), 0)
		r := x.end(t, call)
		want(t, ex, r, 1)
		wantExitCode(t, ex, 7)
		if string(r.Stdout) != "begun\ndone\n" {
			t.Errorf("stdout is %q", r.Stdout)
		}
	})

	// The connection goes, and the guest comes back without what the job had there.
	rebooted := f.row("guest rebooted", "run")
	const alone = "the guest still runs, but the connection to it failed"
	f.add(rebooted, 1, func(t *testing.T, x *trial) {
		call := x.script(t, config(t), "sudo reboot -f")
		x.wait(func() { x.wantLost(t, x.end(t, call), 2*time.Minute, alone) })
	})
	f.add(rebooted, 1, func(t *testing.T, x *trial) {
		call := x.script(t, config(t), "")
		virsh(t, "reset", x.machine())
		x.wait(func() { x.wantLost(t, x.end(t, call), 2*time.Minute, alone) })
	})

	f.add(f.row("guest's QEMU killed", "run"), 2, func(t *testing.T, x *trial) {
		x.lose(t, x.script(t, config(t), ""), func() {
			time.Sleep(time.Duration(x.random.Float64() * float64(time.Second)))
			if err := syscall.Kill(qemu(t, x.machine()), syscall.SIGKILL); err != nil {
				t.Error(err)
			}
		}, "shut off", "is shut off (QEMU or the guest crashed)")
	})

	f.add(f.row("guest's disk filled by the job", "run"), 1, func(t *testing.T, x *trial) {
		s := newSettings(t, fmt.Sprintf("%s[defaults]\nnetwork = %q\n", emulated, f.network.name))
		ex := x.prepared(t, s.runner(t))
		r := ex.Run(t.Context(), "build_script", `sudo fallocate -l $(($(stat -f --format '%f * %S' /))) /filled || true
			while echo more; do :; done 2>/dev/null >~/more; sudo sh -c 'while echo more; do :; done 2>/dev/null >/more'; exit 28`)
		want(t, ex, r, 1)
		wantExitCode(t, ex, 28)
		if got := output(t, ex, "echo more >~/yet || echo full"); got != "full\n" {
			t.Errorf("the guest's disk is not full: %q", got)
		}
		x.wantOwn(t, ex)
		call := ex.StartRun("build_script", "echo begun; sleep 600")
		waitFor(t, call, "begun\n")
		x.tell(t, call)
		want(t, ex, ex.Run(t.Context(), "after_script", "true"), 0)
	})
}

// brokenServers are guests with an SSH server that takes connections and no more.
func (f *faults) brokenServers() {
	const (
		silent  = "sshd accepts and says nothing"
		hanging = "sshd never authenticates"
		stop    = "sudo kill -STOP $(cat /run/sshd.pid)"
		hang    = `cat >>/etc/ssh/sshd_config <<END
AuthorizedKeysFile none
AuthorizedKeysCommand /bin/sleep 4000
AuthorizedKeysCommandUser root
END
`
	)
	// Every sub-stage makes a connection of its own.
	apart := func(t *testing.T) runner.Config {
		return newSettings(t, "keep_connection = false\n"+f.tiny("")).runner(t)
	}
	for _, server := range []struct{ what, boot, script string }{
		{silent, `sed -i 's,/usr/sbin/sshd.*,/bin/nc -ll -p 22 -e /bin/sleep 4000,' /etc/inittab`, stop},
		{hanging, `printf 'AuthorizedKeysFile none\\nAuthorizedKeysCommand /bin/sleep 4000\\nAuthorizedKeysCommandUser root\\n' >>/etc/ssh/sshd_config`,
			"sudo sh -c '" + hang + "kill -HUP $(cat /run/sshd.pid)'"},
	} {
		prepare, run := f.row(server.what, "prepare"), f.row(server.what, "run")
		f.add(prepare, 1, func(t *testing.T, x *trial) {
			call := x.start(t, f.config(t, first(server.boot), "[timeouts]", `ssh = "10s"`)).StartPrepare()
			waitFor(t, call, "  address ")
			x.wait(func() {
				x.wantLost(t, x.end(t, call), patience, "wait for the guest's SSH", "none after 10s (timeouts.ssh)")
			})
		})
		f.add(prepare, 1, func(t *testing.T, x *trial) {
			call := x.start(t, f.config(t, first(server.boot))).StartPrepare()
			waitFor(t, call, "  address ")
			x.tell(t, call)
		})
		f.add(run, 1, func(t *testing.T, x *trial) {
			ex := x.prepared(t, apart(t))
			want(t, ex, ex.Run(t.Context(), "get_sources", server.script), 0)
			x.wait(func() {
				x.wantLost(t, ex.Run(t.Context(), "build_script", "true"), 90*time.Second, "no session after 1m0s")
			})
		})
		f.add(run, 1, func(t *testing.T, x *trial) {
			ex := x.prepared(t, apart(t))
			want(t, ex, ex.Run(t.Context(), "get_sources", server.script), 0)
			x.tell(t, ex.StartRun("build_script", "true"))
		})
	}
	f.add(f.row("sshd with another host key than in prepare", "run"), 1, func(t *testing.T, x *trial) {
		ex := x.prepared(t, apart(t))
		want(t, ex, ex.Run(t.Context(), "get_sources", `sudo sh -c 'rm /etc/ssh/ssh_host_ed25519_key*
			ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key && kill -HUP $(cat /run/sshd.pid)'; sleep 1`), 0)
		for _, stage := range []string{"build_script", "after_script"} {
			x.wantLost(t, ex.Run(t.Context(), stage, "true"), 30*time.Second, "host key is not the expected one")
		}
	})
}
