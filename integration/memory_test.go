//go:build integration

package integration

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"libvirt-driver/driver"
	"libvirt-driver/integration/runner"
)

// These tests run one after the other: a guest that is saved for the next job is the host's, and what another test
// makes of it would show.

// remembered are settings with one image whose machines start from memory.
const remembered = emulated + `default_image = "debian"
[images.debian]
volume = "gitlab-runner-base.qcow2"
start = "memory"
`

// tinyRemembered is the tiny guest's image, started from memory.
func tinyRemembered(image string, more ...string) string {
	return tiny("start = \"memory\"\n"+image, more...)
}

// remembering writes settings with images that start from memory. At the test's end their saved guests are removed, as
// gc does once no image wants them.
func remembering(t *testing.T, text string) settings {
	t.Helper()
	s := newSettings(t, text)
	t.Cleanup(func() {
		s.write(t, emulated)
		if exit, stdout, stderr := callDriver(t, s, "gc"); exit != 0 {
			t.Errorf("gc exits with %d: %s%s", exit, stdout, stderr)
		}
		wantNoSlot(t)
	})
	return s
}

// slots returns the names of the saved guests, as list has them.
func (s settings) slots(t *testing.T) (names []string) {
	t.Helper()
	exit, stdout, stderr := callDriver(t, s, "list", "--json")
	var machines []driver.Machine
	if err := json.Unmarshal([]byte(stdout), &machines); exit != 0 || err != nil {
		t.Fatalf("list exits with %d: %v: %s", exit, err, stderr)
	}
	for _, m := range machines {
		if m.Start == "memory" && m.Name == m.Domain {
			names = append(names, m.Name)
		}
	}
	return names
}

const slotPrefix = "libvirt-driver-memory-"

