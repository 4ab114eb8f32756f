//go:build integration

package integration

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"libvirt-driver/integration/runner"
)

// knownBy returns settings with the Debian guest, whose host key is known in this way. Nothing on the host lets anybody
// into the guests but the keys that the driver makes. more is put after it.
func knownBy(way string, more ...string) string {
	return emulated + "[defaults]\nkey = \"/no/such/key\"\nhost_key = \"" + way + "\"\n" + strings.Join(more, "\n") + "\n"
}

func TestAWholeJobIsGreenWithKeysOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"injected", "agent"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			job := newJob(runner.Job{
				Script:      []string{"ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub", "echo $(grep -c . ~/.ssh/authorized_keys) key", "stat --format '%U %a' ~/.ssh ~/.ssh/authorized_keys"},
				AfterScript: []string{"echo after"},
			})
			o := runJob(t, newSettings(t, knownBy(way)).runner(t), job)
			log := string(o.Log)
			if !o.Green() || len(o.RunnerLog) > 0 {
				t.Fatalf("the job has not succeeded: %v\nthe runner's log: %s\njob log:\n%s", o.Err, o.RunnerLog, log)
			}
			print := expected(t, log)
			for _, text := range []string{"256 " + print + " ", "\n1 key\n", "gitlab-runner 700\ngitlab-runner 600\n", "\nafter\n"} {
				if !strings.Contains(log, text) {
					t.Errorf("the log does not say %q:\n%s", text, log)
				}
			}
		})
	}
}

var stepOfKey = regexp.MustCompile(`(?m)^  key +(SHA256:\S+),`)

// expected returns the fingerprint of the host key that prepare says it expects.
func expected(t *testing.T, log string) string {
	t.Helper()
	found := stepOfKey.FindStringSubmatch(log)
	if found == nil {
		t.Fatalf("prepare does not say which host key it expects:\n%s", log)
	}
	return found[1]
}

// impostor is a real SSH server in the place of the guests of a network.
type impostor struct {
	rule  []string
	print string // its host key's
	log   string // path
	there bool
}

// newImpostor starts an SSH server that takes whoever comes, with the key of the host's that lets into the guests. It
// stands ready, and is not in anybody's place yet.
func newImpostor(t *testing.T, n network) *impostor {
	t.Helper()
	dir := t.TempDir()
	key := filepath.Join(dir, "host_key")
	command(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		t.Fatal(err)
	}
	const port = "2222"
	config := filepath.Join(dir, "sshd_config")
	text := fmt.Sprintf("ListenAddress %s.1\nPort %s\nHostKey %s\nPidFile none\nLogLevel DEBUG3\nUsePAM no\nStrictModes no\nAuthorizedKeysFile /root/.ssh/id_rsa.pub\n",
		n.prefix, port, key)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	i := &impostor{
		log:   filepath.Join(dir, "log"),
		print: strings.Fields(command(t, "ssh-keygen", "-l", "-f", key))[1],
		rule:  []string{"OUTPUT", "-t", "nat", "-d", n.prefix + ".0/24", "-p", "tcp", "--dport", "22", "-j", "DNAT", "--to-destination", n.prefix + ".1:" + port},
	}
	log, err := os.Create(i.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", config)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		i.stepAside(t)
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // it was killed
	})
	until(t, "the impostor listens", func() bool { return strings.Contains(i.said(t), "Server listening") })
	return i
}

