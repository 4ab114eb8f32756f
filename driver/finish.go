package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
)

// Ending QEMU and taking its network filter down takes libvirt most of a second,
// and nobody needs to wait for it: once its processors stand still, a guest can
// neither run nor be reached. cleanup sees to that and returns; a finisher, a
// process of the driver's own that inherits cleanup's lock on the machine,
// removes it. The host's capacity counts the machine until then, and where the
// finisher is killed gc finishes.

// handing is how long the settings may take to be handed on to a finisher.
const handing = 5 * time.Second

// StartFinisher starts the finisher of a machine and hands the lock on it on,
// and the settings: their file may be changed, or gone, before it is done.
func StartFinisher(h *Host, machine string, lock *os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	defer out.Close()
	var env []string // where the user's own locks and sockets are
	for _, name := range []string{"HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	pid, err := spawn([]string{"finish", machine}, env, in, null, null, lock)
	if err != nil {
		return err
	}
	out.SetWriteDeadline(time.Now().Add(handing))
	if err := json.NewEncoder(out).Encode(h.Settings); err != nil {
		syscall.Kill(pid, syscall.SIGKILL)
		syscall.Wait4(pid, nil, 0, nil)
		return err
	}
	return nil
}

// Finish is a finisher's whole life. The lock on the machine is its file 3.
func (h *Host) Finish(ctx context.Context, machine string) error {
	const inherited = 3
	job, ok := parseMachine(machine)
	if !ok {
		return fmt.Errorf("%q is not a machine's name", machine)
	}
	lock := &held{os.NewFile(inherited, h.lockPath(machine))}
	if lock.file == nil || syscall.Flock(inherited, syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return fmt.Errorf("finish the removal of %s: no lock was handed on", machine)
	}
	defer lock.release()
	return h.finish(ctx, machine, job)
}

// halt makes sure that a job's machine can neither run nor be reached any more,
// and reports whether its removal can be left to a finisher. It cannot where
// there is nothing to gain, or something to say to the job's owner; the error
// then is why, if something failed.
func (s *Stage) halt(ctx context.Context, name string, job gitlab.Job) (bool, error) {
	if s.StartFinisher == nil {
		return false, nil
	}
	domain, err := s.domainOf(name)
	if err != nil {
		return false, err
	}
	text, found, err := s.Hypervisor.Metadata(ctx, domain, domainxml.Namespace)
	if err != nil || !found || !owned(text, domain, job) {
		return false, err
	}
	metadata, _ := domainxml.ParseMetadata(text)
	if _, err := s.Hypervisor.PoolSpace(ctx, metadata.Pool); err != nil {
		return false, err
	}
	if err := errors.Join(s.endKeeper(ctx, domain), s.markOver(name)); err != nil {
		return false, err
	}
	if err := s.Hypervisor.SuspendDomain(ctx, domain); err != nil {
		return false, err
	}
	state, err := s.Hypervisor.State(ctx, domain)
	return err == nil && state.Kind == hypervisor.Paused, err
}

// owned reports whether metadata is of a machine that the driver made for the
// job, or made before it had one: the record that binds such a machine to its job
// comes first.
func owned(text, domain string, job gitlab.Job) bool {
	metadata, err := domainxml.ParseMetadata(text)
	if text == "" || err != nil {
		return false
	}
	return metadata.Job == job.ID && metadata.Project == job.Project || metadata.Job == 0 && startOf(domain) != ""
}

// over is what the record of a machine's stages holds when its cleanup has
// begun: what is left of it then is nobody's.
const over = "over"

// markOver notes that a machine's cleanup has begun.
func (h *Host) markOver(machine string) error {
	return os.WriteFile(h.activity(machine), []byte(over), 0o600)
}

// isOver reports whether a machine's cleanup has begun.
func (h *Host) isOver(machine string) bool {
	text, err := os.ReadFile(h.activity(machine))
	return err == nil && string(text) == over
}
