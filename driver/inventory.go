package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
)

// Machine is what a host has of one of the driver's machines.
type Machine struct {
	Name    string `json:"name"`
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

// machineForm is the form of a machine's name.
var machineForm = regexp.MustCompile(`^runner-(\d{1,19})-project-(\d{1,19})-concurrent-(\d{1,19})-job-(\d{1,19})$`)

// parseMachine returns the job that a machine's name is made of.
func parseMachine(name string) (gitlab.Job, bool) {
	m := machineForm.FindStringSubmatch(name)
	if m == nil {
		return gitlab.Job{}, false
	}
	var n [4]int64
	for i := range n {
		var err error
		if n[i], err = strconv.ParseInt(m[i+1], 10, 64); err != nil {
			return gitlab.Job{}, false
		}
	}
	job := gitlab.Job{Runner: n[0], Project: n[1], Concurrent: n[2], ID: n[3]}
	return job, job.Machine() == name
}

// List returns the driver's machines on this host, the oldest first: domains
// that carry its metadata and a machine's name, volumes that have a machine's
// name in a pool of the settings, and what belongs together as one. It notes
// which pools it cannot look into since they are not active.
func (h *Host) List(ctx context.Context) ([]Machine, error) {
	return h.list(ctx, func(pool string) {
		h.Log.Note("pool %s is not active: the volumes in it are not shown (virsh pool-start %s)", pool, pool)
	})
}

func (h *Host) list(ctx context.Context, inactive func(pool string)) ([]Machine, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, looking, fmt.Errorf("not answered within %v", looking))
	defer cancel()
	domains, err := h.Hypervisor.Domains(ctx, domainxml.Namespace)
	if err != nil {
		return nil, err
	}
	machines := map[string]*Machine{}
	pools := h.Settings.Pools()
	for _, domain := range domains {
		metadata, err := domainxml.ParseMetadata(domain.Metadata)
		job, ok := parseMachine(domain.Name)
		if err != nil || !ok || metadata.Job != job.ID || metadata.Project != job.Project {
			continue
		}
		machines[domain.Name] = &Machine{
			Name: domain.Name, Job: job.ID, Project: job.Project, JobURL: metadata.JobURL, Image: metadata.Image,
			Created: metadata.Created, State: domain.State.String(), Address: metadata.Address, owner: metadata.Owner,
		}
		pools = with(pools, metadata.Pool)
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
			if !ok {
				continue
			}
			machine := machines[name]
			if machine == nil {
				machine = &Machine{Name: name, Job: job.ID, Project: job.Project, State: noDomain, Created: volume.Modified}
				machines[name] = machine
			}
			machine.Disk += volume.Allocation
			if isOverlay || machine.Volume == "" {
				machine.Pool, machine.Volume = pool, volume.Name
			}
		}
	}
	var list []Machine
	for _, machine := range machines {
		list = append(list, *machine)
	}
	slices.SortFunc(list, func(a, b Machine) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
	})
	return list, nil
}
