package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// The checks of what is in the host's files.

// checkSettings reads the settings, on which all else depends.
func (d *Doctor) checkSettings() Finding {
	d.file = file{path: d.Config}
	if d.Config == "" {
		d.file.path = settings.DefaultPath
	}
	var err error
	if d.file.doc, err = os.ReadFile(d.file.path); errors.Is(err, fs.ErrNotExist) {
		d.file.lost = true
	}
	configured, err := settings.Load(d.Config)
	if err != nil {
		return failure(d.mendSettings(err), "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	d.settings = configured
	if d.file.lost {
		return fine("no file %s: the built-in image serves every job", d.file.path)
	}
	if info, err := os.Stat(d.file.path); err == nil && info.Mode().Perm()&0o022 != 0 {
		return failure(command("chmod", "go-w", d.file.path), "others than its owner may write to %s (mode %04o)",
			d.file.path, info.Mode().Perm())
	}
	return fine("%s, %s", d.file.path, count(len(configured.Images), "image"))
}

// mendSettings returns what mends a settings file: a key that is written wrong
// is written right, for the rest it takes a person.
func (d *Doctor) mendSettings(err error) string {
	if d.file.lost {
		return command("install", "-D", "-m", "0644", "/dev/null", d.file.path)
	}
	var commands []string
	list, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return ""
	}
	for _, err := range list.Unwrap() {
		var problem *settings.Problem
		if !errors.As(err, &problem) {
			continue
		}
		meant, ok := problem.Meant()
		if !ok {
			commands = append(commands, command("editor", "+"+strconv.Itoa(problem.Line), d.file.path))
			continue
		}
		wrong := problem.Key[strings.LastIndexByte(problem.Key, '.')+1:]
		commands = append(commands, command("sed", "-i", fmt.Sprintf("%ds/%s/%s/", problem.Line, wrong, meant), d.file.path))
	}
	return script(commands...)
}

// jobs is how many jobs may run at once.
type jobs struct {
	n int
	// file is the runner's configuration that says so; "" where it comes from
	// elsewhere.
	file string
}

// runnerConfig is GitLab Runner's configuration of a runner that is root's. See
// https://docs.gitlab.com/runner/configuration/advanced-configuration/.
const runnerConfig = "/etc/gitlab-runner/config.toml"

// checkJobs finds out how many jobs may run at once, which other checks count
// with.
func (d *Doctor) checkJobs(context.Context, string) Finding {
	if d.Concurrent > 0 {
		d.jobs = jobs{n: d.Concurrent}
		return fine("%d (--concurrent)", d.jobs.n)
	}
	d.jobs = jobs{n: 1}
	doc, err := os.ReadFile(runnerConfig)
	if err != nil {
		return fine("taken to be 1: no %s can be read (--concurrent N says otherwise)", runnerConfig)
	}
	n, ok := concurrent(string(doc))
	if !ok {
		return fine("1: %s does not say concurrent", runnerConfig)
	}
	d.jobs = jobs{n, runnerConfig}
	return fine("%d (concurrent in %s)", n, runnerConfig)
}

var concurrentSyntax = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^\s*concurrent\s*=\s*([0-9]{1,6})\s*(?:#.*)?$`)
})

// concurrent returns what a runner's configuration says before its first table.
func concurrent(doc string) (n int, ok bool) {
	for line := range strings.Lines(doc) {
		line = strings.TrimRight(line, "\r\n")
		if strings.HasPrefix(strings.TrimSpace(line), "[") {
			break
		}
		if m := concurrentSyntax().FindStringSubmatch(line); m != nil {
			n, err := strconv.Atoi(m[1])
			return n, err == nil && n > 0
		}
	}
	return 0, false
}

// fewer returns what makes the runner run no more than n jobs at once.
func (j jobs) fewer(n int) string {
	if j.file == "" || n < 1 {
		return ""
	}
	return command("sed", "-i", fmt.Sprintf(`s/^\s*concurrent\s*=.*/concurrent = %d/`, n), j.file)
}

// checkKey looks at the private key of an image.
func (d *Doctor) checkKey(_ context.Context, image string) Finding {
	path := d.settings.Images[image].Key
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return d.missingKey(image, path)
	case err != nil:
		return unknown(err)
	case !info.Mode().IsRegular():
		return failure("", "%s is not a file", path)
	case info.Mode().Perm()&0o077 != 0:
		return failure(command("chmod", "600", path), "%s opens every guest, and others than its owner may read it (mode %04o)",
			path, info.Mode().Perm())
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 && int(owner) != os.Geteuid() {
		return failure(command("chown", strconv.Itoa(os.Geteuid()), path), "%s belongs to another user (%d)", path, owner)
	}
	_, err = sshexec.LoadKey(path)
	private := strings.TrimSuffix(path, ".pub")
	switch {
	case errors.Is(err, sshexec.ErrPassphrase):
		return failure(command("ssh-keygen", "-p", "-N", "", "-f", path),
			"%s is protected by a passphrase, which nobody is there to enter", path)
	case err != nil && private != path && exists(private):
		return failure(d.setImage(image, "key", strconv.Quote(private)), "%s is the public half: the driver needs the private one", path)
	case err != nil:
		return failure("", "%v", err)
	}
	return fine("%s", path)
}

// missingKey says what to do about a key that is not there: take one that is,
// or make one.
func (d *Doctor) missingKey(image, path string) Finding {
	if near := neighbour(path); near != "" {
		return failure(d.setImage(image, "key", strconv.Quote(near)), "there is no %s, but a %s", path, near)
	}
	remedy := command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
	if dir := filepath.Dir(path); !exists(dir) {
		remedy = script(command("install", "-d", "-m", "0700", dir), remedy)
	}
	return failure(remedy,
		"there is no %s. The public half of a new one goes into the image, to %s's authorized_keys", path, d.settings.Images[image].User)
}

