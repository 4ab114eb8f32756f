package gitlab

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// checkMessage checks that a message is one line of text that is not long.
func checkMessage(t *testing.T, err error) {
	t.Helper()
	if text := err.Error(); len(text) > 1000 || strings.ContainsFunc(text, unicode.IsControl) {
		t.Errorf("error is not one short line: %q", text)
	}
}

// Environment variables, as the runner makes them of a job's: whatever there is,
// the exit codes are the runner's, and nothing that a job sets is trusted.
func FuzzEnvironment(f *testing.F) {
	f.Fuzz(func(t *testing.T, text, name string) {
		environ := strings.Split(text, "\x00")
		e, err := ReadEnvironment(environ)
		if err != nil {
			checkMessage(t, err)
			if !strings.Contains(err.Error(), "_FAILURE_EXIT_CODE") {
				t.Errorf("error %v does not name the variable", err)
			}
			return
		}
		for variable, code := range map[string]int{"BUILD_FAILURE_EXIT_CODE": e.BuildFailure, "SYSTEM_FAILURE_EXIT_CODE": e.SystemFailure} {
			if code < 1 || code > 255 || !strings.Contains(text, variable+"=") {
				t.Errorf("%s is %d", variable, code)
			}
		}
		for _, err := range []error{nil, errors.New("host"), &BuildError{Err: errors.New("job")}} {
			want := map[bool]int{true: 0, false: e.SystemFailure}[err == nil]
			if errors.As(err, new(*BuildError)) {
				want = e.BuildFailure
			}
			if code, unsaid := e.Exit(err); code != want || unsaid != nil {
				t.Errorf("%v exits with %d, %v; want %d", err, code, unsaid, want)
			}
		}
		// What config passed on is never what a job set.
		if passed := e.Passed(name); passed != "" && !strings.HasPrefix(name, "CUSTOM_ENV_") {
			if !slices.Contains(environ, name+"="+passed) {
				t.Errorf("%s=%s is passed on from nowhere", name, passed)
			}
		}
		if said := e.JobVariable(name); said != "" && !slices.Contains(environ, "CUSTOM_ENV_"+name+"="+said) {
			t.Errorf("the job says %s=%s nowhere", name, said)
		}
	})
}

// Whatever a job's description and variables hold, the machine's name is made of
// what GitLab said, and a lie is the job's fault.
func FuzzJob(f *testing.F) {
	f.Add(honest().response, "1001", "42", "7", "3", "debian", "https://gitlab.example/-/jobs/1001")

	path := filepath.Join(f.TempDir(), "response.json")
	f.Fuzz(func(t *testing.T, response, id, project, runner, concurrent, image, page string) {
		if err := os.WriteFile(path, []byte(response), 0o600); err != nil {
			t.Fatal(err)
		}
		e := &Environment{JobResponseFile: path, vars: map[string]string{
			"CUSTOM_ENV_CI_JOB_ID": id, "CUSTOM_ENV_CI_PROJECT_ID": project, "CUSTOM_ENV_CI_RUNNER_ID": runner,
			"CUSTOM_ENV_CI_CONCURRENT_PROJECT_ID": concurrent, "CUSTOM_ENV_CI_JOB_IMAGE": image, "CUSTOM_ENV_CI_JOB_URL": page,
		}}
		identity, unnamed := e.Identity()
		job, err := e.Job()
		switch {
		case err == nil && (unnamed != nil || identity.Machine() != job.Machine()):
			t.Fatalf("job %+v is known by %+v, %v", job, identity, unnamed)
		case errors.As(err, new(*BuildError)):
			checkMessage(t, err)
			if !strings.Contains(err.Error(), "the job's variables say CI_") {
				t.Errorf("the job is blamed: %v", err)
			}
		case err != nil && !strings.Contains(err.Error(), path):
			t.Errorf("error %v does not name the file", err)
		}
		if unnamed == nil && strings.Trim(identity.Machine(), "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			t.Errorf("machine name %q", identity.Machine())
		}
		if err != nil {
			return
		}
		for said, truth := range map[string]int64{id: job.ID, project: job.Project} {
			if said != "" && said != fmt.Sprint(truth) && id != project {
				t.Errorf("%d although the job's variables say %q", truth, said)
			}
		}
		if want := fmt.Sprintf("runner-%s-project-%d-concurrent-%s-job-%d", zero(runner), job.Project, zero(concurrent), job.ID); job.Machine() != want {
			t.Errorf("machine %s, want %s", job.Machine(), want)
		}
		if u, err := url.Parse(job.URL); job.URL != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || job.URL != page) ||
			strings.ContainsFunc(job.URL, func(r rune) bool { return r < '!' || r > '~' }) {
			t.Errorf("URL %q", job.URL)
		}
	})
}

func zero(text string) string {
	if text == "" {
		return "0"
	}
	return text
}

// marks are a section's, as GitLab looks for them.
var marks = regexp.MustCompile(`section_(?:start|end):\d+:[a-zA-Z0-9_.-]+(?:\[.*\])?\r\x1b\[0K`)

// What others have said is text in the job log: every control sequence in it is
// the log's own.
func FuzzLog(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		for _, plain := range []bool{true, false} {
			var out strings.Builder
			log := NewLog(&out, plain)
			log.Title("%s", text)
			log.Step(text, time.Second, "%s", text)
			log.Note("%s", text)
			log.Error(errors.New(text))
			log.Section("console", text, []string{text, text})
			written := out.String()
			if got, want := len(marks.FindAllString(written, -1)), map[bool]int{true: 0, false: 2}[plain]; got != want {
				t.Errorf("%d marks of sections, want %d, in %q", got, want, written)
			}
			written = marks.ReplaceAllString(written, "")
			for _, own := range []string{"\x1b[0K", bold, cyan, yellow, red, reset} {
				if !plain {
					written = strings.ReplaceAll(written, own, "")
				}
			}
			if strings.ContainsFunc(strings.ReplaceAll(written, "\n", ""), unicode.IsControl) || !utf8.ValidString(written) {
				t.Errorf("more than text: %q", written)
			}
		}
		once := Harmless(text)
		if again := Harmless(once); again != once {
			t.Errorf("%q is not the last word: %q", once, again)
		}
		if clean := !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }); clean && once != text {
			t.Errorf("%q is changed to %q", text, once)
		}
	})
}
