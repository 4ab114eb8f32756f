//go:build integration

// Package integration holds the tests that call the built driver as GitLab Runner does, against a real libvirtd with
// real guests. test.sh builds what they need and starts the private libvirt host (host.sh) that they run on.
//
// Tests that change what all tests share (libvirtd itself) are not parallel, and so run before those that are.
package integration

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

const (
	images   = "/var/lib/libvirt/images" // pool default
	nvram    = "/var/lib/libvirt/qemu/nvram"
	consoles = "/var/log/libvirt/qemu"
)

// binary is the built driver.
var binary = os.Getenv("LIBVIRT_DRIVER_BINARY")

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	before, err := lookAround()
	if binary == "" || err != nil {
		fmt.Fprintf(os.Stderr, "the tests need a libvirt host of their own and the built driver: run integration/test.sh (LIBVIRT_DRIVER_BINARY is %q; %v)\n", binary, err)
		os.Exit(2)
	}
	code := m.Run()
	if err := debian.remove(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: the shared guest cannot be removed:", err)
		code = 1
	}
	var left []string
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		after, err := lookAround()
		if err != nil {
			fmt.Fprintln(os.Stderr, "FAIL: cannot look at the host after the tests:", err)
			os.Exit(1)
		}
		left = nil
		for kind, things := range after {
			for _, thing := range things {
				if !slices.Contains(before[kind], thing) {
					left = append(left, kind+": "+thing)
				}
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, thing := range left {
		fmt.Fprintln(os.Stderr, "FAIL: left on the host by the tests:", thing)
		code = 1
	}
	os.Exit(code)
}

// lookAround returns, by kind, everything on the host that a machine could leave there. It asks virsh and the file
// system, and not the driver.
func lookAround() (map[string][]string, error) {
	seen, err := lookAtFiles()
	if err != nil {
		return nil, err
	}
	known, err := lookAtLibvirt()
	if err != nil {
		return nil, err
	}
	maps.Copy(seen, known)
	return seen, nil
}

// lookAtLibvirt is the part of lookAround that virsh shows.
func lookAtLibvirt() (map[string][]string, error) {
	const networks = "net-list --all --name"
	lists, err := inOneVirsh("list --all --name", "pool-list --all --name", networks)
	if err != nil {
		return nil, err
	}
	seen := map[string][]string{}
	for list, lines := range lists {
		seen["virsh "+list] = strings.Fields(strings.Join(lines, " "))
	}
	var commands []string
	for _, network := range seen["virsh "+networks] {
		commands = append(commands, "net-dhcp-leases "+network, "net-dumpxml "+network)
	}
	answers, _ := inOneVirsh(commands...) // a network that is not active has no leases, and one may be gone by now
	for command, lines := range answers {
		what, network, _ := strings.Cut(command, " ")
		for _, line := range lines {
			if fields := strings.Fields(line); what == "net-dhcp-leases" && len(fields) > 4 { // date, time, MAC, protocol, address, ...
				seen["leases of network "+network] = append(seen["leases of network "+network], fields[2]+" "+fields[4])
			}
			if kept := reservation.FindString(line); kept != "" {
				seen["reservations of network "+network] = append(seen["reservations of network "+network], kept)
			}
		}
	}
	return seen, nil
}

// inOneVirsh returns the lines that each of the commands prints; one that fails prints none. One virsh for all takes a
// fraction of the processor time of one for each, which counts where it is done again and again.
func inOneVirsh(commands ...string) (map[string][]string, error) {
	const mark = "= "
	var script strings.Builder
	for _, command := range commands {
		fmt.Fprintf(&script, "echo '%s%s\n'; %s; ", mark, command, command)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "virsh", "--quiet", "--connect", "qemu:///system", script.String()).Output()
	if err != nil {
		err = fmt.Errorf("virsh %q: %w: %s", script.String(), err, out)
	}
	lines, command := map[string][]string{}, ""
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(line, "\n")
		if next, ok := strings.CutPrefix(line, mark); ok {
			command = next
			continue
		}
		lines[command] = append(lines[command], line)
	}
	return lines, err
}

