package doctor

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"libvirt-driver/driver"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

const (
	// patience is how long a guest may wait for room on the host: a host on which
	// jobs wait longer is no place to try an image.
	patience = time.Minute
	// asking bounds the questions to a guest, some of which take an emulated one
	// seconds.
	asking = 2 * time.Minute
)

// questions is the script that the guest is asked with.
//
//go:embed guest.sh
var questions string

// boot boots a guest of d.Boot as prepare does for a job, looks at it from
// within, and removes it. The machine has a machine's name and metadata, and
// this process as its owner: if that is killed, gc finds the machine.
func (d *Doctor) boot(ctx context.Context, report func(Finding)) error {
	image, err := d.settings.Image(d.Boot)
	if err != nil {
		report(Finding{Check: "boot", Subject: d.Boot, Level: Failure, Found: oneLine(err.Error())})
		return nil
	}
	dir, err := os.MkdirTemp("", "libvirt-driver-doctor")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	v := &visit{Doctor: d, image: image, dir: dir, watch: watch{Hypervisor: d.hypervisor}}
	if err := v.begin(); err != nil {
		return err
	}
	defer func() {
		// Whatever has come to an end, the guest has to.
		if err := v.stage.Cleanup(context.WithoutCancel(ctx)); err != nil {
			report(v.name(failure(d.own("gc", "--older-than", "1m"), "the guest is not removed: %s", oneLine(err.Error())), "removal"))
		}
	}()
	d.Log.Title("booting a guest of image %s ...", image.Name)
	for _, found := range v.guest(ctx) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		report(found)
	}
	return nil
}

// visit is a guest that is booted to be looked at.
type visit struct {
	*Doctor
	image settings.Image
	dir   string
	watch watch
	stage *driver.Stage
	// log is what prepare would have written to a job's log.
	log bytes.Buffer
	out answers
}

