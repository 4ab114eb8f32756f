//go:build integration

package integration

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"libvirt-driver/integration/runner"
)

// hash is a file's.
func hash(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// diskImage is what qemu-img reads in an image's own header.
type diskImage struct {
	Format        string `json:"format"`
	Size          int64  `json:"virtual-size"`
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Specific      struct {
		Data struct {
			Compat        string `json:"compat"`
			LazyRefcounts bool   `json:"lazy-refcounts"`
		} `json:"data"`
	} `json:"format-specific"`
}

// overlayOf is what an overlay of that size on a base must be.
func overlayOf(size int64, base, baseFormat string) diskImage {
	i := diskImage{Format: "qcow2", Size: size, Backing: base, BackingFormat: baseFormat}
	i.Specific.Data.Compat = "1.1"
	return i
}

func inspectImage(file string) (diskImage, error) {
	var i diskImage
	out, err := exec.Command("qemu-img", "info", "--force-share", "--output=json", file).Output()
	if err != nil {
		return i, fmt.Errorf("qemu-img info %s: %w", file, err)
	}
	return i, json.Unmarshal(out, &i)
}

// wantImage checks what an image's header says.
func wantImage(t *testing.T, file string, want diskImage) {
	t.Helper()
	if got, err := inspectImage(file); err != nil || got != want {
		t.Errorf("%s is %+v (%v), not %+v", file, got, err, want)
	}
}

func TestAWholeJobIsGreenAndLeavesNothingAndItsBaseVolumeAsItWas(t *testing.T) {
	t.Parallel()
	// The base volume of the private host is read-only; a copy is not.
	dir := newFolder(t)
	base := filepath.Join(dir, "bookworm.qcow2")
	command(t, "cp", filepath.Join(images, "gitlab-runner-base.qcow2"), base)
	command(t, "chmod", "666", base)
	pool, before := newPool(t, dir), hash(t, base)

	job := newJob(runner.Job{
		Image: "debian:bookworm",
		Variables: []runner.Variable{
			{Key: "LIBVIRT_DRIVER_DISK", Value: "10 GiB"},
			{Key: "SECRET", Value: "do not show me", Masked: true},
			{Key: "FILE", Value: "what the file holds", File: true},
		},
		Script: []string{
			`cat "$FILE" && echo "$SECRET"`,
			`sudo dd if=/dev/urandom of=/big bs=1M count=64 status=none && sync`,
			`df --output=size --block-size=M / | tail -n 1`,
			`printf 'no newline at the end'`,
		},
		Steps:        []runner.Step{{Name: "release", Script: []string{`echo "released from $PWD"`}}},
		AfterScript:  []string{`echo "after_script sees $CI_JOB_STATUS"`},
		Cache:        []string{"vendor/"},
		Artifacts:    []string{"out/"},
		Dependencies: []string{"build"},
	})
	machine := machineOf(job)
	overlay := filepath.Join(dir, machine+".qcow2")

	cfg := newSettings(t, emulated+fmt.Sprintf(`
[images.bookworm]
volume = "bookworm.qcow2"
pool = %q
max_disk = "10 GiB"
[[aliases]]
match = "debian:*"
image = "bookworm"
`, pool)).runner(t)
	cfg.Trace = true
	var header diskImage
	var volume, domain string
	cfg.OnCall = func(call *runner.Call) {
		if call.SubStage == "build_script" {
			var errs [3]error
			header, errs[0] = inspectImage(overlay)
			volume, errs[1] = tryVirsh("vol-dumpxml", "--pool", pool, machine+".qcow2")
			domain, errs[2] = tryVirsh("dumpxml", machine)
			if err := errors.Join(errs[:]...); err != nil {
				t.Error(err)
			}
		}
	}
	o := runJob(t, cfg, job)

	if !o.Green() || len(o.RunnerLog) > 0 {
		t.Fatalf("the job has not succeeded: %v\nthe runner's log: %s\njob log:\n%s", o.Err, o.RunnerLog, o.Log)
	}
	expected := []string{
		"config", "prepare", "run prepare_script", "run get_sources", "run restore_cache", "run download_artifacts",
		"run build_script", "run step_release", "run after_script", "run archive_cache", "run upload_artifacts_on_success",
		"run cleanup_file_variables", "cleanup",
	}
	if calls := stages(o); !slices.Equal(calls, expected) {
		t.Errorf("the calls are %q, not %q", calls, expected)
	}
	for _, r := range o.Calls {
		var others []string // the keeper, the finisher: the driver itself
		if r.Stage == "prepare" || r.Stage == "cleanup" {
			others = []string{binary}
		}
		if r.Trace.Processes != len(others) || !slices.Equal(r.Trace.Execs, others) || r.Trace.OwnRSS >= 40<<20 {
			t.Errorf("%s started %d processes %q, and had %d bytes of memory", r.Name(), r.Trace.Processes, r.Trace.Execs, r.Trace.OwnRSS)
		}
	}
	log := string(o.Log)
	for _, text := range []string{
		"Using Custom executor with driver libvirt-driver", "Machine " + machine + ": image bookworm, 2 vCPUs, 2 GiB memory, 10 GiB disk",
		"  disk     10 GiB, on bookworm.qcow2", "Running on debian via", "what the file holds[MASKED]\n", "no newline at the end",
		"released from /home/gitlab-runner/builds/group/project", "after_script sees success", "Job succeeded",
	} {
		if !strings.Contains(log, text) {
			t.Errorf("the log does not say %q", text)
		}
	}
	var megabytes int
	for line := range strings.Lines(log) {
		if n := 0; strings.HasSuffix(line, "M\n") {
			if _, err := fmt.Sscanf(strings.TrimSpace(line), "%dM", &n); err == nil {
				megabytes = n
			}
		}
	}
	if megabytes < 9_000 || megabytes > 10<<10 {
		t.Errorf("the guest's root file system has %d MB of the 10 GiB that were asked for", megabytes)
	}
	if t.Failed() {
		t.Logf("job log:\n%s", log)
	}

	if want := overlayOf(10<<30, base, "qcow2"); header != want {
		t.Errorf("the overlay is %+v, not %+v", header, want)
	}
	for _, part := range []string{"<backingStore>", "<path>" + base + "</path>", "<format type='qcow2'/>"} {
		if !strings.Contains(volume, part) {
			t.Errorf("the volume has no %s:\n%s", part, volume)
		}
	}
	for _, part := range []string{
		"<domain type='qemu'", "<driver name='qemu' type='qcow2'", "<backingStore type='file'", "<source file='" + base + "'/>",
		fmt.Sprintf(":job>%d</", job.ID), ":project>42</", ":runner>1</", ":image>bookworm</", ":created>", "<rng model='virtio'>",
	} {
		if !strings.Contains(domain, part) {
			t.Errorf("the domain has no %s:\n%s", part, domain)
		}
	}
	for _, part := range []string{"<graphics", "<redirdev"} {
		if strings.Contains(domain, part) {
			t.Errorf("the domain has a %s:\n%s", part, domain)
		}
	}

	wantGone(t, machine)
	if after := hash(t, base); after != before {
		t.Errorf("the base volume has changed: from %s to %s", before, after)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("the pool has %v (%v), not the base volume alone", files, err)
	}
}

func TestAJobThatFailsRunsItsAfterScriptAndKeepsItsExitCode(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{
		Script:      []string{"echo before", "exit 7", "echo not reached"},
		AfterScript: []string{`echo "after_script sees $CI_JOB_STATUS"`, "exit 9"},
	})
	o := runJob(t, newSettings(t, tiny("")).runner(t), job)
	log := string(o.Log)
	if o.Status != runner.Failed || o.FailureReason != runner.ScriptFailure || o.ExitCode != 7 ||
		!strings.Contains(log, "after_script sees failed\n") || strings.Contains(log, "\nnot reached\n") {
		t.Errorf("the job ends as %s (%s), exit code %d: %v\n%s", o.Status, o.FailureReason, o.ExitCode, o.Err, log)
	}
	if calls := stages(o); calls[len(calls)-1] != "cleanup" || !slices.Contains(calls, "run after_script") {
		t.Errorf("the calls are %q", calls)
	}
	// A script that failed has the last word; the driver adds nothing to it.
	if strings.Contains(log, "libvirt-driver: run:") {
		t.Errorf("the driver has its say too:\n%s", log)
	}
}

