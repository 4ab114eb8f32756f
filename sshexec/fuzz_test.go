package sshexec

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"golang.org/x/crypto/ssh"
)

// What a guest's server says of a command's end.
func FuzzExit(f *testing.F) {
	f.Fuzz(func(t *testing.T, kind string, payload []byte) {
		exit, ok := parseExit(&ssh.Request{Type: kind, Payload: payload})
		switch {
		case !ok && exit != nil || ok && kind != "exit-status" && kind != "exit-signal":
			t.Errorf("%q: %+v, %v", kind, exit, ok)
		case exit == nil && ok && (kind != "exit-status" || string(payload) != "\x00\x00\x00\x00"):
			t.Errorf("%q %q is success", kind, payload)
		case exit == nil:
		case kind == "exit-status" && (exit.Signal != "" || exit.Code < 1 || exit.Code > 1<<32-1):
			t.Errorf("status %+v", exit)
		case kind == "exit-signal" && (exit.Code < 128 || exit.Code > 128+15 || exit.Signal == "" || len(exit.Signal) > 64 ||
			exit.Code > 128 && signalNumbers[exit.Signal] != exit.Code-128):
			t.Errorf("signal %+v", exit)
		}
		if exit != nil && strings.ContainsFunc(exit.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("error %q", exit)
		}
	})
}

// What comes from the stop script, or from whatever answers in its place.
func FuzzAlive(f *testing.F) {
	form := regexp.MustCompile(`^alive [+-]?[0-9]+$`)
	f.Fuzz(func(t *testing.T, line string) {
		n, ok := parseAlive(line)
		if n < 0 || ok && !form.MatchString(line) {
			t.Errorf("%q is %d processes", line, n)
		}
		if n >= 0 && n < 1<<31 {
			if again, ok := parseAlive(fmt.Sprintf("alive %d", n)); again != n || !ok {
				t.Errorf("%d processes come back as %d, %v", n, again, ok)
			}
		}
	})
}

// What a server says before it lets anyone in, in pieces: an excerpt of it is
// quoted on the message's own line.
func FuzzBanner(f *testing.F) {
	f.Fuzz(func(t *testing.T, first, second, third string) {
		var l login
		config := l.config(&hostKeyPin{})
		for _, piece := range []string{first, second, third} {
			if err := config.BannerCallback(piece); err != nil {
				t.Fatal(err)
			}
		}
		text, said := l.banner(), first+second+third
		if said == "" {
			if text != "" {
				t.Errorf("nothing is said as %q", text)
			}
			return
		}
		quoted, ok := strings.CutPrefix(text, " (the server said ")
		unquoted, err := strconv.Unquote(strings.TrimSuffix(quoted, ")"))
		if !ok || err != nil || unquoted != said[:min(len(said), maxExcerpt)] {
			t.Errorf("%q is said as %q", said, text)
		}
		if strings.ContainsFunc(text, unicode.IsControl) || len(text) > 4*maxExcerpt+100 {
			t.Errorf("message %q", text)
		}
	})
}

// The host key that prepare handed over accepts itself and nothing else.
func FuzzHostKey(f *testing.F) {
	stranger, _, _, _, err := ssh.ParseAuthorizedKey([]byte("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		pin, err := newHostKeyPin(text)
		if err != nil {
			if strings.ContainsFunc(err.Error(), unicode.IsControl) || len(err.Error()) > 1000 {
				t.Errorf("error %q", err)
			}
			return
		}
		if pin.key == nil {
			if text != "" {
				t.Errorf("%q pins nothing", text)
			}
			return
		}
		again, err := newHostKeyPin(authorized(pin.key))
		if err != nil || again.check("a", nil, pin.key) != nil || pin.check("a", nil, again.key) != nil {
			t.Errorf("%q does not accept itself: %v", text, err)
		}
		if authorized(stranger) != authorized(pin.key) && pin.check("a", nil, stranger) == nil {
			t.Errorf("%q accepts a stranger", text)
		}
		if a := pin.algorithms(); len(a) != len(hostKeyAlgorithms) || a[0] != signatures(pin.key.Type())[0] {
			t.Errorf("algorithms %q", a)
		}
	})
}

// What a guest says at its door: it ends, and only what opens it does.
func FuzzDoor(f *testing.F) {
	f.Fuzz(func(t *testing.T, said []byte) {
		conn, guest := net.Pipe()
		defer conn.Close()
		go io.Copy(io.Discard, guest)
		go func() {
			guest.Write(said)
			guest.Close()
		}()
		err := (&Door{Words: "end\n"}).talk(conn)
		lines := strings.Split(strings.ReplaceAll(string(said), "\r\n", "\n"), "\n")
		opens := slices.Contains(lines[:len(lines)-1], Greeting) && slices.Contains(lines[:len(lines)-1], Open)
		if err == nil && !opens {
			t.Errorf("opened by %q", said)
		}
		if err != nil && (strings.ContainsFunc(err.Error(), unicode.IsControl) || len(err.Error()) > 2000) {
			t.Errorf("error %q", err)
		}
	})
}
