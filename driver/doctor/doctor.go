// Package doctor looks at a host, from libvirt's socket to the inside of a
// guest, and says for each point whether it is as jobs need it, and if not, the
// command that mends it.
//
// What is looked at is the table of checks. Each check is a function that looks
// at one thing, changes nothing, and returns one finding: the first thing that
// is wrong.
package doctor

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"libvirt-driver/driver"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// Level is how bad a finding is.
type Level string

// Failure is what keeps jobs from running, or makes it unsafe that they do.
// Warning is what costs time or room, or will be a failure later. Skipped is
// what could not be looked at, for a reason that is a finding itself.
const (
	OK      Level = "ok"
	Warning Level = "warning"
	Failure Level = "failure"
	Skipped Level = "skipped"
)

// Finding is what one check found.
type Finding struct {
	// Check names what was looked at, such as "pool", and Subject which one.
	Check   string `json:"check"`
	Subject string `json:"subject,omitempty"`
	Level   Level  `json:"level"`
	// Found says in a sentence without its period what is so.
	Found string `json:"found"`
	// Remedy is what mends it: commands for bash, one or more on a line each.
	// Empty when there is nothing to mend, or no command can.
	Remedy string `json:"remedy,omitempty"`
}

// Hypervisor is what the doctor needs of libvirt. [hypervisor.Connection] has
// it.
type Hypervisor interface {
	driver.Hypervisor

	Socket() (string, error)
	Versions(ctx context.Context) (hypervisor.Versions, error)
	User(ctx context.Context) (uid, gid int, ok bool, err error)
	Pool(ctx context.Context, name string) (hypervisor.Pool, error)
	Layout(ctx context.Context, pool, name string) (format, backing string, err error)
	Network(ctx context.Context, name string) (hypervisor.Network, error)
	Filters(ctx context.Context) ([]string, error)
	Disks(ctx context.Context) ([]hypervisor.Disk, error)
	Try(ctx context.Context, name, xml string) error
}

// Doctor is one visit to a host.
type Doctor struct {
	// Config is the settings file as it was named, or "" for the default one.
	Config string
	// Concurrent is how many jobs may run at once; 0 leaves it to GitLab
	// Runner's own configuration.
	Concurrent int
	// Boot is the image to boot a guest of, as a job would name it; "" boots
	// none.
	Boot string
	// Open returns libvirt as the settings have it. Nothing is dialled yet.
	Open func(*settings.Settings) Hypervisor
	// Connect opens an SSH session to a guest.
	Connect func(context.Context, sshexec.Target) (driver.Shell, error)
	// LockDir is the folder for the locks of machines; see [driver.LockDir].
	LockDir string
	// Log takes what a guest that is booted is waited for.
	Log *gitlab.Log
	// Report takes each finding as it comes.
	Report func(Finding)

	settings   *settings.Settings
	hypervisor Hypervisor
	file       file
	jobs       jobs
	uid, gid   int  // QEMU's
	knowsUser  bool // whether libvirt says so
	asked      bool // whether libvirt answers
}

// check is one line of the table of checks.
type check struct {
	name string
	// of lists what there is to look at; nil for one thing without a name.
	of func(*Doctor) []string
	// look looks at one of them.
	look func(*Doctor, context.Context, string) Finding
	// asks tells that it takes a libvirt that answers.
	asks bool
}

// limit bounds a check: what takes longer is a fault itself.
const limit = 15 * time.Second

// checks is everything that is looked at, in the order of a job's way into its
// guest. The settings come before all of it.
var checks = []check{
	{"jobs at once", nil, (*Doctor).checkJobs, false},
	{"socket", nil, (*Doctor).checkSocket, false},
	{"libvirt", nil, (*Doctor).checkVersions, true},
	{"kvm", nil, (*Doctor).checkKVM, true},
	{"memory", (*Doctor).images, (*Doctor).checkMemory, true},
	{"pool", (*Doctor).pools, (*Doctor).checkPool, true},
	{"space", (*Doctor).pools, (*Doctor).checkSpace, true},
	{"volume", (*Doctor).images, (*Doctor).checkVolume, true},
	{"writers", (*Doctor).images, (*Doctor).checkWriters, true},
	{"network", (*Doctor).networks, (*Doctor).checkNetwork, true},
	{"addresses", (*Doctor).images, (*Doctor).checkAddresses, true},
	{"bridge", (*Doctor).networks, (*Doctor).checkBridge, true},
	{"filter", (*Doctor).filtered, (*Doctor).checkFilter, true},
	{"kernel", (*Doctor).kernels, (*Doctor).checkKernel, false},
	{"key", (*Doctor).keyed, (*Doctor).checkKey, false},
	{"log_dir", nil, (*Doctor).checkLogDir, false},
	{"locks", nil, (*Doctor).checkLocks, false},
	{"standby", (*Doctor).standing, (*Doctor).checkStandby, false},
	{"leftovers", nil, (*Doctor).checkLeftovers, true},
}

