package main

import "fmt"

// goal is a target and the figure that it is for: a row of a table of the report,
// of one way of the driver's or, without a name, of each.
type goal struct {
	name            string
	table, row, way string
	target          target
}

// goals are what the driver promises.
var goals = []goal{
	{"prepare", timeTable, prepareRow, "boot", share(0.95)},
	{"prepare, the driver's own share", outsideTable, ownRow, "boot", atMost(0.3, "s")},
	{"prepare", timeTable, prepareRow, "standby", oneIn(30)},
	{"prepare", timeTable, prepareRow, "memory", oneIn(7)},
	{"run, guest at rest", timeTable, atRestRow, "", oneIn(7)},
	{"cleanup", timeTable, cleanupRow, "", oneIn(5)},
	{"whole job", timeTable, wholeRow, "standby", oneIn(12)},
	{"processor time of a whole job", cpuTable, allRow, "", atMost(0.15, "s")},
	{"memory of any process, MiB", memoryTable, largestRow, "", below(40, "MiB")},
	// The driver's own that keeps the connection to the guest, and the one that
	// finishes its removal.
	{"processes started", processTable, wholeRow, "", never(2)},
	{"other programs executed", processTable, othersRow, "", never(0)},
}

// target is what a figure is measured against.
type target struct {
	text string
	met  func(baseline, way series) bool
}

// share is the target of a way that takes at most this share of the baseline's
// figure, median by median.
func share(s float64) target {
	return target{fmt.Sprintf("≤ %.2f of baseline", s), func(baseline, way series) bool {
		return len(baseline) > 0 && way.median() <= s*baseline.median()
	}}
}

// oneIn is the target of a way that takes at most one nth of the baseline's
// figure, median by median.
func oneIn(n float64) target {
	t := share(1 / n)
	t.text = fmt.Sprintf("≤ 1/%.0f of baseline", n)
	return t
}

// atMost is the target of a figure whose median is no more than the limit.
func atMost(limit float64, unit string) target {
	return target{fmt.Sprintf("≤ %.2g %s", limit, unit), func(_, way series) bool { return way.median() <= limit }}
}

// below is the target of a figure that is never as much as the limit.
func below(limit float64, unit string) target {
	return target{fmt.Sprintf("< %.0f %s, each", limit, unit), func(_, way series) bool { return way.quantile(1) < limit }}
}

// never is the target of a count that is never more.
func never(more float64) target {
	text := "none"
	if more > 0 {
		text = fmt.Sprintf("≤ %.0f, each", more)
	}
	return target{text, func(_, way series) bool { return way.quantile(1) <= more }}
}

// judge adds the table of targets, and counts them. A figure that was not
// measured meets none.
func (m *measurements) judge(r *report) {
	t := table{header: []string{"", "way", "baseline", "measured", "ratio", "target", "verdict"}}
	for _, g := range goals {
		for side, name := range m.sides {
			if side == 0 || g.way != "" && g.way != name {
				continue
			}
			figures, u := m.find(g)
			baseline, way := figures[0], figures[side]
			verdict := "met"
			if len(way) > 0 && g.target.met(baseline, way) {
				r.met++
			} else {
				verdict = "missed"
				r.missed = append(r.missed, fmt.Sprintf("%s, %s: %s, target %s", name, g.name, u.middle(way), g.target.text))
			}
			t.rows = append(t.rows, []string{
				g.name, name, u.middle(baseline), u.middle(way), u.ratio(baseline, way), g.target.text, verdict,
			})
		}
	}
	r.add("Targets, by medians but where each counts", t)
}

// find returns the figures of a goal, of every side.
func (m *measurements) find(g goal) ([]series, unit) {
	for _, c := range m.compared {
		for _, row := range c.rows {
			if c.caption == g.table && row.name == g.row {
				return row.figures, c.unit
			}
		}
	}
	panic("no table has the figure of target " + g.name)
}