// begin puts the stage of a made-up job together.
func (v *visit) begin() error {
	response, err := json.Marshal(map[string]any{
		"id": time.Now().UnixMilli(), "job_info": map[string]int{"project_id": 0}, "image": map[string]string{"name": v.image.Name},
	})
	if err != nil {
		return err
	}
	file := filepath.Join(v.dir, "response.json")
	if err := os.WriteFile(file, response, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(v.script(), []byte(questions), 0o600); err != nil {
		return err
	}
	environment, err := gitlab.ReadEnvironment([]string{
		"BUILD_FAILURE_EXIT_CODE=1", "SYSTEM_FAILURE_EXIT_CODE=2", "JOB_RESPONSE_FILE=" + file,
		// Two doctors at the same moment are two.
		"CUSTOM_ENV_CI_CONCURRENT_PROJECT_ID=" + strconv.Itoa(os.Getpid()),
	})
	if err != nil {
		return err
	}
	configured := *v.settings
	configured.Timeouts.Turn = min(configured.Timeouts.Turn, patience)
	// Whether there is a bash is a question, and sh is in every guest.
	image := v.image
	image.Shell = settings.ShellSh
	configured.Images = maps.Clone(configured.Images)
	configured.Images[image.Name] = image
	host := v.host()
	host.Settings, host.Hypervisor, host.Log = &configured, &v.watch, gitlab.NewLog(&v.log, true)
	v.stage = &driver.Stage{
		Maker: driver.Maker{
			Host: host,
			Connect: func(ctx context.Context, target sshexec.Target) (driver.Shell, error) {
				shell, err := v.Connect(ctx, target)
				if err == nil && v.watch.shell.IsZero() {
					v.watch.shell = time.Now()
				}
				return shell, err
			},
		},
		Environment: environment,
		Stdout:      &v.out,
		Stderr:      &v.out,
		Owner:       os.Getpid(),
	}
	return nil
}

func (v *visit) script() string { return filepath.Join(v.dir, "guest.sh") }

// name says what a finding is about.
func (v *visit) name(f Finding, check string) Finding {
	f.Check, f.Subject = check, v.image.Name
	return f
}

// guest boots the guest and asks it.
func (v *visit) guest(ctx context.Context) []Finding {
	if err := v.stage.Prepare(ctx); err != nil {
		fmt.Fprint(os.Stderr, v.log.String())
		return []Finding{v.name(failure("", "%s", oneLine(err.Error())), "boot")}
	}
	found := []Finding{
		v.name(fine("%s, %.1f s after the machine was started", v.watch.address, v.watch.addressed.Sub(v.watch.started).Seconds()), "address"),
		v.name(fine("%s, %.1f s after the machine was started", v.image.User, v.watch.shell.Sub(v.watch.started).Seconds()), "shell"),
	}
	if v.image.Shell != settings.ShellBash && v.image.Shell != settings.ShellSh {
		return append(found, v.name(Finding{Level: Skipped, Found: fmt.Sprintf("a guest with %s is not asked further", v.image.Shell)}, "inside"))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, asking, fmt.Errorf("no answer after %v", asking))
	defer cancel()
	if err := v.stage.Run(ctx, v.script()); err != nil {
		return append(found, v.name(failure("", "the guest cannot be asked: %s", oneLine(err.Error())), "inside"))
	}
	told := v.out.read()
	base, err := v.hypervisor.Volume(ctx, v.image.Pool, v.image.Volume)
	if err != nil {
		return append(found, v.name(unknown(err), "inside"))
	}
	p := patient{image: v.image, told: told, concurrent: v.jobs.n, emulated: v.watch.emulated}
	switch told.one("root") {
	case "rootfs", "tmpfs", "ramfs":
		// What is wrong is wrong in the initramfs, which virt-customize does not
		// know.
	default:
		p.volume = base.Path
	}
	for _, inside := range inside {
		found = append(found, v.name(inside.look(p), inside.name))
	}
	return found
}

// watch is a hypervisor that notes what is done with a guest, and when it got how
// far.
type watch struct {
	driver.Hypervisor
	started, addressed, shell time.Time
	address                   netip.Addr
	emulated                  bool
}

// Capabilities notes how the guest's processors are run.
func (w *watch) Capabilities(ctx context.Context, virtType, machineType string) (hypervisor.Capabilities, error) {
	host, err := w.Hypervisor.Capabilities(ctx, virtType, machineType)
	w.emulated = host.VirtType == string(settings.VirtQEMU)
	return host, err
}

// StartDomain notes when the domain is started.
func (w *watch) StartDomain(ctx context.Context, name string) error {
	w.started = time.Now()
	return w.Hypervisor.StartDomain(ctx, name)
}

// Leases notes when the guest has its address.
func (w *watch) Leases(ctx context.Context, network, mac string) ([]hypervisor.Lease, error) {
	leases, err := w.Hypervisor.Leases(ctx, network, mac)
	if len(leases) > 0 {
		w.note(leases[0].Address)
	}
	return leases, err
}

// Addresses notes when the guest has its address.
func (w *watch) Addresses(ctx context.Context, domain, mac string, source hypervisor.AddressSource) ([]netip.Addr, error) {
	addresses, err := w.Hypervisor.Addresses(ctx, domain, mac, source)
	if len(addresses) > 0 {
		w.note(addresses[0])
	}
	return addresses, err
}

func (w *watch) note(address netip.Addr) {
	if w.addressed.IsZero() {
		w.addressed = time.Now()
	}
	w.address = address
}

// answers is what a guest writes, and when it wrote the first of it. A guest
// writes what it likes: it is bounded.
type answers struct {
	mu    sync.Mutex
	first time.Time
	text  bytes.Buffer
}

const maxAnswers = 64 << 10

func (a *answers) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.first.IsZero() {
		a.first = time.Now()
	}
	if a.text.Len()+len(p) > maxAnswers {
		return 0, errors.New("the guest says too much")
	}
	return a.text.Write(p)
}

// read returns what the guest said.
func (a *answers) read() told {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := told{at: a.first, said: map[string][]string{}}
	for line := range strings.Lines(a.text.String()) {
		name, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		t.said[name] = append(t.said[name], oneLine(printable(answer)))
	}
	return t
}

// printable drops what a terminal could take for more than text.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return -1
		}
		return r
	}, text)
}
