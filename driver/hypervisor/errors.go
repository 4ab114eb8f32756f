package hypervisor

import (
	"errors"
	"fmt"

	"github.com/digitalocean/go-libvirt"
)

// What a caller may decide on. Test with errors.Is; the error's text names the
// thing and keeps libvirt's own words.
var (
	// ErrNotFound: there is no such pool, volume, network or domain.
	ErrNotFound = errors.New("not found")
	// ErrInactive: the pool, network or domain is there but not running.
	ErrInactive = errors.New("not active")
	// ErrBusy: libvirt is at work on it; later it will not be.
	ErrBusy = errors.New("busy")
	// ErrUnreachable: libvirtd is not there or went away.
	ErrUnreachable = errors.New("libvirtd is out of reach")
)

// wrap says what was attempted, and turns libvirt's error numbers, of which a
// caller may know nothing, into the errors above.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	switch {
	case is(err, libvirt.ErrNoDomain), is(err, libvirt.ErrNoStoragePool), is(err, libvirt.ErrNoStorageVol),
		is(err, libvirt.ErrNoNetwork), is(err, libvirt.ErrNoDomainMetadata):
		return fmt.Errorf("%s: %w: %w", what, ErrNotFound, err)
	case is(err, libvirt.ErrOperationInvalid):
		return fmt.Errorf("%s: %w: %w", what, ErrInactive, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// is reports whether err is libvirt's error of that number; see
// https://libvirt.org/html/libvirt-virterror.html#virErrorNumber.
func is(err error, number libvirt.ErrorNumber) bool {
	var e libvirt.Error
	return errors.As(err, &e) && e.Code == uint32(number)
}
