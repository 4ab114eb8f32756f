package driver

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// An image with start = "memory" has its machines start from a guest that was
// saved with its shell up: a slot, see slot.go. What is restored has the slot's
// name, MAC address and address, a disk of the job's own on the slot's, and an
// identity of its own before the job gets in. This file is how a slot is made,
// and how a machine starts from one.
//
// A job never fails because of a slot: where anything about one does, the slot is
// removed and the machine is booted.

// doorScript puts the door into a guest before it is saved, and identityScript is
// what waits there for the guest to be restored; see there.
var (
	//go:embed door.sh
	doorScript string
	//go:embed identity.sh
	identityScript string
)

const (
	// settling is how long a guest may take to have a door, which waits for the
	// end of its boot, and saving how long libvirt may then take to save it, which
	// writes all the memory that it uses.
	settling = 4 * time.Minute
	saving   = 5 * time.Minute
)

// unfitError is why a machine cannot start from memory although it could be
// booted.
type unfitError struct{ error }

func (e *unfitError) Unwrap() error { return e.error }

func unfit(format string, args ...any) error { return &unfitError{fmt.Errorf(format, args...)} }

// fromMemory starts the machine from a slot, and makes one where there is none
// that is free. m becomes that machine. The error is an unfitError when the
// machine can be booted instead; then m is as it was, and nothing is left. The
// caller holds the lock on the machine.
func (mk *Maker) fromMemory(ctx context.Context, m *machine) (_ contact, settle func(bool), err error) {
	fail := func(err error) (contact, func(bool), error) { return contact{}, func(bool) {}, err }
	if m.image != mk.Settings.Images[m.image.Name] {
		return fail(unfit("the job asks for another size than the image's own"))
	}
	asking, cancel := context.WithTimeoutCause(ctx, creation, errSlow)
	defer cancel()
	if host, err := mk.Hypervisor.Capabilities(asking, string(mk.Settings.VirtType), m.image.Machine); err != nil {
		return fail(unfit("%w", err))
	} else if bootsByUEFI(m.image, host.Arch) {
		return fail(unfit("UEFI keeps a memory of its own, which is not saved"))
	}
	print, err := mk.slotPrint(asking, *m)
	if err != nil {
		return fail(unfit("%w", err))
	}
	if why := mk.refused(print); why != "" {
		return fail(unfit("tried within the last hour, in vain: %s", why))
	}
	found, hold, err := mk.findSlot(asking, print)
	if err != nil {
		return fail(unfit("look for a saved guest: %w", err))
	}
	fresh := found == nil
	if fresh {
		mk.Log.Note("no saved guest of this image is free: one is made first, which takes a boot")
		if _, err := mk.collectSlots(asking, false); err != nil {
			mk.Log.Note("a saved guest is left behind: %v", err)
		}
		if found, hold, err = mk.makeSlot(ctx, *m, print); err != nil {
			return fail(mk.note(ctx, print, err))
		}
	}
	defer hold.release()

	restored := *m
	restored.domain, restored.mac, restored.frozen = found.Name, macAddress(found.Name), frozenAs(found.Name)
	reached, keeper, err := mk.restore(ctx, &restored, *found)
	if err == nil {
		*m = restored
		return reached, keeper.release, nil
	}
	var no *unfitError
	if errors.As(err, &no) && ctx.Err() == nil {
		mk.showConsole(restored.domain)
		_, left := mk.removeWithin(ctx, m.name, m.job)
		if err := errors.Join(left, mk.unbind(m.name), mk.removeSlot(ctx, found.Name)); err != nil {
			return fail(fmt.Errorf("%w: and what came of it cannot be removed: %w", no.error, err))
		}
		if fresh {
			err = mk.note(ctx, print, err)
		}
	}
	return fail(err)
}