func (i *impostor) said(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(i.log)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// stepIn makes the impostor answer whoever calls an SSH server of the network.
func (i *impostor) stepIn(t *testing.T) {
	t.Helper()
	command(t, "iptables", append([]string{"-w", "-I"}, i.rule...)...)
	i.there = true
}

// stepAside lets the guests answer again.
func (i *impostor) stepAside(t *testing.T) {
	if i.there {
		i.there = false
		command(t, "iptables", append([]string{"-w", "-D"}, i.rule...)...)
	}
}

// wantRefused checks that the impostor was called and that nobody tried to log in.
func (i *impostor) wantRefused(t *testing.T) {
	t.Helper()
	said := i.said(t)
	if !strings.Contains(said, "Connection from") || !strings.Contains(said, "SSH2_MSG_KEXINIT received") {
		t.Errorf("the impostor was not called:\n%s", said)
	}
	if strings.Contains(said, "userauth-request") {
		t.Errorf("somebody tried to log in:\n%s", said)
	}
}

func TestAnImpostorInPrepareIsRefused(t *testing.T) {
	t.Parallel()
	for way, settings := range map[string]func(network string) string{
		"injected": func(network string) string { return knownBy("injected", network) },
		"agent":    func(network string) string { return tiny("host_key = \"agent\"\n" + network) },
	} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			net := newNetwork(t, true)
			impostor := newImpostor(t, net)
			impostor.stepIn(t)
			ex := start(t, newSettings(t, settings(fmt.Sprintf("network = %q", net.name))).runner(t), newJob(runner.Job{}))
			r := ex.Prepare(t.Context())
			want(t, ex, r, 2, "the server's host key is not the expected one", "showed ssh-ed25519 "+impostor.print,
				"expected ssh-ed25519 "+expected(t, string(r.Stderr)), "answers at its address")
			impostor.wantRefused(t)
		})
	}
}

func TestAnImpostorBetweenPrepareAndRunIsRefused(t *testing.T) {
	t.Parallel()
	for way, settings := range map[string]func(network string) string{
		"injected": func(network string) string { return knownBy("injected", network) },
		"agent":    func(network string) string { return tiny("host_key = \"agent\"\n" + network) },
		"pinned":   func(network string) string { return tiny("host_key = \"pinned\"\n" + network) },
	} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			net := newNetwork(t, true)
			impostor := newImpostor(t, net)
			job := newJob(runner.Job{})
			ex := prepared(t, newSettings(t, settings(fmt.Sprintf("network = %q", net.name))).runner(t), job)
			impostor.stepIn(t)
			// The connection that prepare made is to the guest, whoever is at its address by now.
			if got := output(t, ex, "echo the guest is there"); got != "the guest is there\n" {
				t.Errorf("a script writes %q", got)
			}
			if said := impostor.said(t); strings.Contains(said, "Connection from") {
				t.Errorf("the impostor was called:\n%s", said)
			}
			// A sub-stage that has to log in anew comes to the impostor.
			pid := keeper(t, machineOf(job))
			if pid == 0 {
				t.Fatal("no process keeps the connection")
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			until(t, "the connection is lost", func() bool { return keeper(t, machineOf(job)) == 0 })
			pinned := fingerprint(t, job)
			r := ex.Run(t.Context(), "build_script", "echo the secret of the job")
			want(t, ex, r, 2, "the server's host key is not the expected one", "showed ssh-ed25519 "+impostor.print, "expected ssh-ed25519 "+pinned)
			wantWithin(t, r, 20*time.Second)
			impostor.wantRefused(t)
			impostor.stepAside(t)
			if got := output(t, ex, "echo the guest is there"); got != "the guest is there\n" {
				t.Errorf("a script writes %q", got)
			}
		})
	}
}

var hostKeyOf = regexp.MustCompile(`host-key>(ssh-[^<]+)<`)

