package main

import (
	"fmt"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"libvirt-driver/integration/runner"
)

// row is one figure of all sides, the baseline's first. A side that has no such
// figure has an empty series.
type row struct {
	name    string
	figures []series
}

// group is jobs of each side, the baseline's first.
type group [][]*job

// ways are those of the driver alone.
func (g group) ways() group { return append(group{nil}, g[1:]...) }

// perJob makes the row of a figure that each job has, or, where it is NaN, has
// not.
func (g group) perJob(name string, figure func(*job) float64) row {
	r := row{name, make([]series, len(g))}
	for side, jobs := range g {
		for _, j := range jobs {
			if v := figure(j); !math.IsNaN(v) {
				r.figures[side] = append(r.figures[side], v)
			}
		}
	}
	return r
}

// Rows' names that targets name, too.
const (
	prepareRow = "prepare"
	atRestRow  = "run, guest at rest"
	cleanupRow = "cleanup"
	wholeRow   = "whole job, 8 sub-stages"
	ownRow     = "all but that: the side's own"
	allRow     = "whole job, all processes"
	othersRow  = "other programs they execute"
	largestRow = "any process of a job"
)

// perCall makes a row for each kind of call, of a figure that each call has.
func (g group) perCall(figure func(*runner.Result) float64) []row {
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
		{prepareRow, func(j *job) []*runner.Result { return []*runner.Result{j.prepare} }},
		{"run, right after prepare", func(j *job) []*runner.Result { return j.runs }},
		{atRestRow, func(j *job) []*runner.Result { return j.atRest }},
		{cleanupRow, func(j *job) []*runner.Result { return []*runner.Result{j.cleanup} }},
	} {
		r, any := row{kind.name, make([]series, len(g))}, false
		for side, jobs := range g {
			for _, j := range jobs {
				r.figures[side] = append(r.figures[side], of(kind.calls(j), figure)...)
			}
			any = any || len(r.figures[side]) > 0
		}
		if any {
			rows = append(rows, r)
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

const mib = 1 << 20

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
	peak = func(r *runner.Result) float64 { return float64(r.Trace.PeakRSS) / mib }
)

// Figures of a job.
var (
	wallOfJob = ofCalls(wall, sum)
	keeperCPU = func(j *job) float64 { return j.keeper }
	leftCPU   = func(j *job) float64 {
		var all float64
		for _, u := range j.left {
			all += u.cpu
		}
		return all
	}
	allCPU     = func(j *job) float64 { return ofCalls(cpu, sum)(j) + keeperCPU(j) + leftCPU(j) }
	serviceCPU = func(j *job) float64 {
		if j.beside == 0 {
			return math.NaN()
		}
		return j.beside
	}
	// leftPeak is that of the processes that calls left behind.
	leftPeak = func(j *job) float64 {
		most := j.keeperPeak
		for _, u := range j.left {
			most = max(most, u.peak)
		}
		return float64(most) / mib
	}
)

// Tables, of which targets name some.
const (
	timeTable    = "Time, in seconds"
	cpuTable     = "Processor time, in seconds"
	processTable = "Processes that the calls of one job start"
	memoryTable  = "Peak memory of the largest process, in MiB"
	outsideTable = "prepare as seen from outside, in seconds"
)

// report makes the report of all that was measured, but for the targets.
func (m *measurements) report() *report {
	r := &report{
		title: "The driver beside the documentation page's scripts",
		facts: []string{
			fmt.Sprintf("n = %d jobs of each side, in turns; nothing left out; ratio: median to the baseline's", len(m.timed[0])),
			fmt.Sprintf("run: a script that does nothing, %d times in each job, and %d times more when the guest is at rest",
				len(subStages), len(subStages)),
		},
	}
	timed, ways := m.timed, m.timed.ways()

	times := append(timed.perCall(wall), timed.perJob(wholeRow, wallOfJob))
	m.compare(r, timeTable, seconds, times)
	r.add(timeTable+": minima and maxima", m.spreads(times, seconds))

	m.compare(r, cpuTable, seconds, append(timed.perCall(cpu),
		timed.perJob("whole job, its calls", ofCalls(cpu, sum)),
		ways.perJob("left behind: the keeper", keeperCPU),
		ways.perJob("left behind: the finisher", leftCPU),
		timed.perJob(allRow, allCPU),
		ways.perJob("beside it: the service", serviceCPU)))

	m.compare(r, processTable, count, append(m.traced.perCall(processes),
		m.traced.perJob(wholeRow, ofCalls(processes, sum)),
		m.traced.perJob(othersRow, ofCalls(programs, sum))))

	largest := m.traced.perJob(largestRow, ofCalls(peak, larger))
	left := ways.perJob("left behind", leftPeak)
	for side, s := range left.figures {
		if len(s) > 0 {
			largest.figures[side] = series{max(largest.figures[side].quantile(1), s.quantile(1))}
		}
	}
	m.compare(r, memoryTable, mebibytes, append(m.traced.perCall(peak), left, largest))

	outside := outsideRows(timed)
	m.compare(r, outsideTable, seconds, outside)
	r.add(outsideTable+": minima and maxima", m.spreads(outside, seconds))
	m.compare(r, "The way through prepare, in seconds", seconds, prepareSteps(timed))
	m.compare(r, "The way through run and cleanup, in seconds", seconds, cleanupSteps(timed))
	m.compare(r, "Calls to libvirtd of one job", count, rpcRows(ways))
	r.add("prepare by the driver's own log, in seconds", m.ownSteps())
	if len(timed[0]) >= enoughForPercentiles {
		r.add("Percentiles, in seconds", m.percentiles(times))
	}
	return r
}

// addTail adds what many jobs of each way have shown.
func (m *measurements) addTail(r *report) {
	rows := append(m.timed.perCall(wall), m.timed.perJob(wholeRow, wallOfJob), m.timed.perJob("processor time of a whole job", allCPU))
	r.add(fmt.Sprintf("Percentiles of %d jobs of each way more, in seconds", len(m.timed[len(m.timed)-1])), m.percentiles(rows))
}

// since is between two times that a job may not have.
func since(from, to time.Time) float64 {
	if from.IsZero() || to.IsZero() {
		return math.NaN()
	}
	return between(from, to)
}

// outsideRows take prepare apart where it boots a guest that was watched.
func outsideRows(g group) []row {
	start := func(j *job) float64 { return since(j.prepare.Started, j.boot.started) }
	end := func(j *job) float64 { return since(j.boot.listening, j.prepare.Ended) }
	return []row{
		g.perJob("call to guest started", start),
		g.perJob("guest: to its address", func(j *job) float64 { return since(j.boot.started, j.boot.addressed) }),
		g.perJob("guest: to its SSH port", func(j *job) float64 { return since(j.boot.addressed, j.boot.listening) }),
		g.perJob("SSH port to return", end),
		g.perJob("the guest's own share", func(j *job) float64 { return since(j.boot.started, j.boot.listening) }),
		g.perJob(ownRow, func(j *job) float64 { return start(j) + end(j) }),
	}
}

// prepareSteps follow one prepare from its first instruction to its return. Of a
// baseline, which asks libvirtd by other programs, there is what the network
// shows.
func prepareSteps(g group) []row {
	ways := g.ways()
	calls := func(j *job) []rpc { return inside(j.rpc, j.prepare.Started, j.prepare.Ended) }
	// made is when the machine runs; where that is not this prepare's doing, when
	// it returns.
	made := func(j *job) time.Time {
		if !j.boot.started.IsZero() {
			return j.boot.started
		}
		if at := last(calls(j), startOrRestore); !at.IsZero() {
			return at
		}
		return j.prepare.Ended
	}
	asked := func(some []procedure) func(*job) float64 {
		return func(j *job) float64 { return taken(calls(j), some) }
	}
	first := func(j *job) float64 {
		if calls := calls(j); len(calls) > 0 {
			return between(j.prepare.Started, calls[0].sent)
		}
		return math.NaN()
	}
	// starting ends as the machine runs, and not with libvirtd's answer.
	starting := func(j *job) float64 {
		var all float64
		for _, c := range calls(j) {
			if taken([]rpc{c}, startOrRestore) > 0 {
				all += max(0, between(c.sent, made(j)))
			}
		}
		return all
	}
	others := func(j *job) float64 {
		until := inside(j.rpc, j.prepare.Started, made(j))
		return taken(until, nil) - taken(until, createOverlay) - taken(until, define) - taken(until, startOrRestore)
	}
	rest := func(j *job) float64 {
		return between(j.prepare.Started, made(j)) - first(j) - asked(createOverlay)(j) - asked(define)(j) - starting(j) - others(j)
	}
	return []row{
		ways.perJob("driver: to its first call", first),
		ways.perJob("libvirt: overlay", asked(createOverlay)),
		ways.perJob("libvirt: define", asked(define)),
		ways.perJob("libvirt: start, or restore", starting),
		ways.perJob("libvirt: what else is asked", others),
		ways.perJob("driver: between these", rest),
		g.perJob("guest: firmware, kernel, to DHCP", func(j *job) float64 { return since(j.boot.started, j.boot.asked) }),
		g.perJob("guest: DHCP", func(j *job) float64 { return since(j.boot.asked, j.boot.addressed) }),
		g.perJob("guest: to its SSH port", func(j *job) float64 { return since(j.boot.addressed, j.boot.listening) }),
		g.perJob("that is noticed, by TCP", func(j *job) float64 { return since(j.boot.listening, j.boot.connected) }),
		g.perJob("SSH: the server's version", func(j *job) float64 { return since(j.boot.connected, j.boot.greeted) }),
		g.perJob("SSH: keys exchanged", func(j *job) float64 { return since(j.boot.greeted, j.boot.keyed) }),
		g.perJob("SSH: login, session; return", func(j *job) float64 { return since(j.boot.keyed, j.prepare.Ended) }),
	}
}

// cleanupSteps follow a run and a removal, of which the calls after cleanup's
// return are the finisher's.
func cleanupSteps(g group) []row {
	ways := g.ways()
	within := func(j *job) []rpc { return inside(j.rpc, j.cleanup.Started, j.cleanup.Ended) }
	after := func(j *job) []rpc { return inside(j.rpc, j.cleanup.Started, time.Now()) }
	took := func(some []procedure) func(*job) float64 {
		return func(j *job) float64 { return taken(after(j), some) }
	}
	return []row{
		g.perJob("run: to a script's first byte", func(j *job) float64 { return since(j.echo.Started, j.echo.FirstByte) }),
		g.perJob("run: from it to return", func(j *job) float64 { return since(j.echo.FirstByte, j.echo.Ended) }),
		ways.perJob("cleanup: to its first call", func(j *job) float64 {
			if calls := within(j); len(calls) > 0 {
				return between(j.cleanup.Started, calls[0].sent)
			}
			return math.NaN()
		}),
		ways.perJob("libvirt: suspend", func(j *job) float64 { return taken(within(j), suspend) }),
		ways.perJob("libvirt: what else is asked", func(j *job) float64 { return taken(within(j), nil) - taken(within(j), suspend) }),
		g.perJob("cleanup returns", func(j *job) float64 { return wall(j.cleanup) }),
		ways.perJob("libvirt: destroy", took(destroy)),
		ways.perJob("libvirt: undefine", took(undefine)),
		ways.perJob("libvirt: delete volumes", took(deleteVolume)),
		ways.perJob("all is gone, from the call on", func(j *job) float64 { return since(j.cleanup.Started, last(after(j), nil)) }),
	}
}

// rpcRows count the calls to libvirtd.
func rpcRows(ways group) []row {
	some := func(from, to func(*job) time.Time) func(*job) float64 {
		return func(j *job) float64 { return float64(len(inside(j.rpc, from(j), to(j)))) }
	}
	return []row{
		ways.perJob("prepare", some(func(j *job) time.Time { return j.prepare.Started }, func(j *job) time.Time { return j.prepare.Ended })),
		ways.perJob("run, all sub-stages", some(func(j *job) time.Time { return j.runs[0].Started },
			func(j *job) time.Time { return j.runs[len(j.runs)-1].Ended })),
		ways.perJob("cleanup", some(func(j *job) time.Time { return j.cleanup.Started }, func(j *job) time.Time { return j.cleanup.Ended })),
		ways.perJob("after it: the finisher", some(func(j *job) time.Time { return j.cleanup.Ended }, func(*job) time.Time { return time.Now() })),
	}
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
		return least
	}
	return least + "–" + most
}

