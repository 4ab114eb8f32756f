package main

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"

	"libvirt-driver/integration/runner"
)

// row compares one figure of both sides.
type row struct {
	name             string
	baseline, driver series
	target           *target
}

// target is what a figure is measured against.
type target struct {
	text string
	met  func(baseline, driver series) bool
}

// atMost is the target of a driver that takes at most this share of the
// baseline's figure, median by median.
func atMost(share float64) *target {
	return &target{fmt.Sprintf("≤ %.2f", share), func(baseline, driver series) bool {
		return driver.median() <= share*baseline.median()
	}}
}

// below is the target of a figure that is never as much as the limit.
func below(limit float64, unit string) *target {
	return &target{fmt.Sprintf("< %.0f %s", limit, unit), func(_, driver series) bool {
		return driver.quantile(1) < limit
	}}
}

// ownAlone is the target of a count of processes: the driver's own that keeps
// the connection to the guest, and the one that finishes its removal.
var ownAlone = &target{"≤ 2", func(_, driver series) bool { return driver.quantile(1) <= 2 }}

// none is the target of a count that is 0.
var none = &target{"none", func(_, driver series) bool { return driver.quantile(1) == 0 }}

// verdict is "" for a figure without a target.
func (r row) verdict() string {
	switch {
	case r.target == nil || len(r.driver) == 0:
		return ""
	case r.target.met(r.baseline, r.driver):
		return "met"
	}
	return "missed"
}

// pair is jobs of both sides, the baseline's first.
type pair [2][]*job

// perJob makes the row of a figure that each job has.
func (p pair) perJob(name string, figure func(*job) float64, t *target) row {
	var all [2]series
	for side, jobs := range p {
		for _, j := range jobs {
			all[side] = append(all[side], figure(j))
		}
	}
	return row{name, all[0], all[1], t}
}

// perCall makes a row for each kind of call, of a figure that each call has.
func (p pair) perCall(figure func(*runner.Result) float64, targets map[string]*target) []row {
	var rows []row
	for _, kind := range []struct {
		name  string
		calls func(*job) []*runner.Result
	}{
		{"config", func(j *job) []*runner.Result {
			if j.config.Pid == 0 {
				return nil
			}
			return []*runner.Result{j.config}
		}},
		{"prepare", func(j *job) []*runner.Result { return []*runner.Result{j.prepare} }},
		{"run, right after prepare", func(j *job) []*runner.Result { return j.runs }},
		{"run, guest at rest", func(j *job) []*runner.Result { return j.atRest }},
		{"cleanup", func(j *job) []*runner.Result { return []*runner.Result{j.cleanup} }},
	} {
		var all [2]series
		for side, jobs := range p {
			for _, j := range jobs {
				all[side] = append(all[side], of(kind.calls(j), figure)...)
			}
		}
		if len(all[0])+len(all[1]) > 0 {
			rows = append(rows, row{kind.name, all[0], all[1], targets[kind.name]})
		}
	}
	return rows
}

// ofCalls makes a job's figure of its calls' figures.
func ofCalls(figure func(*runner.Result) float64, join func(a, b float64) float64) func(*job) float64 {
	return func(j *job) float64 {
		var all float64
		for _, r := range j.calls() {
			all = join(all, figure(r))
		}
		return all
	}
}

func sum(a, b float64) float64 { return a + b }

func larger(a, b float64) float64 { return max(a, b) }

// Figures of a call.
var (
	wall = func(r *runner.Result) float64 { return r.Duration().Seconds() }
	// cpu is the processor time of the call's process and of all that it started
	// and waited for.
	cpu       = func(r *runner.Result) float64 { return (r.User + r.System).Seconds() }
	processes = func(r *runner.Result) float64 { return float64(r.Trace.Processes) }
	// programs leaves out the driver itself, whose keeper and finisher are more of it.
	programs = func(r *runner.Result) float64 {
		n := 0
		for _, program := range r.Trace.Execs {
			if filepath.Base(program) != "libvirt-driver" {
				n++
			}
		}
		return float64(n)
	}
	peak = func(r *runner.Result) float64 { return float64(r.Trace.PeakRSS) / (1 << 20) }
)