// fingerprint returns that of the host key in a machine's metadata.
func fingerprint(t *testing.T, job runner.Job) string {
	t.Helper()
	found := hostKeyOf.FindStringSubmatch(virsh(t, "dumpxml", machineOf(job)))
	if found == nil {
		t.Fatal("the domain has no host key")
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	return ssh.FingerprintSHA256(key)
}

func TestAGuestWhoseAgentDoesNotTellItsKeyIsNotConnectedTo(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ before, complaint string }{
		"no agent":                  {`rm /etc/guest-agent`, "none after 8s (timeouts.ssh): asked the guest agent"},
		"one that must not":         {`sed -i s,exec.qemu-ga,exec\ qemu-ga\ -b\ guest-file-open, /etc/guest-agent`, "the guest agent does not do this"},
		"one that cannot authorize": {`sed -i /^gitlab-runner/d /etc/passwd`, "authorize a key for gitlab-runner in the guest"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			net := newNetwork(t, true)
			impostor := newImpostor(t, net)
			impostor.stepIn(t)
			ex := start(t, newSettings(t, tiny(fmt.Sprintf("network = %q\nhost_key = \"agent\"\n", net.name)+
				first(test.before),
				"[timeouts]", `ssh = "8s"`)).runner(t), newJob(runner.Job{}))
			want(t, ex, ex.Prepare(t.Context()), 2, test.complaint, "image tiny", "install and enable qemu-guest-agent in the image", `or set host_key = "pinned"`)
			if said := impostor.said(t); strings.Contains(said, "Connection from") {
				t.Errorf("connected all the same:\n%s", said)
			}
		})
	}
}

// A job owns its guest, and with it the guest's host key: what answers the driver may be anything.
func TestAGuestThatTurnsHostileGetsNothingOfTheHost(t *testing.T) {
	t.Parallel()
	network := newNetwork(t, true)
	ex := prepared(t, newSettings(t, "keep_connection = false\n"+tiny(fmt.Sprintf("network = %q", network.name))).runner(t), newJob(runner.Job{}))
	hostKey, err := ssh.ParsePrivateKey([]byte(output(t, ex, "sudo cat /etc/ssh/ssh_host_ed25519_key")))
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", network.prefix+".1:2222")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	got := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = behaveBadly(conn, hostKey)
		}
		got <- err
	}()
	rule := []string{"OUTPUT", "-t", "nat", "-d", network.prefix + ".0/24", "-p", "tcp", "--dport", "22", "-j", "DNAT", "--to-destination", listener.Addr().String()}
	command(t, "iptables", append([]string{"-w", "-I"}, rule...)...)
	defer command(t, "iptables", append([]string{"-w", "-D"}, rule...)...)
	r := ex.Run(t.Context(), "build_script", "true")
	if err := <-got; err != nil {
		t.Error(err)
	}
	want(t, ex, r, 0)
}

// behaveBadly serves one connection of the driver's and asks it for everything that a client can be asked for. The
// error tells what was granted, or was asked for by the driver.
func behaveBadly(conn net.Conn, hostKey ssh.Signer) error {
	defer conn.Close()
	config := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
	config.AddHostKey(hostKey)
	server, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return err
	}
	var asked []error
	go func() {
		for request := range requests {
			_ = request.Reply(request.Type == "keepalive@openssh.com", nil)
		}
	}()
	tryAll := func() {
		for _, kind := range []string{
			"auth-agent@openssh.com", "auth-agent", "x11", "forwarded-tcpip", "direct-tcpip", "session", "tun@openssh.com",
			"forwarded-streamlocal@openssh.com", "direct-streamlocal@openssh.com",
		} {
			var refusal *ssh.OpenChannelError
			if _, _, err := server.OpenChannel(kind, nil); !errors.As(err, &refusal) {
				asked = append(asked, fmt.Errorf("channel %s: %v", kind, err))
			}
		}
		for _, kind := range []string{"tcpip-forward", "streamlocal-forward@openssh.com", "hostkeys-00@openssh.com"} {
			if ok, _, err := server.SendRequest(kind, true, nil); ok || err != nil {
				asked = append(asked, fmt.Errorf("request %s: %v, %v", kind, ok, err))
			}
		}
	}
	for offered := range channels {
		if offered.ChannelType() != "session" {
			asked = append(asked, fmt.Errorf("the driver opens a channel %s", offered.ChannelType()))
			_ = offered.Reject(ssh.Prohibited, "")
			continue
		}
		channel, requests, err := offered.Accept()
		if err != nil {
			return err
		}
		for request := range requests {
			if request.Type != "exec" {
				asked = append(asked, fmt.Errorf("the driver asks a session for %s", request.Type))
				_ = request.Reply(false, nil)
				continue
			}
			if err := request.Reply(true, nil); err != nil {
				return err
			}
			tryAll()
			if _, err := channel.SendRequest("exit-status", false, []byte{0, 0, 0, 0}); err != nil {
				return err
			}
			if err := channel.Close(); err != nil {
				return err
			}
		}
	}
	return errors.Join(asked...)
}

