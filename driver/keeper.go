package driver

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Keeper is the process that keeps the connection to a job's guest, as the
// prepare stage that starts it knows it. A nil Keeper keeps nothing.
type Keeper struct {
	pid     int
	calls   *os.File // the keeper's standard input
	answers *os.File // the keeper's standard output
	reply   *json.Decoder
	failed  bool // it cannot be used
}

// StartKeeper starts a machine's keeper: this program, as "keep DIR DOMAIN",
// in a session of its own, so that what ends the stages ends it only with the
// machine. It gets nothing of the job's environment and no open file.
func StartKeeper(dir, domain string) (*Keeper, error) {
	calls, answers, theirs, err := pipes()
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	pid, err := spawn([]string{"keep", dir, domain}, nil, theirs...)
	if err != nil {
		calls.Close()
		answers.Close()
		return nil, fmt.Errorf("start a process that keeps the connection: %w", err)
	}
	return &Keeper{pid: pid, calls: calls, answers: answers, reply: json.NewDecoder(answers)}, nil
}

// pipes returns this side's ends of the pipes to a keeper and the keeper's
// standard files.
func pipes() (calls, answers *os.File, theirs []*os.File, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, nil, err
	}
	in, calls, err := os.Pipe()
	if err != nil {
		null.Close()
		return nil, nil, nil, err
	}
	answers, out, err := os.Pipe()
	if err != nil {
		for _, f := range []*os.File{null, in, calls} {
			f.Close()
		}
		return nil, nil, nil, err
	}
	return calls, answers, []*os.File{in, out, null}, nil
}

// startKeeper starts the keeper of the job's machine where the settings want
// one.
func (mk *Maker) startKeeper(m machine) *Keeper {
	if mk.StartKeeper == nil {
		return nil
	}
	keeper, err := mk.StartKeeper(mk.LockDir, m.domain)
	if err != nil {
		mk.Log.Note("every sub-stage will log in anew: %v", err)
	}
	return keeper
}

// works reports whether the keeper can be asked.
func (k *Keeper) works() bool { return k != nil && !k.failed }

// knock makes one attempt to get a shell. It returns what [sshexec.Dial] would,
// as far as prepare decides on it, or errNoKeeper when the keeper itself is at
// fault; then it is not to be asked again.
func (k *Keeper) knock(ctx context.Context, call knock) (contact, error) {
	ctx, cancel := context.WithTimeout(ctx, call.Limit+time.Second)
	defer cancel()
	if err := json.NewEncoder(k.calls).Encode(call); err != nil {
		k.failed = true
		return contact{}, fmt.Errorf("%w: %w", errNoKeeper, err)
	}
	var a answer
	answered := make(chan error, 1)
	go func() { answered <- k.reply.Decode(&a) }()
	var err error
	select {
	case err = <-answered:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		k.failed = true
		return contact{}, fmt.Errorf("%w: %w", errNoKeeper, err)
	}
	if err := a.Err(); err != nil {
		return contact{}, err
	}
	return contact{Address: call.Address, HostKey: a.HostKey, Relay: a.Relay}, nil
}

// errNoKeeper says that the connection cannot be kept.
var errNoKeeper = errors.New("the process that keeps the connection has failed")

// release lets the keeper go on by itself where keep is set, and else ends it.
func (k *Keeper) release(keep bool) {
	if k == nil {
		return
	}
	defer k.calls.Close()
	defer k.answers.Close()
	if keep && k.works() && json.NewEncoder(k.calls).Encode(knock{Keep: true}) == nil {
		return
	}
	syscall.Kill(k.pid, syscall.SIGKILL)
	syscall.Wait4(k.pid, nil, 0, nil)
}

// keeperPath returns the file by which a machine's keeper is known: it holds the
// keeper's process id, and the keeper a lock on it while it lives.
func keeperPath(dir, domain string) string { return filepath.Join(dir, domain+".keeper") }

// relayPath returns the socket at which sub-stages find the keeper. A socket's
// path has 107 bytes at most, and a machine's name can be longer.
func relayPath(dir, domain string) string {
	sum := sha256.Sum256([]byte(domain))
	return filepath.Join(dir, fmt.Sprintf("%x.ssh", sum[:12]))
}

// register makes this process a machine's keeper until leave is called.
func register(dir, domain string) (leave func(), err error) {
	path := keeperPath(dir, domain)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("keep the connection to %s: %w", domain, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("keep the connection to %s: another process does: %w", domain, err)
	}
	os.Remove(relayPath(dir, domain)) // of one that was killed
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("keep the connection to %s: %w", domain, err)
	}
	return func() {
		os.Remove(path)
		f.Close()
	}, nil
}

// endKeeper ends the keeper of a machine, if there is one, and removes its
// files.
func (h *Host) endKeeper(ctx context.Context, domain string) error {
	path := keeperPath(h.LockDir, domain)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for try := 0; ; try++ {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break // it has ended
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("lock %s: %w", path, err)
		}
		if err := kill(f); err != nil {
			return fmt.Errorf("end the process that keeps the connection to %s: %w", domain, err)
		}
		pause(ctx, backoff(try)/10)
		if ctx.Err() != nil {
			return fmt.Errorf("end the process that keeps the connection to %s: %w", domain, context.Cause(ctx))
		}
	}
	return errors.Join(gone(os.Remove(relayPath(h.LockDir, domain))), gone(os.Remove(path)))
}

// kill kills the process whose id is in f, and that held a lock on f when it was
// looked at: the id is of that process alone while the lock is held.
func kill(f *os.File) error {
	text := make([]byte, 20)
	n, _ := f.ReadAt(text, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil || pid <= 1 {
		return nil // it has just begun
	}
	process, err := unix.PidfdOpen(pid, 0) // holds on to the process, not to the number
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(process)
	if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		syscall.Flock(int(f.Fd()), syscall.LOCK_UN)
		return nil
	}
	if err := unix.PidfdSendSignal(process, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// gone lets a file be missing that is to be removed.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// enterRelay connects to a machine's keeper. A keeper that does not answer at
// once is as good as none.
func (mk *Maker) enterRelay(ctx context.Context, domain string, c contact) (Shell, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return mk.ConnectRelay(ctx, relayPath(mk.LockDir, domain), c.Relay)
}
