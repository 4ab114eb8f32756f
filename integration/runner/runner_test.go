package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fake is a driver made of shell snippets. Each call adds a line to $RECORD: the
// stage, run's sub-stage, the private folder's name.
type fake struct {
	config, prepare, run, cleanup string
}

// okConfig is the output of a config stage that succeeds.
const okConfig = `echo '{"driver":{"name":"fake","version":"v1"},"builds_dir":"/builds","cache_dir":"/cache",` +
	`"hostname":"guest","job_env":{"FAKE_ENV":"from config"}}'; `

func (f fake) runner(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	stage := func(name, snippet string) []string {
		record := `echo ` + name + ` $2 $(basename "$PWD") >> "$RECORD"; `
		return []string{"/bin/sh", "-c", record + snippet, "driver"}
	}
	if f.config == "" {
		f.config = okConfig
	}
	return Config{
		Commands: Commands{
			Config:  stage("config", f.config),
			Prepare: stage("prepare", f.prepare),
			Run:     stage("run", f.run),
			Cleanup: stage("cleanup", f.cleanup),
		},
		Env:                append(os.Environ(), "RECORD="+filepath.Join(dir, "record"), "OUT="+dir),
		TempDir:            t.TempDir(),
		RetryInterval:      time.Millisecond,
		StageRetryInterval: time.Millisecond,
	}
}

func env(cfg Config, key string) string {
	for _, kv := range slices.Backward(cfg.Env) {
		if value, ok := strings.CutPrefix(kv, key+"="); ok {
			return value
		}
	}
	return ""
}

// record is the calls so far. Folders are numbered in the order they appear.
func record(t *testing.T, cfg Config) []string {
	t.Helper()
	text, err := os.ReadFile(env(cfg, "RECORD"))
	if err != nil {
		t.Fatal(err)
	}
	var calls []string
	numbers := map[string]string{}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		last := len(fields) - 1
		if numbers[fields[last]] == "" {
			numbers[fields[last]] = strconv.Itoa(len(numbers) + 1)
		}
		fields[last] = numbers[fields[last]]
		calls = append(calls, strings.Join(fields, " "))
	}
	return calls
}

func wantRecord(t *testing.T, cfg Config, want ...string) {
	t.Helper()
	if got := record(t, cfg); !slices.Equal(got, want) {
		t.Errorf("calls:\n  %s\nwant:\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func runJob(t *testing.T, cfg Config, job Job) *Outcome {
	t.Helper()
	o, err := RunJob(t.Context(), cfg, job)
	if err != nil {
		t.Fatal(err)
	}
	noFolders(t, cfg)
	return o
}

// noFolders checks that every private folder has been removed.
func noFolders(t *testing.T, cfg Config) {
	t.Helper()
	left, err := os.ReadDir(cfg.TempDir)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("private folders left: %v", left)
	}
}

func wantLog(t *testing.T, o *Outcome, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(string(o.Log), text) {
			t.Errorf("job log lacks %q:\n%s", text, o.Log)
		}
	}
}

