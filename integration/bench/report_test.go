package main

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/settings"
	"libvirt-driver/integration/runner"
)

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		s    series
		q    float64
		want float64
	}{
		{series{3}, 0, 3},
		{series{3}, 0.5, 3},
		{series{3}, 1, 3},
		{series{4, 1}, 0.5, 2.5},
		{series{9, 1, 5}, 0.5, 5},
		{series{9, 1, 5}, 0, 1},
		{series{9, 1, 5}, 1, 9},
		{series{9, 1, 5}, 0.25, 3},
		{series{40, 10, 30, 20, 50}, 0.95, 48},
	} {
		if got := test.s.quantile(test.q); math.Abs(got-test.want) > 1e-9 {
			t.Errorf("%v: quantile %v is %v, want %v", test.s, test.q, got, test.want)
		}
	}
	if got := (series{}).median(); !math.IsNaN(got) {
		t.Errorf("the median of nothing is %v", got)
	}
	s := series{3, 1, 2}
	s.median()
	if s[0] != 3 || s[1] != 1 {
		t.Errorf("the series was sorted in place: %v", s)
	}
}

func TestTargets(t *testing.T) {
	for _, test := range []struct {
		name          string
		target        target
		baseline, way series
		want          bool
	}{
		{"just met", share(0.8), series{1, 10, 100}, series{8}, true},
		{"just missed", share(0.8), series{1, 10, 100}, series{8.001}, false},
		{"medians count", share(1), series{5, 5, 5}, series{1, 5, 900}, true},
		{"one in 30", oneIn(30), series{15}, series{0.5}, true},
		{"not one in 30", oneIn(30), series{15}, series{0.51}, false},
		{"no baseline", oneIn(30), nil, series{0}, false},
		{"at most", atMost(0.3, "s"), nil, series{0.1, 0.3, 9}, true},
		{"more", atMost(0.3, "s"), nil, series{0.31}, false},
		{"below", below(40, "MiB"), nil, series{39.9}, true},
		{"at the limit", below(40, "MiB"), nil, series{40}, false},
		{"every one below", below(40, "MiB"), nil, series{1, 1, 41}, false},
		{"none", never(0), series{186}, series{0}, true},
		{"one", never(0), series{186}, series{1}, false},
		{"two", never(2), series{186}, series{2, 1}, true},
	} {
		if got := test.target.met(test.baseline, test.way); got != test.want {
			t.Errorf("%s: met: %v, want %v", test.name, got, test.want)
		}
	}
	if got := oneIn(7).text + share(0.95).text + atMost(0.15, "s").text + never(0).text; got != "≤ 1/7 of baseline≤ 0.95 of baseline≤ 0.15 snone" {
		t.Errorf("targets read %q", got)
	}
}

func TestCompareTable(t *testing.T) {
	m := &measurements{sides: []string{"baseline", "boot", "standby"}}
	r := &report{}
	m.compare(r, "Time", seconds, []row{
		{"prepare", []series{{15, 15.5, 14.75}, {12, 13, 11}, {0.5}}},
		{"config", []series{nil, {0.0049}, nil}},
	})
	m.compare(r, "Count", count, []row{{"processes", []series{{186}, {0}, {1}}}})
	want := "[[prepare 15.00 12.00 0.800 0.500 0.033] [config – 0.005  – ]] [[processes 186 0  1 ]]"
	if got := fmt.Sprint(r.sections[0].table.rows, r.sections[1].table.rows); got != want {
		t.Errorf("rows %s\nwant %s", got, want)
	}
	got := m.spreads(m.compared[0].rows, seconds).rows
	if want := "[[prepare 14.75–15.50 11.00–13.00 0.500] [config  0.005 ]]"; fmt.Sprint(got) != want {
		t.Errorf("rows %s\nwant %s", got, want)
	}
}

func TestTable(t *testing.T) {
	sample := table{
		header: []string{"", "baseline", "min–max", "note"},
		rows:   [][]string{{"first", "1.5", "1–2", ""}, {"the 2nd", "–", "", ""}},
	}
	var text strings.Builder
	sample.text(&text)
	if want := "" +
		"           baseline  min–max\n" +
		"  first         1.5      1–2\n" +
		"  the 2nd         –\n"; text.String() != want {
		t.Errorf("text\n%s\nwant\n%s", &text, want)
	}
	var markdown strings.Builder
	sample.markdown(&markdown)
	if want := "" +
		"|  | baseline | min–max | note |\n" +
		"|---|--:|--:|--:|\n" +
		"| first | 1.5 | 1–2 |  |\n" +
		"| the 2nd | – |  |  |\n"; markdown.String() != want {
		t.Errorf("Markdown\n%s\nwant\n%s", &markdown, want)
	}
}