// ratio shows what a way's median is to the baseline's.
func (u unit) ratio(baseline, way series) string {
	if !u.ratios || len(baseline) == 0 || len(way) == 0 || baseline.median() == 0 {
		return ""
	}
	return fmt.Sprintf("%.3f", way.median()/baseline.median())
}

// compare adds a table of medians, and remembers the rows for the targets.
func (m *measurements) compare(r *report, caption string, u unit, rows []row) {
	t := table{header: []string{""}}
	for side, name := range m.sides {
		t.header = append(t.header, name)
		if side > 0 {
			t.header = append(t.header, "ratio")
		}
	}
	for _, row := range rows {
		if !slices.ContainsFunc(row.figures, func(s series) bool { return len(s) > 0 }) {
			continue
		}
		line := []string{row.name}
		for side, s := range row.figures {
			line = append(line, u.middle(s))
			if side > 0 {
				line = append(line, u.ratio(row.figures[0], s))
			}
		}
		t.rows = append(t.rows, line)
	}
	r.add(caption, t)
	m.compared = append(m.compared, compared{caption, u, rows})
}

// compared is a table of the report as targets look at it.
type compared struct {
	caption string
	unit    unit
	rows    []row
}

// spreads makes a table of minima and maxima.
func (m *measurements) spreads(rows []row, u unit) table {
	t := table{header: append([]string{""}, m.sides...)}
	for _, row := range rows {
		line := []string{row.name}
		for _, s := range row.figures {
			line = append(line, u.spread(s))
		}
		t.rows = append(t.rows, line)
	}
	return t
}