func TestGreenJob(t *testing.T) {
	cfg := fake{prepare: `echo preparing`, run: `cat "$1" > "$OUT/$2"; echo "$CUSTOM_ENV_CI_JOB_STATUS" > "$OUT/$2.status"`}.runner(t)
	extra := "#!/bin/sh\n"
	o := runJob(t, cfg, Job{
		Script: []string{"true"}, AfterScript: []string{"true"},
		Steps:     []Step{{Name: "release", Script: []string{"true"}}},
		Variables: []Variable{{Key: "CI_JOB_STATUS", Value: "the job's own"}},
		Scripts: map[string]string{
			"restore_cache": extra, "download_artifacts": extra, "archive_cache": extra, "archive_cache_on_failure": extra,
			"upload_artifacts_on_success": extra, "upload_artifacts_on_failure": extra,
		},
	})
	if !o.Green() || o.FailureReason != "" || o.Err != nil {
		t.Errorf("status %s, reason %q, error %v", o.Status, o.FailureReason, o.Err)
	}
	wantRecord(t, cfg, "config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run restore_cache 1",
		"run download_artifacts 1", "run build_script 1", "run step_release 1", "run after_script 1", "run archive_cache 1",
		"run upload_artifacts_on_success 1", "run cleanup_file_variables 1", "cleanup 1")
	wantLog(t, o, "Preparing the \"custom\" executor", "Using Custom executor with driver fake v1...", "preparing\n",
		`Executing "step_script" stage of the job script`, "\x1b[32;1mJob succeeded\x1b[0;m\n")
	for stage, want := range map[string]string{"build_script": "the job's own", "after_script": "success", "cleanup_file_variables": "success"} {
		if got := readFile(t, filepath.Join(env(cfg, "OUT"), stage+".status")); got != want+"\n" {
			t.Errorf("CI_JOB_STATUS of %s is %q, want %q", stage, got, want)
		}
	}
	if len(o.Calls) != 13 {
		t.Errorf("%d calls in the outcome, want 13", len(o.Calls))
	}
	starts := strings.Count(string(o.Log), "section_start:")
	ends := strings.Count(string(o.Log), "section_end:")
	if starts != 11 || ends != 11 {
		t.Errorf("%d sections start and %d end, want 11", starts, ends)
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Which sub-stages still run when one has failed, which failures fail the job,
// and what the later ones are told.
func TestFailingSubStages(t *testing.T) {
	const ok, bad = "#!/bin/sh\n", "fail"
	all := []string{"prepare_script", "get_sources", "restore_cache", "download_artifacts", "build_script", "after_script"}
	onSuccess := []string{"archive_cache", "upload_artifacts_on_success", "cleanup_file_variables"}
	onFailure := []string{"archive_cache_on_failure", "upload_artifacts_on_failure", "cleanup_file_variables"}
	for _, tt := range []struct {
		fails  string
		want   []string
		green  bool
		status string // CI_JOB_STATUS in cleanup
	}{
		{"prepare_script", all[:1], false, "running"},
		{"get_sources", append(all[:2:2], onFailure...), false, "running"},
		{"restore_cache", append(all[:3:3], onFailure...), false, "running"},
		{"download_artifacts", append(all[:4:4], onFailure...), false, "running"},
		{"build_script", append(all[:6:6], onFailure...), false, "failed"},
		{"after_script", append(all[:6:6], onSuccess...), true, "success"},
		{"archive_cache", append(all[:6:6], onSuccess...), false, "success"},
		{"upload_artifacts_on_success", append(all[:6:6], onSuccess...), false, "success"},
		{"cleanup_file_variables", append(all[:6:6], onSuccess...), true, "success"},
	} {
		for _, system := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/system=%v", tt.fails, system), func(t *testing.T) {
				code := "BUILD"
				if system {
					code = "SYSTEM"
				}
				cfg := fake{
					run:     `if grep -qx ` + bad + ` "$1"; then exit $` + code + `_FAILURE_EXIT_CODE; fi`,
					cleanup: `echo "$CUSTOM_ENV_CI_JOB_STATUS" > "$OUT/status"`,
				}.runner(t)
				scripts := map[string]string{}
				for _, stage := range slices.Concat(all, onSuccess, onFailure) {
					scripts[stage] = ok
				}
				scripts[tt.fails] = bad
				scripts["step_script"] = scripts["build_script"]
				o := runJob(t, cfg, Job{Scripts: scripts})
				want := []string{"config 1", "prepare 1"}
				for _, stage := range tt.want {
					want = append(want, "run "+stage+" 1")
				}
				wantRecord(t, cfg, append(want, "cleanup 1")...)
				if o.Green() != tt.green {
					t.Errorf("status %s, error %v", o.Status, o.Err)
				}
				reason := ""
				if !tt.green {
					reason = ScriptFailure
					if system {
						reason = RunnerSystemFailure
					}
				}
				if o.FailureReason != reason {
					t.Errorf("failure reason %q, want %q", o.FailureReason, reason)
				}
				if got := readFile(t, filepath.Join(env(cfg, "OUT"), "status")); got != tt.status+"\n" {
					t.Errorf("CI_JOB_STATUS in cleanup is %q, want %q", got, tt.status)
				}
			})
		}
	}
}

func TestPrepareIsRetriedWithCleanupBetween(t *testing.T) {
	cfg := fake{prepare: `echo >> "$OUT/tries"; [ $(wc -l < "$OUT/tries") = 3 ] || exit $SYSTEM_FAILURE_EXIT_CODE`}.runner(t)
	o := runJob(t, cfg, Job{Scripts: map[string]string{"get_sources": "", "cleanup_file_variables": ""}})
	if !o.Green() {
		t.Errorf("status %s, error %v", o.Status, o.Err)
	}
	wantRecord(t, cfg, "config 1", "prepare 1", "cleanup 1", "config 2", "prepare 2", "cleanup 2",
		"config 3", "prepare 3", "run prepare_script 3", "cleanup 3")
	wantLog(t, o, "ERROR: Preparation failed: exit status 2", "Will be retried in 1ms ...")
}

func TestPrepareFailsThreeTimes(t *testing.T) {
	for name, f := range map[string]fake{
		"system failure":  {prepare: `exit $SYSTEM_FAILURE_EXIT_CODE`},
		"unknown failure": {prepare: `exit 3`},
		"signal":          {prepare: `kill -9 $$`},
		"config":          {config: `echo '{"driver":'`},
		"config exits 2":  {config: `exit 2`},
		"after config":    {config: okConfig + `exit 2`},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := f.runner(t)
			o := runJob(t, cfg, Job{})
			if o.Status != Failed || o.FailureReason != RunnerSystemFailure {
				t.Errorf("status %s, reason %s", o.Status, o.FailureReason)
			}
			stages := []string{"config", "prepare", "cleanup"}
			if f.config != "" {
				stages = []string{"config", "cleanup"}
			}
			var want []string
			for i := range 3 {
				for _, stage := range stages {
					want = append(want, fmt.Sprint(stage, " ", i+1))
				}
			}
			wantRecord(t, cfg, want...)
			wantLog(t, o, "\x1b[31;1mERROR: Job failed (system failure): ")
		})
	}
}

