//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"libvirt-driver/integration/runner"
)

// runJob runs a whole job. At the test's end nothing of its machine may be left.
func runJob(t *testing.T, cfg runner.Config, job runner.Job) *runner.Outcome {
	t.Helper()
	o, err := runner.RunJob(t.Context(), cfg, job)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wantGone(t, machineOf(job)) })
	return o
}

// stages are the calls of a job, in order.
func stages(o *runner.Outcome) []string {
	var names []string
	for _, r := range o.Calls {
		names = append(names, r.Name())
	}
	return names
}

// wantRefused runs a job and checks that it is refused as its own failure, by the config stage and without a second
// attempt, with the texts in its log.
func wantRefused(t *testing.T, cfg runner.Config, job runner.Job, texts ...string) {
	t.Helper()
	o := runJob(t, cfg, job)
	bad := o.Status != runner.Failed || o.FailureReason != runner.ScriptFailure
	if bad {
		t.Errorf("the job ends as %s (%s: %v)", o.Status, o.FailureReason, o.Err)
	}
	if calls := strings.Join(stages(o), ", "); calls != "config, cleanup" {
		t.Errorf("the calls are %s; not config, cleanup", calls)
		bad = true
	}
	for _, text := range texts {
		if !strings.Contains(string(o.Log), text) {
			t.Errorf("the log does not say %q", text)
			bad = true
		}
	}
	if bad {
		t.Errorf("job log:\n%s", o.Log)
	}
}

func TestAJobThatForgesWhoItIsIsRefused(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, tiny("")).runner(t)
	for _, forged := range []struct{ variable, value, complaint string }{
		{"CI_JOB_ID", "1", "GitLab says"},
		{"CI_JOB_ID", "../../../etc/passwd", "GitLab says"},
		{"CI_JOB_ID", "2000 ", "GitLab says"},
		{"CI_JOB_ID", "<name>x</name>", "GitLab says"},
		{"CI_PROJECT_ID", "7", "GitLab says 42"},
		{"CI_PROJECT_ID", "042", "GitLab says 42"},
		{"CI_RUNNER_ID", "../..", "not a number"},
		{"CI_RUNNER_ID", "-1", "not a number"},
		{"CI_RUNNER_ID", "01", "not a number"},
		{"CI_RUNNER_ID", "1\n2", "not a number"},
		{"CI_RUNNER_ID", "٣", "not a number"}, // a digit, in Arabic
		{"CI_RUNNER_ID", strings.Repeat("9", 30), "not a number"},
		{"CI_CONCURRENT_PROJECT_ID", "0/../../default", "not a number"},
		{"CI_CONCURRENT_PROJECT_ID", "%s%n", "not a number"},
		{"CI_JOB_IMAGE", "tiny", "choose the image with image:"},
	} {
		t.Run(fmt.Sprintf("%s=%.20q", forged.variable, forged.value), func(t *testing.T) {
			// As GitLab does, the runner lets a job override the variables that tell who it is.
			job := newJob(runner.Job{Image: "other", Script: []string{"true"}, Variables: []runner.Variable{
				{Key: forged.variable, Value: forged.value, Raw: true},
			}})
			wantRefused(t, cfg, job, forged.variable, forged.complaint)
		})
	}
}

// What job_env says cannot be set by a job, and later stages hold against it what the job says then.
func TestAJobThatChangesItsNameAfterConfigIsRefused(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, tiny("")).runner(t)
	cfg.BuildFailure = 41
	job := newJob(runner.Job{})
	ex := start(t, cfg, job)
	forged := func(argv []string) (exit int, text string) {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = append(ex.Env(), "CUSTOM_ENV_CI_RUNNER_ID=8")
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	if exit, text := forged(cfg.Commands.Prepare); exit != 41 || !strings.Contains(text, "says now that it is runner-8-project-42") {
		t.Errorf("prepare exits with %d:\n%s", exit, text)
	}
	// Cleanup refuses nothing: the machine that config named is to go.
	want(t, ex, ex.Prepare(t.Context()), 0)
	if exit, text := forged(cfg.Commands.Cleanup); exit != 0 || text != "" {
		t.Errorf("cleanup exits with %d:\n%s", exit, text)
	}
	wantGone(t, machineOf(job))
}

// The administrator edits the settings while a job runs: it goes on with what it was given.
func TestAJobOutlivesAChangeOfTheSettings(t *testing.T) {
	t.Parallel()
	s := newSettings(t, tiny(""))
	ex := prepared(t, s.runner(t), newJob(runner.Job{Image: "tiny"}))
	s.write(t, "[images.other]\nvolume = \"other.qcow2\"\n")
	if got := output(t, ex, "echo the guest is there"); got != "the guest is there\n" {
		t.Errorf("a script writes %q", got)
	}
}

func TestAStageThatIsNotToldWhichJobItIsFails(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, tiny("")).runner(t)
	for name, damage := range map[string]func(*runner.Executor) error{
		"no response":            func(ex *runner.Executor) error { return os.Remove(ex.ResponseFile()) },
		"half a response":        func(ex *runner.Executor) error { return os.Truncate(ex.ResponseFile(), 100) },
		"a response without ids": func(ex *runner.Executor) error { return os.WriteFile(ex.ResponseFile(), []byte(`{}`), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			ex, err := runner.New(cfg, newJob(runner.Job{}))
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(ex); err != nil {
				t.Fatal(err)
			}
			for _, r := range []*runner.Result{ex.Config(t.Context()), ex.Prepare(t.Context()), ex.Run(t.Context(), "build_script", "true"), ex.Cleanup(t.Context())} {
				want(t, ex, r, 2, "response file")
			}
		})
	}
}

func TestConfigTellsTheRunnerWhatItNeeds(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex := start(t, newSettings(t, tiny("user = \"someone\"\nshell = \"sh\"")).runner(t), job)
	r := ex.Config(t.Context())
	want(t, ex, r, 0)
	var answer struct {
		Driver          struct{ Name, Version string }
		Hostname, Shell string
		BuildsDir       string            `json:"builds_dir"`
		CacheDir        string            `json:"cache_dir"`
		Shared          bool              `json:"builds_dir_is_shared"`
		JobEnv          map[string]string `json:"job_env"`
	}
	if err := json.Unmarshal(r.Stdout, &answer); err != nil {
		t.Fatalf("%v: %s", err, r.Stdout)
	}
	if answer.Driver.Name != "libvirt-driver" || answer.Driver.Version == "" || answer.Hostname != machineOf(job) || answer.Shell != "sh" ||
		answer.BuildsDir != "/home/someone/builds" || answer.CacheDir != "/home/someone/cache" || answer.Shared ||
		answer.JobEnv["LIBVIRT_DRIVER_MACHINE"] != machineOf(job) || answer.JobEnv["LIBVIRT_DRIVER_IMAGE"] != "tiny" {
		t.Errorf("config answers %+v", answer)
	}
	if len(r.Stderr) > 0 {
		t.Errorf("config says in the job log: %s", r.Stderr)
	}
}