// wantNoSlot checks that nothing of a saved guest is on the host.
func wantNoSlot(t *testing.T) {
	t.Helper()
	wantGone(t, slotPrefix)
	left, err := filepath.Glob("/run/libvirt-driver/*.refusal")
	if err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// wantRestored checks that a prepare took the machine from memory, and returns the slot.
func wantRestored(t *testing.T, ex *runner.Executor) string {
	t.Helper()
	found := regexp.MustCompile(`restored from memory \((libvirt-driver-memory-[0-9a-f]{12})\)`).FindSubmatch(ex.JobLog())
	if found == nil {
		t.Fatalf("the machine did not start from memory:\n%s", ex.JobLog())
	}
	return string(found[1])
}

// self is what a guest says of itself.
type self struct {
	name, machineID, hostKey, random, boot, mac, address string
	clock                                                float64
	asked                                                time.Time
}

func selfOf(t *testing.T, ex *runner.Executor) self {
	t.Helper()
	asked := time.Now()
	out := output(t, ex, `
		PATH=$PATH:/usr/sbin:/sbin
		head -c 32 /dev/urandom | base64
		cat /proc/sys/kernel/random/uuid
		date +%s.%N
		uname -n
		cat /etc/machine-id 2>/dev/null || echo none
		cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub
		cat /sys/class/net/e*/address
		ip -4 addr show | sed -n 's/.*inet \([0-9.]*\).* e.*/\1/p'
	`)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 8 {
		t.Fatalf("the guest says %q", out)
	}
	clock, err := strconv.ParseFloat(lines[2], 64)
	if err != nil {
		clock, err = strconv.ParseFloat(strings.TrimSuffix(lines[2], ".%N"), 64) // busybox's
	}
	if err != nil {
		t.Fatal(err)
	}
	return self{random: lines[0], boot: lines[1], clock: clock, name: lines[3], machineID: lines[4], hostKey: lines[5], mac: lines[6],
		address: lines[7], asked: asked}
}

// wantRight checks that a guest's clock is within a second of the host's, and that its name is the machine's.
func (s self) wantRight(t *testing.T, job runner.Job) {
	t.Helper()
	asked, answered := float64(s.asked.UnixMilli())/1000, float64(time.Now().UnixMilli())/1000
	t.Logf("the guest's clock is off by %.3f to %.3f s", s.clock-answered, s.clock-asked)
	if s.clock < asked-1 || s.clock > answered+1 {
		t.Errorf("the guest's clock says %.3f, between %.3f and %.3f on the host's", s.clock, asked, answered)
	}
	if s.name != machineOf(job) {
		t.Errorf("the guest is called %q", s.name)
	}
}

func TestAWholeJobStartsFromMemory(t *testing.T) {
	s := remembering(t, remembered)
	var slot, log string
	for i := range 3 {
		job := newJob(runner.Job{Script: []string{"echo hello from $(uname -n)", "sudo -n true", "git --version"}})
		began := time.Now()
		o := runJob(t, s.runner(t), job)
		if !o.Green() {
			t.Fatalf("the job ends as %s: %v\n%s", o.Status, o.Err, o.Log)
		}
		for _, r := range o.Calls {
			t.Logf("job %d: %s took %v", i, r.Name(), r.Duration().Round(time.Millisecond))
		}
		log = string(o.Log)
		t.Logf("job %d took %v\n%s", i, time.Since(began), log)
		if !strings.Contains(log, "hello from "+machineOf(job)) {
			t.Errorf("the guest has not the machine's name")
		}
		slots := s.slots(t)
		if len(slots) != 1 || !strings.Contains(log, "restored from memory ("+slots[0]+")") || slot != "" && slots[0] != slot {
			t.Fatalf("saved guests after job %d: %q; the first was %q", i, slots, slot)
		}
		slot = slots[0]
		if made := strings.Contains(log, "one is made first"); made != (i == 0) {
			t.Errorf("job %d made a saved guest: %v", i, made)
		}
	}
}

func TestTheFirstPacketOfAGuestFromMemoryIsNotLost(t *testing.T) {
	s := remembering(t, tinyRemembered(""))
	prepared(t, s.runner(t), newJob(runner.Job{})) // makes the first saved guest, and keeps it
	job := newJob(runner.Job{})
	ex := prepared(t, s.runner(t), job) // on a network that says nothing to a new port for 4 s
	wantRestored(t, ex)
	began := time.Now()
	output(t, ex, `exec 3<>/dev/tcp/192.168.122.1/53`)
	took := time.Since(began)
	t.Logf("the first connection, to the host, took %v", took)
	if took > 7*time.Second { // TCP by itself tries after 1, 3 and 7 s
		t.Errorf("the first connection took %v", took)
	}
}

func TestTwoMachinesFromMemoryAreTwo(t *testing.T) {
	s := remembering(t, remembered)
	cfg := s.runner(t)
	both := func(jobs [2]runner.Job) (guests [2]self, slots [2]string) {
		var made [2]*runner.Executor
		var calls [2]*runner.Call
		for i, job := range jobs {
			made[i] = start(t, cfg, job)
			calls[i] = made[i].StartPrepare()
		}
		for i, ex := range made {
			want(t, ex, calls[i].Wait(t.Context()), 0)
			slots[i] = wantRestored(t, ex)
		}
		for i, ex := range made {
			guests[i] = selfOf(t, ex)
			guests[i].wantRight(t, jobs[i])
		}
		for i, ex := range made {
			remove(t, ex, jobs[i])
		}
		return guests, slots
	}
	newJobs := func() [2]runner.Job { return [2]runner.Job{newJob(runner.Job{}), newJob(runner.Job{})} }
	first, slots := both(newJobs())
	if slots[0] == slots[1] {
		t.Fatalf("both started from %s at once", slots[0])
	}
	differ(t, first[0], first[1], true)
	second, again := both(newJobs())
	for i := range again {
		for j := range slots {
			if again[i] == slots[j] {
				differ(t, first[j], second[i], false)
			}
		}
	}
	if again[0] != slots[0] && again[0] != slots[1] || again[1] != slots[0] && again[1] != slots[1] {
		t.Errorf("the next two started from %q, and not from %q", again, slots)
	}
}

// differ checks that two guests are not the same. At once they have addresses of their own as well; after one another
// they have their slot's.
func differ(t *testing.T, a, b self, atOnce bool) {
	t.Helper()
	for what, values := range map[string][2]string{
		"name": {a.name, b.name}, "machine ID": {a.machineID, b.machineID}, "host key": {a.hostKey, b.hostKey},
		"random numbers": {a.random, b.random}, "random UUID": {a.boot, b.boot},
	} {
		if values[0] == values[1] || values[0] == "" {
			t.Errorf("two guests have the same %s: %q", what, values[0])
		}
	}
	for what, values := range map[string][2]string{"MAC address": {a.mac, b.mac}, "address": {a.address, b.address}} {
		if (values[0] == values[1]) == atOnce {
			t.Errorf("%s: %q", what, values)
		}
	}
}

func TestNothingOfAJobIsInTheNextFromTheSameMemory(t *testing.T) {
	s := remembering(t, tinyRemembered(""))
	cfg := s.runner(t)
	job := newJob(runner.Job{})
	ex := prepared(t, cfg, job)
	slot := wantRestored(t, ex)
	marker := rand.Text() + rand.Text()
	files, err := filepath.Glob(filepath.Join(images, slot+"*"))
	if err != nil || len(files) != 2 {
		t.Fatalf("the files of the saved guest: %q, %v", files, err)
	}
	var before []string
	for _, file := range files {
		before = append(before, hash(t, file))
	}
	output(t, ex, fmt.Sprintf(`echo %[1]s | sudo tee /tmp/marker /etc/marker >/dev/null
		echo %[1]s | sudo dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
		sudo MARKER=%[1]s setsid sleep 7777 >/dev/null 2>&1 </dev/null &
		sync`, marker))
	if guest := output(t, ex, `sudo head -c 64 /dev/vda; pgrep -f 'sleep 7777' >/dev/null && echo; echo asleep`); !strings.Contains(guest, marker) || !strings.Contains(guest, "asleep") {
		t.Fatalf("the marker is not in the guest: %q", guest)
	}
	remove(t, ex, job)

	next := prepared(t, cfg, newJob(runner.Job{}))
	if from := wantRestored(t, next); from != slot {
		t.Fatalf("the next job started from %s, not from %s", from, slot)
	}
	guest := output(t, next, `ls /tmp/marker /etc/marker 2>/dev/null; sudo head -c 512 /dev/vda | base64; pgrep -fa '[s]leep 7777' || echo nobody sleeps`)
	if strings.Contains(guest, "/marker") || !strings.Contains(guest, "nobody sleeps") ||
		strings.Contains(guest, base64.StdEncoding.EncodeToString([]byte(marker[:48]))) {
		t.Errorf("the next guest has something of the last: %s", guest)
	}
	for i, file := range files {
		if hash(t, file) != before[i] {
			t.Errorf("%s was written to", file)
		}
		text, err := os.ReadFile(file)
		if err != nil || bytes.Contains(text, []byte(marker)) {
			t.Errorf("%s has the marker in it, %v", file, err)
		}
		if info, err := os.Stat(file); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is for others to read: %v, %v", file, info.Mode(), err)
		}
	}
}

