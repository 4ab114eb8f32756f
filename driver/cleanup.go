package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
)

// Cleanup removes the job's machine and everything that prepare made for it,
// whatever is there of it. Nothing being there is success. It does not wait for
// what takes its time when nobody can use the machine any more: a process of its
// own finishes that.
func (s *Stage) Cleanup(ctx context.Context) error {
	job, err := s.made()
	var refused *gitlab.BuildError
	if errors.As(err, &refused) {
		s.Log.Note("nothing to remove: no machine is made for such a job: %v", err)
		return nil
	}
	if err != nil {
		return err
	}
	limit := s.Settings.Timeouts.Destroy
	waiting, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not free after %v (timeouts.destroy)", limit))
	defer cancel()
	lock, err := s.lock(waiting, job.Machine(), "another stage that works on "+job.Machine())
	if err != nil {
		return err
	}
	working, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %v (timeouts.destroy)", limit))
	defer cancel()
	halted, err := s.halt(working, job.Machine(), job)
	if halted && s.StartFinisher(&s.Host, job.Machine(), lock.file) == nil {
		return stopped(ctx) // the lock is the finisher's now
	}
	defer lock.release()
	if err != nil && working.Err() != nil {
		return err
	}
	if err := s.finish(working, job.Machine(), job); err != nil {
		return err
	}
	return stopped(ctx)
}

// stopped returns the failure of a stage that was told to stop and was done all
// the same: who told it to is not to find that it went on. What takes its time
// but may be left out, as a lease, may have been cut short.
func stopped(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("%w, when all was done", context.Cause(ctx))
}

// finish removes a machine and the record of its stages.
func (h *Host) finish(ctx context.Context, name string, job gitlab.Job) error {
	_, err := h.removeWithin(ctx, name, job)
	if err == nil || errors.Is(err, errForeign) {
		return errors.Join(err, h.forget(name))
	}
	return err
}

// made says whose machine there is to remove. What the config stage passed on
// is the name that prepare went by, whatever the job's variables have come to
// say. Without it they made the name, if they did, in an earlier attempt. The
// error is a BuildError when no stage can have made a machine.
func (s *Stage) made() (gitlab.Job, error) {
	if job, ok := parseMachine(s.Environment.Passed(passedMachine)); ok {
		return job, nil
	}
	return s.Environment.Identity()
}

// removeWithin removes a job's machine, again and again until it is gone or the
// time is up, and reports whether there was anything.
func (h *Host) removeWithin(ctx context.Context, name string, job gitlab.Job) (found bool, err error) {
	limit := h.Settings.Timeouts.Destroy
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %v (timeouts.destroy)", limit))
	defer cancel()
	var last leftover
	for try := 0; ; try++ {
		some, left := h.remove(ctx, name, job)
		found = found || some
		switch {
		case len(left.things) == 0 && left.err == nil:
			return found, nil
		case ctx.Err() != nil && last.err != nil && !errors.Is(left.err, hypervisor.ErrUnreachable):
			// An attempt that is cut short has nothing to say but that.
			return found, last.report(context.Cause(ctx))
		case ctx.Err() != nil || left.final():
			return found, left.report(context.Cause(ctx))
		}
		last = left
		pause(ctx, min(backoff(try)*4, time.Second))
	}
}

// errForeign is a domain that has the job's name and that the driver did not
// make.
var errForeign = errors.New("is not this driver's: it was made by something else")

// leftover is what a removal could not remove, and why.
type leftover struct {
	things []string
	err    error
}

func (l *leftover) add(err error, format string, args ...any) {
	if err != nil {
		l.things = append(l.things, fmt.Sprintf(format, args...))
		l.err = errors.Join(l.err, err)
	}
}

// final reports whether trying again is no use: it takes an administrator.
func (l *leftover) final() bool {
	return errors.Is(l.err, errForeign) || errors.Is(l.err, hypervisor.ErrInactive) || errors.Is(l.err, fs.ErrPermission)
}

