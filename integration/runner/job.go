package runner

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
)

// The GitLab that the made up jobs come from. Nothing connects to it: the jobs'
// GIT_STRATEGY is none.
const (
	serverURL   = "https://gitlab.example.com"
	serverHost  = "gitlab.example.com"
	projectPath = "group/project"
	shortToken  = "itest"
)

// Job is a CI job as GitLab hands it to a runner. The zero value of every field
// is usable: a job without a script only goes through the runner's own
// sub-stages.
type Job struct {
	// ID and ProjectID are the job's identity, in the JSON and in the predefined
	// variables; 0 means 1001 and 42.
	ID, ProjectID int64
	// Name and Stage are those of .gitlab-ci.yml; "" means "job" and "test".
	Name, Stage string
	// Image is image:.
	Image string
	// Services are services:.
	Services []Service
	// Variables follow the predefined ones and override them, in CUSTOM_ENV_ and
	// in the scripts, as they do in GitLab.
	Variables []Variable
	// Script is before_script: and script:; the build_script sub-stage.
	Script []string
	// Steps follow it, each as the sub-stage step_NAME.
	Steps []Step
	// AfterScript is after_script:.
	AfterScript []string
	// Cache is cache:paths:, for the sub-stages restore_cache and archive_cache.
	// Artifacts is artifacts:paths:, for upload_artifacts_on_success. Dependencies
	// are earlier jobs with artifacts, for download_artifacts. All their scripts
	// call gitlab-runner in the guest, and only say so where it is missing.
	Cache, Artifacts, Dependencies []string
	// Scripts replaces whole generated scripts by the names of their sub-stages,
	// step_script for build_script; "" leaves the sub-stage out.
	Scripts map[string]string
	// Timeout is the job's own; 0 means 1 h.
	Timeout time.Duration

	// RunnerID is CI_RUNNER_ID; 0 means 1.
	RunnerID int64
	// ConcurrentID and ConcurrentProjectID are the runner's slot for the job, and
	// its slot among this project's.
	ConcurrentID, ConcurrentProjectID int
}

// Step is a named list of commands.
type Step struct {
	Name   string
	Script []string
}

// Service is one of services:.
type Service struct {
	Name       string     `json:"name"`
	Alias      string     `json:"alias"`
	Entrypoint []string   `json:"entrypoint"`
	Command    []string   `json:"command"`
	Variables  []Variable `json:"variables,omitempty"`
}

// Variable is a job variable. Raw ones are not expanded; masked ones are hidden
// in the job log; file ones reach the job as a file's name.
type Variable struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Public bool   `json:"public"`
	File   bool   `json:"file"`
	Masked bool   `json:"masked"`
	Raw    bool   `json:"raw"`
}

func (j Job) withDefaults() Job {
	if j.ID == 0 {
		j.ID = 1001
	}
	if j.ProjectID == 0 {
		j.ProjectID = 42
	}
	if j.Name == "" {
		j.Name = "job"
	}
	if j.Stage == "" {
		j.Stage = "test"
	}
	if j.Timeout == 0 {
		j.Timeout = time.Hour
	}
	if j.RunnerID == 0 {
		j.RunnerID = 1
	}
	return j
}

func (j Job) token() string { return fmt.Sprintf("glcbt-token-of-job-%d", j.ID) }

// steps are the job's steps without after_script.
func (j Job) steps() []Step {
	var steps []Step
	if len(j.Script) > 0 || j.Scripts["step_script"] != "" {
		steps = append(steps, Step{Name: "script", Script: j.Script})
	}
	return append(steps, j.Steps...)
}

