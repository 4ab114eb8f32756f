package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// host is a hypervisor in memory, for what a stage decides. What libvirt does
// is for the tests in integration/.
type host struct {
	mu       sync.Mutex
	calls    []string
	volumes  map[string]uint64 // "pool/name" to capacity
	domains  map[string]string // name to metadata
	state    hypervisor.State
	stopped  chan struct{} // closed when state is no longer Running
	failures map[string]error
	modified time.Time         // of every volume
	files    map[string]string // in the guest
	memory   hypervisor.Memory
	space    uint64
	lent     netip.Addr // to every guest
	kept     netip.Addr // for every guest that one is kept for
	noticed  chan struct{}
}

func newHost() *host {
	return &host{
		volumes:  map[string]uint64{"default/gitlab-runner-base.qcow2": 8 << 30},
		domains:  map[string]string{},
		state:    hypervisor.State{Kind: hypervisor.Running},
		stopped:  make(chan struct{}),
		failures: map[string]error{},
		memory:   hypervisor.Memory{Total: 16 << 30, Available: 16 << 30},
		space:    100 << 30,
		lent:     netip.MustParseAddr("192.0.2.7"),
		kept:     netip.MustParseAddr("192.0.2.7"),
		noticed:  make(chan struct{}),
	}
}

func (h *host) note(call string, args ...any) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, strings.TrimSpace(fmt.Sprintln(append([]any{call}, args...)...)))
	return h.failures[call]
}

func (h *host) called(call string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.ContainsFunc(h.calls, func(c string) bool { return strings.HasPrefix(c, call) })
}

func (h *host) stop(state hypervisor.State) {
	h.mu.Lock()
	h.state = state
	h.mu.Unlock()
	close(h.stopped)
}

func (h *host) Capabilities(_ context.Context, virtType, machine string) (hypervisor.Capabilities, error) {
	return hypervisor.Capabilities{VirtType: "qemu", Arch: "x86_64", MachineType: "q35"}, h.note("Capabilities", virtType, machine)
}

func (h *host) Memory(context.Context) (hypervisor.Memory, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.memory, nil
}

func (h *host) PoolSpace(context.Context, string) (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.space, h.failures["PoolSpace"]
}

func (h *host) Volume(_ context.Context, pool, name string) (hypervisor.Volume, error) {
	h.mu.Lock()
	capacity, ok := h.volumes[pool+"/"+name]
	h.mu.Unlock()
	if !ok {
		return hypervisor.Volume{}, hypervisor.ErrNotFound
	}
	return hypervisor.Volume{Pool: pool, Name: name, Path: "/" + pool + "/" + name, Capacity: capacity}, h.note("Volume")
}

func (h *host) CreateOverlay(_ context.Context, name string, base hypervisor.Volume, format string, capacity uint64) (hypervisor.Volume, error) {
	v := hypervisor.Volume{Pool: base.Pool, Name: name, Path: "/" + base.Pool + "/" + name, Capacity: max(capacity, base.Capacity)}
	h.addVolume(base.Pool, name, v.Capacity)
	return v, h.note("CreateOverlay", name, format, capacity)
}

func (h *host) Versions(context.Context) (hypervisor.Versions, error) {
	return hypervisor.Versions{Libvirt: "9.0.0", Hypervisor: "7.2.0"}, h.note("Versions")
}

func (h *host) CreateFile(_ context.Context, pool, name string) (hypervisor.Volume, error) {
	h.addVolume(pool, name, 0)
	return hypervisor.Volume{Pool: pool, Name: name, Path: "/" + pool + "/" + name}, h.note("CreateFile", pool, name)
}

func (h *host) SaveDomain(_ context.Context, name, path string) error {
	return h.note("SaveDomain", name, path)
}

func (h *host) RestoreDomain(_ context.Context, name, path, _ string) error {
	return h.note("RestoreDomain", name, path)
}

func (h *host) Channels(_ context.Context, domain string) (map[string]string, error) {
	at := "/channels/" + domain + "/"
	return map[string]string{domainxml.Door: at + "door", domainxml.DoorShell: at + "shell"}, h.note("Channels", domain)
}

