//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/driver/doctor"
)

// patient is a host on which all is well: settings, and a pool, a network, a key, a kernel and a folder for logs of its
// own, so that each can be spoilt.
type patient struct {
	settings          settings
	dir, pool, volume string
	network           network
	key, kernel, logs string
	config            map[string]string // keys of the image
	top               []string          // lines before the first table
	args              []string          // of the doctor
}

func newPatient(t *testing.T) *patient {
	t.Helper()
	// libvirt leaves the folder that it makes for networks that start with the host.
	t.Cleanup(func() { _ = os.Remove("/etc/libvirt/qemu/networks/autostart") })
	dir := newFolder(t)
	p := &patient{
		dir: dir, pool: newPool(t, dir), volume: filepath.Join(dir, "tiny.qcow2"), network: newNetwork(t, true),
		key: filepath.Join(dir, "id_rsa"), kernel: filepath.Join(dir, "vmlinuz"), logs: filepath.Join(dir, "logs"),
		top: []string{`virt_type = "qemu"`},
	}
	command(t, "cp", filepath.Join(images, "tiny.qcow2"), p.volume)
	command(t, "cp", filepath.Join(images, "tiny-vmlinux"), p.kernel)
	command(t, "install", "-m", "600", "/root/.ssh/id_rsa", p.key)
	if err := os.Mkdir(p.logs, 0o755); err != nil {
		t.Fatal(err)
	}
	virsh(t, "pool-refresh", p.pool)
	virsh(t, "pool-autostart", p.pool)
	virsh(t, "net-autostart", p.network.name)
	p.config = map[string]string{
		"volume": "tiny.qcow2", "pool": p.pool, "network": p.network.name, "key": p.key, "memory": "256 MiB",
		"kernel": p.kernel, "initrd": filepath.Join(images, "tiny-initrd"),
	}
	p.settings = newSettings(t, "")
	p.write(t)
	return p
}

// write writes the settings anew.
func (p *patient) write(t *testing.T) {
	t.Helper()
	text := strings.Join(p.top, "\n") + fmt.Sprintf("\nlog_dir = %q\n\n[images.tiny]\n", p.logs)
	for _, key := range []string{"volume", "format", "pool", "network", "address", "key", "memory", "kernel", "initrd", "filter"} {
		if value, ok := p.config[key]; ok {
			text += fmt.Sprintf("%s = %q\n", key, value)
		}
	}
	p.settings.write(t, text)
}

// examine has the doctor look at the host, and returns its exit code and what it found.
func (p *patient) examine(t *testing.T, args ...string) (exit int, findings []doctor.Finding) {
	t.Helper()
	args = append(append([]string{"--config", string(p.settings), "doctor", "--json"}, p.args...), args...)
	exit, stdout, stderr := call(t, args...)
	if err := json.Unmarshal([]byte(stdout), &findings); err != nil {
		t.Fatalf("%v: exit code %d\n%s\n%s", err, exit, stdout, stderr)
	}
	return exit, findings
}