// predefined are the variables that GitLab sends with the job, its own last.
func (j Job) predefined() variables {
	public := func(key, value string) Variable { return Variable{Key: key, Value: value, Public: true} }
	timeout := strconv.Itoa(int(j.Timeout.Seconds()))
	sha := strings.Repeat("0", 40)
	vars := variables{
		public("CI", "true"),
		public("GITLAB_CI", "true"),
		public("CI_SERVER", "yes"),
		public("CI_SERVER_URL", serverURL),
		public("CI_SERVER_HOST", serverHost),
		public("CI_API_V4_URL", serverURL+"/api/v4"),
		public("CI_JOB_ID", strconv.FormatInt(j.ID, 10)),
		public("CI_JOB_NAME", j.Name),
		public("CI_JOB_STAGE", j.Stage),
		public("CI_JOB_TIMEOUT", timeout),
		public("CI_JOB_URL", fmt.Sprintf("%s/%s/-/jobs/%d", serverURL, projectPath, j.ID)),
		public("CI_PIPELINE_ID", "500"),
		public("CI_PROJECT_ID", strconv.FormatInt(j.ProjectID, 10)),
		public("CI_PROJECT_NAME", path.Base(projectPath)),
		public("CI_PROJECT_NAMESPACE", path.Dir(projectPath)),
		public("CI_PROJECT_PATH", projectPath),
		public("CI_PROJECT_PATH_SLUG", strings.ReplaceAll(projectPath, "/", "-")),
		public("CI_PROJECT_URL", serverURL+"/"+projectPath),
		public("CI_COMMIT_SHA", sha),
		public("CI_COMMIT_SHORT_SHA", sha[:8]),
		public("CI_COMMIT_REF_NAME", "main"),
		public("CI_COMMIT_REF_SLUG", "main"),
		public("CI_COMMIT_BRANCH", "main"),
		public("CI_REPOSITORY_URL", serverURL+"/"+projectPath+".git"),
		public("CI_RUNNER_ID", strconv.FormatInt(j.RunnerID, 10)),
		public("CI_RUNNER_TAGS", `["vm"]`),
		{Key: "CI_JOB_TOKEN", Value: j.token(), Masked: true},
		public("GIT_STRATEGY", "none"),
	}
	return append(vars, j.Variables...)
}

// masked are the texts that the job log hides.
func (j Job) masked() []string {
	var phrases []string
	for _, v := range j.predefined() {
		if v.Masked && v.Value != "" {
			phrases = append(phrases, v.Value)
		}
	}
	return phrases
}

// Response is the job response that Runner writes to $JOB_RESPONSE_FILE.
func (j Job) Response() ([]byte, error) {
	j = j.withDefaults()
	type object = map[string]any
	step := func(name, when string, allowFailure bool, script []string) object {
		return object{
			"name": name, "script": script, "timeout": int(j.Timeout.Seconds()),
			"when": when, "allow_failure": allowFailure,
		}
	}
	steps := []object{}
	for _, s := range j.steps() {
		steps = append(steps, step(s.Name, "on_success", false, s.Script))
	}
	if len(j.AfterScript) > 0 {
		steps = append(steps, step("after_script", "always", true, j.AfterScript))
	}
	services := j.Services
	if services == nil {
		services = []Service{}
	}
	var cache, artifacts []object
	if len(j.Cache) > 0 {
		cache = []object{{"key": "default", "untracked": false, "policy": "pull-push", "paths": j.Cache, "when": "on_success"}}
	}
	if len(j.Artifacts) > 0 {
		artifacts = []object{{
			"name": "artifacts", "untracked": false, "paths": j.Artifacts, "exclude": nil, "when": "on_success",
			"artifact_type": "archive", "artifact_format": "zip", "expire_in": "1 day",
		}}
	}
	dependencies := []object{}
	for i, name := range j.Dependencies {
		dependencies = append(dependencies, object{
			"id": j.ID - int64(i) - 1, "name": name, "token": j.token(),
			"artifacts_file": object{"filename": "artifacts.zip", "size": 100},
		})
	}
	sha := strings.Repeat("0", 40)
	var b bytes.Buffer
	err := json.NewEncoder(&b).Encode(object{
		"id":              j.ID,
		"token":           j.token(),
		"allow_git_fetch": true,
		"job_info": object{
			"name": j.Name, "stage": j.Stage, "pipeline_id": 500,
			"project_id": j.ProjectID, "project_name": path.Base(projectPath), "project_full_path": projectPath,
			"namespace_id": 0, "root_namespace_id": 0, "organization_id": 0,
			"instance_id": "", "instance_uuid": "", "user_id": 0,
			"time_in_queue_seconds":                          1.5,
			"project_jobs_running_on_instance_runners_count": "0",
			"queue_size": 0, "queue_depth": 0,
		},
		"git_info": object{
			"repo_url": serverURL + "/" + projectPath + ".git", "repo_object_format": "sha1",
			"ref": "main", "sha": sha, "before_sha": sha, "ref_type": "branch",
			"refspecs": []string{"+refs/heads/main:refs/remotes/origin/main"},
			"depth":    0, "protected": nil,
		},
		"runner_info": object{"uuid": "", "timeout": int(j.Timeout.Seconds())},
		"inputs":      object{},
		"variables":   j.predefined(),
		"steps":       steps,
		"image": object{
			"name": j.Image,
			"executor_opts": object{
				"docker":     object{"platform": "", "user": ""},
				"kubernetes": object{"user": ""},
			},
		},
		"services":     services,
		"artifacts":    artifacts,
		"cache":        cache,
		"credentials":  []any{},
		"dependencies": dependencies,
		"features": object{
			"trace_sections":      true,
			"token_mask_prefixes": []string{"glpat-"},
			"failure_reasons": []string{
				"unknown_failure", ScriptFailure, "api_failure", "stuck_or_timeout_failure", RunnerSystemFailure,
				"missing_dependency_failure", "runner_unsupported", JobExecutionTimeout, "image_pull_failure",
			},
			"tracing": nil,
		},
		"policy_options":  object{"execution_policy_job": false, "policy_name": ""},
		"suspend_options": object{},
	})
	if err != nil {
		return nil, fmt.Errorf("encode job response: %w", err)
	}
	return b.Bytes(), nil
}