func (h *host) DeleteVolume(_ context.Context, pool, name string) (bool, error) {
	if err := h.note("DeleteVolume", pool, name); err != nil {
		return false, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, found := h.volumes[pool+"/"+name]
	delete(h.volumes, pool+"/"+name)
	return found, nil
}

func (h *host) Volumes(_ context.Context, pool string) ([]hypervisor.Volume, error) {
	err := h.note("Volumes", pool)
	h.mu.Lock()
	defer h.mu.Unlock()
	var volumes []hypervisor.Volume
	for path := range h.volumes {
		if p, name, _ := strings.Cut(path, "/"); p == pool {
			volumes = append(volumes, hypervisor.Volume{Pool: p, Name: name, Allocation: 1 << 20, Modified: h.modified})
		}
	}
	return volumes, err
}

func (h *host) addVolume(pool, name string, capacity uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.volumes[pool+"/"+name] = capacity
}

func (h *host) Domains(context.Context, string) ([]hypervisor.Domain, error) {
	err := h.note("Domains")
	h.mu.Lock()
	defer h.mu.Unlock()
	var domains []hypervisor.Domain
	for name, metadata := range h.domains {
		domains = append(domains, hypervisor.Domain{Name: name, State: h.state, Metadata: metadata})
	}
	return domains, err
}

func (h *host) DefineDomain(_ context.Context, name, xml string) error {
	h.describe(name, metadataOf.FindStringSubmatch(xml)[1])
	return h.note("DefineDomain", name)
}

// metadataOf finds a domain's metadata in its XML.
var metadataOf = regexp.MustCompile(`(?s)<metadata>(.*)</metadata>`)

func (h *host) describe(name, metadata string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.domains[name] = metadata
}

func (h *host) StartDomain(_ context.Context, name string) error { return h.note("StartDomain", name) }
func (h *host) SuspendDomain(_ context.Context, name string) error {
	return h.note("SuspendDomain", name)
}

func (h *host) DestroyDomain(_ context.Context, name string) error {
	return h.note("DestroyDomain", name)
}

func (h *host) UndefineDomain(_ context.Context, name string) error {
	h.mu.Lock()
	delete(h.domains, name)
	h.mu.Unlock()
	return h.note("UndefineDomain", name)
}

func (h *host) Metadata(_ context.Context, name, _ string) (string, bool, error) {
	err := h.note("Metadata", name)
	h.mu.Lock()
	defer h.mu.Unlock()
	text, found := h.domains[name]
	return text, found, err
}

func (h *host) SetMetadata(_ context.Context, name, _, _, text string) error {
	h.describe(name, text)
	return h.note("SetMetadata", name)
}

func (h *host) Close() {}

func (h *host) State(_ context.Context, name string) (hypervisor.State, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, found := h.domains[name]; !found {
		return hypervisor.State{Kind: hypervisor.Gone}, nil
	}
	return h.state, nil
}

func (h *host) Watch(ctx context.Context, name string, done func(hypervisor.State) bool) (hypervisor.State, error) {
	if err := h.note("Watch", name); err != nil {
		return hypervisor.State{}, err
	}
	select {
	case <-ctx.Done():
		return hypervisor.State{}, ctx.Err()
	case <-h.stopped:
		h.mu.Lock()
		defer h.mu.Unlock()
		if !done(h.state) {
			return hypervisor.State{}, errors.New("not what was waited for")
		}
		return h.state, nil
	}
}

func (h *host) Discover(_ context.Context, network, mac string) error {
	return h.note("Discover", network, mac)
}

func (h *host) FilterAddress(_ context.Context, domain, mac string, address netip.Addr) error {
	return h.note("FilterAddress", domain, mac, address.String())
}

func (h *host) Reserve(_ context.Context, network, mac string) (netip.Addr, error) {
	return h.kept, h.note("Reserve", network, mac)
}

func (h *host) Unreserve(_ context.Context, network, mac string) error {
	return h.note("Unreserve", network, mac)
}

func (h *host) Noticed(context.Context, string) (<-chan struct{}, error) { return h.noticed, nil }

func (h *host) KeepsLeases(context.Context, string) (bool, error) { return true, h.note("KeepsLeases") }

func (h *host) Leases(context.Context, string, string) ([]hypervisor.Lease, error) {
	return []hypervisor.Lease{{Address: h.lent}}, h.note("Leases")
}

func (h *host) ReleaseLeases(_ context.Context, network, mac string) error {
	return h.note("ReleaseLeases", network, mac)
}

func (h *host) Addresses(context.Context, string, string, hypervisor.AddressSource) ([]netip.Addr, error) {
	return nil, h.note("Addresses")
}

func (h *host) CreateSecret(_ context.Context, pool, name string, content []byte) (hypervisor.Volume, error) {
	h.addVolume(pool, name, uint64(len(content)))
	return hypervisor.Volume{Pool: pool, Name: name, Path: "/" + pool + "/" + name}, h.note("CreateSecret", pool, name, string(content))
}

func (h *host) WipeVolume(_ context.Context, pool, name string) error {
	return h.note("WipeVolume", pool, name)
}

func (h *host) ReadGuestFile(_ context.Context, _, path string) ([]byte, error) {
	return []byte(h.files[path]), h.note("ReadGuestFile", path)
}

func (h *host) AuthorizeKey(_ context.Context, _, user, key string) error {
	return h.note("AuthorizeKey", user, key)
}

// shell is a guest that lets everyone in and whose scripts end as told.
type shell struct {
	result  error
	ping    error
	aborted chan error
	takes   time.Duration
	hangs   bool
}

func (s *shell) HostKey() string             { return "ssh-ed25519 AAAA" }
func (s *shell) Ping(context.Context) error  { return s.ping }
func (s *shell) Alive(context.Context) error { return s.ping }
func (s *shell) Abort(err error)             { s.aborted <- err }
func (s *shell) Close() error                { return nil }

func (s *shell) Run(ctx context.Context, _ sshexec.Command) error {
	time.Sleep(s.takes)
	if !s.hangs {
		return s.result
	}
	select {
	case err := <-s.aborted:
		return fmt.Errorf("%w: %w", sshexec.ErrLost, err)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stage is a Stage on fakes, for job 1001 of project 42.
type stage struct {
	*Stage
	host *host
	log  bytes.Buffer
	dir  string
}

const machineName = "runner-7-project-42-concurrent-0-job-1001"

func newStage(t testing.TB, vars map[string]string) *stage {
	t.Helper()
	return newStageIn(t, t.TempDir(), testKey(t), vars)
}

// newStageIn makes a stage whose files are in dir.
func newStageIn(t testing.TB, dir, key string, vars map[string]string) *stage {
	t.Helper()
	s := &stage{host: newHost(), dir: dir}
	response := filepath.Join(s.dir, "response.json")
	if err := os.WriteFile(response, []byte(`{"id": 1001, "job_info": {"project_id": 42}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	environ := []string{"BUILD_FAILURE_EXIT_CODE=1", "SYSTEM_FAILURE_EXIT_CODE=2", "JOB_RESPONSE_FILE=" + response,
		"CUSTOM_ENV_CI_RUNNER_ID=7"}
	for name, value := range vars {
		environ = append(environ, name+"="+value)
	}
	environment, err := gitlab.ReadEnvironment(environ)
	if err != nil {
		t.Fatal(err)
	}
	configured := settings.Default()
	configured.LogDir = s.dir
	image := configured.Images["default"]
	image.Key = key
	configured.Images["default"] = image
	s.Stage = &Stage{
		Maker: Maker{
			Host:    Host{Settings: configured, Hypervisor: s.host, LockDir: s.dir, Log: gitlab.NewLog(&s.log, true), Version: "1.2.3"},
			Connect: func(context.Context, sshexec.Target) (Shell, error) { return &shell{}, nil },
		},
		Environment: environment,
	}
	return s
}

// mine makes metadata of job 1001 or of another.
func mine(t *testing.T, job int64, pool string) string {
	t.Helper()
	text, err := domainxml.Metadata{Job: job, Project: 42, Pool: pool}.Element()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// isBuild reports whether a failure is the job's own.
func isBuild(err error) bool {
	var build *gitlab.BuildError
	return errors.As(err, &build)
}
