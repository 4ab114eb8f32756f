package sshexec

import "context"

// The shell of a script is most of what a short one costs: on an emulated guest to
// start it takes a tenth of a second. So a [Relay] starts the next script's when the
// last one is done with, and not before: it is to find what that has changed.

// renew sees to it that a shell waits. Where that is not possible whoever needs one
// will hear why.
func (r *Relay) renew() {
	if r.shell == "" {
		return
	}
	r.waiting.Lock()
	defer r.waiting.Unlock()
	if r.spare == nil {
		r.spare, _ = r.client.startShell(context.Background(), r.shell)
	}
}

// startShell hands out the shell that waits, or a new one. One that is about to wait
// is waited for.
func (r *Relay) startShell(ctx context.Context, name string) (*shell, error) {
	if ctx.Err() == nil {
		if s := r.take(name); s != nil {
			return s, nil
		}
	}
	return r.client.startShell(ctx, name)
}

// take hands out the shell that waits, and nil if there is none of this kind.
func (r *Relay) take(name string) *shell {
	r.waiting.Lock()
	defer r.waiting.Unlock()
	s := r.spare
	r.spare = nil
	if s != nil && (name != r.shell || s.over()) { // over, as by TMOUT
		s.close()
		return nil
	}
	return s
}