// wantWell checks that the doctor finds nothing wrong.
func (p *patient) wantWell(t *testing.T, when string) {
	t.Helper()
	exit, findings := p.examine(t)
	for _, f := range findings {
		if f.Level != doctor.OK {
			t.Errorf("%s: %+v", when, f)
		}
	}
	if exit != 0 {
		t.Errorf("%s: exit code %d", when, exit)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// Not parallel: some of the faults are those of all of the host, and machines that other tests leave would be found.
func TestDoctorNamesEachFaultOfAHostAndItsRemedyMendsIt(t *testing.T) {
	set := func(key, value string) func(*testing.T, *patient) {
		return func(t *testing.T, p *patient) { p.config[key] = value; p.write(t) }
	}
	top := func(line string) func(*testing.T, *patient) {
		return func(t *testing.T, p *patient) { p.top = append(p.top, line); p.write(t) }
	}
	run := func(format string) func(*testing.T, *patient) {
		return func(t *testing.T, p *patient) {
			command(t, "bash", "-euc", strings.NewReplacer("POOL", p.pool, "NETWORK", p.network.name, "BRIDGE", p.network.bridge,
				"VOLUME", p.volume, "DIR", p.dir, "KEY", p.key, "KERNEL", p.kernel, "LOGS", p.logs, "SETTINGS", string(p.settings),
			).Replace(format))
		}
	}
	newPatient(t).wantWell(t, "without any fault")
	for _, fault := range []struct {
		name  string
		check string // that finds it
		says  string // part of what is found
		level doctor.Level
		plant func(*testing.T, *patient)
	}{
		{"a setting is written wrong", "settings", "virt_typ: is not a known key", doctor.Failure,
			func(t *testing.T, p *patient) { p.top = []string{`virt_typ = "qemu"`}; p.write(t) }},
		{"others may write the settings", "settings", "others than its owner may write", doctor.Failure, run("chmod 666 SETTINGS")},
		{"the settings name a socket that is not there", "socket", "nothing answers at /run/no-such-socket", doctor.Failure,
			top(`socket = "/run/no-such-socket"`)},
		{"libvirtd does not run", "socket", "libvirtd does not run", doctor.Failure,
			func(t *testing.T, p *patient) { endLibvirtd(t) }},
		{"libvirtd does not answer", "socket", "does not answer", doctor.Failure,
			func(t *testing.T, p *patient) {
				if err := syscall.Kill(libvirtd(t), syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}},
		// host.sh's libvirtd offers KVM, as the machine does, and QEMU cannot use it, or finds something else there.
		{"KVM is there and does not work", "kvm", "a guest on it does not run", doctor.Failure,
			func(t *testing.T, p *patient) {
				if kvm() != fails {
					command(t, "mount", "--bind", "/dev/null", "/dev/kvm")
					t.Cleanup(func() { command(t, "umount", "/dev/kvm") })
				}
				p.top = []string{`virt_type = "kvm"`}
				p.write(t)
			}},
		{"a guest has more memory than the host", "memory", "it never fits", doctor.Failure, set("memory", "1 TiB")},
		{"the pool does not run", "pool", "does not run", doctor.Failure, run("virsh pool-destroy POOL")},
		{"the pool is not there", "pool", "there is no such pool", doctor.Failure, run("virsh pool-destroy POOL; virsh pool-undefine POOL")},
		{"the pool does not start with the host", "pool", "not after a restart", doctor.Warning, run("virsh pool-autostart --disable POOL")},
		{"more of the pool is reserved than it has", "space", "jobs wait", doctor.Failure, top(`reserve_disk = "16 TiB"`)},
		{"the base volume is called otherwise", "volume", "there is no volume tiny.qcow2 in pool", doctor.Failure, run("mv VOLUME DIR/tiny.qcow; virsh pool-refresh POOL")},
		{"the base volume has another format", "volume", "is qcow2, and the settings say raw", doctor.Failure, set("format", "raw")},
		{"the base volume is of another program", "volume", "is vmdk, and the settings say qcow2", doctor.Failure,
			run("qemu-img convert -f qcow2 -O vmdk VOLUME VOLUME.vmdk; mv VOLUME.vmdk VOLUME")},
		{"the base volume is an overlay", "volume", "is itself an overlay", doctor.Failure,
			run("mv VOLUME DIR/under; qemu-img create -q -f qcow2 -b DIR/under -F qcow2 VOLUME; virsh pool-refresh POOL")},
		{"the base volume keeps its data elsewhere", "volume", "keeps its data in another file", doctor.Failure,
			run("rm VOLUME; qemu-img create -q -f qcow2 -o data_file=DIR/data VOLUME 64M; virsh pool-refresh POOL")},
		{"QEMU's user does not get to the base volume", "volume", "does not get through the folder", doctor.Failure, run("chmod 700 DIR")},
		{"another domain writes to the base volume", "writers", "has tiny.qcow2 as its disk vda", doctor.Failure,
			func(t *testing.T, p *patient) {
				name := "writer-of-" + p.pool
				virsh(t, "define", document(t, `<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><os><type>hvm</type></os>
					<devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='%s'/><target dev='vda' bus='virtio'/></disk></devices></domain>`,
					name, p.volume))
				t.Cleanup(func() { virsh(t, "undefine", name) })
			}},
		{"the network does not run", "network", "does not run", doctor.Failure, run("virsh net-destroy NETWORK")},
		{"the network is not there", "network", "there is no such network", doctor.Failure, run("virsh net-destroy NETWORK; virsh net-undefine NETWORK")},
		{"the network has no DHCP", "addresses", "has no DHCP", doctor.Failure,
			func(t *testing.T, p *patient) {
				virsh(t, "net-update", p.network.name, "delete", "ip-dhcp-range", p.network.lends(2, 254), "--live", "--config")
				set("address", "lease")(t, p)
			}},
		{"the network lends too few addresses", "addresses", "lends 3 addresses, too few for 5 jobs at once", doctor.Failure,
			func(t *testing.T, p *patient) {
				p.args = []string{"--concurrent", "5"}
				virsh(t, "net-update", p.network.name, "delete", "ip-dhcp-range", p.network.lends(2, 254), "--live", "--config")
				virsh(t, "net-update", p.network.name, "add-last", "ip-dhcp-range", p.network.lends(7, 9), "--live", "--config")
			}},
		{"the bridge holds packets back", "bridge", "has STP on", doctor.Warning,
			run("virsh net-dumpxml NETWORK | sed \"s/stp='off'/stp='on'/\" | virsh net-define /dev/stdin; ip link set BRIDGE type bridge stp_state 1")},
		{"the network filter is not there", "filter", "there is no filter clean-traffic", doctor.Failure, run("virsh nwfilter-undefine clean-traffic")},
		{"the network filter is called otherwise", "filter", "there is no filter clean-trafic", doctor.Failure, set("filter", "clean-trafic")},
		{"the kernel is called otherwise", "kernel", "there is no", doctor.Failure, run("mv KERNEL KERNEL-2")},
		{"the key is not there", "key", "there is no", doctor.Failure, run("rm KEY")},
		{"everybody may read the key", "key", "others than its owner may read it (mode 0644)", doctor.Failure, run("chmod 644 KEY")},
		{"the key has a passphrase", "key", "protected by a passphrase", doctor.Failure, run("ssh-keygen -q -p -N secret -f KEY")},
		{"the key is the public half", "key", "the driver needs the private one", doctor.Failure,
			func(t *testing.T, p *patient) {
				command(t, "bash", "-c", fmt.Sprintf("ssh-keygen -y -f %[1]s >%[1]s.pub && chmod 600 %[1]s.pub", p.key))
				set("key", p.key+".pub")(t, p)
			}},
		{"the folder for logs is not there", "log_dir", "there is no folder", doctor.Failure, run("rmdir LOGS")},
		{"the folder for logs cannot be written to", "log_dir", "mounted read-only", doctor.Failure,
			func(t *testing.T, p *patient) {
				command(t, "mount", "-t", "tmpfs", "-o", "mode=755", "logs", p.logs)
				t.Cleanup(func() { command(t, "umount", p.logs) })
				command(t, "mount", "-o", "remount,ro", p.logs)
			}},
		{"everybody may write the locks", "locks", "others may write", doctor.Failure, run("mkdir -p /run/libvirt-driver; chmod 777 /run/libvirt-driver")},
		{"a machine is left of a job that is over", "leftovers", "older than 24h0m0s", doctor.Warning,
			run("virsh vol-create-as POOL runner-1-project-42-concurrent-0-job-1999.qcow2 1M --format qcow2; touch -d yesterday-2hours DIR/runner-*.qcow2; virsh pool-refresh POOL")},
	} {
		t.Run(fault.name, func(t *testing.T) {
			p := newPatient(t)
			fault.plant(t, p)

			exit, findings := p.examine(t)
			var found doctor.Finding
			for _, f := range findings {
				if f.Check == fault.check && f.Level != doctor.OK {
					found = f
				}
			}
			exits := map[doctor.Level]int{doctor.Failure: 1, doctor.Warning: 2}
			if found.Level != fault.level || exit != exits[fault.level] || !strings.Contains(found.Found, fault.says) {
				t.Errorf("exit code %d, the finding is %+v, of\n%+v", exit, found, findings)
			}
			t.Logf("%s: %s\n%s", found.Check, found.Found, found.Remedy)
			p.mend(t, found.Remedy)
			p.wantWell(t, "after the remedy")
		})
	}
}

// mend runs a remedy as an administrator does who knows the key's passphrase.
func (p *patient) mend(t *testing.T, remedy string) {
	t.Helper()
	ask := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(ask, []byte("#!/bin/sh\necho secret\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", remedy)
	cmd.Env = append(os.Environ(), "SSH_ASKPASS="+ask, "SSH_ASKPASS_REQUIRE=force")
	// A daemon that it starts keeps its output open.
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); remedy == "" || err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("the remedy fails: %v\n%s\n%s", err, remedy, said)
	}
}

// endLibvirtd ends the private libvirtd. Somebody else starts it.
func endLibvirtd(t *testing.T) {
	t.Helper()
	pid := libvirtd(t)
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(t, "libvirtd has ended", func() bool { return syscall.Kill(pid, 0) != nil })
}

// lends writes a range of the network's addresses for virsh.
func (n network) lends(from, to int) string {
	return fmt.Sprintf("<range start='%[1]s.%[2]d' end='%[1]s.%[3]d'/>", n.prefix, from, to)
}

// wantFinding checks what the doctor found of one thing.
func wantFinding(t *testing.T, findings []doctor.Finding, check string, level doctor.Level, text string) {
	t.Helper()
	for _, f := range findings {
		if f.Check == check {
			if f.Level != level || !strings.Contains(f.Found, text) {
				t.Errorf("%s is not %s with %q: %+v", check, level, text, f)
			}
			return
		}
	}
	t.Errorf("nothing is found of %s", check)
}

func TestDoctorAsksAGuestAndLeavesNothingOfIt(t *testing.T) {
	p := newPatient(t)
	// Kernels take archives one after the other: what an image must not have, and a slow SSH server.
	p.config["initrd"] = filepath.Join(p.dir, "initrd")
	p.write(t)
	command(t, "bash", "-euc", `
		mkdir -p "$1/more/etc/ssh"
		cd "$1/more"
		echo 0123456789abcdef0123456789abcdef >etc/machine-id
		echo shared >etc/ssh/ssh_host_rsa_key
		printf '%s\n' 'HostKey /etc/ssh/ssh_host_ed25519_key' 'PasswordAuthentication no' 'UseDNS yes' >etc/ssh/sshd_config
		touch -d 2024-01-02 etc/machine-id etc/ssh/ssh_host_rsa_key
		cp "$2" ../initrd
		chmod 644 ../initrd
		find . | cpio --quiet -o -H newc >>../initrd
	`, "bash", p.dir, filepath.Join(images, "tiny-initrd"))
	exit, findings := p.examine(t, "--boot", "tiny")
	if exit != 1 {
		t.Errorf("exit code %d", exit)
	}
	for check, found := range map[string]struct {
		level doctor.Level
		text  string
	}{
		"address": {doctor.OK, p.network.prefix + "."}, "shell": {doctor.OK, "after the machine was started"},
		"bash": {doctor.OK, "5."}, "sudo": {doctor.OK, "without a password"}, "clock": {doctor.OK, "right within"},
		"machine-id": {doctor.Failure, "0123456789abcdef0123456789abcdef is in the image"},
		"host keys":  {doctor.Warning, "ssh_host_rsa_key is in the image"}, "sshd": {doctor.Warning, "UseDNS"},
		"git": {doctor.Failure, "there is none"}, "git-lfs": {doctor.Warning, "there is none"}, "gitlab-runner": {doctor.Warning, "there is none"},
		"boot costs": {doctor.Warning, "programs at random addresses"},
	} {
		wantFinding(t, findings, check, found.level, found.text)
	}
	wantGone(t, "runner-0-project-0-")

	if _, findings = p.examine(t, "--boot", "no-such-image"); findings[len(findings)-1].Level != doctor.Failure ||
		!strings.Contains(findings[len(findings)-1].Found, "no-such-image") {
		t.Errorf("an image that is not configured: %+v", findings[len(findings)-1])
	}
}

func TestDoctorThatIsToldToStopRemovesItsGuestAndOneThatIsKilledLeavesItToGC(t *testing.T) {
	p := newPatient(t)
	booted := func() (*exec.Cmd, string) {
		cmd := exec.Command(binary, "--config", string(p.settings), "doctor", "--boot", "tiny")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		machine := ""
		until(t, "the doctor's guest runs", func() bool {
			for _, domain := range strings.Fields(virsh(t, "list", "--name")) {
				if strings.HasPrefix(domain, "runner-0-project-0-") {
					machine = domain
				}
			}
			return machine != ""
		})
		return cmd, machine
	}
	cmd, machine := booted()
	told := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	if took := time.Since(told); cmd.ProcessState.ExitCode() != 1 || took > 10*time.Second {
		t.Errorf("told to stop it ended after %v: %v", took, err)
	}
	wantGone(t, machine)

	cmd, machine = booted()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	// gc waits for 5 minutes after the last that a machine's stages did.
	stage, then := filepath.Join("/run/libvirt-driver", machine+".stage"), time.Now().Add(-6*time.Minute)
	if err := os.Chtimes(stage, then, then); err != nil {
		t.Fatal(err)
	}
	if said := command(t, binary, "--config", string(p.settings), "gc"); !strings.Contains(said, "removed "+machine) || !strings.Contains(said, "is gone") {
		t.Errorf("gc says %q", said)
	}
	wantGone(t, machine)
}

// The Debian guest has all but GitLab Runner, which its tests play.
func TestDoctorFindsADebianGuestAsItIs(t *testing.T) {
	p := newPatient(t)
	p.settings.write(t, emulated)
	_, findings := p.examine(t, "--boot", "default")
	for check, text := range map[string]string{
		"bash": "5.", "git": "2.", "git-lfs": "3.", "sudo": "without a password", "machine-id": "made by the guest itself",
		"host keys": "made by the guest itself", "clock": "right within", "sshd": "nothing", "boot costs": "nothing", "boot time": "slowest: ",
	} {
		wantFinding(t, findings, check, doctor.OK, text)
	}
	wantFinding(t, findings, "gitlab-runner", doctor.Warning, "there is none")
	wantGone(t, "runner-0-project-0-")
}
