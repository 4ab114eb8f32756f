package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"libvirt-driver/domainxml"
	"libvirt-driver/driver/settings"
)

// What a guest writes to its console is lines of text.
func FuzzPrintable(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		lines := printable(text)
		for _, line := range lines {
			if line == "" || strings.HasSuffix(line, " ") || strings.ContainsFunc(line, func(r rune) bool {
				return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
			}) {
				t.Errorf("line %q of %q", line, text)
			}
		}
		if again := printable(strings.Join(lines, "\n")); !slices.Equal(again, lines) {
			t.Errorf("%q becomes %q", lines, again)
		}
		if len(lines) > 1+strings.Count(text, "\n") {
			t.Errorf("%d lines of %q", len(lines), text)
		}
	})
}

// A name is a machine's only if it is made as machines' names are; and then
// everything that is named by it stays where it belongs.
func FuzzMachineName(f *testing.F) {
	f.Fuzz(func(t *testing.T, name string) {
		job, ok := parseMachine(name)
		if !ok {
			return
		}
		if job.Machine() != name {
			t.Fatalf("%q is taken for %q", name, job.Machine())
		}
		h := &Host{Settings: &settings.Settings{LogDir: "/log"}, LockDir: "/lock"}
		for _, path := range []string{h.activity(name), h.consoleLog(name), qemuLog(name)} {
			if !slices.Contains([]string{"/lock", "/log", "/var/log/libvirt/qemu"}, filepath.Dir(path)) || len(filepath.Base(path)) > 200 {
				t.Errorf("file %s", path)
			}
		}
		mac, err := net.ParseMAC(macAddress(name))
		if err != nil || len(mac) != 6 || mac[0]&3 != 2 {
			t.Errorf("MAC address %s: %v", macAddress(name), err)
		}
	})
}

// The file that prepare leaves for run.
func FuzzContact(f *testing.F) {
	f.Fuzz(func(t *testing.T, doc []byte) {
		c, err := parseContact(doc)
		if err != nil {
			if c != (contact{}) {
				t.Errorf("half a contact: %+v with %v", c, err)
			}
			return
		}
		if c.Address == "" || c.HostKey == "" || c.User == "" || c.Key == "" || c.Shell == "" {
			t.Errorf("something is missing in %+v", c)
		}
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseContact(text); again != c || err != nil {
			t.Errorf("%+v becomes %+v, %v", c, again, err)
		}
	})
}

// The owner in a domain's metadata: what is no process of this host is not gone
// for that, and no machine is removed because of it.
func FuzzOwner(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		o, err := parseOwner(text)
		if err != nil {
			if o != (owner{}) || strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("owner %+v, %q", o, err)
			}
			return
		}
		if again, err := parseOwner(o.String()); again != o || err != nil {
			t.Errorf("%+v becomes %+v, %v", o, again, err)
		}
		if _, err := o.gone(); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
		// Of this boot but of another namespace it can be neither seen nor missed.
		self, err := process(1)
		if err != nil {
			t.Fatal(err)
		}
		o.Boot = self.Boot
		if gone, err := o.gone(); o.PIDs != self.PIDs && (gone || err != nil) {
			t.Errorf("%+v: gone %v, %v", o, gone, err)
		}
	})
}

// Only what carries the job's own metadata is removed, and nothing besides.
func FuzzForeign(f *testing.F) {
	dir, key := f.TempDir(), testKey(f)
	f.Fuzz(func(t *testing.T, metadata, other string) {
		s := newStageIn(t, dir, key, nil)
		s.host.domains[machineName] = metadata
		s.host.domains["other"] = other
		s.host.volumes["default/"+volumeName(machineName)] = 1
		s.host.volumes["default/"+other] = 1
		err := s.Cleanup(context.Background())
		read, unreadable := domainxml.ParseMetadata(metadata)
		mine := unreadable == nil && read.Job == 1001 && read.Project == 42
		if _, left := s.host.domains[machineName]; left == mine || mine != (err == nil) {
			t.Errorf("metadata %q: left %v, error %v", metadata, left, err)
		}
		if _, left := s.host.volumes["default/"+volumeName(machineName)]; left == mine {
			t.Errorf("metadata %q: the volume is left: %v", metadata, left)
		}
		if _, left := s.host.domains["other"]; !left {
			t.Error("another domain is gone")
		}
		if _, left := s.host.volumes["default/"+other]; !left && other != volumeName(machineName) {
			t.Errorf("volume %q is gone", other)
		}
		for _, call := range s.host.calls {
			if strings.Contains(call, " other") {
				t.Errorf("called: %s", call)
			}
		}
	})
}