// variables are in their order of precedence: the last of a name wins.
type variables []Variable

func (vs variables) lookup(key string) (Variable, bool) {
	for i := len(vs) - 1; i >= 0; i-- {
		if vs[i].Key == key {
			return vs[i], true
		}
	}
	return Variable{}, false
}

func (vs variables) get(key string) string {
	v, _ := vs.lookup(key)
	return v.Value
}

// expand replaces $NAME and ${NAME}, once: the values put in are not expanded
// again. A file variable stands for its file's name. $$ is a dollar sign.
func (vs variables) expand(tmpDir string) variables {
	value := func(key string) string {
		if key == "$" {
			return key
		}
		v, _ := vs.lookup(key)
		if v.File {
			return tmpDir + "/" + v.Key
		}
		return v.Value
	}
	expanded := make(variables, 0, len(vs))
	for _, v := range vs {
		if !v.Raw {
			v.Value = os.Expand(v.Value, value)
		}
		expanded = append(expanded, v)
	}
	return expanded
}

// variables are all of the job's variables at this moment, in Runner's order.
func (b *Build) variables() variables {
	b.mu.Lock()
	status := b.status
	b.mu.Unlock()

	public := func(key, value string) Variable { return Variable{Key: key, Value: value, Public: true} }
	job := b.job.predefined()
	var vs variables
	flags := make(map[string]bool, len(featureFlags))
	for _, flag := range featureFlags {
		name, value, _ := strings.Cut(flag, "=")
		flags[name] = true
		if on, err := strconv.ParseBool(job.get(name)); err == nil {
			value = strconv.FormatBool(on)
		}
		vs = append(vs, public(name, value))
	}
	if b.job.Image != "" {
		vs = append(vs, public("CI_JOB_IMAGE", b.job.Image))
	}
	vs = append(vs,
		public("CI_RUNNER_SHORT_TOKEN", shortToken),
		public("CI_BUILDS_DIR", b.builds),
		public("CI_PROJECT_DIR", b.project),
		public("CI_CONCURRENT_ID", strconv.Itoa(b.job.ConcurrentID)),
		public("CI_CONCURRENT_PROJECT_ID", strconv.Itoa(b.job.ConcurrentProjectID)),
		public("CI_SERVER", "yes"),
		public("CI_JOB_STATUS", status),
		public("CI_JOB_TIMEOUT", strconv.Itoa(int(b.job.Timeout.Seconds()))),
	)
	for _, v := range job {
		if flags[v.Key] {
			continue
		}
		if v.Key == "CI_JOB_STATUS" && status != "running" {
			v.Value = status // Runner overwrites the job's own too
		}
		vs = append(vs, v)
	}
	vs = append(vs,
		public("CI_SHARED_ENVIRONMENT", "true"),
		public("CI_RUNNER_VERSION", Version),
		public("CI_RUNNER_REVISION", "00000000"),
		public("CI_RUNNER_EXECUTABLE_ARCH", "linux/amd64"),
		public("RUNNER_TEMP_PROJECT_DIR", b.tmpDir()),
	)
	return vs.expand(b.tmpDir())
}

