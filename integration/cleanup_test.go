//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"libvirt-driver/integration/runner"
)

// started begins an attempt and kills its prepare as soon as the machine has been started, so that all of the machine
// is there and nothing waits for its guest.
func started(t *testing.T, cfg runner.Config, job runner.Job) *runner.Executor {
	t.Helper()
	ex, call := midway(t, cfg, job, "  machine  started")
	kill(t, call)
	if !exists(t, machineOf(job)) {
		t.Fatalf("the machine has not been started:\n%s", ex.JobLog())
	}
	return ex
}

// kill ends a call as the kernel does for want of memory: without a last word.
func kill(t *testing.T, call *runner.Call) {
	t.Helper()
	if err := call.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := call.Wait(t.Context()); r.Signal != syscall.SIGKILL {
		t.Fatalf("%s ended before it was killed: exit code %d\n%s", r.Name(), r.ExitCode, r.Stderr)
	}
}

// cleanUp makes a cleanup call and checks that it succeeds, in silence, and leaves nothing.
func cleanUp(t *testing.T, ex *runner.Executor, job runner.Job) {
	t.Helper()
	r := ex.Cleanup(t.Context())
	want(t, ex, r, 0)
	if len(r.Stdout)+len(r.Stderr) > 0 {
		t.Errorf("cleanup says %q and %q", r.Stdout, r.Stderr)
	}
	wantGone(t, machineOf(job))
}

func TestCleanupWithoutPrepareSucceeds(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex, err := runner.New(newSettings(t, tiny("")).runner(t), job)
	if err != nil {
		t.Fatal(err)
	}
	cleanUp(t, ex, job) // not even config ran
	if ex, err = ex.Next(); err != nil {
		t.Fatal(err)
	}
	want(t, ex, ex.Config(t.Context()), 0)
	cleanUp(t, ex, job)
}

func TestCleanupRemovesAMachineThatIsStartingUpAndSucceedsAgainAfterwards(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := started(t, newSettings(t, tiny("")).runner(t), job)
	cleanUp(t, ex, job)
	cleanUp(t, again(t, ex), job)
}

func TestCleanupRemovesTheNVRAMOfAUEFIMachine(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := started(t, newSettings(t, emulated+"[images.uefi]\nvolume = \"gitlab-runner-base.qcow2\"\nfirmware = \"uefi\"\n"+
		"[[aliases]]\nmatch = \"*\"\nimage = \"uefi\"\n").runner(t), withImage(job, "uefi"))
	if files, err := filepath.Glob(filepath.Join(nvram, machineOf(job)+"*")); err != nil || len(files) != 1 {
		t.Errorf("the machine's NVRAM is not where it was thought to be: %v, %v", files, err)
	}
	cleanUp(t, ex, job)
}

func withImage(job runner.Job, image string) runner.Job {
	job.Image = image
	return job
}

func TestCleanupRemovesSnapshotsAndSavedState(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := started(t, newSettings(t, tiny("")).runner(t), job)
	virsh(t, "snapshot-create-as", machineOf(job), "before")
	virsh(t, "managedsave", machineOf(job))
	if seen, err := lookAround(); err != nil || !strings.Contains(strings.Join(seen["files"], " "), "/save/"+machineOf(job)) {
		t.Errorf("the machine's saved state is not where it was thought to be (%v)", err)
	}
	cleanUp(t, ex, job)
}