func TestASavedGuestThatCannotBeRestoredIsThrownAwayAndTheJobIsBooted(t *testing.T) {
	s := remembering(t, tinyRemembered(""))
	cfg := s.runner(t)
	for _, spoil := range []func(file string) error{
		func(file string) error { return os.Truncate(file, 4<<20) },
		func(file string) error { return os.WriteFile(file, []byte("nonsense"), 0o600) },
		os.Remove,
	} {
		job := newJob(runner.Job{})
		ex := prepared(t, cfg, job)
		slot := wantRestored(t, ex)
		remove(t, ex, job)
		if err := spoil(filepath.Join(images, slot+"-frozen.state")); err != nil {
			t.Fatal(err)
		}
		job = newJob(runner.Job{})
		ex = prepared(t, cfg, job)
		if log := string(ex.JobLog()); !strings.Contains(log, "the machine is booted, and not started from memory: restore "+slot) {
			t.Errorf("job log:\n%s", log)
		}
		if out := output(t, ex, "echo green"); out != "green\n" {
			t.Errorf("the job's script says %q", out)
		}
		remove(t, ex, job)
		wantNoSlot(t)
	}
}

func TestGcRemovesASavedGuestThatNoImageIsLikeAnyMore(t *testing.T) {
	dir := newFolder(t)
	base := filepath.Join(dir, "base.qcow2")
	command(t, "cp", filepath.Join(images, "tiny.qcow2"), base)
	command(t, "chmod", "644", base)
	pool := newPool(t, dir)
	s := remembering(t, tinyRemembered(fmt.Sprintf("pool = %q\nvolume = \"base.qcow2\"", pool)))
	job := newJob(runner.Job{})
	ex := prepared(t, s.runner(t), job)
	slot := wantRestored(t, ex)
	gc := func(args ...string) string {
		t.Helper()
		exit, stdout, stderr := callDriver(t, s, append([]string{"gc"}, args...)...)
		if exit != 0 {
			t.Fatalf("gc exits with %d: %s%s", exit, stdout, stderr)
		}
		return stdout
	}
	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(base, later, later); err != nil {
		t.Fatal(err)
	}
	if out := gc(); out != "" { // a job's machine starts from it
		t.Errorf("gc says %q", out)
	}
	remove(t, ex, job)
	const why = ": a saved guest that no image is like any more\n"
	if out := gc("--dry-run"); out != "would remove "+slot+why {
		t.Errorf("gc --dry-run says %q", out)
	}
	if slots := s.slots(t); len(slots) != 1 {
		t.Errorf("listed: %q", slots)
	}
	if out := gc(); out != "removed "+slot+why {
		t.Errorf("gc says %q", out)
	}
	wantNoSlot(t)
}