// report says what is left and why, if anything is; cause is what ended the
// attempts, if something did.
func (l *leftover) report(cause error) error {
	switch {
	case l.err == nil:
		return nil
	case errors.Is(l.err, hypervisor.ErrUnreachable), errors.Is(l.err, fs.ErrPermission):
		return l.err // nobody knows what is left
	case cause != nil && !errors.Is(l.err, cause):
		return fmt.Errorf("%w: left behind: %s: %w", cause, strings.Join(l.things, ", "), l.err)
	}
	return fmt.Errorf("left behind: %s: %w", strings.Join(l.things, ", "), l.err)
}

// remove makes one attempt to remove a job's machine.
func (h *Host) remove(ctx context.Context, name string, job gitlab.Job) (found bool, left leftover) {
	domain, err := h.domainOf(name)
	if err != nil {
		left.add(err, "machine %s", name)
		return found, left
	}
	text, found, err := h.Hypervisor.Metadata(ctx, domain, domainxml.Namespace)
	if err != nil {
		left.add(err, "domain %s", domain)
		return found, left
	}
	metadata, _ := domainxml.ParseMetadata(text)
	if found {
		if !owned(text, domain, job) {
			left.add(fmt.Errorf("domain %s %w: remove it with virsh undefine --nvram %[1]s", domain, errForeign), "domain %s", domain)
			return found, left
		}
		if err := h.Hypervisor.DestroyDomain(ctx, domain); err != nil {
			left.add(err, "domain %s", domain)
			return found, left
		}
	}
	if startOf(domain) != startMemory { // or else the address stays the slot's
		defer h.releaseLeases(ctx, with(h.Settings.Networks(), metadata.Network), macAddress(domain))()
	}
	volumes := []string{volumeName(name), identityVolume(name)}
	if domain != name {
		volumes = append(volumes, volumeName(domain), identityVolume(domain))
	}
	some := h.tearDown(ctx, domain, metadata.Pool, volumes, &left)
	return found || some, left
}

// tearDown makes one attempt to remove what there is of a domain that does not
// run, and reports whether there was a volume. own is the pool that has its
// volumes, as far as is known: what the settings said when it was made still
// counts. The domain's definition goes last: it names the volume, so that an
// attempt cut short is not the last that knows of it.
func (h *Host) tearDown(ctx context.Context, domain, own string, volumes []string, left *leftover) (found bool) {
	left.add(h.endKeeper(ctx, domain), "the process that keeps its connection")
	for _, pool := range with(h.Settings.Pools(), own) {
		for _, volume := range volumes {
			some, err := h.Hypervisor.DeleteVolume(ctx, pool, volume)
			found = found || some
			if errors.Is(err, hypervisor.ErrInactive) && pool != own {
				// Nothing says that it has anything of this machine's, and it must not
				// hold up the jobs of other pools.
				continue
			}
			left.add(withRemedy(err, pool, volume), "volume %s in pool %s", volume, pool)
		}
	}
	if len(left.things) == 0 {
		left.add(h.Hypervisor.UndefineDomain(ctx, domain), "domain %s", domain)
	}
	left.add(h.removeLogs(domain), "logs in %s", h.Settings.LogDir)
	return found
}

// releaseLeases gives a MAC address's leases back while the caller goes on, and
// returns how to wait for the end of that: the DHCP server takes its time, and
// nothing else waits for it. A lease that cannot be given back is no failure: it
// ends by itself.
func (h *Host) releaseLeases(ctx context.Context, networks []string, mac string) (wait func()) {
	var releasing sync.WaitGroup
	notes := make(chan error, len(networks))
	for _, network := range networks {
		releasing.Go(func() {
			if err := h.Hypervisor.ReleaseLeases(ctx, network, mac); err != nil {
				notes <- err
			}
		})
	}
	return func() {
		releasing.Wait()
		close(notes)
		for err := range notes {
			h.Log.Note("%v: it ends by itself", err)
		}
	}
}

// with returns names with one more, unless it is there or empty.
func with(names []string, name string) []string {
	if name == "" || slices.Contains(names, name) {
		return names
	}
	return append(names, name)
}