// A job's failure in the prepare sequence stops the retries at once.
func TestPrepareBuildFailure(t *testing.T) {
	for name, f := range map[string]fake{
		"prepare":       {prepare: `echo 13 > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`},
		"config":        {config: `echo 13 > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`},
		"no builds_dir": {config: `echo '{"cache_dir":"/c"}'`},
		"no cache_dir":  {config: `echo '{"builds_dir":"/b"}'`},
		"empty config":  {config: `:`},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := f.runner(t)
			o := runJob(t, cfg, Job{})
			if o.Status != Failed || o.FailureReason != ScriptFailure {
				t.Errorf("status %s, reason %s, error %v", o.Status, o.FailureReason, o.Err)
			}
			if f.prepare != "" {
				wantRecord(t, cfg, "config 1", "prepare 1", "cleanup 1")
			} else {
				wantRecord(t, cfg, "config 1", "cleanup 1")
			}
			if strings.HasPrefix(name, "prepare") && o.ExitCode != 13 {
				t.Errorf("exit code %d, want 13", o.ExitCode)
			}
		})
	}
}

func TestBuildsDirOfTheRunner(t *testing.T) {
	cfg := fake{config: `:`}.runner(t)
	cfg.BuildsDir, cfg.CacheDir = "/b", "/c"
	if o := runJob(t, cfg, Job{}); !o.Green() {
		t.Errorf("status %s, error %v", o.Status, o.Err)
	}
	cfg.Commands.Config = nil
	o := runJob(t, cfg, Job{})
	if !o.Green() || len(o.Calls) != 5 {
		t.Errorf("without config stage: status %s, error %v, %d calls", o.Status, o.Err, len(o.Calls))
	}
	wantLog(t, o, "Using Custom executor...")
}

func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		name, run string
		code      int // of a BuildError; -1 is a system failure
		text      string
	}{
		{"no file", `exit $BUILD_FAILURE_EXIT_CODE`, 41, "exit status 41"},
		{"file", `printf 7 > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, 7, "exit status 7"},
		{"file with newline", `echo 7 > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, 7, "exit status 7"},
		{"only the first line", `printf '255\nmore' > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, 255, "exit status 255"},
		{"zero", `echo 0 > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, 0, "exit status 0"},
		{"empty file", `: > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, -1, "unknown Custom executor executable exit code 42; executable execution terminated with: exit status 41"},
		{"blank", `echo '7 ' > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, -1, "exit code 42;"},
		{"text", `echo seven > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`, -1, "exit code 42;"},
		{"system failure", `echo 7 > "$BUILD_EXIT_CODE_FILE"; exit $SYSTEM_FAILURE_EXIT_CODE`, -1, "exit status 42"},
		{"unknown", `exit 1`, -1, "unknown Custom executor executable exit code 1; executable execution terminated with: exit status 1"},
		{"signal", `kill -9 $$`, -1, "exit code -1; executable execution terminated with: signal: killed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := fake{run: `[ $2 != build_script ] || { ` + tt.run + `; }`}.runner(t)
			cfg.BuildFailure, cfg.SystemFailure = 41, 42
			o := runJob(t, cfg, Job{Script: []string{"true"}})
			var buildErr *BuildError
			if isBuild := errors.As(o.Err, &buildErr); isBuild != (tt.code >= 0) {
				t.Fatalf("error %T %v", o.Err, o.Err)
			}
			if tt.code >= 0 && o.ExitCode != tt.code {
				t.Errorf("exit code %d, want %d", o.ExitCode, tt.code)
			}
			if !strings.Contains(o.Err.Error(), tt.text) {
				t.Errorf("error %q lacks %q", o.Err, tt.text)
			}
		})
	}
}

// The file is not reset between sub-stages.
func TestStaleExitCodeFile(t *testing.T) {
	cfg := fake{run: `case $2 in
		prepare_script) echo 9 > "$BUILD_EXIT_CODE_FILE";;
		build_script) exit $BUILD_FAILURE_EXIT_CODE;;
		esac`}.runner(t)
	if o := runJob(t, cfg, Job{Script: []string{"true"}}); o.ExitCode != 9 {
		t.Errorf("exit code %d, want the stale file's 9", o.ExitCode)
	}
}