// tmpDir is the guest's folder for file variables and the like.
func (b *Build) tmpDir() string { return b.project + ".tmp" }

// featureFlags are Runner's with their defaults, which it exports to every job.
var featureFlags = strings.Fields(`
	FF_TEST_FEATURE=false FF_NETWORK_PER_BUILD=false FF_USE_LEGACY_KUBERNETES_EXECUTION_STRATEGY=false
	FF_USE_DIRECT_DOWNLOAD=true FF_USE_FASTZIP=true FF_DISABLE_UMASK_FOR_DOCKER_EXECUTOR=false
	FF_ENABLE_BASH_EXIT_CODE_CHECK=false FF_USE_WINDOWS_LEGACY_PROCESS_STRATEGY=false FF_USE_LEGACY_BASH_EVAL=false
	FF_USE_POWERSHELL_PATH_RESOLVER=false FF_USE_DYNAMIC_TRACE_FORCE_SEND_INTERVAL=false FF_SCRIPT_SECTIONS=false
	FF_ENABLE_JOB_CLEANUP=false FF_KUBERNETES_HONOR_ENTRYPOINT=false FF_POSIXLY_CORRECT_ESCAPES=false
	FF_RESOLVE_FULL_TLS_CHAIN=false FF_DISABLE_POWERSHELL_STDIN=false FF_USE_POD_ACTIVE_DEADLINE_SECONDS=true
	FF_USE_ADVANCED_POD_SPEC_CONFIGURATION=false FF_SECRET_RESOLVING_FAILS_IF_MISSING=true FF_PRINT_POD_EVENTS=false
	FF_USE_GIT_BUNDLE_URIS=true FF_USE_GIT_NATIVE_CLONE=false FF_USE_DUMB_INIT_WITH_KUBERNETES_EXECUTOR=false
	FF_USE_INIT_WITH_DOCKER_EXECUTOR=false FF_LOG_IMAGES_CONFIGURED_FOR_JOB=false
	FF_USE_DOCKER_AUTOSCALER_DIAL_STDIO=true FF_CLEAN_UP_FAILED_CACHE_EXTRACT=false FF_USE_WINDOWS_JOB_OBJECT=false
	FF_TIMESTAMPS=true FF_DISABLE_AUTOMATIC_TOKEN_ROTATION=false FF_USE_LEGACY_GCS_CACHE_ADAPTER=false
	FF_DISABLE_UMASK_FOR_KUBERNETES_EXECUTOR=false FF_USE_LEGACY_S3_CACHE_ADAPTER=false
	FF_GIT_URLS_WITHOUT_TOKENS=false FF_WAIT_FOR_POD_TO_BE_REACHABLE=false FF_MASK_ALL_DEFAULT_TOKENS=true
	FF_EXPORT_HIGH_CARDINALITY_METRICS=false FF_USE_FLEETING_ACQUIRE_HEARTBEATS=false
	FF_USE_EXPONENTIAL_BACKOFF_STAGE_RETRY=true FF_USE_ADAPTIVE_REQUEST_CONCURRENCY=true
	FF_USE_GITALY_CORRELATION_ID=true FF_USE_GIT_PROACTIVE_AUTH=false FF_HASH_CACHE_KEYS=false
	FF_ENABLE_JOB_INPUTS_INTERPOLATION=true FF_USE_JOB_ROUTER=false FF_SCRIPT_TO_STEP_MIGRATION=false
	FF_USE_PARALLEL_CACHE_TRANSFER=false FF_USE_PARALLEL_ARTIFACT_TRANSFER=false FF_CONCRETE=false
	FF_SUSPENDABLE_ENVIRONMENTS=false FF_USE_NATIVE_CONTAINER_STOP=false
`)