// The driver's own log is what the steps are read from.
func TestOwnSteps(t *testing.T) {
	m := &measurements{sides: []string{"baseline", "boot", "standby"}, timed: make(group, 3)}
	for i := range 3 {
		var out bytes.Buffer
		log := gitlab.NewLog(&out, true)
		log.Title("Machine runner-1: image default, 2 vCPUs, 2 GiB memory")
		log.Note("it took 7.00 s")
		log.Step("disk", 20*time.Millisecond, "8 GiB, on %s", "base.qcow2")
		log.Step("address", time.Duration(10+i)*time.Second, "192.168.122.7")
		log.Title("The machine is ready after 12.0 s.")
		m.timed[1] = append(m.timed[1], &job{prepare: &runner.Result{Stage: "prepare", Stderr: out.Bytes()}})
	}
	want := [][]string{{"disk", "0.02", "0.02", "–", ""}, {"address", "11.00", "10.00–12.00", "–", ""}}
	if got := m.ownSteps().rows; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("steps %q, want %q", got, want)
	}
}

// call makes the result of a call that took so many seconds.
func call(stage string, took float64) *runner.Result {
	started := time.Unix(1000, 0)
	return &runner.Result{
		Stage: stage, Pid: 1, Started: started, Ended: started.Add(time.Duration(took * float64(time.Second))),
		User: 20 * time.Millisecond, System: 5 * time.Millisecond,
		Trace: &runner.Trace{Processes: 3, Execs: []string{"/usr/bin/virsh"}, PeakRSS: 97 << 20},
	}
}

func sampleJob(prepare float64) *job {
	j := &job{config: &runner.Result{Stage: "config"}, prepare: call("prepare", prepare), cleanup: call("cleanup", 1.7)}
	for range subStages {
		j.runs = append(j.runs, call("run", 0.7))
		j.atRest = append(j.atRest, call("run", 0.5))
	}
	j.echo = call("run", 0.6)
	j.echo.FirstByte = j.echo.Started.Add(200 * time.Millisecond)
	return j
}

// booted is a job that was watched.
func booted(j *job) *job {
	after := func(s float64) time.Time { return j.prepare.Started.Add(time.Duration(s * float64(time.Second))) }
	j.boot = boot{
		started: after(2), asked: after(9), addressed: after(10), listening: after(11),
		connected: after(11.25), greeted: after(11.75), keyed: after(12.5),
	}
	return j
}

// called is a job of which the calls to libvirtd were seen. They begin 0.5 s after
// prepare does.
func called(j *job) *job {
	j.config = call("config", 0.006)
	j.cleanup.Started = j.prepare.Ended.Add(time.Minute)
	j.cleanup.Ended = j.cleanup.Started.Add(1700 * time.Millisecond)
	for i := range j.runs {
		j.runs[i].Started = j.prepare.Ended.Add(time.Second)
		j.runs[i].Ended = j.runs[i].Started.Add(700 * time.Millisecond)
	}
	add := func(from time.Time, number uint32, at, took float64) {
		sent := from.Add(time.Duration(at * float64(time.Second)))
		j.rpc = append(j.rpc, rpc{procedure{remote, number}, sent, sent.Add(time.Duration(took * float64(time.Second)))})
	}
	add(j.prepare.Started, 95, 0.5, 0.125) // the volume
	add(j.prepare.Started, 93, 0.75, 0.25)
	add(j.prepare.Started, 350, 1, 0.125)
	add(j.prepare.Started, 196, 1.25, 1) // the guest starts in the middle of it
	add(j.prepare.Started, 341, 5, 0.5)  // a lease
	add(j.runs[0].Started, 265, 0.125, 0.01)
	add(j.cleanup.Started, 265, 0.125, 0.25)
	add(j.cleanup.Started, 34, 0.5, 0.5)
	add(j.cleanup.Ended, 234, 1, 0.75)
	add(j.cleanup.Ended, 94, 2, 0.125)
	add(j.cleanup.Ended, 94, 2.25, 0.125)
	add(j.cleanup.Ended, 231, 2.5, 0.5)
	j.keeper, j.keeperPeak = 0.04, 15<<20
	j.left = []usage{{pid: 7, cpu: 0.03, peak: 98 << 20}}
	return j
}