func TestAttempts(t *testing.T) {
	run := `[ $2 != get_sources ] || { echo >> "$OUT/tries"; [ $(wc -l < "$OUT/tries") = 3 ] || exit 2; }`
	for attempts, want := range map[string]Status{"2": Failed, "3": Success, "11": Failed} {
		cfg := fake{run: run}.runner(t)
		o := runJob(t, cfg, Job{Variables: []Variable{{Key: "GET_SOURCES_ATTEMPTS", Value: attempts}}})
		if o.Status != want {
			t.Errorf("%s attempts: status %s, want %s: %v", attempts, o.Status, want, o.Err)
		}
		if attempts == "3" {
			wantRecord(t, cfg, "config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run clear_worktree 1",
				"run get_sources 1", "run get_sources 1", "run cleanup_file_variables 1", "cleanup 1")
		}
	}
}

// dump is a snippet that shows how a call was started.
const dump = `env -0 > "$OUT/$STAGE.env"
	{ pwd; readlink /proc/self/fd/0; [ "$(readlink /proc/self/fd/2)" = "$(readlink /proc/$$/fd/1)" ] && echo same || echo different
	  echo $$; sed 's/.*) //' /proc/$$/stat | cut -d' ' -f3; stat -c %a .; tty || :; } > "$OUT/$STAGE.facts"
	cp "$JOB_RESPONSE_FILE" "$OUT/$STAGE.json"
	printenv CUSTOM_ENV_CI_JOB_SERVICES > "$OUT/$STAGE.services" || :
	`

func dumped(t *testing.T, cfg Config, stage string) map[string]string {
	t.Helper()
	vars := map[string]string{}
	for kv := range strings.SplitSeq(readFile(t, filepath.Join(env(cfg, "OUT"), stage+".env")), "\x00") {
		if key, value, ok := strings.Cut(kv, "="); ok {
			vars[key] = value
		}
	}
	return vars
}

func TestEnvironmentOfCalls(t *testing.T) {
	f := fake{
		config: `STAGE=config; ` + dump + `echo '{"builds_dir":"/builds","cache_dir":"/cache","job_env":{` +
			`"FROM_CONFIG":"yes","HOST_VAR":"of job_env","CUSTOM_ENV_MY_VAR":"of job_env","CUSTOM_ENV_NEW":"of job_env"}}'`,
		prepare: `STAGE=prepare; ` + dump,
		run:     `STAGE=$2; ` + dump,
		cleanup: `STAGE=cleanup; ` + dump,
	}
	cfg := f.runner(t)
	cfg.Env = append(cfg.Env, "HOST_VAR=of the host", "HOST_ONLY=1", "TMPDIR=/nowhere", "BUILD_FAILURE_EXIT_CODE=99")
	cfg.BuildFailure, cfg.SystemFailure = 101, 102
	services := []Service{{Name: "redis:7", Alias: "cache", Command: []string{"redis-server"}, Variables: []Variable{{Key: "A", Value: "b"}}}}
	o := runJob(t, cfg, Job{
		ID: 7, ProjectID: 8, RunnerID: 9, ConcurrentID: 3, ConcurrentProjectID: 2, Image: "debian-12", Services: services,
		Timeout: 90 * time.Second,
		Variables: []Variable{
			{Key: "CI_JOB_ID", Value: "666"}, {Key: "MY_VAR", Value: "my value"}, {Key: "REF", Value: "x-$MY_VAR-${NONE}-$$"},
			{Key: "RAW", Value: "$MY_VAR", Raw: true}, {Key: "FILE", Value: "line 1\nline 2\n", File: true},
			{Key: "USES_FILE", Value: "$FILE"}, {Key: "FF_USE_FASTZIP", Value: "false"},
		},
		Script: []string{"true"},
	})
	if !o.Green() {
		t.Fatalf("status %s, error %v", o.Status, o.Err)
	}
	const project = "/builds/group/project"
	for _, stage := range []string{"config", "prepare", "build_script", "cleanup"} {
		got := dumped(t, cfg, stage)
		want := map[string]string{
			"BUILD_FAILURE_EXIT_CODE": "101", "SYSTEM_FAILURE_EXIT_CODE": "102", "HOST_ONLY": "1", "HOST_VAR": "of job_env",
			"BUILD_EXIT_CODE_FILE": got["TMPDIR"] + "/build_exit_code", "JOB_RESPONSE_FILE": got["TMPDIR"] + "/response.json",
			"FROM_CONFIG": "yes", "CUSTOM_ENV_NEW": "of job_env", "CUSTOM_ENV_MY_VAR": "my value",
			"CUSTOM_ENV_REF": "x-my value--$", "CUSTOM_ENV_RAW": "$MY_VAR", "CUSTOM_ENV_FILE": "line 1\nline 2\n",
			"CUSTOM_ENV_USES_FILE": project + ".tmp/FILE",
			"CUSTOM_ENV_CI_JOB_ID": "666", "CUSTOM_ENV_CI_PROJECT_ID": "8", "CUSTOM_ENV_CI_RUNNER_ID": "9",
			"CUSTOM_ENV_CI_CONCURRENT_ID": "3", "CUSTOM_ENV_CI_CONCURRENT_PROJECT_ID": "2", "CUSTOM_ENV_CI_JOB_IMAGE": "debian-12",
			"CUSTOM_ENV_CI_BUILDS_DIR": "/builds", "CUSTOM_ENV_CI_PROJECT_DIR": project, "CUSTOM_ENV_CI_JOB_TIMEOUT": "90",
			"CUSTOM_ENV_CI_JOB_TOKEN": "glcbt-token-of-job-7", "CUSTOM_ENV_RUNNER_TEMP_PROJECT_DIR": project + ".tmp",
			"CUSTOM_ENV_FF_USE_FASTZIP": "false", "CUSTOM_ENV_FF_TIMESTAMPS": "true",
			"CUSTOM_ENV_CI_JOB_SERVICES": `[{"name":"redis:7","alias":"cache","entrypoint":null,"command":["redis-server"],` +
				`"variables":[{"key":"A","value":"b","public":false,"file":false,"masked":false,"raw":false}]}]`,
		}
		if stage == "config" { // nothing of the config stage is known yet
			want["HOST_VAR"] = "of the host"
			want["FROM_CONFIG"], want["CUSTOM_ENV_NEW"] = "", ""
			want["CUSTOM_ENV_CI_BUILDS_DIR"], want["CUSTOM_ENV_CI_PROJECT_DIR"] = "", ""
			want["CUSTOM_ENV_RUNNER_TEMP_PROJECT_DIR"], want["CUSTOM_ENV_USES_FILE"] = ".tmp", ".tmp/FILE"
		}
		for key, value := range want {
			if got[key] != value {
				t.Errorf("%s: %s is %q, want %q", stage, key, got[key], value)
			}
		}
		facts := strings.Split(readFile(t, filepath.Join(env(cfg, "OUT"), stage+".facts")), "\n")
		if wantFacts := []string{got["TMPDIR"], "/dev/null", "different", facts[3], facts[3], "700", "not a tty", ""}; !slices.Equal(facts, wantFacts) {
			t.Errorf("%s: facts %q, want %q", stage, facts, wantFacts)
		}
		var response struct {
			ID        int64                      `json:"id"`
			JobInfo   struct{ Project_ID int64 } `json:"job_info"`
			Image     struct{ Name string }
			Services  []Service
			Variables []Variable
		}
		if err := json.Unmarshal([]byte(readFile(t, filepath.Join(env(cfg, "OUT"), stage+".json"))), &response); err != nil {
			t.Fatal(err)
		}
		if response.ID != 7 || response.JobInfo.Project_ID != 8 || response.Image.Name != "debian-12" || len(response.Services) != 1 {
			t.Errorf("%s: job response %+v", stage, response)
		}
		if raw := variables(response.Variables).get("REF"); raw != "x-$MY_VAR-${NONE}-$$" {
			t.Errorf("%s: the job response's REF is %q, want it unexpanded", stage, raw)
		}
	}
}

