package doctor

import (
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	"libvirt-driver/driver/settings"
)

// The checks of a guest from within.

// told is what a guest said: for each name what came after it, and when the
// first of it came.
type told struct {
	at   time.Time
	said map[string][]string
}

// one returns the first answer of that name, "" when there is none.
func (t told) one(name string) string {
	if len(t.said[name]) == 0 {
		return ""
	}
	return t.said[name][0]
}

// has reports whether there is an answer of that name.
func (t told) has(name string) bool { return len(t.said[name]) > 0 }

// patient is a guest that was asked.
type patient struct {
	told
	image settings.Image
	// volume is the base volume's file; "" when the guest's system is not on it.
	volume     string
	concurrent int
	emulated   bool
}

// inside is everything that is looked at in a guest.
var inside = []struct {
	name string
	look func(patient) Finding
}{
	{"bash", patient.bash},
	{"git", patient.git},
	{"git-lfs", patient.lfs},
	{"gitlab-runner", patient.runner},
	{"sudo", patient.sudo},
	{"machine-id", patient.machineID},
	{"host keys", patient.hostKeys},
	{"clock", patient.clock},
	{"sshd", patient.sshd},
	{"boot costs", patient.bootCosts},
	{"boot time", patient.bootTime},
}

// customize writes what changes the image, if it is on the base volume.
//
// https://libguestfs.org/virt-customize.1.html
func (p patient) customize(words ...string) string {
	if p.volume == "" {
		return ""
	}
	return command(append([]string{"virt-customize", "--format", string(p.image.Format), "-a", p.volume}, words...)...)
}

func (p patient) bash() Finding {
	switch {
	case p.has("bash"):
		return fine("%s", p.one("bash"))
	case p.image.Shell != settings.ShellBash:
		return fine("none, and none is needed: shell is %s", p.image.Shell)
	}
	return failure(p.customize("--install", "bash"), "there is none: no script of a job runs")
}

func (p patient) git() Finding {
	if p.has("git") {
		return fine("%s", strings.TrimPrefix(p.one("git"), "git version "))
	}
	return failure(p.customize("--install", "git"), "there is none: no job gets its sources")
}

func (p patient) lfs() Finding {
	if p.has("git-lfs") {
		version, _, _ := strings.Cut(p.one("git-lfs"), " ")
		return fine("%s", strings.TrimPrefix(version, "git-lfs/"))
	}
	return warning(p.customize("--install", "git-lfs"), "there is none: large files of a project stay pointers")
}

func (p patient) runner() Finding {
	if p.has("gitlab-runner") {
		return fine("%s", strings.TrimSpace("found "+p.one("gitlab-runner")))
	}
	remedy := ""
	if p.volume != "" {
		const to = "/usr/local/bin/gitlab-runner"
		remedy = p.customize("--upload") + " \\\n    " + `"$(command -v gitlab-runner)":` + to + " " + command("--chmod", "0755:"+to)
	}
	return warning(remedy, "there is none: artifacts and caches are left out")
}

func (p patient) sudo() Finding {
	if p.has("sudo") {
		return fine("without a password")
	}
	file := "/etc/sudoers.d/" + p.image.User
	return warning(p.customize("--install", "sudo", "--write", file+":"+p.image.User+" ALL=(ALL) NOPASSWD: ALL", "--chmod", "0440:"+file),
		"%s may not use it without a password: no job can install anything", p.image.User)
}

// older reports whether a file was in the image: what a guest makes at its boot
// it makes after that began, by the clock of that time.
func (p patient) older(changed string) bool {
	began, errBegan := strconv.ParseInt(p.one("began"), 10, 64)
	at, err := strconv.ParseInt(changed, 10, 64)
	const rounding = 1 // second
	return err == nil && errBegan == nil && at < began-rounding
}

func (p patient) machineID() Finding {
	changed, id, _ := strings.Cut(p.one("machine-id"), " ")
	switch {
	case !p.has("machine-id"), id == "uninitialized":
		return fine("none")
	case p.older(changed):
		return failure(p.customize("--truncate", "/etc/machine-id"),
			"%s is in the image, and so in every guest: two at once get the same address", id)
	}
	return fine("made by the guest itself: %s", id)
}

