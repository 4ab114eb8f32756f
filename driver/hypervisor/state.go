package hypervisor

import (
	"fmt"

	"github.com/digitalocean/go-libvirt"
)

// Kind is what a domain does.
type Kind string

// The states of a domain, in virsh's words.
const (
	Running Kind = "running"
	Paused  Kind = "paused"
	Off     Kind = "shut off"
	Crashed Kind = "crashed"
	// Gone is a domain that does not exist.
	Gone Kind = "gone"
)

// State is a domain's state and why it is in it; see
// https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainState.
type State struct {
	Kind Kind
	// Reason is in plain words, empty when libvirt knows none.
	Reason string
	// ByHand tells of a pause that someone asked libvirt for, and will end.
	ByHand bool
}

func (s State) String() string {
	if s.Reason == "" {
		return string(s.Kind)
	}
	return fmt.Sprintf("%s (%s)", s.Kind, s.Reason)
}

func newState(state libvirt.DomainState, reason int32) State {
	switch state {
	case libvirt.DomainPaused:
		r := libvirt.DomainPausedReason(reason)
		s := State{Kind: Paused, Reason: pausedReasons[r]}
		switch r {
		case libvirt.DomainPausedUser, libvirt.DomainPausedMigration, libvirt.DomainPausedSave,
			libvirt.DomainPausedDump, libvirt.DomainPausedSnapshot, libvirt.DomainPausedStartingUp:
			s.ByHand = true
		}
		return s
	case libvirt.DomainShutoff:
		return State{Kind: Off, Reason: offReasons[libvirt.DomainShutoffReason(reason)]}
	case libvirt.DomainCrashed:
		return State{Kind: Crashed}
	default:
		// Running, blocked, suspended by the guest itself, or about to be shut
		// off: why it is shows in the state that follows at once.
		return State{Kind: Running}
	}
}

var pausedReasons = map[libvirt.DomainPausedReason]string{
	libvirt.DomainPausedUser:           "by a user",
	libvirt.DomainPausedMigration:      "for migration",
	libvirt.DomainPausedSave:           "to be saved",
	libvirt.DomainPausedDump:           "to be dumped",
	libvirt.DomainPausedIoerror:        "I/O error on its disk",
	libvirt.DomainPausedWatchdog:       "watchdog",
	libvirt.DomainPausedFromSnapshot:   "restored from a snapshot",
	libvirt.DomainPausedShuttingDown:   "shutting down",
	libvirt.DomainPausedSnapshot:       "for a snapshot",
	libvirt.DomainPausedCrashed:        "guest crashed",
	libvirt.DomainPausedStartingUp:     "starting up",
	libvirt.DomainPausedPostcopy:       "for migration",
	libvirt.DomainPausedPostcopyFailed: "migration failed",
	libvirt.DomainPausedAPIError:       "after a failed libvirt call",
}

var offReasons = map[libvirt.DomainShutoffReason]string{
	libvirt.DomainShutoffShutdown:     "the guest powered off",
	libvirt.DomainShutoffDestroyed:    "destroyed",
	libvirt.DomainShutoffCrashed:      "QEMU or the guest crashed",
	libvirt.DomainShutoffMigrated:     "migrated to another host",
	libvirt.DomainShutoffSaved:        "saved",
	libvirt.DomainShutoffFailed:       "failed to start",
	libvirt.DomainShutoffFromSnapshot: "restored from a snapshot",
	libvirt.DomainShutoffDaemon:       "libvirtd lost it",
}