// What list shows, and gc may remove, are machines by name, of which the domain
// says the same; whatever else is on the host.
func FuzzList(f *testing.F) {
	dir, key := f.TempDir(), testKey(f)
	f.Fuzz(func(t *testing.T, domain, metadata, volume string) {
		s := newStageIn(t, dir, key, nil)
		s.host.domains[domain] = metadata
		s.host.volumes["default/"+volume] = 1
		machines, err := s.List(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range machines {
			job, ok := parseMachine(m.Name)
			if !ok || job.ID != m.Job || job.Project != m.Project {
				t.Errorf("machine %+v", m)
			}
			if m.State != noDomain {
				read, err := domainxml.ParseMetadata(metadata)
				if m.Name != domain || err != nil || read.Job != m.Job || read.Project != m.Project {
					t.Errorf("machine %+v of domain %q with %q", m, domain, metadata)
				}
			}
			if m.Volume != "" && (m.Volume != volumeName(m.Name) || m.Volume != volume) {
				t.Errorf("machine %+v has volume %q", m, volume)
			}
			if _, err := json.Marshal(m); err != nil {
				t.Errorf("machine %+v: %v", m, err)
			}
		}
		if len(machines) > 2 {
			t.Errorf("%d machines of one domain and one volume", len(machines))
		}
		if _, err := s.Collect(context.Background(), time.Hour, true); err != nil && !strings.Contains(err.Error(), "owner") {
			t.Error(err)
		}
	})
}

// A whole job, by what it can set: it is served or refused, in words that are
// text, and nothing of it is left or touched besides its own machine.
func FuzzStages(f *testing.F) {
	dir, key := f.TempDir(), testKey(f)
	f.Fuzz(func(t *testing.T, image, vcpus, memory, disk, runner, concurrent, id string) {
		vars := map[string]string{}
		for name, value := range map[string]string{
			"CI_JOB_IMAGE": image, "LIBVIRT_DRIVER_VCPUS": vcpus, "LIBVIRT_DRIVER_MEMORY": memory, "LIBVIRT_DRIVER_DISK": disk,
			"CI_RUNNER_ID": runner, "CI_CONCURRENT_PROJECT_ID": concurrent, "CI_JOB_ID": id,
		} {
			vars["CUSTOM_ENV_"+name] = value
		}
		s := newStageIn(t, dir, key, vars)
		limited := s.Settings.Images["default"]
		limited.MaxVCPUs, limited.MaxMemory, limited.MaxDisk = 4, 4<<30, 20<<30
		s.Settings.Images["default"] = limited
		s.Settings.BuiltIn, s.Settings.DefaultImage = false, "default"
		s.Settings.Aliases = []settings.Alias{{Match: "debian:*", Image: "default"}}
		// With a variable in image: it is the job's variables that say which.
		response := `{"id": 1001, "job_info": {"project_id": 42}, "image": {"name": "$IMAGE"}}`
		if err := os.WriteFile(s.Environment.JobResponseFile, []byte(response), 0o600); err != nil {
			t.Fatal(err)
		}

		var answer bytes.Buffer
		failure := s.Config(&answer)
		if failure == nil {
			failure = s.Prepare(context.Background())
		}
		if failure != nil {
			s.Log.Error(failure)
			if !isBuild(failure) {
				t.Errorf("what a job sets is the host's fault: %v", failure)
			}
		} else if !json.Valid(answer.Bytes()) {
			t.Errorf("config answers %q", answer.Bytes())
		}
		if err := s.Cleanup(context.Background()); err != nil {
			t.Errorf("cleanup after %v: %v", failure, err)
		}
		if len(s.host.domains) != 0 || len(s.host.volumes) != 1 {
			t.Errorf("left: %v, %v", s.host.domains, s.host.volumes)
		}
		if log := strings.ReplaceAll(s.log.String(), "\n", ""); strings.ContainsFunc(log, unicode.IsControl) {
			t.Errorf("log: %q", log)
		}
		for _, call := range s.host.calls {
			if strings.Trim(call, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.: ") != "" {
				t.Errorf("called: %q", call)
			}
		}
	})
}