// lookAtFiles is the part of lookAround that the file system shows, processes among it. It costs little.
func lookAtFiles() (map[string][]string, error) {
	seen := map[string][]string{}
	for _, dir := range []string{
		"/var/lib/libvirt", consoles, "/etc/libvirt/qemu", "/run/libvirt/qemu", "/run/libvirt-driver",
	} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case err != nil || path == dir: // what goes away meanwhile is not there
			case strings.HasSuffix(path, ".macs"):
				// libvirt keeps this list once it has had a guest on the network; guests that are gone must not be in it.
				text, err := os.ReadFile(path)
				var guests []struct{ Domain string }
				if err == nil {
					err = json.Unmarshal(text, &guests)
				}
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("%s: %w", path, err)
				}
				for _, guest := range guests {
					seen["files"] = append(seen["files"], path+" with "+guest.Domain)
				}
			default:
				seen["files"] = append(seen["files"], path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, process := range processes {
		text, _ := os.ReadFile(process)
		args := strings.Split(string(text), "\x00")
		if strings.HasPrefix(filepath.Base(args[0]), "qemu-system-") || args[0] == "libvirt-driver" {
			seen["processes"] = append(seen["processes"], strings.Join(args[:min(5, len(args))], " "))
		}
	}
	return seen, nil
}

// reservation is an address that a network keeps for a MAC: the submatches.
var reservation = regexp.MustCompile(`<host mac='([^']*)'.* ip='([^']*)'`)