// Examine looks at everything and returns the worst that was found: OK, Warning
// or Failure. The error is for a context that ended in the middle.
func (d *Doctor) Examine(ctx context.Context) (Level, error) {
	worst := OK
	report := func(f Finding) {
		if f.Level == Failure || f.Level == Warning && worst == OK {
			worst = f.Level
		}
		d.Report(f)
	}
	found := d.checkSettings()
	found.Check = "settings"
	report(found)
	if d.settings == nil {
		return worst, nil
	}
	d.hypervisor = d.Open(d.settings)
	defer d.hypervisor.Close()
	for _, c := range checks {
		subjects := []string{""}
		if c.of != nil {
			subjects = c.of(d)
		}
		for _, subject := range subjects {
			found := d.run(ctx, c, subject)
			if ctx.Err() != nil {
				return worst, context.Cause(ctx)
			}
			found.Check, found.Subject = c.name, subject
			report(found)
		}
	}
	if d.Boot == "" {
		return worst, nil
	}
	if worst == Failure {
		report(Finding{Check: "boot", Subject: d.Boot, Level: Skipped, Found: "not tried before the failures above are mended"})
		return worst, nil
	}
	return worst, d.boot(ctx, func(f Finding) { report(f) })
}

// run runs one check within its limit.
func (d *Doctor) run(ctx context.Context, c check, subject string) Finding {
	if c.asks && !d.asked {
		return Finding{Level: Skipped, Found: "libvirt cannot be asked"}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer after %v", limit))
	defer cancel()
	found := c.look(d, ctx, subject)
	if c.asks && ctx.Err() != nil {
		d.asked = false // a libvirtd that went away is not waited for again and again
	}
	return found
}

// host is the host as the driver's other commands see it.
func (d *Doctor) host() driver.Host {
	return driver.Host{Settings: d.settings, Hypervisor: d.hypervisor, LockDir: d.LockDir, Log: d.Log}
}

// images returns the names of the images, sorted.
func (d *Doctor) images() []string {
	var names []string
	for name := range d.settings.Images {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// kernels returns the names of the images that boot a kernel directly.
func (d *Doctor) kernels() []string {
	return slices.DeleteFunc(d.images(), func(name string) bool { return d.settings.Images[name].Kernel == "" })
}

// keyed returns the names of the images that let the key of the settings in; for
// others every job has a key of its own.
func (d *Doctor) keyed() []string {
	return slices.DeleteFunc(d.images(), func(name string) bool { return d.settings.Images[name].HostKey != settings.HostKeyPinned })
}

// filtered returns the names of the images whose guests' packets are filtered.
func (d *Doctor) filtered() []string {
	return slices.DeleteFunc(d.images(), func(name string) bool { return d.settings.Images[name].Filter == "" })
}

func (d *Doctor) pools() []string    { return d.settings.Pools() }
func (d *Doctor) networks() []string { return d.settings.Networks() }

func fine(format string, args ...any) Finding {
	return Finding{Level: OK, Found: fmt.Sprintf(format, args...)}
}

func warning(remedy, format string, args ...any) Finding {
	return Finding{Level: Warning, Found: fmt.Sprintf(format, args...), Remedy: remedy}
}

func failure(remedy, format string, args ...any) Finding {
	return Finding{Level: Failure, Found: fmt.Sprintf(format, args...), Remedy: remedy}
}

// unknown is the finding of a check that could not be made.
func unknown(err error) Finding {
	return failure("", "cannot be looked at: %s", oneLine(err.Error()))
}

// size writes a size for people: a round one as it is, any other in MiB.
func size(n uint64) string {
	const tenth = 1 << 30 / 10
	switch {
	case n >= 100<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<30:
		return fmt.Sprintf("%d.%d GiB", n/tenth/10, n/tenth%10)
	}
	return settings.FormatSize(n &^ (1<<20 - 1))
}

// count writes a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	if strings.HasSuffix(thing, "s") {
		return fmt.Sprintf("%d %ses", n, thing)
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// oneLine puts text of others on one line, and bounds it.
func oneLine(text string) string {
	const longest = 300
	text = strings.Join(strings.Fields(text), " ")
	if runes := []rune(text); len(runes) > longest {
		return string(runes[:longest-1]) + "…"
	}
	return text
}