func TestAPrepareThatIsKilledWhileItSavesOrRestoresAGuestLeavesNothingForLong(t *testing.T) {
	s := remembering(t, tinyRemembered(""))
	some := func(pattern string) func() bool {
		return func() bool {
			found, _ := filepath.Glob(pattern)
			return len(found) > 0
		}
	}
	for _, point := range []struct {
		name  string
		shows func() bool
		says  string
	}{
		{"disk of the saved guest", some(images + "/" + slotPrefix + "*-frozen.qcow2"), ""},
		{"domain of the saved guest", some("/run/libvirt/qemu/" + slotPrefix + "*.pid"), ""},
		{"shell of the saved guest", nil, "  shell "},
		{"door", nil, "  door "},
		{"memory of the saved guest", some(images + "/" + slotPrefix + "*.state"), ""},
		{"record of the saved guest", some("/run/libvirt-driver/" + slotPrefix + "*.slot"), ""},
		{"record of the job's machine", some("/run/libvirt-driver/runner-*.machine"), ""},
		{"job's disk", some(images + "/runner-*.qcow2"), ""},
		{"restored", nil, "restored from memory"},
	} {
		t.Run(point.name, func(t *testing.T) {
			job := newJob(runner.Job{})
			ex := start(t, s.runner(t), job)
			call := ex.StartPrepare()
			if point.shows != nil {
				for !point.shows() {
					select {
					case <-call.Done():
						t.Fatalf("prepare is over before: %s", ex.JobLog())
					case <-time.After(time.Millisecond):
					}
				}
			} else {
				waitFor(t, call, point.says)
			}
			kill(t, call)
			remove(t, ex, job)
			// What is left of the saved guest is gone with gc, and not before it is nobody's.
			s.write(t, emulated)
			exit, stdout, stderr := callDriver(t, s, "gc")
			if exit != 0 {
				t.Errorf("gc exits with %d: %s%s", exit, stdout, stderr)
			}
			wantNoSlot(t)
			s.write(t, tinyRemembered(""))
		})
	}
}

func callDriver(t *testing.T, s settings, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	return call(t, append([]string{"--config", string(s)}, args...)...)
}

func TestAMachineFromMemoryWhoseImageInjectsKeysIsEnteredByTheNetworkToo(t *testing.T) {
	s := remembering(t, "keep_connection = false\n"+remembered+"host_key = \"injected\"\n")
	cfg := s.runner(t)
	for range 2 { // the first makes the saved guest
		job := newJob(runner.Job{})
		ex := prepared(t, cfg, job)
		wantRestored(t, ex)
		selfOf(t, ex).wantRight(t, job)
		keys := strings.Fields(output(t, ex, "cat ~/.ssh/authorized_keys"))
		if len(keys) != 2 { // type and key of one
			t.Errorf("who may log in: %q", keys)
		}
		remove(t, ex, job)
	}
}
