package doctor

import (
	"context"
	"slices"
)

// standing returns the names of the images of which machines shall stand ready.
func (d *Doctor) standing() []string {
	return slices.DeleteFunc(d.images(), func(name string) bool { return d.settings.Images[name].Standby == 0 })
}

// checkStandby looks whether somebody keeps an image's machines ready.
func (d *Doctor) checkStandby(_ context.Context, name string) Finding {
	host := d.host()
	wanted := count(int(d.settings.Images[name].Standby), "machine")
	if served, err := host.HasStandby(); err != nil {
		return unknown(err)
	} else if !served {
		return warning("systemctl enable --now libvirt-driver-standby", "%s shall stand ready, but no standby service runs: jobs boot", wanted)
	}
	return fine("a service keeps %s ready", wanted)
}
