package gitlab

import (
	"encoding/json"
	"io"
)

// Config is the config stage's answer, as
// https://docs.gitlab.com/runner/executors/custom/#config describes it.
type Config struct {
	Driver    Driver `json:"driver"`
	Hostname  string `json:"hostname"`
	BuildsDir string `json:"builds_dir"`
	CacheDir  string `json:"cache_dir"`
	// BuildsDirIsShared is always false: a machine serves one job.
	BuildsDirIsShared bool   `json:"builds_dir_is_shared"`
	Shell             string `json:"shell"`
	// JobEnv is passed to every later stage of the same attempt.
	JobEnv map[string]string `json:"job_env"`
}

// Driver names the driver in the job log.
type Driver struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Write writes the answer to the stage's standard output.
func (c Config) Write(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(c)
}