// sample are measurements of all ways.
func sample(n int) *measurements {
	m := &measurements{sides: append([]string{"baseline"}, wayNames()...)}
	for side := range m.sides {
		m.traced = append(m.traced, []*job{sampleJob(100)})
		m.timed = append(m.timed, nil)
		for i := range n {
			var j *job
			switch side {
			case 0:
				j = booted(sampleJob(100 + float64(i)))
			case 1:
				j = called(booted(sampleJob(90 + float64(i))))
			case 2:
				j = called(sampleJob(3.25))
				j.beside = 0.5
			default:
				j = called(sampleJob(15))
			}
			m.timed[side] = append(m.timed[side], j)
		}
	}
	m.traced[2][0].prepare.Trace = &runner.Trace{PeakRSS: 30 << 20}
	return m
}

func TestReport(t *testing.T) {
	m := sample(enoughForPercentiles)
	r := m.report()
	m.judge(r)
	r.facts = append(r.facts, "machine: 2 cores")

	var text, markdown bytes.Buffer
	if err := r.text(&text); err != nil {
		t.Fatal(err)
	}
	if err := r.markdown(&markdown); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 100 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	flat := strings.Join(strings.Fields(text.String()), " ")
	for _, want := range []string{
		"n = 20 jobs of each side",
		"machine: 2 cores",
		"baseline boot ratio standby ratio memory ratio",
		"config – 0.006 0.006 0.006",
		"prepare 109.50 99.50 0.909 3.250 0.030 15.00 0.137",
		"prepare 100.00–119.00 90.00–109.00 3.250 15.00",
		"run, right after prepare 0.700 0.700 1.000 0.700 1.000 0.700 1.000 run, guest at rest 0.500 0.500 1.000",
		// Without the runs at rest.
		"whole job, 8 sub-stages 116.80 106.81 0.914 10.56 0.090 22.31 0.191",
		// Ten calls of 25 ms, and the driver's config; the keeper and the finisher.
		"whole job, its calls 0.250 0.275 1.100",
		"left behind: the keeper – 0.040 0.040 0.040",
		"left behind: the finisher – 0.030 0.030 0.030",
		"whole job, all processes 0.250 0.345 1.380",
		"beside it: the service – – 0.500 –",
		"whole job, 8 sub-stages 30 30 27 30",
		"other programs they execute 10 10 9 10",
		"left behind – 98.0 98.0 98.0",
		"any process of a job 97.0 98.0 1.010 98.0 1.010 98.0 1.010",
		"call to guest started 2.000 2.000 1.000 – –",
		"the guest's own share 9.000 9.000 1.000 – –",
		"all but that: the side's own 100.50 90.50 0.900 – –",
		"all but that: the side's own 91.00–110.00 81.00–100.00",
		"driver: to its first call – 0.500 0.500 0.500",
		"libvirt: overlay – 0.250 0.250 0.250",
		"libvirt: define – 0.125 0.125 0.125",
		// Not what libvirtd does once the machine runs; where nobody watched, all of it.
		"libvirt: start, or restore – 0.750 1.000 1.000",
		"libvirt: what else is asked – 0.125 0.125 0.125",
		"driver: between these – 0.250 0.250 0.250",
		"guest: firmware, kernel, to DHCP 7.000 7.000 1.000",
		"guest: DHCP 1.000 1.000",
		"that is noticed, by TCP 0.250 0.250",
		"SSH: the server's version 0.500 0.500",
		"SSH: keys exchanged 0.750 0.750",
		"SSH: login, session; return 97.00 87.00",
		"run: to a script's first byte 0.200 0.200 1.000 0.200 1.000 0.200 1.000 run: from it to return 0.400",
		"cleanup: to its first call – 0.125",
		"libvirt: suspend – 0.500",
		"libvirt: what else is asked – 0.250",
		"cleanup returns 1.700 1.700 1.000",
		"libvirt: destroy – 0.750",
		"libvirt: undefine – 0.500",
		"libvirt: delete volumes – 0.250",
		"all is gone, from the call on – 4.700",
		"prepare – 5 4 5 run, all sub-stages – 1 1 1 cleanup – 2 2 2 after it: the finisher – 4 4 4",
		"50 % 90 % 95 % 99 % max samples",
		"prepare baseline 109.50 117.10 118.05 118.81 119.00 20 boot 99.50 107.10 108.05 108.81 109.00 20",
		"run, guest at rest baseline 0.500 0.500 0.500 0.500 0.500 160",
		"prepare boot 109.50 99.50 0.909 ≤ 0.95 of baseline met",
		"prepare standby 109.50 3.250 0.030 ≤ 1/30 of baseline met",
		"prepare memory 109.50 15.00 0.137 ≤ 1/7 of baseline met",
		"whole job standby 116.80 10.56 0.090 ≤ 1/12 of baseline missed",
		"processor time of a whole job boot 0.250 0.345 1.380 ≤ 0.15 s missed",
		"memory of any process, MiB memory 97.0 98.0 1.010 < 40 MiB, each missed",
		"3 of 23 targets met missed: boot, prepare, the driver's own share: 90.50, target ≤ 0.3 s missed:",
	} {
		if !strings.Contains(flat, want) {
			t.Errorf("the report does not say %q:\n%s", want, &text)
		}
	}
	if want := "\n| prepare | 109.50 | 99.50 | 0.909 | 3.250 | 0.030 | 15.00 | 0.137 |\n"; !strings.Contains(markdown.String(), want) {
		t.Errorf("Markdown has no line of prepare:\n%s", &markdown)
	}
	for _, s := range sample(enoughForPercentiles - 1).report().sections {
		if strings.HasPrefix(s.caption, "Percentiles") {
			t.Errorf("percentiles of %d jobs", enoughForPercentiles-1)
		}
	}
}

