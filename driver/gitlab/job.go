package gitlab

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
)

// Job is the job that a stage serves.
type Job struct {
	// ID and Project are from the job response file, which GitLab wrote and
	// the job cannot change.
	ID, Project int64
	// Runner is the runner's id and Concurrent the slot of the project that
	// the job runs in. Both come from the environment; 0 where it has none,
	// as for the job that a runner makes up to check itself at start-up.
	Runner, Concurrent int64
	// Image is the job's image: with its variables expanded; empty for a job
	// without one.
	Image string
	// Services names the images of the services that the job asks for.
	Services []string
	// URL leads to the job's page, for people. It proves nothing. It is empty,
	// or printable ASCII that begins with http:// or https://.
	URL string
}

// Machine returns the name of the job's machine:
// runner-R-project-P-concurrent-C-job-J, of digits, lower-case letters and
// hyphens alone.
func (j Job) Machine() string {
	return fmt.Sprintf("runner-%d-project-%d-concurrent-%d-job-%d", j.Runner, j.Project, j.Concurrent, j.ID)
}

// page returns a page's URL, or nothing when text is not one. A job chooses it.
func page(text string) string {
	const longest = 2000
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || len(text) > longest ||
		strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return ""
	}
	return text
}

// response is what the driver reads of a job response.
type response struct {
	ID      *int64 `json:"id"`
	JobInfo struct {
		ProjectID *int64 `json:"project_id"`
	} `json:"job_info"`
	Image struct {
		Name string `json:"name"`
	} `json:"image"`
	Services []struct {
		Name string `json:"name"`
	} `json:"services"`
}

// maxResponse bounds a job response in bytes. GitLab's own limit on a
// pipeline's configuration is far below it.
const maxResponse = 64 << 20

// Job reads who the job is. The job response file decides; where the job's
// variables say otherwise the error is a BuildError, since only the job itself
// can have forged them.
func (e *Environment) Job() (Job, error) {
	doc, err := e.response()
	if err != nil {
		return Job{}, err
	}
	job, err := e.identity(doc)
	if err != nil {
		return Job{}, err
	}
	job.URL = page(e.JobVariable("CI_JOB_URL"))
	for _, service := range doc.Services {
		job.Services = append(job.Services, service.Name)
	}
	for _, claim := range []struct {
		variable string
		truth    int64
	}{{"CI_JOB_ID", job.ID}, {"CI_PROJECT_ID", job.Project}} {
		said := e.JobVariable(claim.variable)
		if said != "" && said != strconv.FormatInt(claim.truth, 10) {
			return Job{}, &BuildError{Err: fmt.Errorf(
				"the job's variables say %s=%q, but GitLab says %d: remove %s from the job's variables",
				claim.variable, clip(said), claim.truth, claim.variable)}
		}
	}
	if job.Image, err = e.image(doc.Image.Name); err != nil {
		return Job{}, err
	}
	return job, nil
}

// Identity reads what the job's machine is named by, ID, Project, Runner and
// Concurrent, whatever else the job's variables claim. The error is a
// BuildError when they make no name.
func (e *Environment) Identity() (Job, error) {
	doc, err := e.response()
	if err != nil {
		return Job{}, err
	}
	return e.identity(doc)
}

func (e *Environment) identity(doc response) (Job, error) {
	job := Job{ID: *doc.ID, Project: *doc.JobInfo.ProjectID}
	if job.ID < 0 || job.Project < 0 {
		return Job{}, fmt.Errorf("job response file %s: id %d, project %d: not positive numbers",
			e.JobResponseFile, job.ID, job.Project)
	}
	var err error
	if job.Runner, err = e.number("CI_RUNNER_ID"); err != nil {
		return Job{}, err
	}
	if job.Concurrent, err = e.number("CI_CONCURRENT_PROJECT_ID"); err != nil {
		return Job{}, err
	}
	return job, nil
}

func (e *Environment) response() (response, error) {
	var doc response
	if e.JobResponseFile == "" {
		return doc, fmt.Errorf("JOB_RESPONSE_FILE is not set: it takes GitLab Runner 14.1 or newer to say which job this is")
	}
	info, err := os.Stat(e.JobResponseFile)
	if err != nil {
		return doc, fmt.Errorf("read job response file: %w", err)
	}
	if info.Size() > maxResponse {
		return doc, fmt.Errorf("job response file %s has %d bytes; at most %d are read", e.JobResponseFile, info.Size(), maxResponse)
	}
	text, err := os.ReadFile(e.JobResponseFile)
	if err != nil {
		return doc, fmt.Errorf("read job response file: %w", err)
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		return doc, fmt.Errorf("job response file %s: %w", e.JobResponseFile, err)
	}
	if doc.ID == nil || doc.JobInfo.ProjectID == nil {
		return doc, fmt.Errorf("job response file %s lacks id or job_info.project_id", e.JobResponseFile)
	}
	return doc, nil
}

// number reads a variable that is part of the machine's name.
func (e *Environment) number(variable string) (int64, error) {
	text := e.JobVariable(variable)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != text {
		return 0, &BuildError{Err: fmt.Errorf(
			"the job's variables say %s=%q, which is not a number: remove %s from the job's variables",
			variable, clip(text), variable)}
	}
	return n, nil
}

// image returns the job's image. GitLab's word may hold variables; the runner
// expands them only in CI_JOB_IMAGE, which a job may forge, but then only into
// what it could have written in image: as well.
func (e *Environment) image(told string) (string, error) {
	expanded := e.JobVariable("CI_JOB_IMAGE")
	switch {
	case strings.Contains(told, "$"):
		return expanded, nil
	case expanded != "" && expanded != told:
		return "", &BuildError{Err: fmt.Errorf(
			"the job's variables say CI_JOB_IMAGE=%q, but GitLab says %q: choose the image with image: in .gitlab-ci.yml",
			clip(expanded), clip(told))}
	}
	return told, nil
}
