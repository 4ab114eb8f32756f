package driver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

const (
	// attend is how often the standby service looks after its machines. A job that
	// has just taken one has the host to itself until then.
	attend = 3 * time.Second
	// After a machine that could not be made, the next of its image is tried after
	// a pause, which doubles each time.
	firstRetry, lastRetry = 30 * time.Second, 10 * time.Minute
)

// service is the standby service at work: it keeps as many machines ready as
// the settings ask for.
type service struct {
	*Maker
	booting chan struct{} // bounds how many machines boot at a time
	making  sync.WaitGroup

	mu sync.Mutex
	// expected are the machines in the making, by image; retry and patience say
	// when a failed one is tried again.
	expected map[string]uint
	retry    map[string]time.Time
	patience map[string]time.Duration
}

// standbyLock is the name of the lock that the one standby service of a host
// holds.
const standbyLock = "standby"

// KeepStandby is the standby service's whole life. It returns when ctx ends;
// machines that stand ready then go on doing so, for jobs to take and for the
// next service to look after.
func (mk *Maker) KeepStandby(ctx context.Context) error {
	lock, err := mk.tryLock(standbyLock)
	if errors.Is(err, errLocked) {
		return errors.New("another standby service runs on this host")
	}
	if err != nil {
		return err
	}
	defer lock.release()
	service := &service{
		Maker:    mk,
		booting:  make(chan struct{}, max(1, runtime.NumCPU()/4)),
		expected: map[string]uint{},
		retry:    map[string]time.Time{},
		patience: map[string]time.Duration{},
	}
	defer service.making.Wait()
	for ctx.Err() == nil {
		if err := service.attend(ctx); err != nil && ctx.Err() == nil {
			mk.Log.Note("%v", err)
		}
		pause(ctx, attend)
	}
	return nil
}

// HasStandby reports whether a standby service runs on the host.
func (h *Host) HasStandby() (bool, error) {
	f, err := os.Open(h.lockPath(standbyLock))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// Drain removes all machines that stand ready, and returns how many. It takes a
// host without a standby service, which would only make new ones.
func (h *Host) Drain(ctx context.Context) (n int, err error) {
	lock, err := h.tryLock(standbyLock)
	if errors.Is(err, errLocked) {
		return 0, errors.New("the standby service runs and would make new ones: stop it first (systemctl stop libvirt-driver-standby)")
	}
	if err != nil {
		return 0, err
	}
	defer lock.release()
	var failures []error
	for _, ready := range h.standings() {
		if !h.takeBack(ready.Domain) {
			continue
		}
		if err := h.discard(ctx, ready.Domain); err != nil {
			failures = append(failures, err)
			continue
		}
		n++
	}
	return n, errors.Join(failures...)
}

// attend looks after the machines once: it removes what is not as it should be,
// and begins to make what is missing.
func (s *service) attend(ctx context.Context) error {
	ready, err := s.inspect(ctx)
	if err != nil {
		return err
	}
	memory, err := s.Hypervisor.Memory(ctx)
	if err != nil {
		return err
	}
	if memory.Available < s.Settings.ReserveMemory {
		s.makeRoom(ctx) // for whoever on this host needs it
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(s.Settings.Images)) {
		image := s.Settings.Images[name]
		for s.missing(image, ready[name]) {
			s.making.Go(func() { s.replace(ctx, image) })
		}
	}
	return nil
}

// inspect returns how many machines of each image stand ready, and removes those
// that no job would take, and what is left of ones that were never made.
func (s *service) inspect(ctx context.Context) (ready map[string]uint, err error) {
	asking, cancel := context.WithTimeoutCause(ctx, looking, fmt.Errorf("not answered within %v", looking))
	defer cancel()
	machines, _, err := s.listDomains(asking)
	if err != nil {
		return nil, err
	}
	records := map[string]standing{}
	for _, each := range s.standings() {
		records[each.Domain] = each
	}
	fits := map[string]string{}
	for name, image := range s.Settings.Images {
		if image.Standby > 0 {
			if fits[name], err = s.fingerprint(asking, machine{image: image}); err != nil {
				return nil, fmt.Errorf("image %s: %w", name, withRemedy(err, image.Pool, image.Volume))
			}
		}
	}
	ready = map[string]uint{}
	for _, machine := range machines {
		if machine.Start != startStandby || machine.Job != 0 {
			continue
		}
		each, ok := records[machine.Domain]
		why := ""
		switch {
		case !ok:
			why = "was not finished"
		case machine.State != string(hypervisor.Running):
			why = "is " + machine.State
		case fits[machine.Image] != each.Fits:
			why = "is not what the settings and the base volume make now"
		case ready[machine.Image] >= s.Settings.Images[machine.Image].Standby:
			why = "is more than the settings ask for"
		default:
			ready[machine.Image]++
			continue
		}
		if ok && !s.takeBack(machine.Domain) {
			continue // a job has it
		}
		err := s.discard(ctx, machine.Domain)
		switch {
		case err == nil:
			s.Log.Note("removed %s: it %s", machine.Domain, why)
		case !errors.Is(err, errLocked):
			s.Log.Note("%v", err)
		}
	}
	return ready, nil
}

// missing reports whether one more machine of an image is to be made now, and
// counts it.
func (s *service) missing(image settings.Image, ready uint) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ready+s.expected[image.Name] >= image.Standby || time.Now().Before(s.retry[image.Name]) {
		return false
	}
	s.expected[image.Name]++
	return true
}