func (p patient) hostKeys() Finding {
	made := 0
	for _, key := range p.said["host-key"] {
		changed, file, _ := strings.Cut(key, " ")
		if p.older(changed) {
			return warning(p.customize("--delete", "/etc/ssh/ssh_host_*"),
				"%s is in the image, and so in every guest: a job could pass for another's guest. The guest must make its own at boot", path.Base(file))
		}
		made++
	}
	if made == 0 {
		return fine("none in /etc/ssh")
	}
	return fine("made by the guest itself")
}

// clock compares the guest's clock with the host's. The guest's answer is older
// than its arrival by milliseconds.
func (p patient) clock() Finding {
	seconds, fraction, _ := strings.Cut(p.one("clock"), ".")
	whole, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return warning("", "the guest does not tell the time: %q", p.one("clock"))
	}
	off := time.Unix(whole, 0).Sub(p.at)
	if nanoseconds, err := strconv.ParseInt(fraction, 10, 64); err == nil && len(fraction) == 9 {
		off += time.Duration(nanoseconds)
	}
	// A guest reads its clock at boot, in whole seconds, and an emulated one on a
	// busy host is behind by more: no harm is done by that.
	const tolerable = 5 * time.Second
	switch {
	case off > tolerable:
		return warning("", "ahead of the host's by %s: TLS and caches may fail", off.Round(time.Second))
	case off < -tolerable:
		return warning("", "behind the host's by %s: TLS and caches may fail", (-off).Round(time.Second))
	}
	return fine("right within %.1f s", max(0.1, off.Abs().Seconds()))
}

func (p patient) sshd() Finding {
	var slow []string
	for _, line := range p.said["sshd"] {
		switch key, _, _ := strings.Cut(line, " "); strings.ToLower(key) {
		case "usedns":
			slow = append(slow, "UseDNS")
		case "gssapiauthentication":
			slow = append(slow, "GSSAPIAuthentication")
		}
	}
	if len(slow) == 0 {
		return fine("nothing in its settings that is slow")
	}
	return warning(p.customize("--write", "/etc/ssh/sshd_config.d/00-fast.conf:"+strings.Join(slow, " no\n")+" no\n"),
		"%s: every login may wait for a name server", strings.Join(slow, " and "))
}

// bootCosts names what is in the image that makes its boot slow.
func (p patient) bootCosts() Finding {
	var costs, units, changes []string
	for _, line := range p.said["costs"] {
		switch what, which, _ := strings.Cut(line, " "); what {
		case "console":
			costs = append(costs, "a kernel that tells its boot on the console (not quiet)")
		case "kernel":
			costs = append(costs, fmt.Sprintf("kernel %s, which is not made for virtual machines", which))
		case "addresses":
			if p.emulated {
				costs = append(costs, "programs at random addresses, which QEMU translates anew at each start")
				changes = append(changes, "--write", "/etc/sysctl.d/norandmaps.conf:kernel.randomize_va_space=0")
			}
		case "unit":
			units = append(units, which)
		}
	}
	for _, line := range p.said["host-key"] {
		made, file, _ := strings.Cut(line, " ")
		if strings.HasSuffix(file, "_rsa_key") && !p.older(made) {
			costs = append(costs, "an RSA host key")
		}
	}
	remedy := ""
	if len(units) > 0 {
		changes = append(changes, "--run-command", "systemctl disable "+strings.Join(units, " "))
	}
	if len(changes) > 0 {
		remedy = p.customize(changes...)
	}
	if costs = append(costs, units...); len(costs) == 0 {
		return fine("nothing that is known to be slow")
	}
	return warning(remedy, "%s: every job waits for it", strings.Join(costs, ", "))
}

// bootTime says where the time goes, which is for an administrator to judge.
func (p patient) bootTime() Finding {
	var slowest []string
	for _, line := range p.said["slow"] {
		took, unit, _ := strings.Cut(line, " ")
		slowest = append(slowest, fmt.Sprintf("%s %s", unit, took))
	}
	said := strings.TrimPrefix(p.one("boot"), "Startup finished in ")
	switch {
	case said == "" && len(slowest) == 0:
		return fine("not told: the guest has no systemd-analyze")
	case len(slowest) == 0:
		return fine("%s", said)
	case said == "":
		return fine("slowest: %s", strings.Join(slowest, ", "))
	}
	return fine("%s; slowest: %s", said, strings.Join(slowest, ", "))
}
