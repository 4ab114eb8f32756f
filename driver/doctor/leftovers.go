package doctor

import (
	"context"
	"time"
)

// checkLeftovers looks for machines whose jobs are over.
func (d *Doctor) checkLeftovers(ctx context.Context, _ string) Finding {
	const day = 24 * time.Hour // as gc has it
	host := d.host()
	over, err := host.Collect(ctx, day, true)
	switch {
	case err != nil && len(over) == 0:
		return Finding{Level: Skipped, Found: oneLine(err.Error())}
	case len(over) == 1:
		return warning(d.own("gc"), "%s: %s", over[0].Machine.Name, over[0].Why)
	case len(over) > 1:
		return warning(d.own("gc"), "%s of jobs that are over, as %s", count(len(over), "machine"), over[0].Machine.Name)
	}
	return fine("no machine of a job that is over")
}