// job_env comes after what the contract sets, and so can override that.
func TestJobEnvOverridesTheContract(t *testing.T) {
	cfg := fake{
		config:  `echo '{"builds_dir":"/b","cache_dir":"/c","job_env":{"TMPDIR":"/elsewhere","SYSTEM_FAILURE_EXIT_CODE":"77"}}'`,
		prepare: `echo "$TMPDIR $SYSTEM_FAILURE_EXIT_CODE $PWD" > "$OUT/seen"; echo 5 > "$PWD/build_exit_code"; exit 1`,
	}.runner(t)
	o := runJob(t, cfg, Job{})
	seen := strings.Fields(readFile(t, filepath.Join(env(cfg, "OUT"), "seen")))
	if seen[0] != "/elsewhere" || seen[1] != "77" || filepath.Dir(seen[2]) != cfg.TempDir {
		t.Errorf("prepare saw %q", seen)
	}
	if o.ExitCode != 5 {
		t.Errorf("exit code %d, want 5: the runner reads its own file", o.ExitCode)
	}
}

// After a config stage that failed, cleanup has no job_env.
func TestCleanupAfterFailedConfig(t *testing.T) {
	cfg := fake{
		config:  `echo >> "$OUT/tries"; [ $(wc -l < "$OUT/tries") = 1 ] && ` + okConfig + ` exit 2`,
		cleanup: `echo "[$FAKE_ENV] [$CUSTOM_ENV_CI_BUILDS_DIR]" >> "$OUT/seen"`,
	}.runner(t)
	runJob(t, cfg, Job{})
	if got := readFile(t, filepath.Join(env(cfg, "OUT"), "seen")); got != strings.Repeat("[] []\n", 3) {
		t.Errorf("cleanup saw %q", got)
	}
}