// Every target is for a way that there is, and measured where that is.
func TestGoals(t *testing.T) {
	for _, g := range goals {
		if g.way != "" && !slices.Contains(wayNames(), g.way) {
			t.Errorf("%s: no way is called %s", g.name, g.way)
		}
	}
	m := sample(1)
	m.report()
	for _, g := range goals {
		figures, _ := m.find(g)
		if side := slices.Index(m.sides, g.way); side > 0 && len(figures[side]) == 0 {
			t.Errorf("%s, %s: not measured", g.name, g.way)
		}
	}
}

func TestSettings(t *testing.T) {
	var o options
	if err := o.choose("standby,boot", "1,16"); err != nil {
		t.Fatal(err)
	}
	o.virtType = "qemu"
	want := "virt_type = \"qemu\"\nsocket = \"/s\"\n[defaults]\nvolume = \"gitlab-runner-base.qcow2\"\nkey = \"/root/.ssh/id_ed25519\"\n[images.standby]\nstandby = 1\n[images.boot]\n[images.tiny]\n" + tiny
	if got := o.settings("/s"); got != want {
		t.Errorf("settings\n%s\nwant\n%s", got, want)
	}
	// The keys of the other ways are of no matter to a machine that is booted.
	o.ways = slices.DeleteFunc(o.ways, func(w way) bool { return w.name != "boot" })
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(o.settings("/s")), 0o600); err != nil {
		t.Fatal(err)
	}
	read, err := settings.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	// boot is the driver's default, whose name and key alone are others.
	boot, err := read.Image("boot")
	byDefault, err2 := settings.Default().Image("")
	if boot.Name, boot.Key = byDefault.Name, byDefault.Key; err != nil || err2 != nil || boot != byDefault {
		t.Errorf("way boot is %+v (%v), not the default %+v (%v)", boot, err, byDefault, err2)
	}
	if fmt.Sprint(o.many) != "[1 16]" {
		t.Errorf("many: %v", o.many)
	}
	for _, bad := range [][2]string{{"boots", ""}, {"", ""}, {"boot", "0"}, {"boot", "1,,4"}, {"boot", "65"}} {
		if err := new(options).choose(bad[0], bad[1]); err == nil {
			t.Errorf("taken: --ways %q --many %q", bad[0], bad[1])
		}
	}
}

func TestManyTable(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(1000+s, 0) }
	size := func(n int) (timed, traced *batch) {
		timed = &batch{began: at(0), ended: at(30), gone: at(31)}
		traced = &batch{}
		for range n {
			timed.jobs = append(timed.jobs, called(sampleJob(20)))
			traced.jobs = append(traced.jobs, sampleJob(20))
			timed.left = append(timed.left, usage{cpu: 0.07, peak: 15 << 20})
			timed.rpc = append(timed.rpc, timed.jobs[0].rpc...)
		}
		return timed, traced
	}
	c := &crowd{}
	for _, n := range []int{1, 4} {
		timed, traced := size(n)
		c.timed, c.traced = append(c.timed, timed), append(c.traced, traced)
	}
	var text strings.Builder
	c.table().text(&text)
	flat := strings.Join(strings.Fields(text.String()), " ")
	for _, want := range []string{
		"jobs at once 1 4", "whole batch, s 30.00 30.00", "until nothing is left of it, s 31.00 31.00", "jobs a minute 2.0 8.0",
		"prepare, median, s 20.00 20.00", "processor time a job, s 0.345 0.345", "of it, keeper's and finisher's 0.070 0.070",
		"largest process, MiB 97.0 97.0", "calls to libvirtd a job 12.0 12.0", "StorageVolDelete 2.0 2.0",
	} {
		if !strings.Contains(flat, want) {
			t.Errorf("the table does not say %q:\n%s", want, &text)
		}
	}
}