func TestABaseVolumeMayBeRawAndAGuestsWritesStayInTheOverlay(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	base := filepath.Join(dir, "base.img")
	command(t, "qemu-img", "convert", "-O", "raw", filepath.Join(images, "tiny.qcow2"), base)
	command(t, "chmod", "666", base)
	pool, before := newPool(t, dir), hash(t, base)
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, tiny(fmt.Sprintf("volume = \"base.img\"\nformat = \"raw\"\npool = %q\ndisk = \"80 MiB\"", pool))).runner(t), job)
	wantImage(t, filepath.Join(dir, machineOf(job)+".qcow2"), overlayOf(80<<20, base, "raw"))
	got := output(t, ex, "yes | head -c 1048576 | sudo dd of=/dev/vda bs=4k seek=256 conv=fsync 2>/dev/null\n"+
		"sudo dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | head -c 4; cat /sys/block/vda/size")
	if got != "y\ny\n163840\n" {
		t.Errorf("the guest reads %q", got)
	}
	cleanUp(t, ex, job)
	if after := hash(t, base); after != before {
		t.Errorf("the base volume has changed: from %s to %s", before, after)
	}
}

func TestAGuestBootsByUEFI(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := prepared(t, newSettings(t, emulated+"default_image = \"uefi\"\n[images.uefi]\nvolume = \"gitlab-runner-base.qcow2\"\nfirmware = \"uefi\"\n").runner(t), job)
	if got := output(t, ex, "[ -d /sys/firmware/efi ] && echo UEFI"); got != "UEFI\n" {
		t.Errorf("the guest says %q", got)
	}
	cleanUp(t, ex, job)
}
