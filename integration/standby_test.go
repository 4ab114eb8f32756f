//go:build integration

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// service is a standby service at work.
type service struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer // to be read when the service has ended
	done   chan struct{}
}

// serve starts a standby service, which ends with the test at the latest.
func serve(t *testing.T, s settings) *service {
	t.Helper()
	v := &service{cmd: exec.Command(binary, "--config", string(s), "standby"), done: make(chan struct{})}
	v.cmd.Stderr = &v.stderr
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.done)
		v.cmd.Wait()
	}()
	t.Cleanup(func() {
		v.stop(t, syscall.SIGTERM)
		if t.Failed() {
			t.Logf("the service said:\n%s", v.stderr.String())
		}
	})
	return v
}

// stop ends the service by a signal.
func (v *service) stop(t *testing.T, sig syscall.Signal) {
	t.Helper()
	v.cmd.Process.Signal(sig)
	select {
	case <-v.done:
	case <-time.After(30 * time.Second):
		v.cmd.Process.Kill()
		<-v.done
		t.Errorf("the service goes on after %v", sig)
	}
}

// listed is a machine as list --json shows it.
type listed struct {
	Name, Domain, Start, State, Address, Image string
	Job                                        int64
}

func list(t *testing.T, s settings) []listed {
	t.Helper()
	exit, out, stderr := call(t, "--config", string(s), "list", "--json")
	var machines []listed
	if err := json.Unmarshal([]byte(out), &machines); exit != 0 || err != nil {
		t.Fatal(exit, err, stderr)
	}
	return machines
}

// ready returns the domains that stand ready: they run, have been reached, and are nobody's.
func ready(t *testing.T, s settings) []string {
	t.Helper()
	var domains []string
	for _, m := range list(t, s) {
		if m.Start == "standby" && m.Job == 0 && m.Address != "" && m.State == "running" {
			domains = append(domains, m.Domain)
		}
	}
	slices.Sort(domains)
	return domains
}