// step is a line of the driver's log about a step that is done: two blanks, its
// name, what came of it, the seconds it took.
var step = regexp.MustCompile(`(?m)^  ([a-z][a-z -]*?) {1,}\S.* ([0-9]+\.[0-9]+) s$`)

// ownSteps makes a table of the steps that the driver's prepare has logged, in
// the order in which they come.
func (m *measurements) ownSteps() table {
	var names []string
	took := map[string][]series{}
	for side, jobs := range m.timed {
		if side == 0 {
			continue
		}
		for _, j := range jobs {
			log := append(append([]byte(nil), j.prepare.Stdout...), j.prepare.Stderr...)
			for _, found := range step.FindAllStringSubmatch(string(log), -1) {
				name := found[1]
				if took[name] == nil {
					names = append(names, name)
					took[name] = make([]series, len(m.sides))
				}
				s, err := strconv.ParseFloat(found[2], 64)
				if err != nil {
					panic(err) // the expression lets nothing else through
				}
				took[name][side] = append(took[name][side], s)
			}
		}
	}
	t := table{header: []string{"step"}}
	for _, name := range m.sides[1:] {
		t.header = append(t.header, name, "min–max")
	}
	logged := unit{func(v float64) string { return fmt.Sprintf("%.2f", v) }, false}
	for _, name := range names {
		line := []string{name}
		for _, s := range took[name][1:] {
			line = append(line, logged.middle(s), logged.spread(s))
		}
		t.rows = append(t.rows, line)
	}
	return t
}

// enoughForPercentiles is how many jobs a 95th percentile needs to be more than
// the maximum.
const enoughForPercentiles = 20

// percentiles makes a table of each figure's spread, a line for each side.
func (m *measurements) percentiles(rows []row) table {
	shares := []float64{0.5, 0.9, 0.95, 0.99}
	t := table{header: []string{"", ""}}
	for _, q := range shares {
		t.header = append(t.header, fmt.Sprintf("%.0f %%", 100*q))
	}
	t.header = append(t.header, "max", "samples")
	for _, r := range rows {
		name := r.name
		for side, s := range r.figures {
			if len(s) == 0 {
				continue
			}
			line := []string{name, m.sides[side]}
			name = ""
			for _, q := range append(shares, 1) {
				line = append(line, seconds.format(s.quantile(q)))
			}
			t.rows = append(t.rows, append(line, strconv.Itoa(len(s))))
		}
	}
	return t
}