// secretsOf returns pieces of the private keys of a prepared job.
func secretsOf(t *testing.T, ex *runner.Executor) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(ex.Dir(), "libvirt-driver-guest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var contact struct {
		Key string `json:"own_key"`
	}
	if err := json.Unmarshal(text, &contact); err != nil {
		t.Fatal(err)
	}
	secrets := map[string]string{}
	for whose, key := range map[string]string{"client's": contact.Key, "guest's": output(t, ex, "sudo cat /etc/ssh/ssh_host_ed25519_key")} {
		// What makes a key private is near its end: in the last line but one, for the kinds that are made here.
		lines := strings.Split(strings.TrimSpace(key), "\n")
		if len(lines) < 6 {
			t.Fatalf("the %s private key has %d lines", whose, len(lines))
		}
		secrets[whose] = lines[len(lines)-3]
	}
	return secrets
}

// seek reports every file below the folders that holds one of the texts, plain or in base64, and for which look is so.
func seek(t *testing.T, secrets map[string]string, look func(fs.FileInfo) bool, dirs ...string) {
	t.Helper()
	seen := 0
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return nil // what goes away meanwhile is not there
			}
			info, err := entry.Info()
			if err != nil || !look(info) || info.Size() > 64<<20 {
				return nil // base images are larger, and older
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			seen++
			wantNoSecret(t, secrets, path, text)
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if seen == 0 {
		t.Errorf("no file in %q", dirs)
	}
}

func wantNoSecret(t *testing.T, secrets map[string]string, where string, text []byte) {
	t.Helper()
	for whose, secret := range secrets {
		for _, form := range append(encodings(secret), []byte(secret)) {
			if bytes.Contains(text, form) {
				t.Errorf("%s holds the %s private key", where, whose)
			}
		}
	}
}

// encodings returns what stands for the text where it is part of something in base64, whatever is before it.
func encodings(text string) [][]byte {
	var all [][]byte
	for before := range 3 {
		code := base64.StdEncoding.EncodeToString(append(make([]byte, before), text...))
		all = append(all, []byte(code[4:len(code)-4]))
	}
	return all
}

