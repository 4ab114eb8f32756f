package driver

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/hypervisor"
)

// orphan adds a machine of job to the host: made so long ago, by that owner.
func (s *stage) orphan(t *testing.T, name string, job int64, age time.Duration, by owner) {
	t.Helper()
	text, err := domainxml.Metadata{Job: job, Project: 42, Pool: "default", Volume: volumeName(name),
		Created: time.Now().Add(-age), Owner: by.String()}.Element()
	if err != nil {
		t.Fatal(err)
	}
	s.host.domains[name] = text
	s.host.volumes["default/"+volumeName(name)] = 1
}

// dead returns a process that has ended.
func dead(t *testing.T) owner {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	o, err := process(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	return o
}

func (s *stage) collected(t *testing.T, dryRun bool) map[string]string {
	t.Helper()
	done, err := s.Collect(context.Background(), 24*time.Hour, dryRun)
	if err != nil {
		t.Fatal(err)
	}
	why := map[string]string{}
	for _, c := range done {
		if c.Removed == dryRun {
			t.Errorf("%s: removed %v in a dry run %v", c.Machine.Name, c.Removed, dryRun)
		}
		why[c.Machine.Name] = c.Why
	}
	return why
}

func TestCollectRemovesOnlyWhatIsOver(t *testing.T) {
	self, err := process(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	gone := dead(t)
	rebooted := self
	rebooted.Boot = "another-boot"
	reused := self
	reused.Start = "1"
	elsewhere := gone
	elsewhere.PIDs = "pid:[1]"
	const prefix = "runner-7-project-42-concurrent-0-job-"

	s := newStage(t, nil)
	for name, m := range map[string]struct {
		age  time.Duration
		by   owner
		over string
	}{
		"1": {time.Hour, self, ""},
		"2": {25 * time.Hour, self, "older than"},
		"3": {time.Hour, gone, "its runner"},
		"4": {time.Hour, rebooted, "its runner"},
		"5": {time.Hour, reused, "its runner"},
		// Seen from another PID namespace, nothing is proven.
		"6": {time.Hour, elsewhere, ""},
		// Too young: the caller may be a wrapper that ends with each stage.
		"7": {time.Minute, gone, ""},
	} {
		s.orphan(t, prefix+name, int64(name[0]-'0'), m.age, m.by)
		t.Cleanup(func() {
			_, there := s.host.domains[prefix+name]
			if there != (m.over == "") {
				t.Errorf("job %s is there: %v", name, there)
			}
		})
	}
	// Not the driver's: the name alone, the metadata alone, another job's metadata.
	s.host.domains["base-image"] = s.host.domains[prefix+"2"]
	s.host.domains[prefix+"8"] = s.host.domains[prefix+"2"]
	// A volume without a domain, old enough, and one that is being made.
	s.host.modified = time.Now().Add(-time.Hour)
	s.host.volumes["default/"+prefix+"9.qcow2"] = 1
	s.host.volumes["default/base.qcow2"] = 1
	lock, err := s.tryLock(prefix + "10")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.release()
	s.host.volumes["default/"+prefix+"10.qcow2"] = 1

	planned := s.collected(t, true)
	done := s.collected(t, false)
	if len(planned) != 5 || len(done) != 5 {
		t.Errorf("planned %v\ndone %v", planned, done)
	}
	for name, why := range map[string]string{"2": "older than 24h", "3": "its runner", "4": "its runner", "5": "its runner", "9": "without a domain"} {
		if !strings.Contains(done[prefix+name], why) {
			t.Errorf("job %s: %q, want %q", name, done[prefix+name], why)
		}
	}
	for _, volume := range []string{"base.qcow2", prefix + "1.qcow2", prefix + "10.qcow2"} {
		if _, there := s.host.volumes["default/"+volume]; !there {
			t.Errorf("volume %s is gone", volume)
		}
	}
	if _, there := s.host.domains["base-image"]; !there {
		t.Error("a domain that has no machine's name is gone")
	}
}

func TestCollectLeavesAMachineWhoseStageIsAtWork(t *testing.T) {
	s := newStage(t, nil)
	s.orphan(t, machineName, 1001, time.Hour, dead(t))
	done, err := s.atWork(machineName)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.collected(t, false); len(got) != 0 {
		t.Errorf("while a stage is at work: %v", got)
	}
	done()
	if got := s.collected(t, false); len(got) != 0 {
		t.Errorf("just after a stage ended: %v", got)
	}
	long := time.Now().Add(-quiet - time.Second)
	if err := os.Chtimes(s.activity(machineName), long, long); err != nil {
		t.Fatal(err)
	}
	if got := s.collected(t, false); len(got) != 1 {
		t.Errorf("after a while: %v", got)
	}
	if _, err := os.Stat(s.activity(machineName)); err == nil {
		t.Error("the record of the machine is left")
	}
}

func TestListJoinsDomainsAndVolumes(t *testing.T) {
	s := newStage(t, nil)
	s.orphan(t, machineName, 1001, time.Hour, owner{})
	lone := "runner-7-project-42-concurrent-0-job-1002"
	s.host.volumes["default/"+volumeName(lone)] = 1
	s.host.modified = time.Now()
	got, err := s.List(context.Background())
	if err != nil || len(got) != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	if m := got[0]; m.Job != 1001 || m.State != string(hypervisor.Running) || m.Volume == "" || m.Disk != 1<<20 {
		t.Errorf("machine %+v", m)
	}
	if m := got[1]; m.Job != 1002 || m.State != noDomain || m.Project != 42 {
		t.Errorf("lone volume %+v", m)
	}
}

func TestCollectRemovesRecordsOfNothing(t *testing.T) {
	s := newStage(t, nil)
	self, err := process(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	const old, fresh = "runner-1-project-42-concurrent-0-job-1", "runner-1-project-42-concurrent-0-job-2"
	s.orphan(t, machineName, 1001, time.Minute, self)
	held, err := s.tryLock("held")
	if err != nil {
		t.Fatal(err)
	}
	defer held.release()
	past := time.Now().Add(-2 * quiet)
	for path, stays := range map[string]bool{
		s.lockPath("killed"): false, held.file.Name(): true,
		s.activity(old): false, s.bindingPath(old): false, s.activity(fresh): true, s.activity(machineName): true,
	} {
		if path != held.file.Name() {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if path != s.activity(fresh) {
			if err := os.Chtimes(path, past, past); err != nil {
				t.Fatal(err)
			}
		}
		defer func() {
			if _, err := os.Lstat(path); (err == nil) != stays {
				t.Errorf("%s: %v", path, err)
			}
		}()
	}
	s.collected(t, false)
}