// report makes the report of all that was measured.
func (m *measurements) report(facts []string) *report {
	n := len(m.timed[1])
	whole := fmt.Sprintf("whole job, %d sub-stages", len(subStages))
	r := &report{
		title: "The driver beside the documentation page's scripts",
		facts: append([]string{
			fmt.Sprintf("n = %d jobs of each side, in turns; medians, minima and maxima, nothing left out", n),
			fmt.Sprintf("run: a script that does nothing, %d times in each job, and %d times more when the guest is at rest",
				len(subStages), len(subStages)),
		}, facts...),
	}

	times := append(m.timed.perCall(wall, map[string]*target{
		"prepare": atMost(0.95), "run, guest at rest": atMost(1.0 / 7), "cleanup": atMost(1),
	}), m.timed.perJob(whole, ofCalls(wall, sum), nil))
	r.compare("Time, in seconds", seconds, times)
	r.compare("Processor time of the calls' processes, in seconds", seconds,
		append(m.timed.perCall(cpu, nil), m.timed.perJob(whole, ofCalls(cpu, sum), nil)))
	r.compare("Processes that the calls of one job start", count,
		append(m.traced.perCall(processes, nil), m.traced.perJob(whole, ofCalls(processes, sum), ownAlone),
			m.traced.perJob("other programs that they execute", ofCalls(programs, sum), none)))
	r.compare("Peak memory of the calls' largest process, in MiB", mebibytes,
		append(m.traced.perCall(peak, nil), m.traced.perJob("any call of a job", ofCalls(peak, larger), below(40, "MiB"))))

	start := func(j *job) float64 { return between(j.prepare.Started, j.boot.started) }
	end := func(j *job) float64 { return between(j.boot.listening, j.prepare.Ended) }
	r.compare("prepare as seen from outside, in seconds", seconds, []row{
		m.timed.perJob("call to guest started", start, nil),
		m.timed.perJob("guest: to its address", func(j *job) float64 { return between(j.boot.started, j.boot.addressed) }, nil),
		m.timed.perJob("guest: to its SSH port", func(j *job) float64 { return between(j.boot.addressed, j.boot.listening) }, nil),
		m.timed.perJob("SSH port to return", end, nil),
		m.timed.perJob("the guest's own share", func(j *job) float64 { return between(j.boot.started, j.boot.listening) }, nil),
		m.timed.perJob("all but that: the side's own", func(j *job) float64 { return start(j) + end(j) }, nil),
	})
	r.add("The driver's prepare by its own log, in seconds", ownSteps(m.timed[1]))
	if n >= enoughForPercentiles {
		r.add("Percentiles, in seconds", percentiles(times))
	}
	return r
}

// compare adds a table of figures of both sides, and counts their targets.
func (r *report) compare(caption string, u unit, rows []row) {
	for _, row := range rows {
		switch row.verdict() {
		case "met":
			r.met++
		case "missed":
			r.missed = append(r.missed, fmt.Sprintf("%s: %s: %s", caption, row.name, row.target.text))
		}
	}
	r.add(caption, comparison(rows, u))
}

// unit shows a measurement, and says whether dividing two means anything.
type unit struct {
	format func(float64) string
	ratios bool
}

var (
	seconds = unit{func(v float64) string {
		if v >= 10 {
			return fmt.Sprintf("%.2f", v)
		}
		return fmt.Sprintf("%.3f", v)
	}, true}
	mebibytes = unit{func(v float64) string { return fmt.Sprintf("%.1f", v) }, true}
	count     = unit{func(v float64) string { return fmt.Sprintf("%.0f", v) }, false}
)

// middle shows a series' median.
func (u unit) middle(s series) string {
	if len(s) == 0 {
		return "–"
	}
	return u.format(s.median())
}

// spread shows a series' minimum and maximum, unless they show alike.
func (u unit) spread(s series) string {
	if len(s) == 0 {
		return ""
	}
	least, most := u.format(s.quantile(0)), u.format(s.quantile(1))
	if least == most {
		return ""
	}
	return least + "–" + most
}

// comparison makes a table of figures of both sides.
func comparison(rows []row, u unit) table {
	t := table{header: []string{"", "baseline", "min–max", "driver", "min–max", "ratio", "target", ""}}
	for _, r := range rows {
		ratio, goal := "", ""
		if u.ratios && len(r.baseline) > 0 && len(r.driver) > 0 && r.baseline.median() != 0 {
			ratio = fmt.Sprintf("%.3f", r.driver.median()/r.baseline.median())
		}
		if r.target != nil {
			goal = r.target.text
		}
		t.rows = append(t.rows, []string{
			r.name, u.middle(r.baseline), u.spread(r.baseline), u.middle(r.driver), u.spread(r.driver), ratio, goal, r.verdict(),
		})
	}
	return t
}

// step is a line of the driver's log about a step that is done: two blanks, its
// name, what came of it, the seconds it took.
var step = regexp.MustCompile(`(?m)^  ([a-z][a-z -]*?) {1,}\S.* ([0-9]+\.[0-9]+) s$`)

// ownSteps makes a table of the steps that the driver's prepare has logged, in
// the order in which they come.
func ownSteps(jobs []*job) table {
	var names []string
	took := map[string]series{}
	for _, j := range jobs {
		log := append(append([]byte(nil), j.prepare.Stdout...), j.prepare.Stderr...)
		for _, m := range step.FindAllStringSubmatch(string(log), -1) {
			name := m[1]
			if took[name] == nil {
				names = append(names, name)
			}
			s, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				panic(err) // the expression lets nothing else through
			}
			took[name] = append(took[name], s)
		}
	}
	t := table{header: []string{"step", "median", "min–max"}}
	logged := unit{func(v float64) string { return fmt.Sprintf("%.2f", v) }, false}
	for _, name := range names {
		t.rows = append(t.rows, []string{name, logged.middle(took[name]), logged.spread(took[name])})
	}
	return t
}

// enoughForPercentiles is how many jobs a 95th percentile needs to be more than
// the maximum.
const enoughForPercentiles = 20

func percentiles(rows []row) table {
	shares := []float64{0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1}
	t := table{header: []string{""}}
	for _, q := range shares {
		t.header = append(t.header, fmt.Sprintf("%.0f %%", 100*q))
	}
	for _, r := range rows {
		for _, side := range []struct {
			name string
			s    series
		}{{"baseline", r.baseline}, {"driver", r.driver}} {
			if len(side.s) == 0 {
				continue
			}
			line := []string{r.name + ": " + side.name}
			for _, q := range shares {
				line = append(line, seconds.format(side.s.quantile(q)))
			}
			t.rows = append(t.rows, line)
		}
	}
	return t
}