// What another user of the host can get at must never hold a private key, and nothing may after cleanup.
func TestPrivateKeysAreNowhereThatAnotherUserCanReadAndGoWithTheJob(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	command(t, "cp", filepath.Join(images, "gitlab-runner-base.qcow2"), filepath.Join(dir, "base.qcow2"))
	job := newJob(runner.Job{})
	machine := machineOf(job)
	ex := start(t, newSettings(t, knownBy("injected", fmt.Sprintf("pool = %q\nvolume = \"base.qcow2\"", newPool(t, dir)))).runner(t), job)

	// The file by which the guest gets its keys is looked at as fast as can be, for as long as prepare runs.
	identity := filepath.Join(dir, machine+"-identity")
	var written int
	modes := map[string]bool{}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if info, err := os.Stat(identity); err == nil {
				owner := info.Sys().(*syscall.Stat_t).Uid
				modes[fmt.Sprintf("%o of user %d", info.Mode().Perm(), owner)] = true
				if text, err := os.ReadFile(identity); err == nil && bytes.Contains(text, []byte("/etc/ssh/ssh_host_ed25519_key")) {
					written++
				}
			}
			time.Sleep(time.Millisecond)
		}
	}()
	r := ex.Prepare(t.Context())
	close(stop)
	<-stopped
	want(t, ex, r, 0)
	log := ex.JobLog() // before a script of the test's own shows what it must not hold
	user := strings.TrimSpace(command(t, "id", "-u", "libvirt-qemu"))
	for mode := range modes {
		if mode != "600 of user "+user && mode != "600 of user 0" {
			t.Errorf("the guest's keys were in a file of mode %s", mode)
		}
	}
	if written == 0 {
		t.Errorf("the guest's keys were not seen in %s (modes %v): the test looks in vain", identity, modes)
	}

	secrets := secretsOf(t, ex)
	if text, err := os.ReadFile(identity); err != nil || len(bytes.Trim(text, "\x00")) > 0 {
		t.Errorf("the file with the guest's keys is not wiped: %v, %q", err, text)
	}
	everyone := func(info fs.FileInfo) bool { return info.Mode().Perm()&0o004 != 0 }
	everything := func(fs.FileInfo) bool { return true }
	state := []string{"/run", "/etc/libvirt", "/var/log/libvirt", "/var/lib/libvirt"}
	seek(t, secrets, everyone, append(state, ex.Dir())...)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", keeper(t, machine)))
	if err != nil {
		t.Fatal(err)
	}
	wantNoSecret(t, secrets, "the keeper's command line", text)
	// Only root and QEMU read the guest's disk, which holds what the guest has.
	seek(t, secrets, everything, "/run", "/etc/libvirt", "/var/log/libvirt")
	for _, args := range [][]string{
		{"-r", "dumpxml", machine}, {"-r", "dumpxml", "--inactive", machine}, {"dumpxml", "--security-info", machine},
		{"-r", "metadata", machine, "urn:libvirt-driver:machine:1"}, {"-r", "vol-dumpxml", "--pool", filepath.Base(dir), machine + "-identity"},
	} {
		wantNoSecret(t, secrets, "virsh "+strings.Join(args, " "), []byte(virsh(t, args...)))
	}
	if out, err := tryVirsh("-r", "vol-download", "--pool", filepath.Base(dir), machine+"-identity", filepath.Join(t.TempDir(), "x")); err == nil {
		t.Errorf("everyone may read the volume: %s", out)
	}
	for _, file := range []string{"cmdline", "environ"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", qemu(t, machine), file))
		if err != nil {
			t.Fatal(err)
		}
		wantNoSecret(t, secrets, "QEMU's "+file, text)
	}
	wantNoSecret(t, secrets, "the job log", log)
	wantNoSecret(t, secrets, "what the stages answer each other", []byte(fmt.Sprint(ex.JobEnv())))
	if info, err := os.Stat(filepath.Join(ex.Dir(), "libvirt-driver-guest.json")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file with the client's key: %v, %v", info.Mode(), err)
	}

	cleanUp(t, ex, job)
	seek(t, secrets, everything, state...)
	if _, err := os.Stat(ex.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the job's folder is there after its end: %v", err)
	}
}

func TestKeysThatAKilledPrepareLeavesGoWithItsMachine(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex, call := midway(t, newSettings(t, knownBy("injected")).runner(t), job, "  key ")
	kill(t, call)
	if _, err := os.Stat(filepath.Join(images, machineOf(job)+"-identity")); err != nil {
		t.Errorf("the file with the keys is not where it was thought to be: %v", err)
	}
	cleanUp(t, ex, job)
}

// With a key of the job's own, the domain's metadata do not let run in.
func TestRunWithoutTheJobsKeySaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	ex := prepared(t, newSettings(t, tiny("host_key = \"agent\"")).runner(t), newJob(runner.Job{}))
	file := filepath.Join(ex.Dir(), "libvirt-driver-guest.json")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	want(t, ex, ex.Run(t.Context(), "build_script", "true"), 2, file+" is gone", "start the job again")
}
