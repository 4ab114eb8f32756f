//go:build integration

package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"libvirt-driver/integration/runner"
)

// manyImages are settings with several images and aliases for them.
var manyImages = strings.Replace(tiny(""), `default_image = "tiny"`, "", 1) + `
[images."debian:12"]
[images.big]
vcpus = 2
max_vcpus = 4
max_memory = "1 GiB"
max_disk = "256 MiB"
[[aliases]]
match = "alpine:*"
image = "tiny"
[[aliases]]
match = "registry.example.com/*/debian:1?"
image = "debian:12"
`

func TestAnImageThatIsNotConfiguredIsTheJobsFaultAndTheLogListsWhatIs(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, manyImages).runner(t)
	allowed := []string{`"debian:12"`, `"tiny"`, `"big"`, `"alpine:*"`, `"registry.example.com/*/debian:1?"`}
	for _, image := range []string{"windows", "../tiny", "Tiny", "registry.example.com/a/b/debian:12", "tiny.qcow2", "'; DROP TABLE", "%s"} {
		t.Run(image, func(t *testing.T) {
			wantRefused(t, cfg, newJob(runner.Job{Image: image, Script: []string{"true"}}), append(allowed, image)...)
		})
	}
	t.Run("none, and there is no default_image", func(t *testing.T) {
		wantRefused(t, cfg, newJob(runner.Job{Script: []string{"true"}}), append(allowed, "names no image")...)
	})
}

func TestAnImageIsFoundByNameThenByAliasElseByDefault(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, settings, image, gets string }{
		{"its name", manyImages, "debian:12", "debian:12"},
		{"the first alias that matches", manyImages, "alpine:3.22", "tiny"},
		{"another alias", manyImages, "registry.example.com/group/debian:13", "debian:12"},
		{"the default", tiny(""), "", "tiny"},
		{"the built-in image, for whatever a job names", emulated, "whatever", "default"},
		{"a variable in image:", manyImages, "$WANTED", "tiny"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ex := start(t, newSettings(t, test.settings).runner(t), newJob(runner.Job{
				Image:     test.image,
				Variables: []runner.Variable{{Key: "WANTED", Value: "alpine:edge"}, {Key: "CI_JOB_IMAGE", Value: expanded(test.image)}},
			}))
			if got := ex.JobEnv()["LIBVIRT_DRIVER_IMAGE"]; got != test.gets {
				t.Errorf("%q gets %q, not %q", test.image, got, test.gets)
			}
		})
	}
}

// expanded is what GitLab Runner makes of image: in CI_JOB_IMAGE.
func expanded(image string) string { return strings.ReplaceAll(image, "$WANTED", "alpine:edge") }

func TestASizeBeyondTheLimitIsTheJobsFaultAndTheLogNamesTheLimit(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, manyImages).runner(t)
	for _, test := range []struct{ image, variable, value, complaint string }{
		{"big", "VCPUS", "5", "4"},
		{"big", "VCPUS", "0", "4"},
		{"big", "VCPUS", "-1", "4"},
		{"big", "VCPUS", "many", "4"},
		{"big", "VCPUS", "99999999999999999999", "4"},
		{"big", "MEMORY", "2 GiB", "1 GiB"},
		{"big", "MEMORY", "1025", "1 GiB"},
		{"big", "MEMORY", "1 MiB", "64 MiB"},
		{"big", "MEMORY", "1<memory>", "1 GiB"},
		{"big", "DISK", "257 MiB", "256 MiB"},
		{"tiny", "VCPUS", "2", "1"},
		{"tiny", "MEMORY", "257", "256 MiB"},
		{"tiny", "DISK", "100 MiB", "LIBVIRT_DRIVER_DISK"},
	} {
		t.Run(fmt.Sprintf("%s of %s for %s", test.value, test.variable, test.image), func(t *testing.T) {
			wantRefused(t, cfg, newJob(runner.Job{Image: test.image, Script: []string{"true"}, Variables: []runner.Variable{
				{Key: "LIBVIRT_DRIVER_" + test.variable, Value: test.value, Raw: true},
			}}), "LIBVIRT_DRIVER_"+test.variable, test.complaint)
		})
	}
}

