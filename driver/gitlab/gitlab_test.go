package gitlab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// call describes a stage's environment as the runner makes it.
type call struct {
	response string
	vars     map[string]string
}

func honest() call {
	return call{
		response: `{"id": 1001, "job_info": {"project_id": 42}, "image": {"name": "debian"}, "services": [{"name": "postgres:17"}]}`,
		vars: map[string]string{
			"BUILD_FAILURE_EXIT_CODE": "31", "SYSTEM_FAILURE_EXIT_CODE": "32",
			"CUSTOM_ENV_CI_JOB_ID": "1001", "CUSTOM_ENV_CI_PROJECT_ID": "42", "CUSTOM_ENV_CI_RUNNER_ID": "7",
			"CUSTOM_ENV_CI_CONCURRENT_PROJECT_ID": "3", "CUSTOM_ENV_CI_JOB_IMAGE": "debian",
		},
	}
}

func (c call) environment(t testing.TB) *Environment {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "response.json")
	if err := os.WriteFile(path, []byte(c.response), 0o600); err != nil {
		t.Fatal(err)
	}
	environ := []string{"JOB_RESPONSE_FILE=" + path, "BUILD_EXIT_CODE_FILE=" + filepath.Join(dir, "code")}
	for name, value := range c.vars {
		environ = append(environ, name+"="+value)
	}
	e, err := ReadEnvironment(environ)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestJobIsWhoTheResponseSays(t *testing.T) {
	job, err := honest().environment(t).Job()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := job.Machine(), "runner-7-project-42-concurrent-3-job-1001"; got != want {
		t.Errorf("machine %s, want %s", got, want)
	}
	if job.Image != "debian" || len(job.Services) != 1 || job.Services[0] != "postgres:17" {
		t.Errorf("job %+v", job)
	}
}

// A variable of the job can have any predefined variable's name.
func TestForgedVariablesAreTheJobsFault(t *testing.T) {
	for name, value := range map[string]string{
		"CI_JOB_ID":                "1002",
		"CI_PROJECT_ID":            "43",
		"CI_JOB_IMAGE":             "other",
		"CI_RUNNER_ID":             "../../etc",
		"CI_CONCURRENT_PROJECT_ID": "0x3",
		// The name must not depend on how a number is written.
		"CI_CONCURRENT_PROJECT_ID#": "03",
	} {
		c := honest()
		c.vars["CUSTOM_ENV_"+strings.TrimSuffix(name, "#")] = value
		_, err := c.environment(t).Job()
		var build *BuildError
		if !errors.As(err, &build) || !strings.Contains(err.Error(), strings.TrimSuffix(name, "#")) {
			t.Errorf("%s=%s: error %v, want the job's, naming the variable", name, value, err)
		}
	}
}

func TestImageWithVariablesIsTheExpandedOne(t *testing.T) {
	c := honest()
	c.response = strings.Replace(c.response, `"debian"`, `"$DISTRO"`, 1)
	job, err := c.environment(t).Job()
	if err != nil || job.Image != "debian" {
		t.Errorf("image %q, %v", job.Image, err)
	}
}

func TestJobWithoutRunnerOrImage(t *testing.T) {
	c := honest()
	c.response = `{"id": 5, "job_info": {"project_id": 0}}`
	c.vars = map[string]string{"BUILD_FAILURE_EXIT_CODE": "1", "SYSTEM_FAILURE_EXIT_CODE": "2"}
	job, err := c.environment(t).Job()
	if err != nil || job.Machine() != "runner-0-project-0-concurrent-0-job-5" || job.Image != "" {
		t.Errorf("job %+v, %v", job, err)
	}
}

func TestUnusableResponsesAreTheHostsFault(t *testing.T) {
	for _, response := range []string{``, `{`, `{}`, `{"id": 1}`, `{"id": "1", "job_info": {"project_id": 2}}`,
		`{"id": -1, "job_info": {"project_id": 2}}`, `{"id": 1.5, "job_info": {"project_id": 2}}`} {
		c := honest()
		c.response = response
		_, err := c.environment(t).Job()
		var build *BuildError
		if err == nil || errors.As(err, &build) || !strings.Contains(err.Error(), "response") {
			t.Errorf("%s: error %v", response, err)
		}
	}
	e := honest().environment(t)
	e.JobResponseFile = ""
	if _, err := e.Job(); err == nil || !strings.Contains(err.Error(), "JOB_RESPONSE_FILE") {
		t.Errorf("no response file: %v", err)
	}
}