// wantGone checks that nothing of a machine is on the host, or will be once the process that cleanup has left the rest
// to is done.
func wantGone(t *testing.T, machine string) {
	t.Helper()
	left, err := leftOnHost(func(thing string) bool {
		return strings.Contains(thing, machine) || strings.Contains(thing, macAddress(machine))
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Fatalf("left on the host: %q", left)
	}
}

// leftOnHost waits, for a minute at most, until nothing on the host is a machine's, and returns what is then. While
// files and processes are left, which cost little to look at, libvirt is not asked.
func leftOnHost(ofMachine func(thing string) bool) ([]string, error) {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var left []string
		for _, look := range []func() (map[string][]string, error){lookAtFiles, lookAtLibvirt, lookAtFiles} {
			seen, err := look()
			if err != nil {
				return nil, err
			}
			for kind, things := range seen {
				for _, thing := range things {
					if ofMachine(thing) {
						left = append(left, kind+": "+thing)
					}
				}
			}
			if len(left) > 0 {
				break
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return left, nil
		}
	}
}

// exists reports whether libvirt knows the domain.
func exists(t *testing.T, domain string) bool {
	t.Helper()
	return slices.Contains(strings.Fields(virsh(t, "list", "--all", "--name")), domain)
}

func tryVirsh(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"--quiet", "--connect", "qemu:///system"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// virsh returns what virsh prints; the test ends when it fails.
func virsh(t *testing.T, args ...string) string {
	t.Helper()
	out, err := tryVirsh(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// command runs a program of the host; the test ends when it fails.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// tryCommand runs a program of the host.
func tryCommand(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

// document writes a document for virsh to a file.
func document(t *testing.T, format string, args ...any) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "document.xml")
	if err := os.WriteFile(file, fmt.Appendf(nil, format, args...), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// newFolder makes a folder of the test's own that QEMU's user can get at.
func newFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/lib/libvirt", "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// newPool starts a storage pool over the folder. Its name is the folder's.
func newPool(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Base(dir)
	definePool(t, name, dir)
	virsh(t, "pool-start", name)
	return name
}

// definePool defines a storage pool and does not start it.
func definePool(t *testing.T, name, dir string) {
	t.Helper()
	virsh(t, "pool-define-as", name, "dir", "--target", dir)
	t.Cleanup(func() {
		_, _ = tryVirsh("pool-destroy", name) // fails for one that does not run
		virsh(t, "pool-undefine", name)
	})
}

var networks atomic.Int32

// network is a libvirt network of the test's own.
type network struct{ name, bridge, prefix string }

// macs is the file in which libvirt keeps the MACs of the network's guests. It takes out those that go while the
// network is active, and never those that went meanwhile.
func (n network) macs() string { return "/var/lib/libvirt/dnsmasq/" + n.bridge + ".macs" }

// smallNetwork starts a network that lends the addresses PREFIX.2 to PREFIX.last.
func smallNetwork(t *testing.T, last int) network {
	t.Helper()
	n := defineNetwork(t, true)
	virsh(t, "net-update", n.name, "delete", "ip-dhcp-range",
		fmt.Sprintf("<range start='%[1]s.2' end='%[1]s.254'/>", n.prefix), "--config")
	virsh(t, "net-update", n.name, "add", "ip-dhcp-range", fmt.Sprintf("<range start='%[1]s.2' end='%[1]s.%d'/>", n.prefix, last), "--config")
	virsh(t, "net-start", n.name)
	return n
}

// newNetwork starts a network on a bridge of its own. dhcp tells whether libvirt hands out addresses on it. Its DHCP
// server does not first try, for three seconds, whether someone has taken an address that it never lent.
func newNetwork(t *testing.T, dhcp bool) network {
	t.Helper()
	n := defineNetwork(t, dhcp)
	virsh(t, "net-start", n.name)
	return n
}

// cautiousNetwork starts a network whose DHCP server does so, as libvirt's do that are not told otherwise.
func cautiousNetwork(t *testing.T) network {
	t.Helper()
	n := defineNetwork(t, true)
	xml := virsh(t, "net-dumpxml", "--inactive", n.name)
	virsh(t, "net-define", document(t, "%s", strings.Replace(xml, "<dnsmasq:option value='no-ping'/>", "", 1)))
	virsh(t, "net-start", n.name)
	return n
}

// defineNetwork defines a network and does not start it.
func defineNetwork(t *testing.T, dhcp bool) network {
	t.Helper()
	i := networks.Add(1)
	n := network{fmt.Sprintf("test%d", i), fmt.Sprintf("virbr-test%d", i), fmt.Sprintf("192.168.%d", 130+i)}
	ranges := ""
	if dhcp {
		ranges = fmt.Sprintf("<dhcp><range start='%[1]s.2' end='%[1]s.254'/></dhcp>", n.prefix)
	}
	virsh(t, "net-define", document(t, `<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'><name>%s</name><bridge name='%s' stp='off' delay='0'/>
		<ip address='%s.1' netmask='255.255.255.0'>%s</ip>
		<dnsmasq:options><dnsmasq:option value='no-ping'/></dnsmasq:options></network>`, n.name, n.bridge, n.prefix, ranges))
	t.Cleanup(func() {
		_, _ = tryVirsh("net-destroy", n.name) // fails for one that does not run
		virsh(t, "net-undefine", n.name)
	})
	return n
}

// silenceSSH makes every guest on the network deaf to SSH until the returned function is called.
func (n network) silenceSSH(t *testing.T) (listen func()) {
	t.Helper()
	rule := []string{"OUTPUT", "-d", n.prefix + ".0/24", "-p", "tcp", "--dport", "22", "-j", "DROP"}
	command(t, "iptables", append([]string{"-w", "-I"}, rule...)...)
	silent := true
	listen = func() {
		if silent {
			silent = false
			command(t, "iptables", append([]string{"-w", "-D"}, rule...)...)
		}
	}
	t.Cleanup(listen)
	return listen
}

// cmdline is the tiny guest's. On a busy host an emulated guest's timer is late, which Linux takes for a broken one, and
// panics, unless told no_timer_check. The kernel's tests of its own cryptography take it long, and so do programs whose
// addresses change from start to start (norandmaps): QEMU translates them anew.
const cmdline = "console=ttyS0 quiet no_timer_check cryptomgr.notests norandmaps"

// tiny returns settings with one image, the tiny guest's, that serves jobs without image:. image changes or adds to
// it, one setting a line; more is put after it.
func tiny(image string, more ...string) string {
	return `virt_type = "qemu"
default_image = "tiny"
[defaults]
volume = "tiny.qcow2"
vcpus = 1
memory = "256 MiB"
kernel = "` + images + `/tiny-vmlinux"
initrd = "` + images + `/tiny-initrd"
cmdline = "` + cmdline + `"
[images.tiny]
` + image + "\n" + strings.Join(more, "\n") + "\n"
}

// emulated are settings as with no file, but that guests are emulated: the Debian guest's.
const emulated = "virt_type = \"qemu\"\n"

// settings is the driver's settings file.
type settings string

func newSettings(t *testing.T, text string) settings {
	t.Helper()
	s := settings(filepath.Join(t.TempDir(), "config.toml"))
	s.write(t, text)
	return s
}

func (s settings) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(string(s), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// runner returns the configuration of a runner that calls the driver with these settings.
func (s settings) runner(t *testing.T) runner.Config {
	return runner.Config{
		Commands:      runner.Driver(binary, "--config", string(s)),
		Env:           append(os.Environ(), "NO_COLOR=1"),
		TempDir:       t.TempDir(),
		RetryInterval: time.Millisecond,
	}
}

var lastJob atomic.Int64

// newJob gives a job an ID that no other has.
func newJob(job runner.Job) runner.Job {
	job.ID = 2000 + lastJob.Add(1)
	return job
}

// machineOf is the name of the job's machine.
func machineOf(job runner.Job) string {
	return fmt.Sprintf("runner-1-project-42-concurrent-0-job-%d", job.ID)
}

// macAddress is a machine's MAC address.
func macAddress(machine string) string {
	sum := sha256.Sum256([]byte(machine))
	return fmt.Sprintf("52:54:%02x:%02x:%02x:%02x", sum[0], sum[1], sum[2], sum[3])
}

// macOf is the MAC address of the job's machine.
func macOf(job runner.Job) string { return macAddress(machineOf(job)) }

// start begins an attempt at a job; config has succeeded. At the test's end the job's machine is removed, and nothing
// of it may be left.
func start(t *testing.T, cfg runner.Config, job runner.Job) *runner.Executor {
	t.Helper()
	ex, err := runner.New(cfg, job)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, ex, job) })
	want(t, ex, ex.Config(t.Context()), 0)
	return ex
}

// midway starts a job and its prepare, and returns when that has said text.
func midway(t *testing.T, cfg runner.Config, job runner.Job, text string) (*runner.Executor, *runner.Call) {
	t.Helper()
	ex := start(t, cfg, job)
	call := ex.StartPrepare()
	waitFor(t, call, text)
	return ex, call
}

// again begins a further attempt at the executor's job.
func again(t *testing.T, ex *runner.Executor) *runner.Executor {
	t.Helper()
	next, err := ex.Next()
	if err != nil {
		t.Fatal(err)
	}
	want(t, next, next.Config(t.Context()), 0)
	return next
}

// remove makes the cleanup call of an attempt and checks that it leaves nothing of the job's machine.
func remove(t *testing.T, ex *runner.Executor, job runner.Job) {
	t.Helper()
	// Its folder may be gone, by an earlier cleanup.
	next, err := ex.Next()
	if err != nil {
		t.Error(err)
		return
	}
	if r := next.Cleanup(context.Background()); r.ExitCode != 0 {
		t.Errorf("cleanup exits with %d: %s", r.ExitCode, r.Stderr)
	}
	wantGone(t, machineOf(job))
}

// prepared begins an attempt whose prepare succeeds.
func prepared(t *testing.T, cfg runner.Config, job runner.Job) *runner.Executor {
	t.Helper()
	ex := start(t, cfg, job)
	want(t, ex, ex.Prepare(t.Context()), 0)
	return ex
}

// want checks that a call ended with an exit code, and that what it said has the texts.
func want(t *testing.T, ex *runner.Executor, r *runner.Result, exit int, texts ...string) {
	t.Helper()
	bad := r.ExitCode != exit || r.Signal != 0
	if bad {
		t.Errorf("%s ended with exit code %d, signal %v (%v), not with %d", r.Name(), r.ExitCode, r.Signal, r.Err, exit)
	}
	for _, text := range texts {
		if !strings.Contains(string(r.Stderr), text) {
			t.Errorf("%s does not say %q", r.Name(), text)
			bad = true
		}
	}
	if bad {
		t.Fatalf("stdout of %s:\n%.4000s\nstderr:\n%s\njob log:\n%.8000s", r.Name(), r.Stdout, r.Stderr, ex.JobLog())
	}
}

// wantWithin checks that a call took no longer than d.
func wantWithin(t *testing.T, r *runner.Result, d time.Duration) {
	t.Helper()
	if r.Duration() > d {
		t.Errorf("%s took %v, more than %v", r.Name(), r.Duration(), d)
	}
}

// output runs a script in the guest and returns what it writes to standard output.
func output(t *testing.T, ex *runner.Executor, script string) string {
	t.Helper()
	r := ex.Run(t.Context(), "step_look", script)
	want(t, ex, r, 0)
	return string(r.Stdout)
}

// waitFor waits until a call has written a text.
func waitFor(t *testing.T, call *runner.Call, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := call.WaitFor(ctx, text); err != nil {
		t.Fatal(err)
	}
}

// until waits until something is so, for a minute at most.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after a minute: %s", what)
		}
	}
}

// untilState waits until libvirt knows that a domain is in a state, as virsh domstate calls it. That a guest's QEMU has
// ended it may not find for half a minute, where it is at work on the network filters of others.
func untilState(t *testing.T, domain, state string) {
	t.Helper()
	until(t, "libvirt knows that "+domain+" is "+state, func() bool {
		time.Sleep(200 * time.Millisecond) // each look starts a program
		return strings.TrimSpace(virsh(t, "domstate", domain)) == state
	})
}

// qemu returns the process ID of a domain's QEMU.
func qemu(t *testing.T, domain string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/run/libvirt/qemu", domain+".pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