// makeSlot boots a guest of the machine's image and saves it. The lock on the
// slot is the caller's to release.
func (mk *Maker) makeSlot(ctx context.Context, m machine, print string) (_ *slot, _ *held, err error) {
	made := slot{Name: newOwnName(startMemory), Image: m.image.Name, Pool: m.image.Pool, Network: m.image.Network,
		Made: time.Now(), Print: print}
	lock, err := mk.tryLock(made.Name)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		// Where this comes to nothing as well, gc does it, or the next prepare.
		if ctx.Err() == nil {
			if left := mk.removeSlot(ctx, made.Name); left != nil {
				mk.Log.Note("a saved guest is left behind: %v", left)
			}
		}
		lock.release()
	}()

	m.job, m.name, m.domain, m.mac = gitlab.Job{}, made.Name, made.Name, macAddress(made.Name)
	m.volume, m.identity, m.frozen = volumeName(made.Name+frozen), identityVolume(made.Name+frozen), frozenAs(made.Name)
	unkept := *mk
	unkept.StartKeeper = nil // a connection that is open would be saved, too
	reached, _, err := unkept.boot(ctx, &m, func() {})
	if err != nil {
		return nil, nil, err
	}
	made.Frozen, made.Base, made.Capacity, made.Identity = m.disk.Path, m.disk.BasePath, m.disk.capacity, m.provision
	made.Address, made.HostKey, made.Reserved = reached.Address, reached.HostKey, reached.Address == socketAddress(m.address)
	if m.keys.client != nil {
		made.Key = m.keys.client.Public()
	}

	begun := time.Now()
	if err := mk.makeDoor(ctx, reached.of(m.image), made.Key); err != nil {
		return nil, nil, unfit("make a door in the guest: %w", err)
	}
	mk.Log.Step("door", time.Since(begun), "made")
	begun = time.Now()
	saving, cancel := context.WithTimeoutCause(ctx, saving, fmt.Errorf("not saved within %v", saving))
	defer cancel()
	state, err := mk.Hypervisor.CreateFile(saving, m.image.Pool, stateVolume(made.Name))
	if err == nil {
		made.State = state.Path
		err = mk.Hypervisor.SaveDomain(saving, made.Name, state.Path)
	}
	if err == nil {
		err = mk.Hypervisor.UndefineDomain(saving, made.Name)
	}
	if err == nil {
		err = mk.record(made)
	}
	if err != nil {
		return nil, nil, unfit("save the guest: %w", err)
	}
	mk.Log.Step("saved", time.Since(begun), "%s", made.Name)
	return &made, lock, nil
}

// makeDoor puts the door into a guest that is about to be saved, and was entered
// with the public key made if any was made for it.
func (mk *Maker) makeDoor(ctx context.Context, c contact, made string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settling, fmt.Errorf("not done after %v", settling))
	defer cancel()
	target, err := knock{Address: c.Address, User: c.User, Key: c.Key, Own: c.Own, HostKey: c.HostKey}.target(sshexec.Keyring{})
	if err != nil {
		return err
	}
	shell, err := mk.Connect(ctx, target)
	if err != nil {
		return err
	}
	defer shell.Close()
	var said bytes.Buffer
	err = shell.Run(ctx, sshexec.Command{Shell: "sh", Script: strings.NewReader(door(c.User, made)), Stdout: &said, Stderr: &said})
	if text := strings.TrimSpace(said.String()); err != nil && text != "" {
		return fmt.Errorf("%w: %.500q", err, text)
	}
	return err
}