// replace makes one machine, and notes when that may be tried again if it fails.
func (s *service) replace(ctx context.Context, image settings.Image) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.expected[image.Name]--
	}()
	select {
	case s.booting <- struct{}{}:
		defer func() { <-s.booting }()
	case <-ctx.Done():
		return
	}
	begun := time.Now()
	domain, err := s.stand(ctx, image)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
		delete(s.patience, image.Name)
		s.Log.Note("%s stands ready: image %s, made in %.1f s", domain, image.Name, time.Since(begun).Seconds())
	case ctx.Err() != nil, errors.Is(err, errNoRoom):
	default:
		wait := min(max(2*s.patience[image.Name], firstRetry), lastRetry)
		s.patience[image.Name], s.retry[image.Name] = wait, time.Now().Add(wait)
		s.Log.Note("no machine of image %s, next try in %v: %v", image.Name, wait, err)
	}
}

// stand makes a machine that stands ready.
func (s *service) stand(ctx context.Context, image settings.Image) (string, error) {
	domain := newOwnName(startStandby)
	m := machine{
		name: domain, domain: domain, image: image, volume: volumeName(domain), identity: identityVolume(domain), mac: macAddress(domain),
		made: time.Now(), owner: os.Getpid(), ahead: true,
	}
	fits, err := s.fingerprint(ctx, m)
	if err != nil {
		return "", err
	}
	lock, err := s.tryLock(domain) // until it is ready: what is not ready and not locked is nobody's
	if err != nil {
		return "", err
	}
	defer lock.release()
	quiet := *s.Maker
	quiet.Log = gitlab.NewLog(io.Discard, true)
	contact, settle, err := quiet.boot(ctx, &m, func() {})
	if err == nil {
		err = s.describe(ctx, m, contact)
	}
	if err == nil {
		err = s.line(standing{binding: binding{domain}, Fits: fits, Contact: contact.of(image), Created: m.made})
	}
	if settle(err == nil); err != nil {
		if ctx.Err() == nil && !errors.Is(err, errNoRoom) {
			s.showConsole(domain)
		}
		_, left := s.removeWithin(context.WithoutCancel(ctx), domain, gitlab.Job{})
		return "", errors.Join(err, left, s.forget(domain))
	}
	return domain, nil
}

// line puts a machine where jobs look for one.
func (h *Host) line(ready standing) error { return writeRecord(h.readyPath(ready.Domain), ready) }

// discard removes a domain that was made before its job and is nobody's: whoever
// has taken it back, or has seen that it is neither ready nor a job's, may. Of one
// that someone is at work on it returns errLocked.
func (h *Host) discard(ctx context.Context, domain string) error {
	lock, err := h.tryLock(domain)
	if err != nil {
		return err
	}
	defer lock.release()
	if h.isReady(domain) || h.isBound(domain) {
		return errLocked // it came to be used meanwhile
	}
	if _, err := h.removeWithin(ctx, domain, gitlab.Job{}); err != nil {
		return err
	}
	return h.forget(domain)
}

// newOwnName returns a name for a domain that is made before its job.
func newOwnName(start string) string {
	var random [6]byte
	rand.Read(random[:])
	return ownPrefix + start + "-" + hex.EncodeToString(random[:])
}
