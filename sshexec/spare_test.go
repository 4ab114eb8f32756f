package sshexec

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// spareOn serves a connection to the server, and has shells wait.
func spareOn(t *testing.T, s *server, shell string) (*Relay, relayAt) {
	t.Helper()
	relay := s.dial(t).NewRelay(shell)
	at, _ := serveRelay(t, relay)
	return relay, at
}

// waiting returns the process ID of the shell that waits, once it is the server's one
// command; sh has a cat read for it.
func (s *server) waiting(t *testing.T, r *Relay) int {
	t.Helper()
	marker := r.await(t).marker
	var found []process
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		found = slices.DeleteFunc(s.commands(), func(p process) bool { return p.name == "cat" })
		if len(found) != 1 {
			continue
		}
		// A login shell that is bash has not been given it, but told.
		told, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", found[0].pid))
		if strings.Contains(found[0].env+string(told), marker) {
			return found[0].pid
		}
	}
	t.Fatalf("the server has the commands %v, want one, with the marker %s", found, marker)
	return 0
}

// waits returns the shell that waits, nil if none does.
func (r *Relay) waits() *shell {
	r.waiting.Lock()
	defer r.waiting.Unlock()
	return r.spare
}

// await waits until a shell waits, and returns it.
func (r *Relay) await(t *testing.T) *shell {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if s := r.waits(); s != nil {
			return s
		}
	}
	t.Fatal("no shell waits")
	return nil
}

func sayPid(t *testing.T, at relayAt, shell string) string {
	t.Helper()
	c := dialRelay(t, at)
	defer c.Close()
	said, stderr, err := run(t, c, shell, "echo $$")
	if err != nil || stderr != "" {
		t.Errorf("%v, stderr %q", err, stderr)
	}
	return strings.TrimSpace(said)
}

func TestAShellWaitsForEachScript(t *testing.T) {
	s := startServer(t, nil)
	for _, shell := range []string{"bash", "sh"} {
		relay, at := spareOn(t, s, shell)
		for i := range 3 {
			pid := s.waiting(t, relay)
			if said := sayPid(t, at, shell); said != fmt.Sprint(pid) {
				t.Errorf("%s, script %d was run by process %s, while %d waited", shell, i, said, pid)
			}
		}
		s.waiting(t, relay)
		relay.client.Close()
		s.waitNoCommands(t) // one that waits ends with its connection
	}
}

// TestAShellThatWaitedIsLikeANewOne sees that it finds what the script before has
// changed, and does not know that it has waited.
func TestAShellThatWaitedIsLikeANewOne(t *testing.T) {
	s := startServer(t, nil)
	relay, at := spareOn(t, s, "bash")
	c := dialRelay(t, at)
	if _, _, err := run(t, c, "bash", "echo 'echo hello; answer=42' >>~/.bashrc"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.waiting(t, relay)
	time.Sleep(1500 * time.Millisecond)
	stdout, stderr, err := run(t, dialRelay(t, at), "bash", `echo "$answer $SECONDS ${#LIBVIRT_DRIVER_RUN}"; env | grep -c "=$LIBVIRT_DRIVER_RUN$"`)
	if stdout != "hello\n42 0 32\n1\n" || stderr != "" || err != nil {
		t.Errorf("stdout %q, stderr %q, error %v", stdout, stderr, err)
	}
}

// TestAShellThatDoesNotWaitAnyMore ends it in each of the ways there are: the
// script is run all the same, once.
func TestAShellThatDoesNotWaitAnyMore(t *testing.T) {
	s := startServer(t, nil)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		relay, at := spareOn(t, s, "bash")
		pid := s.waiting(t, relay)
		if err := syscall.Kill(pid, signal); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); !relay.hasHeard(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the relay does not hear that its shell has ended")
			}
		}
		if said := sayPid(t, at, "bash"); said == "" || said == fmt.Sprint(pid) {
			t.Errorf("after signal %v the script was run by process %q", signal, said)
		}
		if said, pid := s.waiting(t, relay), sayPid(t, at, "bash"); fmt.Sprint(said) != pid {
			t.Errorf("the next script was run by process %s, while %d waited", pid, said)
		}
		relay.client.Close()
		s.waitNoCommands(t)
	}
}

// hasHeard reports whether the relay could know that the shell has ended.
func (r *Relay) hasHeard() bool {
	r.waiting.Lock()
	defer r.waiting.Unlock()
	return r.spare == nil || r.spare.over()
}

func TestAnotherShellIsNotTheOneThatWaits(t *testing.T) {
	s := startServer(t, nil)
	relay, at := spareOn(t, s, "bash")
	pid := s.waiting(t, relay)
	if said := sayPid(t, at, "sh"); said == "" || said == fmt.Sprint(pid) {
		t.Errorf("sh is process %q, bash was %d", said, pid)
	}
	s.waiting(t, relay)
}

// TestManyWantTheShellThatWaits runs scripts at once: one of them gets it, and each
// is run once.
func TestManyWantTheShellThatWaits(t *testing.T) {
	s := startServer(t, nil)
	relay, at := spareOn(t, s, "bash")
	pid := fmt.Sprint(s.waiting(t, relay))
	var all sync.WaitGroup
	said := make([]string, 5)
	for i := range said {
		all.Go(func() { said[i] = sayPid(t, at, "bash") })
	}
	all.Wait()
	seen := map[string]bool{}
	for _, each := range said {
		seen[each] = true
	}
	if len(seen) != len(said) || !seen[pid] || seen[""] {
		t.Errorf("scripts were run by %v, while %s waited", said, pid)
	}
}

// TestStopAfterAWait ends a script whose shell is much older than the script.
func TestStopAfterAWait(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	relay, at := spareOn(t, s, "bash")
	s.waiting(t, relay)
	time.Sleep(ageSlack + time.Second)
	_, took, err := cancelWhenReady(t, dialRelay(t, at), tree)
	if err == nil || strings.Contains(err.Error(), "still run") || took > 9*time.Second {
		t.Errorf("error %v after %v", err, took)
	}
	s.waiting(t, relay) // the next one, and nothing of the tree
}

// TestNoRoomBesideAShellThatWaits uses a server that gives one session at a time.
func TestNoRoomBesideAShellThatWaits(t *testing.T) {
	s := startServer(t, []string{"MaxSessions 1"})
	relay, at := spareOn(t, s, "bash")
	pid := fmt.Sprint(s.waiting(t, relay))
	c := dialRelay(t, at)
	if err := c.Ping(t.Context()); !errors.Is(err, ErrRefused) {
		t.Errorf("Ping beside the shell that waits: %v", err)
	}
	if said := sayPid(t, at, "bash"); said != pid {
		t.Errorf("the script was run by process %s, while %s waited", said, pid)
	}
}