// restore starts the machine from the slot and gets into its guest. Any failure
// but that the host has no room is an unfitError.
func (mk *Maker) restore(ctx context.Context, m *machine, from slot) (reached contact, keeper *Keeper, err error) {
	release, err := mk.admit(ctx, *m)
	if err != nil {
		return contact{}, nil, fmt.Errorf("find room for the machine: %w", err)
	}
	ready := mk.startKeeper(*m) // by the time that the guest is
	defer func() {
		if err != nil {
			ready.release(false)
		}
	}()
	err = mk.thaw(ctx, m, from)
	release()
	if err != nil {
		return contact{}, nil, unfit("restore %s: %w", from.Name, err)
	}

	watched, stop := mk.followed(ctx, m.domain, 0, func(state hypervisor.State) bool {
		return state.Kind != hypervisor.Running
	})
	defer stop()
	begun := time.Now()
	if m.keys, err = newKeys(settings.HostKeyInjected); err != nil {
		return contact{}, nil, err
	}
	channels, err := mk.Hypervisor.Channels(watched, m.domain)
	if err != nil {
		return contact{}, nil, unfit("%w", err)
	}
	reached, err = mk.tryShell(watched, ready, knock{
		Address: from.Address, User: m.image.User, Own: m.keys.client.Private(), HostKey: from.HostKey, Limit: attempt,
		Shell: string(m.image.Shell),
		Door:  &sshexec.Door{Server: channels[domainxml.Door], Shell: channels[domainxml.DoorShell], Words: m.identify(ready)},
	})
	if err != nil {
		return contact{}, nil, unfit("enter the restored guest: %w", err)
	}
	// The server behind the door has its keys from before the save; the network's
	// has the new one.
	reached.Own, reached.HostKey = m.keys.client.Private(), strings.TrimSpace(m.keys.host.Public())
	mk.Log.Step("shell", time.Since(begun), "%s@%s, a machine of its own now", m.image.User, reached.Address)
	return reached, ready, nil
}

// thaw makes the machine's disk and restores its domain.
func (mk *Maker) thaw(ctx context.Context, m *machine, from slot) error {
	ctx, cancel := context.WithTimeoutCause(ctx, creation, errSlow)
	defer cancel()
	begun := time.Now()
	if from.Reserved {
		address, err := mk.reserve(ctx, *m)
		if err != nil {
			return err
		}
		if !address.IsValid() || socketAddress(address) != from.Address {
			return fmt.Errorf("its address %s is not kept for it any more", from.Address)
		}
		m.address = address
	}
	if err := mk.bind(m.name, from.Name); err != nil {
		return err
	}
	overlay, err := mk.Hypervisor.CreateOverlay(ctx, m.volume,
		hypervisor.Volume{Pool: from.Pool, Name: volumeName(from.Name + frozen), Path: from.Frozen, Capacity: from.Capacity}, "qcow2", 0)
	if err != nil {
		return fmt.Errorf("create disk: %w", err)
	}
	m.disk.Disk = domainxml.Disk{Path: overlay.Path, Between: from.Frozen, BasePath: from.Base, BaseFormat: string(m.image.Format)}
	m.provision = from.Identity
	text, _, err := mk.define(ctx, *m)
	if err != nil {
		return err
	}
	if err := mk.Hypervisor.RestoreDomain(ctx, m.domain, from.State, text); err != nil {
		return err
	}
	mk.Log.Step("machine", time.Since(begun), "restored from memory (%s)", from.Name)
	return nil
}

// door returns doorScript for a guest in which user is to log in once it is
// restored, but not with the public key made.
func door(user, made string) string {
	if made == "" {
		made = "(no such key)"
	}
	return fmt.Sprintf("set -- '%s' '%s'\n", user, made) + strings.Replace(doorScript, "# identity.sh\n", identityScript, 1)
}

// identify returns what the machine's guest is to be, in lines as identityScript
// reads them after the clock's.
func (m machine) identify(keeper *Keeper) string {
	var random [64 + 16]byte
	rand.Read(random[:])
	// Nobody needs the network's SSH server at once where the connection is kept.
	patience := "0"
	if keeper.works() {
		patience = "2"
	}
	return strings.Join([]string{
		fmt.Sprintf("%x", random[:64]), // the seed
		fmt.Sprintf("%x", random[64:]), // the machine-id
		m.name[:min(len(m.name), 64)],
		patience,
		strings.TrimSpace(m.keys.client.Public()),
		strings.TrimSpace(m.keys.host.Public()),
		strings.TrimSpace(m.keys.host.Private()),
		"",
	}, "\n")
}
