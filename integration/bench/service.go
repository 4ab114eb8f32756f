package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// standby is how the service that keeps machines ready is run. It is here alone
// that bench knows.
var standby = service{
	run:   []string{"standby"},
	drain: []string{"standby", "--drain"},
	ready: func() bool {
		records, err := filepath.Glob(filepath.Join(records, "libvirt-driver-standby-*.ready"))
		return err == nil && len(records) > 0
	},
}

// service is a command of the driver's that runs beside a way's jobs.
type service struct {
	// run are its arguments, and drain those of the command that removes what it
	// has left when it has ended; nil where there is none.
	run, drain []string
	// ready tells whether the next job will find what the service is for.
	ready func() bool
}

const (
	// readyWithin is how long a service may take to be ready: an emulated guest
	// boots meanwhile.
	readyWithin = 5 * time.Minute
	// endsWithin is how long it may take to end.
	endsWithin = time.Minute
)

// running is a service that runs.
type running struct {
	service
	command []string // the driver with its global arguments
	process *exec.Cmd
	output  bytes.Buffer
	ended   chan struct{}
	err     error // once ended
}

// start starts a service. It goes to libvirtd by itself, so that what it asks for
// is not taken for a job's.
func (s service) start(command, env []string) (*running, error) {
	r := &running{service: s, command: command, ended: make(chan struct{})}
	r.process = r.exec(context.Background(), s.run, env)
	r.process.Stdout, r.process.Stderr = &r.output, &r.output
	if err := r.process.Start(); err != nil {
		return nil, fmt.Errorf("start the service: %w", err)
	}
	go func() {
		r.err = r.process.Wait()
		close(r.ended)
	}()
	return r, nil
}

func (r *running) exec(ctx context.Context, args, env []string) *exec.Cmd {
	c := exec.CommandContext(ctx, r.command[0], append(r.command[1:len(r.command):len(r.command)], args...)...)
	c.Env = env
	return c
}

// wait waits until the service is ready for a job.
func (r *running) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyWithin, fmt.Errorf("not ready after %v", readyWithin))
	defer cancel()
	for !r.ready() {
		select {
		case <-r.ended:
			return fmt.Errorf("the service %v has ended: %v: %s", r.run, r.err, tail(r.output.Bytes()))
		default:
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return fmt.Errorf("wait for the service %v: %w", r.run, err)
		}
	}
	return nil
}

// end ends the service and removes what it has left.
func (r *running) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), endsWithin)
	defer cancel()
	_ = r.process.Process.Signal(syscall.SIGTERM) // fails for one that has ended
	var late error
	select {
	case <-r.ended:
	case <-ctx.Done():
		_ = r.process.Process.Kill()
		<-r.ended
		late = fmt.Errorf("the service %v has not ended %v after SIGTERM", r.run, endsWithin)
	}
	if r.drain == nil {
		return late
	}
	output, err := r.exec(ctx, r.drain, r.process.Env).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("remove what the service has left: %v: %w: %s", r.drain, err, tail(output))
	}
	return errors.Join(late, err)
}

// tail is the end of what a program wrote.
func tail(output []byte) []byte {
	const keep = 2000
	output = bytes.TrimSpace(output)
	return output[max(0, len(output)-keep):]
}