func TestCleanupOutputIsTheRunnersAlone(t *testing.T) {
	cfg := fake{cleanup: `echo to stdout; printf 'to stderr' >&2; echo $CUSTOM_ENV_CI_JOB_TOKEN; exit 2`}.runner(t)
	o := runJob(t, cfg, Job{})
	if !o.Green() {
		t.Errorf("status %s: cleanup changed it", o.Status)
	}
	for _, want := range []string{
		`level=debug job=1001 msg="to stdout"`, `level=warning job=1001 msg="to stderr"`, `msg="glcbt-token-of-job-1001"`,
	} {
		if !strings.Contains(string(o.RunnerLog), want+"\n") {
			t.Errorf("runner's log lacks %q:\n%s", want, o.RunnerLog)
		}
	}
	if strings.Contains(string(o.Log), "to stdout") || strings.Contains(string(o.Log), "to stderr") {
		t.Errorf("cleanup's output is in the job log:\n%s", o.Log)
	}
	wantLog(t, o, "WARNING: Cleanup script failed: exit status 2")
}

func TestJobLogMasksAcrossWrites(t *testing.T) {
	cfg := fake{prepare: `printf 'a s3c'; sleep 0.05; printf 'r3t b s3c'; sleep 0.05; printf 'ret\n'; printf 's3cr' >&2`}.runner(t)
	o := runJob(t, cfg, Job{Variables: []Variable{{Key: "SECRET", Value: "s3cr3t", Masked: true}}})
	wantLog(t, o, "a [MASKED] b s3cret\n", "s3cr")
	if strings.Contains(string(o.Log), "s3cr3t") {
		t.Errorf("the masked value is in the job log:\n%s", o.Log)
	}
	if got := string(o.Calls[1].Stdout); got != "a s3cr3t b s3cret\n" {
		t.Errorf("the call's own stdout is %q", got)
	}
}

// running is a run stage that says that it runs, and then waits for TERM.
const running = `[ $2 != build_script ] || { trap 'echo got TERM; exit $BUILD_FAILURE_EXIT_CODE' TERM
	(trap 'echo child got TERM; exit' TERM; echo ready; while :; do sleep 0.01; done) & wait; wait; }`

// when calls do once a call of this name has written "ready".
func when(t *testing.T, name string, do func()) func(*Call) {
	return func(c *Call) {
		if c.SubStage != name && c.Stage != name {
			return
		}
		go func() {
			if err := c.WaitFor(t.Context(), "ready"); err != nil {
				t.Error(err)
			}
			do()
		}()
	}
}

func TestCancel(t *testing.T) {
	cfg := fake{run: `echo "$CUSTOM_ENV_CI_JOB_STATUS" > "$OUT/$2"; ` + running}.runner(t)
	var b *Build
	started := make(chan struct{})
	cfg.OnCall = when(t, "build_script", func() { <-started; b.Cancel() })
	b, err := Start(t.Context(), cfg, Job{
		Script: []string{"true"}, AfterScript: []string{"true"}, Scripts: map[string]string{"upload_artifacts_on_failure": "#!/bin/sh\n"},
	})
	if err != nil {
		t.Fatal(err)
	}
	close(started)
	o := b.Wait()
	noFolders(t, cfg)
	if o.Status != Canceled || o.FailureReason != JobCanceled {
		t.Errorf("status %s, reason %s", o.Status, o.FailureReason)
	}
	wantRecord(t, cfg, "config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run build_script 1",
		"run after_script 1", "run upload_artifacts_on_failure 1", "run cleanup_file_variables 1", "cleanup 1")
	wantLog(t, o, "got TERM\n", "child got TERM\n", "WARNING: script canceled externally (UI, API)", "ERROR: Job failed: canceled")
	if got := readFile(t, filepath.Join(env(cfg, "OUT"), "after_script")); got != "canceled\n" {
		t.Errorf("CI_JOB_STATUS of after_script is %q", got)
	}
}