// checkKernel looks at the files of an image that boots a kernel directly.
func (d *Doctor) checkKernel(_ context.Context, name string) Finding {
	image := d.settings.Images[name]
	for _, f := range []struct{ key, path string }{{"kernel", image.Kernel}, {"initrd", image.Initrd}} {
		if f.path == "" {
			continue
		}
		info, err := os.Stat(f.path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			remedy, hint := "", ""
			if near := neighbour(f.path); near != "" {
				remedy, hint = d.setImage(name, f.key, strconv.Quote(near)), ", but a "+near
			}
			return failure(remedy, "%s: there is no %s%s", f.key, f.path, hint)
		case err != nil:
			return unknown(err)
		case !info.Mode().IsRegular() || info.Size() == 0:
			return failure("", "%s: %s is empty or no file", f.key, f.path)
		}
		if found, ok := d.reachable(f.path); !ok {
			return found
		}
	}
	if image.Initrd == "" {
		return fine("%s", image.Kernel)
	}
	return fine("%s, %s", image.Kernel, filepath.Base(image.Initrd))
}

// neighbour returns the file beside path whose name is most like its own, or "".
func neighbour(path string) string {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return ""
	}
	var names []string
	for _, entry := range entries {
		if info, err := os.Stat(filepath.Join(filepath.Dir(path), entry.Name())); err == nil && info.Mode().IsRegular() {
			names = append(names, entry.Name())
		}
	}
	near := settings.Nearest(filepath.Base(path), names)
	if near == "" {
		return ""
	}
	return filepath.Join(filepath.Dir(path), near)
}

// reachable looks whether QEMU's user gets through the folders above a file;
// the file itself libvirt makes its own.
func (d *Doctor) reachable(path string) (Finding, bool) {
	if !d.knowsUser || d.uid == 0 || os.Geteuid() != 0 {
		return Finding{}, true
	}
	for dir := filepath.Dir(path); dir != "/"; dir = filepath.Dir(dir) {
		if passes(d.uid, d.gid, dir) && !passes(d.uid, d.gid, dir+"/.") {
			return failure(command("chmod", "o+x", dir), "QEMU's user (%d) does not get through the folder %s to %s",
				d.uid, dir, path), false
		}
	}
	return Finding{}, true
}

// passes reports whether a user and group alone get to path: the kernel is
// asked, on a thread that is that user for this one question and ends then.
func passes(uid, gid int, path string) bool {
	answer := make(chan bool)
	go func() {
		answer <- asUser(uid, gid, func() bool {
			const pathOnly = 0x200000 // O_PATH, see open(2)
			fd, err := syscall.Open(path, pathOnly|syscall.O_CLOEXEC, 0)
			if err != nil {
				return !errors.Is(err, syscall.EACCES)
			}
			syscall.Close(fd)
			return true
		})
	}()
	return <-answer
}

// checkLogDir looks at the folder for the logs of guests' consoles.
func (d *Doctor) checkLogDir(context.Context, string) Finding {
	dir := d.settings.LogDir
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return failure(command("install", "-d", "-m", "0755", dir), "there is no folder %s: no guest starts without", dir)
	case err != nil:
		return unknown(err)
	case !info.IsDir():
		return failure(d.file.set(nil, "log_dir", strconv.Quote(dir+".d")), "%s is not a folder", dir)
	case info.Mode().Perm()&0o002 != 0:
		return failure(command("chmod", "o-w", dir), "everybody may write to %s (mode %04o), and a link there could lead to any file",
			dir, info.Mode().Perm())
	}
	found := d.writable(dir, "the logs of consoles")
	if found.Level == Warning {
		// virtlogd writes there as root all the same. The folder of libvirt's own
		// logs is not to be given away.
		const own = "/var/log/libvirt-driver"
		found.Remedy = script(command("install", "-d", "-m", "0755", "-o", strconv.Itoa(os.Geteuid()), own),
			d.file.set(nil, "log_dir", strconv.Quote(own)))
		found.Found = fmt.Sprintf("the driver may not delete in %s: consoles' logs stay for the host's log rotation", dir)
	}
	return found
}

// checkLocks looks at the folder for locks, which the driver makes when it is
// not there.
func (d *Doctor) checkLocks(context.Context, string) Finding {
	dir := d.LockDir
	info, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fine("%s, made by the first job", dir)
	case err != nil:
		return unknown(err)
	case !info.IsDir():
		return failure(command("rm", dir), "%s is not a folder", dir)
	case info.Mode().Perm()&0o022 != 0:
		return failure(command("chmod", "go-w", dir), "others may write to %s (mode %04o), and could hold up every job",
			dir, info.Mode().Perm())
	}
	return d.writable(dir, "locks")
}

// writable looks whether the driver may write to a folder.
func (d *Doctor) writable(dir, what string) Finding {
	const write, search = 2, 1 // W_OK and X_OK, see access(2)
	switch err := syscall.Access(dir, write|search); {
	case errors.Is(err, syscall.EROFS):
		return failure(script(`mount -o remount,rw "$(findmnt -n -o TARGET -T `+quote(dir)+`)"`),
			"%s, for %s, is on a file system that is mounted read-only", dir, what)
	case err != nil:
		return warning(command("chown", strconv.Itoa(os.Geteuid()), dir), "the driver may not write to %s, for %s", dir, what)
	}
	return fine("%s", dir)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