// Only now is it known how large the base volume is.
func TestADiskBelowItsBaseVolumesIsTheJobsFaultAtPrepare(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, "base.qcow2"), "200M")
	cfg := newSettings(t, tiny(fmt.Sprintf("volume = \"base.qcow2\"\npool = %q\nmax_disk = \"1 GiB\"", newPool(t, dir)))).runner(t)
	job := newJob(runner.Job{Script: []string{"true"}, Variables: []runner.Variable{{Key: "LIBVIRT_DRIVER_DISK", Value: "100 MiB"}}})
	o := runJob(t, cfg, job)
	if calls := strings.Join(stages(o), ", "); o.FailureReason != runner.ScriptFailure || calls != "config, prepare, cleanup" ||
		!strings.Contains(string(o.Log), "LIBVIRT_DRIVER_DISK: a disk of 100 MiB is asked for, but base volume base.qcow2 has 200 MiB") {
		t.Errorf("%s (%v) after %s\n%s", o.FailureReason, o.Err, calls, o.Log)
	}
}

func TestAJobGetsTheSizeItAsksFor(t *testing.T) {
	t.Parallel()
	ex := prepared(t, newSettings(t, manyImages).runner(t), newJob(runner.Job{Image: "big", Variables: []runner.Variable{
		{Key: "LIBVIRT_DRIVER_VCPUS", Value: "3"},
		{Key: "LIBVIRT_DRIVER_MEMORY", Value: "400 MiB"},
		{Key: "LIBVIRT_DRIVER_DISK", Value: "200"},
	}}))
	got := output(t, ex, "nproc; cat /sys/block/vda/size; while read name kib unit; do [ $name != MemTotal: ] || echo $kib; done </proc/meminfo")
	var cpus, sectors, memory int
	if _, err := fmt.Sscan(got, &cpus, &sectors, &memory); err != nil {
		t.Fatalf("%v: %q", err, got)
	}
	// The kernel keeps some of the memory for itself.
	if cpus != 3 || sectors*512 != 200<<20 || memory < 300<<10 || memory > 400<<10 {
		t.Errorf("the guest has %d CPUs, %d sectors and %d KiB", cpus, sectors, memory)
	}
}

func TestMistakesInTheSettingsAreShownWithTheirLine(t *testing.T) {
	t.Parallel()
	s := newSettings(t, "virt_type = \"qemu\"\n[images.a]\nvolume = \"a\"\nvcpu = 2\nmemory = \"much\"\n\n[timeouts]\nssh = 5\n")
	cfg := s.runner(t)
	cfg.PrepareAttempts = 2
	o := runJob(t, cfg, newJob(runner.Job{Script: []string{"true"}}))
	if o.FailureReason != runner.RunnerSystemFailure {
		t.Errorf("the job ends with %s: %v", o.FailureReason, o.Err)
	}
	for _, text := range []string{":4: images.a.vcpu: ", ":5: images.a.memory: ", ":8: timeouts.ssh: ", "vcpus"} {
		if !strings.Contains(string(o.Log), text) {
			t.Errorf("the log does not say %q", text)
		}
	}
	if t.Failed() {
		t.Logf("job log:\n%s", o.Log)
	}
}

func TestServicesAreToldOfAndNotStarted(t *testing.T) {
	t.Parallel()
	// A base volume that does not exist spares the guest's start: the note comes before.
	cfg := newSettings(t, tiny("volume = \"no-such-volume\"")).runner(t)
	ex := start(t, cfg, newJob(runner.Job{Services: []runner.Service{{Name: "postgres:17"}, {Name: "redis"}}}))
	want(t, ex, ex.Prepare(t.Context()), 2, "services: are not started in a virtual machine (2 asked for)")
}