func TestAbort(t *testing.T) {
	cfg := fake{run: running}.runner(t)
	ctx, abort := context.WithCancel(t.Context())
	defer abort()
	cfg.OnCall = when(t, "build_script", abort)
	o, err := RunJob(ctx, cfg, Job{Script: []string{"true"}, AfterScript: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if o.Status != Canceled || o.FailureReason != JobCanceled {
		t.Errorf("status %s, reason %s", o.Status, o.FailureReason)
	}
	wantRecord(t, cfg, "config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run build_script 1", "cleanup 1")
	wantLog(t, o, "got TERM\n", "child got TERM\n")
}

// TERM in prepare is followed by cleanup, and there is no retry.
func TestCancelInPrepare(t *testing.T) {
	cfg := fake{prepare: `trap 'exit $SYSTEM_FAILURE_EXIT_CODE' TERM; echo ready; sleep 10 & wait`}.runner(t)
	var b *Build
	started := make(chan struct{})
	cfg.OnCall = when(t, "prepare", func() { <-started; b.Cancel() })
	b, err := Start(t.Context(), cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	close(started)
	if o := b.Wait(); o.Status != Canceled {
		t.Errorf("status %s, error %v", o.Status, o.Err)
	}
	wantRecord(t, cfg, "config 1", "prepare 1", "cleanup 1")
}

// A driver that exits 0 on TERM in prepare is taken as prepared.
func TestCancelInPrepareThatExitsZero(t *testing.T) {
	cfg := fake{prepare: `trap 'exit 0' TERM; echo ready; sleep 10 & wait`}.runner(t)
	cfg.PrepareTimeout = time.Second
	if o := runJob(t, cfg, Job{}); !o.Green() {
		t.Errorf("status %s, error %v", o.Status, o.Err)
	}
	wantRecord(t, cfg, "config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run cleanup_file_variables 1", "cleanup 1")
}

func TestTimeouts(t *testing.T) {
	script := func(cfg *Config, job *Job) {
		job.Variables = []Variable{{Key: "RUNNER_SCRIPT_TIMEOUT", Value: "1s"}}
	}
	for _, tt := range []struct {
		name   string
		set    func(*Config, *Job)
		f      fake
		reason string
		want   []string
	}{
		{"job", func(_ *Config, job *Job) { job.Timeout = 3 * time.Second }, fake{run: running}, JobExecutionTimeout,
			[]string{"config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run build_script 1", "cleanup 1"}},
		{"script", script, fake{run: running + `; [ $2 != after_script ] || [ $CUSTOM_ENV_CI_JOB_STATUS = timedout ] || echo wrong >> $RECORD`}, JobExecutionTimeout,
			[]string{"config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run build_script 1",
				"run after_script 1", "run cleanup_file_variables 1", "cleanup 1"}},
		{"prepare", func(cfg *Config, _ *Job) { cfg.PrepareTimeout, cfg.PrepareAttempts = time.Second, 2 },
			fake{prepare: `trap 'exit $SYSTEM_FAILURE_EXIT_CODE' TERM; sleep 10 & wait`}, RunnerSystemFailure,
			[]string{"config 1", "prepare 1", "cleanup 1", "config 2", "prepare 2", "cleanup 2"}},
		{"after_script", func(_ *Config, job *Job) {
			job.Variables = []Variable{{Key: "RUNNER_AFTER_SCRIPT_TIMEOUT", Value: "1s"}}
		}, fake{run: `[ $2 != after_script ] || { trap 'exit 1' TERM; sleep 10 & wait; }`}, "",
			[]string{"config 1", "prepare 1", "run prepare_script 1", "run get_sources 1", "run build_script 1",
				"run after_script 1", "run cleanup_file_variables 1", "cleanup 1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, job := tt.f.runner(t), Job{Script: []string{"true"}, AfterScript: []string{"true"}}
			tt.set(&cfg, &job)
			o := runJob(t, cfg, job)
			if o.FailureReason != tt.reason {
				t.Errorf("failure reason %q, want %q: %v", o.FailureReason, tt.reason, o.Err)
			}
			wantRecord(t, cfg, tt.want...)
		})
	}
}

func TestKillAfterGrace(t *testing.T) {
	cfg := fake{run: `[ $2 != build_script ] || { trap 'echo ignored' TERM; echo ready; while :; do sleep 0.05; done; }`}.runner(t)
	cfg.GracefulKillTimeout = 200 * time.Millisecond
	ctx, abort := context.WithCancel(t.Context())
	defer abort()
	cfg.OnCall = when(t, "build_script", abort)
	o, err := RunJob(ctx, cfg, Job{Script: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	r := o.Calls[4]
	if r.SubStage != "build_script" || r.Signal != syscall.SIGKILL || r.ExitCode != -1 {
		t.Errorf("%s ended with exit code %d, signal %v", r.Name(), r.ExitCode, r.Signal)
	}
	wantLog(t, o, "ignored\n")
}

// Cleanup starts while run still lives when run ignores TERM for too long.
func TestCleanupStartsBesideARunThatIgnoresTerm(t *testing.T) {
	cfg := fake{run: `[ $2 != build_script ] || { trap : TERM; echo ready; while [ ! -e "$OUT/cleaned" ]; do sleep 0.01; done; echo end >> "$RECORD"; }`,
		cleanup: `: > "$OUT/cleaned"; while ! grep -q end "$RECORD"; do sleep 0.01; done`}.runner(t)
	cfg.BuildFinishTimeout = 200 * time.Millisecond
	ctx, abort := context.WithCancel(t.Context())
	defer abort()
	cfg.OnCall = when(t, "build_script", abort)
	o, err := RunJob(ctx, cfg, Job{Script: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if o.Status != Canceled {
		t.Errorf("status %s", o.Status)
	}
	wantLog(t, o, "WARNING: Timed out waiting for the build to finish")
}

// A process that outlives the driver and holds its stdout keeps the stage from
// ending.
func TestOutlivingChild(t *testing.T) {
	cfg := fake{prepare: `setsid sh -c 'sleep 0.5; echo late' & echo early`}.runner(t)
	ex, err := New(cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	ex.Config(t.Context())
	r := ex.Prepare(t.Context())
	if r.Err != nil || r.ExitCode != 0 || string(r.Stdout) != "early\nlate\n" {
		t.Errorf("exit code %d, stdout %q, error %v", r.ExitCode, r.Stdout, r.Err)
	}
	held := r.Held()
	if held < 300*time.Millisecond || r.Duration() < held {
		t.Errorf("held for %v of %v, want about 500ms", held, r.Duration())
	}
	if r := ex.Cleanup(t.Context()); r.Err != nil || r.Held() >= held {
		t.Errorf("cleanup: error %v, held for %v", r.Err, r.Held())
	}
	noFolders(t, cfg)
}

// When what outlives the driver is out of the process group's reach, Runner
// gives up on the stage.
func TestGiveUp(t *testing.T) {
	cfg := fake{prepare: `setsid sleep 5 & echo ready`}.runner(t)
	cfg.GracefulKillTimeout, cfg.ForceKillTimeout, cfg.PrepareTimeout = 100*time.Millisecond, 100*time.Millisecond, time.Second
	ex, err := New(cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	ex.Config(t.Context())
	r := ex.Prepare(t.Context())
	if r.Err == nil || !strings.Contains(r.Err.Error(), fmt.Sprintf("failed to kill process PID=%d", r.Pid)) {
		t.Errorf("error %v", r.Err)
	}
	if r.Duration() > 4*time.Second || r.Exited.IsZero() {
		t.Errorf("took %v, driver's end at %v", r.Duration(), r.Exited)
	}
	ex.Cleanup(t.Context())
}

func TestSingleCalls(t *testing.T) {
	cfg := fake{run: `trap 'exit 3' USR1; echo ready; while :; do sleep 0.01; done`}.runner(t)
	ex, err := New(cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	if r := ex.Config(t.Context()); r.Err != nil || ex.Hostname() != "guest" || ex.JobEnv()["FAKE_ENV"] != "from config" {
		t.Fatalf("config: %v, hostname %q, job_env %q", r.Err, ex.Hostname(), ex.JobEnv())
	}
	c := ex.StartRun("build_script", "#!/bin/sh\n")
	if err := c.WaitFor(t.Context(), "ready"); err != nil {
		t.Fatal(err)
	}
	if err := c.SignalProcess(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	r := c.Wait(t.Context())
	if r.ExitCode != 3 || r.Signal != 0 || r.SubStage != "build_script" || r.Pid != c.Pid() || r.User+r.System <= 0 || r.MaxRSS <= 0 {
		t.Errorf("result %+v", r)
	}
	if err := c.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal after the end: %v", err)
	}
	if err := c.WaitFor(t.Context(), "never"); err == nil {
		t.Error("WaitFor found what was never written")
	}
	if r := c.Wait(t.Context()); r.ExitCode != 3 {
		t.Error("a second Wait has another result")
	}
	script := r.Args[len(r.Args)-2]
	if filepath.Base(script) != "script" || filepath.Dir(filepath.Dir(script)) != ex.Dir() {
		t.Errorf("script file is %s, private folder %s", script, ex.Dir())
	}
	if ex.Cleanup(t.Context()); len(ex.JobLog()) == 0 {
		t.Error("no job log")
	}
	next, err := ex.Next()
	if err != nil {
		t.Fatal(err)
	}
	if next.Dir() == ex.Dir() || next.JobEnv() != nil {
		t.Errorf("next attempt has folder %s and job_env %q", next.Dir(), next.JobEnv())
	}
	next.Cleanup(t.Context())
	noFolders(t, cfg)
}

func TestDriverThatCannotBeStarted(t *testing.T) {
	cfg := Config{Commands: Driver("/nonexistent/driver", "--config", "file"), TempDir: t.TempDir(), RetryInterval: time.Millisecond}
	o := runJob(t, cfg, Job{})
	if o.FailureReason != RunnerSystemFailure || !strings.Contains(o.Err.Error(), "failed to start command: ") {
		t.Errorf("reason %s, error %v", o.FailureReason, o.Err)
	}
	if n := strings.Count(string(o.Log), "Preparation failed"); n != 3 {
		t.Errorf("%d failed attempts, want 3", n)
	}
	if _, err := RunJob(t.Context(), Config{}, Job{}); err == nil {
		t.Error("a runner without run_exec has run a job")
	}
}

func TestKeepOutput(t *testing.T) {
	const size = 3 << 20
	for keep, want := range map[int64]int{0: size, 10: 10, -1: 0} {
		cfg := fake{prepare: fmt.Sprintf("head -c %d /dev/zero", size)}.runner(t)
		cfg.KeepOutput = keep
		o := runJob(t, cfg, Job{})
		r := o.Calls[1]
		if len(r.Stdout) != want || r.StdoutBytes != size {
			t.Errorf("KeepOutput %d: kept %d of %d bytes", keep, len(r.Stdout), r.StdoutBytes)
		}
	}
}
