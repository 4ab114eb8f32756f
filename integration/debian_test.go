//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"libvirt-driver/integration/runner"
)

// shared is one machine that many tests run scripts in. It is made when the first of them needs it.
type shared struct {
	make     sync.Once
	dir      string
	settings settings
	job      runner.Job
	first    *runner.Executor
	err      error
}

// debian is the Debian guest, prepared with the settings that hold when there is no file.
var debian shared

func (s *shared) prepare(t *testing.T) error {
	dir, err := os.MkdirTemp("", "debian")
	if err != nil {
		return err
	}
	s.dir, s.settings = dir, settings(filepath.Join(dir, "config.toml"))
	s.settings.write(t, emulated)
	s.job = newJob(runner.Job{})
	cfg := s.settings.runner(t)
	cfg.TempDir = dir
	if s.first, err = runner.New(cfg, s.job); err != nil {
		return err
	}
	for _, call := range []func(context.Context) *runner.Result{s.first.Config, s.first.Prepare} {
		if r := call(context.Background()); r.Err != nil {
			return fmt.Errorf("%s: %w: %s", r.Name(), r.Err, r.Stderr)
		}
	}
	return nil
}

// executor returns an executor for calls in the shared machine, with a folder of its own. with may change the
// runner's configuration; its job is the machine's.
func (s *shared) executor(t *testing.T, with func(*runner.Config)) *runner.Executor {
	t.Helper()
	s.make.Do(func() { s.err = s.prepare(t) })
	if s.err != nil {
		t.Fatalf("the shared guest cannot be had: %v", s.err)
	}
	cfg := s.settings.runner(t)
	if with != nil {
		with(&cfg)
	}
	ex, err := runner.New(cfg, s.job)
	if err != nil {
		t.Fatal(err)
	}
	want(t, ex, ex.Config(t.Context()), 0)
	return ex
}

// remove cleans the machine up.
func (s *shared) remove() error {
	if s.dir == "" {
		return nil
	}
	var err error
	if s.first != nil {
		if r := s.first.Cleanup(context.Background()); r.Err != nil {
			err = fmt.Errorf("%w: %s", r.Err, r.Stderr)
		}
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}
