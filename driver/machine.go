package driver

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/settings"
)

// The variables that config passes on to later stages. They carry no
// CUSTOM_ENV_ prefix, so that a job cannot forge them.
const (
	passedMachine = "LIBVIRT_DRIVER_MACHINE"
	passedImage   = "LIBVIRT_DRIVER_IMAGE"
)

// machine is the job's machine as planned: all of it follows from the job and
// the settings, so that every stage can work it out again.
type machine struct {
	job  gitlab.Job
	name string
	// domain is libvirt's name of it: the same, but for a machine that was made
	// before its job was known.
	domain string
	// image is what the machine is made of, sized as the job asked.
	image settings.Image
	// volume is the overlay's name, and identity that of the volume by which the
	// guest may get its keys.
	volume, identity string
	mac              string
	// frozen is what the domain is described with more, where it is saved or
	// restored.
	frozen *domainxml.Frozen
	// disk and provision are what create made: the disk, and the path of the keys
	// that the guest gets, if any.
	disk      disk
	provision string
	// made is when this attempt at it began.
	made time.Time
	// keys are made by prepare alone.
	keys keys
	// address is the one that is kept for it, if any; only prepare knows it.
	address netip.Addr
	// sized tells that the job has asked for the size of the disk.
	sized bool
	// ahead tells that no job waits for it.
	ahead bool
	// owner is the process that it is made for.
	owner int
}

// plan works out the job's machine.
func (s *Stage) plan() (machine, error) {
	job, err := s.identify()
	if err != nil {
		return machine{}, err
	}
	passed := s.Environment.Passed(passedImage)
	image, err := s.Settings.Image(cmp.Or(passed, job.Image))
	switch {
	case err != nil && passed != "":
		// The job was granted it a moment ago; the next attempt begins with config.
		return machine{}, fmt.Errorf("the settings have changed since the job's config stage: %w", err)
	case err != nil:
		return machine{}, &gitlab.BuildError{Err: err}
	}
	image, err = image.Resize(settings.Size{
		VCPUs:  s.Environment.JobVariable("LIBVIRT_DRIVER_VCPUS"),
		Memory: s.Environment.JobVariable("LIBVIRT_DRIVER_MEMORY"),
		Disk:   s.Environment.JobVariable("LIBVIRT_DRIVER_DISK"),
	})
	if err != nil {
		return machine{}, &gitlab.BuildError{Err: fmt.Errorf("job variable LIBVIRT_DRIVER_%s: %w", field(err), err)}
	}
	name := job.Machine()
	return machine{job: job, name: name, domain: name, image: image, volume: volumeName(name), identity: identityVolume(name), mac: macAddress(name), made: time.Now(),
		sized: s.Environment.JobVariable("LIBVIRT_DRIVER_DISK") != "",
		owner: cmp.Or(s.Owner, os.Getppid())}, nil
}

// metadata returns whose machine it is, for the domain to carry.
func (m machine) metadata() (domainxml.Metadata, error) {
	owner, err := process(m.owner)
	metadata := domainxml.Metadata{
		Job: m.job.ID, Project: m.job.Project, Runner: m.job.Runner, JobURL: m.job.URL,
		Image: m.image.Name, Pool: m.image.Pool, Volume: m.volume, Network: m.image.Network,
		Created: m.made, Owner: owner.String(), Start: startOf(m.domain),
	}
	if m.domain != m.name {
		metadata.Machine = m.name
	}
	return metadata, err
}

// field returns which part of its machine's size a job cannot have.
func field(err error) string {
	var limit *settings.LimitError
	var value *settings.ValueError
	switch {
	case errors.As(err, &limit):
		return strings.ToUpper(limit.Field)
	case errors.As(err, &value):
		return strings.ToUpper(value.Field)
	}
	return "*"
}

// identify says which job this is, and refuses when config said otherwise.
func (s *Stage) identify() (gitlab.Job, error) {
	job, err := s.Environment.Job()
	if err != nil {
		return job, err
	}
	if passed := s.Environment.Passed(passedMachine); passed != "" && passed != job.Machine() {
		return job, &gitlab.BuildError{Err: fmt.Errorf(
			"the job was %s in its config stage and says now that it is %s: remove CI_RUNNER_ID and CI_CONCURRENT_PROJECT_ID from the job's variables",
			passed, job.Machine())}
	}
	return job, nil
}

// volumeSuffix is what an overlay's name has more than its machine's.
const volumeSuffix = ".qcow2"

// volumeName returns the name of a machine's, or a domain's, overlay.
func volumeName(name string) string { return name + volumeSuffix }

// macAddress returns a domain's MAC address. It follows from the name, so that
// a second attempt at the same job does not take a second lease. 52:54 begins
// the range that QEMU uses, locally administered and unicast; the other 32 bits
// keep any two machines of a host apart.
func macAddress(domain string) string {
	sum := sha256.Sum256([]byte(domain))
	return fmt.Sprintf("52:54:%02x:%02x:%02x:%02x", sum[0], sum[1], sum[2], sum[3])
}

// consoleLog returns the host's file with what a guest wrote to its serial
// console.
func (h *Host) consoleLog(domain string) string {
	return filepath.Join(h.Settings.LogDir, domain+"-console.log")
}

// qemuLog returns the host's file in which libvirt itself logs a domain's QEMU.
func qemuLog(domain string) string {
	return filepath.Join("/var/log/libvirt/qemu", domain+".log")
}