func TestCleanupRemovesWhatIsLeftWhenAnAdministratorWasThereBefore(t *testing.T) {
	t.Parallel()
	for name, tidy := range map[string]func(*testing.T, string){
		"the domain was destroyed":               func(t *testing.T, m string) { virsh(t, "destroy", m) },
		"the domain was paused":                  func(t *testing.T, m string) { virsh(t, "suspend", m) },
		"the domain was destroyed and undefined": func(t *testing.T, m string) { virsh(t, "destroy", m); virsh(t, "undefine", m) },
		"the overlay's file was deleted": func(t *testing.T, m string) {
			virsh(t, "destroy", m)
			if err := os.Remove(filepath.Join(images, m+".qcow2")); err != nil {
				t.Fatal(err)
			}
		},
		"the volume was deleted": func(t *testing.T, m string) { virsh(t, "destroy", m); virsh(t, "vol-delete", m+".qcow2", "default") },
		"the logs were deleted": func(t *testing.T, m string) {
			for _, log := range []string{m + ".log", m + "-console.log"} {
				if err := os.Remove(filepath.Join(consoles, log)); err != nil {
					t.Fatal(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			job := newJob(runner.Job{})
			ex := started(t, newSettings(t, tiny("")).runner(t), job)
			tidy(t, machineOf(job))
			cleanUp(t, ex, job)
		})
	}
}

// The pool and the network that the settings named when the machine was made are in the machine's metadata.
func TestCleanupRemovesAMachineOfSettingsThatHaveChanged(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	command(t, "cp", filepath.Join(images, "tiny.qcow2"), dir)
	s := newSettings(t, tiny("pool = \""+newPool(t, dir)+"\""))
	job := newJob(runner.Job{})
	ex := started(t, s.runner(t), job)
	s.write(t, tiny("pool = \"default\""))
	cleanUp(t, ex, job)
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("the pool has %v (%v), not the base volume alone", files, err)
	}
}

func TestWhatHasTheJobsNameButIsNotTheDriversIsLeftAlone(t *testing.T) {
	t.Parallel()
	const metadata = "<metadata><m:machine xmlns:m='urn:libvirt-driver:machine:1'><m:job>%s</m:job><m:project>%s</m:project></m:machine></metadata>"
	for name, metadata := range map[string]string{
		"a domain without metadata":      "",
		"a domain with others' metadata": "<metadata><x xmlns='urn:other'/></metadata>",
		"a domain of another job":        strings.NewReplacer("%s</m:job>", "1</m:job>", "%s</m:project>", "42</m:project>").Replace(metadata),
		"a domain of another project":    strings.NewReplacer("%s</m:job>", "JOB</m:job>", "%s</m:project>", "43</m:project>").Replace(metadata),
	} {
		t.Run(name, func(t *testing.T) {
			job := newJob(runner.Job{})
			machine := machineOf(job)
			overlay := filepath.Join(images, machine+".qcow2")
			metadata := strings.Replace(metadata, "JOB", machine[strings.LastIndexByte(machine, '-')+1:], 1)
			virsh(t, "vol-create-as", "default", filepath.Base(overlay), "1M", "--format", "qcow2")
			virsh(t, "define", document(t, `<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory>%s
				<os><type>hvm</type></os><devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='%s'/><target dev='vda' bus='virtio'/></disk></devices></domain>`,
				machine, metadata, overlay))
			virsh(t, "start", machine)
			ex, err := runner.New(newSettings(t, tiny("")).runner(t), job)
			if err != nil {
				t.Fatal(err)
			}
			want(t, ex, ex.Config(t.Context()), 0)
			want(t, ex, ex.Prepare(t.Context()), 2, machine+" is not this driver's")
			want(t, ex, ex.Cleanup(t.Context()), 2, machine+" is not this driver's", "left behind: domain "+machine)
			if state := strings.TrimSpace(virsh(t, "domstate", machine)); state != "running" {
				t.Errorf("the domain is %s now", state)
			}
			if _, err := os.Stat(overlay); err != nil {
				t.Error(err)
			}
			virsh(t, "destroy", machine)
			virsh(t, "undefine", machine)
			cleanUp(t, again(t, ex), job) // now the name is free
		})
	}
}

func TestCleanupSaysWhatItCannotRemove(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	command(t, "cp", filepath.Join(images, "tiny.qcow2"), dir)
	command(t, "mount", "--bind", dir, dir)
	t.Cleanup(func() { command(t, "umount", dir) })
	s := newSettings(t, tiny("pool = \""+newPool(t, dir)+"\"", "[timeouts]", `destroy = "3s"`))
	job := newJob(runner.Job{})
	ex := started(t, s.runner(t), job)
	virsh(t, "destroy", machineOf(job))
	command(t, "mount", "-o", "remount,bind,ro", dir)
	want(t, ex, ex.Cleanup(t.Context()), 2, "not done after 3s (timeouts.destroy)",
		"left behind: volume "+machineOf(job)+".qcow2 in pool "+filepath.Base(dir), "Read-only file system")
	if !exists(t, machineOf(job)) {
		t.Error("the domain is gone, and with it the last that knows of the volume")
	}
	command(t, "mount", "-o", "remount,bind,rw", dir)
	cleanUp(t, again(t, ex), job)
}

// A pool that does not run may be on a file server that is down.
func TestAPoolThatDoesNotRunHoldsUpOnlyTheJobsThatUseIt(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	pool := filepath.Base(dir)
	definePool(t, pool, dir)
	s := newSettings(t, tiny("", "[images.elsewhere]", "pool = \""+pool+"\""))
	job := newJob(runner.Job{})
	cleanUp(t, started(t, s.runner(t), job), job)

	job = newJob(runner.Job{Image: "elsewhere"})
	ex := start(t, s.runner(t), job)
	want(t, ex, ex.Prepare(t.Context()), 2, "start the pool: virsh pool-start "+pool)
	cleanUp(t, ex, job)
}