// untilReady waits until that many stand ready, and nothing is in the making.
func untilReady(t *testing.T, s settings, n int) []string {
	t.Helper()
	var now []string
	deadline := time.Now().Add(5 * time.Minute)
	for {
		now = ready(t, s)
		all := 0
		for _, m := range list(t, s) {
			if m.Start == "standby" && m.Job == 0 {
				all++
			}
		}
		if len(now) == n && all == n {
			return now
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q stand ready, not %d", now, n)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// drain removes what stands ready and checks that nothing is left of any machine made ahead.
func drain(t *testing.T, s settings) {
	t.Helper()
	if exit, _, stderr := call(t, "--config", string(s), "standby", "--drain"); exit != 0 {
		t.Errorf("standby --drain exits with %d: %s", exit, stderr)
	}
	command(t, binary, "--config", string(s), "gc")
	wantGone(t, "libvirt-driver-standby-")
}

// Only one standby service can run on a host, so these tests are one, and run while no other does.
func TestStandby(t *testing.T) {
	net := newNetwork(t, true)
	image := fmt.Sprintf("network = %q\nhost_key = \"agent\"\nstandby = 2\nmax_vcpus = 2", net.name)
	s := newSettings(t, tiny(image))
	t.Cleanup(func() { drain(t, s) })
	cfg := s.runner(t)
	whole := t // the service outlives the parts
	v := serve(t, s)
	first := untilReady(t, s, 2)

	t.Run("a second service says that there is one", func(t *testing.T) {
		if exit, _, stderr := call(t, "--config", string(s), "standby"); exit != 1 || !strings.Contains(stderr, "another standby service runs") {
			t.Errorf("exit code %d, %q", exit, stderr)
		}
		if exit, _, stderr := call(t, "--config", string(s), "standby", "--drain"); exit != 1 || !strings.Contains(stderr, "stop it first") {
			t.Errorf("exit code %d, %q", exit, stderr)
		}
	})

	t.Run("it survives to be killed, and its machines do", func(t *testing.T) {
		v.stop(t, syscall.SIGKILL)
		command(t, binary, "--config", string(s), "gc") // which leaves them alone
		v = serve(whole, s)
		time.Sleep(5 * time.Second) // it has looked at least once
		if now := untilReady(t, s, 2); !slices.Equal(now, first) {
			t.Errorf("%q stood ready, now %q", first, now)
		}
	})

	t.Run("libvirtd restarts", func(t *testing.T) {
		stopLibvirtd(t, syscall.SIGTERM)()
		if now := untilReady(t, s, 2); !slices.Equal(now, first) {
			t.Errorf("%q stood ready, now %q", first, now)
		}
	})

	t.Run("jobs at once have one each, and a third boots", func(t *testing.T) {
		jobs := []runner.Job{newJob(runner.Job{}), newJob(runner.Job{}), newJob(runner.Job{})}
		executors := make([]*runner.Executor, len(jobs))
		calls := make([]*runner.Call, len(jobs))
		for i, job := range jobs {
			executors[i] = start(t, cfg, job)
		}
		for i, ex := range executors {
			calls[i] = ex.StartPrepare()
		}
		domains, seen := []string{}, map[string]string{}
		for i, ex := range executors {
			want(t, ex, calls[i].Wait(t.Context()), 0)
			for _, what := range []string{"cat /proc/sys/kernel/random/boot_id", "cat /etc/ssh/ssh_host_ed25519_key.pub",
				"cat /sys/class/net/eth0/address", "head -c 32 /dev/urandom | od -An -tx1"} {
				text := output(t, ex, what)
				if seen[text] != "" || len(text) < 10 {
					t.Errorf("%s: %q of %s, too", what, text, seen[text])
				}
				seen[text] = machineOf(jobs[i])
			}
			if files := output(t, ex, "ls -A ~"); strings.Contains(files, "left-by-a-job") {
				t.Errorf("what a job left is there: %q", files)
			}
			output(t, ex, "touch ~/left-by-a-job")
			if bytes.Contains(calls[i].Wait(t.Context()).Stderr, []byte("stood ready for")) {
				for _, m := range list(t, s) {
					if m.Name == machineOf(jobs[i]) {
						domains = append(domains, m.Domain)
					}
				}
			}
		}
		slices.Sort(domains)
		if !slices.Equal(domains, first) {
			t.Errorf("jobs have taken %q, ready were %q", domains, first)
		}
		for i, ex := range executors {
			want(t, ex, ex.Run(t.Context(), "build_script", "exit 7"), 1)
			wantExitCode(t, ex, 7)
			want(t, ex, ex.Cleanup(t.Context()), 0)
			wantGone(t, machineOf(jobs[i]))
		}
		for _, domain := range domains {
			wantGone(t, domain)
		}
		untilReady(t, s, 2)
	})

	t.Run("a job of another size boots", func(t *testing.T) {
		before := untilReady(t, s, 2)
		job := newJob(runner.Job{Variables: []runner.Variable{{Key: "LIBVIRT_DRIVER_VCPUS", Value: "2", Public: true}}})
		ex := prepared(t, cfg, job)
		if cpus := strings.TrimSpace(output(t, ex, "nproc")); cpus != "2" {
			t.Errorf("the guest has %s processors", cpus)
		}
		if now := ready(t, s); !slices.Equal(now, before) {
			t.Errorf("%q stood ready, now %q", before, now)
		}
	})

	t.Run("one that has died while it waited is thrown away", func(t *testing.T) {
		v.stop(t, syscall.SIGTERM)
		for _, domain := range untilReady(t, s, 2) {
			virsh(t, "destroy", domain)
		}
		ex := start(t, cfg, newJob(runner.Job{}))
		want(t, ex, ex.Prepare(t.Context()), 0, "threw a machine away", "is shut off (destroyed)")
		output(t, ex, "true")
		wantGone(t, "libvirt-driver-standby-")
		v = serve(whole, s)
		untilReady(t, s, 2)
	})

	t.Run("a prepare that is killed as it takes one", func(t *testing.T) {
		for i := range 6 {
			untilReady(t, s, 2)
			job := newJob(runner.Job{})
			ex := start(t, cfg, job)
			call := ex.StartPrepare()
			time.Sleep(time.Duration(i) * 15 * time.Millisecond)
			call.Signal(syscall.SIGKILL)
			wantKilled(t, call.Wait(t.Context()))
			remove(t, ex, job)
			command(t, binary, "--config", string(s), "gc")
		}
		untilReady(t, s, 2)
	})

	t.Run("what the settings do not ask for any more goes", func(t *testing.T) {
		old := untilReady(t, s, 2)
		v.stop(t, syscall.SIGTERM)
		s.write(t, tiny(strings.Replace(image, "standby = 2", "standby = 1\nmemory = \"4 GiB\"", 1)))
		v = serve(whole, s)
		for _, domain := range old {
			wantGone(t, domain)
		}
		now := untilReady(t, s, 1)
		if memory := virsh(t, "dominfo", now[0]); !strings.Contains(memory, "Max memory:     4194304 KiB") {
			t.Errorf("%s is not of the new size: %s", now[0], memory)
		}
	})

	t.Run("one gives way to a job that finds no room", func(t *testing.T) {
		v.stop(t, syscall.SIGTERM)
		untilReady(t, s, 1)
		// The guests' memory and one more guest's are more than there may be.
		var total, guests int
		for line := range strings.Lines(string(readFile(t, "/proc/meminfo"))) {
			fmt.Sscanf(line, "MemTotal: %d kB", &total)
		}
		for _, domain := range strings.Fields(virsh(t, "list", "--name")) {
			for line := range strings.Lines(virsh(t, "dominfo", domain)) {
				var kib int
				if n, _ := fmt.Sscanf(line, "Max memory: %d KiB", &kib); n == 1 {
					guests += kib
				}
			}
		}
		tight := newSettings(t, fmt.Sprintf("reserve_memory = \"%d MiB\"\n", (total-guests)/1024-300)+
			tiny(fmt.Sprintf("network = %q\nmemory = \"256 MiB\"", net.name), "[timeouts]", `turn = "20s"`))
		ex := start(t, tight.runner(t), newJob(runner.Job{}))
		want(t, ex, ex.Prepare(t.Context()), 0, "stood ready, to make room")
		wantGone(t, "libvirt-driver-standby-")
	})

	t.Run("a service that is killed as it makes one", func(t *testing.T) {
		v = serve(whole, s)
		until(t, "there is a domain", func() bool { return strings.Contains(virsh(t, "list", "--all", "--name"), "libvirt-driver-standby-") })
		v.stop(t, syscall.SIGKILL)
		command(t, binary, "--config", string(s), "gc")
		wantGone(t, "libvirt-driver-standby-")
	})
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
