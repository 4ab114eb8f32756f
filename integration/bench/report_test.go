package main

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"libvirt-driver/driver/gitlab"
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
		name             string
		target           *target
		baseline, driver series
		want             string
	}{
		{"no target", nil, series{1}, series{9}, ""},
		{"nothing measured", atMost(1), series{1}, nil, ""},
		{"just met", atMost(0.8), series{1, 10, 100}, series{8}, "met"},
		{"just missed", atMost(0.8), series{1, 10, 100}, series{8.001}, "missed"},
		{"medians count", atMost(1), series{5, 5, 5}, series{1, 5, 900}, "met"},
		{"below", below(40, "MiB"), nil, series{39.9}, "met"},
		{"at the limit", below(40, "MiB"), nil, series{40}, "missed"},
		{"every one below", below(40, "MiB"), nil, series{1, 1, 41}, "missed"},
		{"none", none, series{186}, series{0}, "met"},
		{"one", none, series{186}, series{1}, "missed"},
	} {
		r := row{test.name, test.baseline, test.driver, test.target}
		if got := r.verdict(); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestComparison(t *testing.T) {
	got := comparison([]row{
		{"prepare", series{15, 15.5, 14.75}, series{12, 13, 11}, atMost(0.95)},
		{"run", series{0.7}, series{0.6}, atMost(0.8)},
		{"config", nil, series{0.0049}, nil},
	}, seconds).rows
	want := [][]string{
		{"prepare", "15.00", "14.75–15.50", "12.00", "11.00–13.00", "0.800", "≤ 0.95", "met"},
		{"run", "0.700", "", "0.600", "", "0.857", "≤ 0.80", "missed"},
		{"config", "–", "", "0.005", "", "", "", ""},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("rows %q\nwant %q", got, want)
	}
	got = comparison([]row{{"processes", series{186}, series{0}, none}}, count).rows
	if want := "[[processes 186  0   none met]]"; fmt.Sprint(got) != want {
		t.Errorf("rows %v, want %v", got, want)
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
	var jobs []*job
	for i := range 3 {
		var out bytes.Buffer
		log := gitlab.NewLog(&out, true)
		log.Title("Machine runner-1: image default, 2 vCPUs, 2 GiB memory")
		log.Note("it took 7.00 s")
		log.Step("disk", 20*time.Millisecond, "8 GiB, on %s", "base.qcow2")
		log.Step("address", time.Duration(10+i)*time.Second, "192.168.122.7")
		log.Title("The machine is ready after 12.0 s.")
		jobs = append(jobs, &job{prepare: &runner.Result{Stage: "prepare", Stderr: out.Bytes()}})
	}
	want := [][]string{{"disk", "0.02", ""}, {"address", "11.00", "10.00–12.00"}}
	if got := ownSteps(jobs).rows; fmt.Sprint(got) != fmt.Sprint(want) {
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
	started := j.prepare.Started.Add(2 * time.Second)
	j.boot = boot{started, started.Add(8 * time.Second), started.Add(9 * time.Second)}
	return j
}

func TestReport(t *testing.T) {
	m := &measurements{traced: pair{{sampleJob(100)}, {sampleJob(100)}}}
	for i := range enoughForPercentiles {
		m.timed[0] = append(m.timed[0], sampleJob(100+float64(i)))
		driver := sampleJob(90 + float64(i))
		driver.config = call("config", 0.006)
		m.timed[1] = append(m.timed[1], driver)
	}
	r := m.report([]string{"machine: 2 cores"})

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
		"config – 0.006",
		"prepare 109.50 100.00–119.00 99.50 90.00–109.00 0.909 ≤ 0.95 met",
		"run, right after prepare 0.700 0.700 1.000 run, guest at rest 0.500 0.500 1.000 ≤ 0.14 missed",
		"cleanup 1.700 1.700 1.000 ≤ 1.00 met",
		// Without the runs at rest.
		"whole job, 8 sub-stages 116.80 107.30–126.30 106.81 97.31–116.31 0.914",
		// Ten calls of 25 ms, and the driver's config.
		"whole job, 8 sub-stages 0.250 0.275 1.100",
		"whole job, 8 sub-stages 30 30 ≤ 2 missed",
		"programs that they execute 10 10 none missed",
		"any call of a job 97.0 97.0 1.000 < 40 MiB missed",
		"call to guest started 2.000 2.000",
		"guest: to its address 8.000 8.000",
		"guest: to its SSH port 1.000 1.000",
		"SSH port to return 98.50 89.00–108.00 88.50 79.00–98.00",
		"the guest's own share 9.000 9.000",
		"all but that: the side's own 100.50 91.00–110.00 90.50 81.00–100.00",
		"prepare: driver 90.95 94.75 99.50 104.25 107.10 108.05 109.00",
		"2 of 6 targets met missed: Time, in seconds: run, guest at rest: ≤ 0.14 missed: Processes",
	} {
		if !strings.Contains(flat, want) {
			t.Errorf("the report does not say %q:\n%s", want, &text)
		}
	}
	if !strings.Contains(markdown.String(), "\n| prepare | 109.50 | 100.00–119.00 | 99.50 | 90.00–109.00 | 0.909 | ≤ 0.95 | met |\n") {
		t.Errorf("Markdown has no line of prepare:\n%s", &markdown)
	}
	m.timed[1] = m.timed[1][:enoughForPercentiles-1]
	if sections := m.report(nil).sections; strings.HasPrefix(sections[len(sections)-1].caption, "Percentiles") {
		t.Errorf("percentiles of %d jobs", len(m.timed[1]))
	}
}
