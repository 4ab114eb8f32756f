// Package driver is the four stages of GitLab Runner's Custom executor, each in
// the file of its name and told as a story: config, prepare, run, cleanup.
//
// Prepare's machine has stood ready (standby.go, claim.go), starts from memory
// (memory.go), or boots (boot.go).
//
// A stage returns nil, a [gitlab.BuildError] for what is the job's own fault,
// or any other error for the infrastructure's.
package driver

import (
	"io"
	"os"

	"libvirt-driver/driver/gitlab"
)

// Stage is one call of the driver by GitLab Runner.
type Stage struct {
	Maker
	Environment *gitlab.Environment
	// StartFinisher starts the process that removes a machine after its cleanup;
	// see [StartFinisher]. Without it cleanup does that itself.
	StartFinisher func(h *Host, machine string, lock *os.File) error
	// Stdout and Stderr take what the job's script writes.
	Stdout, Stderr io.Writer
	// Owner is the process without which nobody is left who would clean the
	// machine up; 0 stands for the one that called this one.
	Owner int
}
