package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
)

// Machine is what a host has of one of the driver's machines.
type Machine struct {
	// Name is the job's name for it; that of a machine which is nobody's yet is
	// Domain.
	Name string `json:"name"`
	// Domain is libvirt's name for it.
	Domain string `json:"domain"`
	// Start is how it came to be: "boot", or, made before its job, "standby" or
	// "memory".
	Start string `json:"start"`
	// Job and Project are 0 for a machine that is nobody's yet.
	Job     int64  `json:"job"`
	Project int64  `json:"project"`
	JobURL  string `json:"job_url,omitempty"`
	Image   string `json:"image,omitempty"`
	// Created is when it was made: by the domain's metadata, or, of a volume
	// without a domain, when that was last written to.
	Created time.Time `json:"created"`
	// State is the domain's state in virsh's words, or "no domain".
	State   string `json:"state"`
	Address string `json:"address,omitempty"`
	// Pool and Volume name the overlay, or the volume with the guest's keys when
	// that is all there is; Disk is what both take of the host's disk in bytes.
	// Volume is empty when there is none.
	Pool   string `json:"pool,omitempty"`
	Volume string `json:"volume,omitempty"`
	Disk   uint64 `json:"disk"`

	owner string
}

// looking bounds the time that libvirt may take to say what there is.
const looking = 30 * time.Second

// noDomain is the state of a machine of which only the volume is there.
const noDomain = "no domain"

// parseMachine returns the job that a machine's name is made of.
func parseMachine(name string) (gitlab.Job, bool) {
	var job gitlab.Job
	_, err := fmt.Sscanf(name, "runner-%d-project-%d-concurrent-%d-job-%d", &job.Runner, &job.Project, &job.Concurrent, &job.ID)
	if err != nil || min(job.Runner, job.Project, job.Concurrent, job.ID) < 0 || job.Machine() != name {
		return gitlab.Job{}, false
	}
	return job, true
}

// List returns the driver's machines on this host, the oldest first: domains
// that carry its metadata and a machine's name, volumes that have a machine's
// name in a pool of the settings, and what belongs together as one; and the
// guests that were saved for machines to start from. It notes which pools it
// cannot look into since they are not active.
func (h *Host) List(ctx context.Context) ([]Machine, error) {
	machines, err := h.list(ctx, h.noteInactive)
	if err != nil {
		return nil, err
	}
	slots, err := h.listSlots(ctx, machines)
	machines = append(slices.DeleteFunc(machines, Machine.isSlot), slots...)
	slices.SortFunc(machines, byAge)
	return machines, err
}

func (h *Host) noteInactive(pool string) {
	h.Log.Note("pool %s is not active: the volumes in it are not shown (virsh pool-start %s)", pool, pool)
}

// isSlot reports whether m is a slot, or will be, and no job's machine.
func (m Machine) isSlot() bool { return m.Start == startMemory && m.Name == m.Domain }

func byAge(a, b Machine) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
}

// listDomains returns the machines of which there is a domain, without what
// their volumes would tell, and the pools in which these may be.
func (h *Host) listDomains(ctx context.Context) (list []*Machine, pools []string, err error) {
	domains, err := h.Hypervisor.Domains(ctx, domainxml.Namespace)
	if err != nil {
		return nil, nil, err
	}
	pools = h.Settings.Pools()
	for _, domain := range domains {
		metadata, err := domainxml.ParseMetadata(domain.Metadata)
		name, ok := machineOf(domain.Name, metadata)
		if err != nil || !ok {
			continue
		}
		list = append(list, &Machine{
			Name: name, Domain: domain.Name, Start: cmp.Or(startOf(domain.Name), "boot"),
			Job: metadata.Job, Project: metadata.Project, JobURL: metadata.JobURL, Image: metadata.Image,
			Created: metadata.Created, State: domain.State.String(), Address: metadata.Address, owner: metadata.Owner,
		})
		pools = with(pools, metadata.Pool)
	}
	return list, pools, nil
}

func (h *Host) list(ctx context.Context, inactive func(pool string)) ([]Machine, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, looking, fmt.Errorf("not answered within %v", looking))
	defer cancel()
	list, pools, err := h.listDomains(ctx)
	if err != nil {
		return nil, err
	}
	machines := map[string]*Machine{} // by both names
	for _, machine := range list {
		machines[machine.Name], machines[machine.Domain] = machine, machine
	}
	for _, pool := range pools {
		volumes, err := h.Hypervisor.Volumes(ctx, pool)
		if errors.Is(err, hypervisor.ErrInactive) {
			inactive(pool)
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, volume := range volumes {
			name, isOverlay := strings.CutSuffix(volume.Name, volumeSuffix)
			if !isOverlay {
				var isIdentity bool
				if name, isIdentity = strings.CutSuffix(volume.Name, identitySuffix); !isIdentity {
					continue
				}
			}
			job, ok := parseMachine(name)
			start := startOf(name)
			if !ok && start == "" {
				continue
			}
			machine := machines[name]
			if machine == nil {
				machine = &Machine{
					Name: name, Domain: name, Start: cmp.Or(start, "boot"),
					Job: job.ID, Project: job.Project, State: noDomain, Created: volume.Modified,
				}
				list = append(list, machine)
				machines[name] = machine
			}
			machine.Disk += volume.Allocation
			if isOverlay || machine.Volume == "" {
				machine.Pool, machine.Volume = pool, volume.Name
			}
		}
	}
	var sorted []Machine
	for _, machine := range list {
		sorted = append(sorted, *machine)
	}
	slices.SortFunc(sorted, byAge)
	return sorted, nil
}

// machineOf returns the job's name for the machine that a domain is, or the
// domain's own while it is nobody's. It reports false for a domain that is not
// the driver's: the name and the metadata disagree.
func machineOf(domain string, metadata domainxml.Metadata) (string, bool) {
	switch name := cmp.Or(metadata.Machine, domain); {
	case startOf(domain) == "" && name != domain, startOf(domain) != metadata.Start:
		return "", false
	case startOf(name) != "":
		return name, metadata.Machine == "" && metadata.Job == 0
	default:
		job, ok := parseMachine(name)
		return name, ok && metadata.Job == job.ID && metadata.Project == job.Project
	}
}