func TestReadEnvironmentNamesWhatIsMissing(t *testing.T) {
	for want, environ := range map[string][]string{
		"BUILD_FAILURE_EXIT_CODE is not set":     {"SYSTEM_FAILURE_EXIT_CODE=2"},
		"SYSTEM_FAILURE_EXIT_CODE is not set":    {"BUILD_FAILURE_EXIT_CODE=1"},
		`BUILD_FAILURE_EXIT_CODE is "0"`:         {"BUILD_FAILURE_EXIT_CODE=0", "SYSTEM_FAILURE_EXIT_CODE=2"},
		`SYSTEM_FAILURE_EXIT_CODE is "soon"`:     {"BUILD_FAILURE_EXIT_CODE=1", "SYSTEM_FAILURE_EXIT_CODE=soon"},
		`SYSTEM_FAILURE_EXIT_CODE is "256", not`: {"BUILD_FAILURE_EXIT_CODE=1", "SYSTEM_FAILURE_EXIT_CODE=256"},
	} {
		if _, err := ReadEnvironment(environ); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", environ, err, want)
		}
	}
}

func TestExit(t *testing.T) {
	script := &BuildError{Err: errors.New("exit status 255"), ExitCode: 255}
	for _, test := range []struct {
		name string
		err  error
		code int
		file string
	}{
		{"success", nil, 0, ""},
		{"script failed", script, 31, "255"},
		{"wrapped", fmt.Errorf("run: %w", script), 31, "255"},
		{"job's fault without a script", &BuildError{Err: errors.New("no such image")}, 31, ""},
		{"anything else", errors.New("libvirtd is away"), 32, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			e := honest().environment(t)
			// What an earlier sub-stage left would count for this one.
			if err := os.WriteFile(e.ExitCodeFile, []byte("99"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := e.ClearExitCode(); err != nil {
				t.Fatal(err)
			}
			code, err := e.Exit(test.err)
			if code != test.code || err != nil {
				t.Errorf("exit %d, %v, want %d", code, err, test.code)
			}
			text, _ := os.ReadFile(e.ExitCodeFile)
			if string(text) != test.file {
				t.Errorf("exit code file %q, want %q", text, test.file)
			}
		})
	}
}

// Exiting with BUILD_FAILURE and no exit code would tell the runner another one.
func TestExitCodeThatCannotBeWrittenIsASystemFailure(t *testing.T) {
	e := honest().environment(t)
	e.ExitCodeFile = filepath.Join(t.TempDir(), "missing", "code")
	code, err := e.Exit(&BuildError{Err: errors.New("exit status 3"), ExitCode: 3})
	if code != 32 || err == nil || !strings.Contains(err.Error(), "exit code 3") {
		t.Errorf("exit %d, %v", code, err)
	}
}

func TestConfigIsOneJSONObject(t *testing.T) {
	var out bytes.Buffer
	err := Config{Driver: Driver{"libvirt-driver", "1.2.3"}, Hostname: "h", BuildsDir: "/b", CacheDir: "/c", Shell: "bash",
		JobEnv: map[string]string{"NAME": "<value>"}}.Write(&out)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	want := `map[builds_dir:/b builds_dir_is_shared:false cache_dir:/c driver:map[name:libvirt-driver version:1.2.3] hostname:h job_env:map[NAME:<value>] shell:bash]`
	if fmt.Sprint(got) != want {
		t.Errorf("got  %v\nwant %s", got, want)
	}
}

func TestLogLines(t *testing.T) {
	var out bytes.Buffer
	log := NewLog(&out, true)
	log.Title("Machine %s", "m")
	log.Step("disk", 1234*time.Millisecond, "%s on %s", "8 GiB", "base")
	log.Note("careful")
	log.Error(errors.New("no"))
	log.Section("console", "Console", []string{"a", "b"})
	want := "Machine m\n" +
		"  disk     8 GiB on base                                                          1.23 s\n" +
		"note: careful\nlibvirt-driver: no\nConsole\na\nb\n"
	if out.String() != want {
		t.Errorf("got\n%q\nwant\n%q", out.String(), want)
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 100 {
			t.Errorf("wider than 100 columns: %q", line)
		}
	}
	out.Reset()
	NewLog(&out, false).Section("console", "Console", []string{"a"})
	if s := out.String(); !strings.Contains(s, "section_start:") || !strings.Contains(s, ":console\r\x1b[0K") || !strings.Contains(s, "section_end:") {
		t.Errorf("no section markers in %q", s)
	}
}
