package sshexec

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// listenAt listens at a socket, whose path it returns, and serves the first who comes.
func listenAt(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "door")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		serve(conn)
	}()
	return path
}

// doorShell stands for the shell of a door: it reads words, which end in "end", and
// does as told with the connection.
func doorShell(t *testing.T, greeting string, then func(words string, conn net.Conn)) string {
	t.Helper()
	return listenAt(t, func(conn net.Conn) {
		io.WriteString(conn, greeting)
		var words strings.Builder
		for in := bufio.NewScanner(conn); in.Scan(); {
			fmt.Fprintln(&words, in.Text())
			if in.Text() == "end" {
				break
			}
		}
		then(words.String(), conn)
	})
}

// doorServer stands for the server of a door, which goes on once it is let go.
func doorServer(t *testing.T, s *server, letGo <-chan struct{}, toServer func(io.Writer, io.Reader)) string {
	t.Helper()
	return listenAt(t, func(conn net.Conn) {
		<-letGo
		server, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		go toServer(server, conn)
		io.Copy(conn, server)
	})
}

func TestADoorLeadsToAServer(t *testing.T) {
	s := startServer(t, nil)
	var got string
	letGo, entered := make(chan struct{}), make(chan struct{})
	shell := doorShell(t, "noise\r\n"+Greeting+"\r\n", func(words string, conn net.Conn) {
		got = words
		close(letGo)
		select {
		case <-entered:
			t.Error("entered before the door was open")
		case <-time.After(time.Second):
		}
		io.WriteString(conn, Open+"\n")
	})
	target := s.target()
	target.Address = "192.0.2.1:22" // leads nowhere
	target.Door = &Door{Shell: shell, Words: "identity\nend\n",
		Server: doorServer(t, s, letGo, func(w io.Writer, r io.Reader) { io.Copy(w, r) })}
	c, err := Dial(t.Context(), target)
	close(entered)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Ping(t.Context()); err != nil || !regexp.MustCompile(`^\d+\.\d{6}\nidentity\nend\n$`).MatchString(got) {
		t.Errorf("%v; the words were %q", err, got)
	}
}

// TestADoorsShellThatHasNotNoticedTheWords is told more, as a virtio channel may keep back what is not followed by more.
func TestADoorsShellThatHasNotNoticedTheWords(t *testing.T) {
	conn, guest := net.Pipe()
	defer conn.Close()
	defer guest.Close()
	go func() {
		io.WriteString(guest, Greeting+"\n")
		in := bufio.NewReader(guest)
		for line := ""; line != "end\n"; {
			line, _ = in.ReadString('\n')
		}
		if line, _ := in.ReadString('\n'); line == "\n" {
			io.WriteString(guest, Open+"\n")
		}
	}()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if err := (&Door{Words: "end\n"}).talk(conn); err != nil {
		t.Error(err)
	}
}

func TestADoorThatDoesNotOpen(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		greeting string
		then     func(string, net.Conn)
		want     string
		shut     bool
	}{
		"refuses":          {Greeting + "\n", func(_ string, c net.Conn) { io.WriteString(c, "the clock cannot be set\n") }, "the clock cannot be set", true},
		"ends":             {Greeting + "\n", func(string, net.Conn) {}, "did not open", false},
		"says nothing":     {"", func(string, net.Conn) {}, "no word from the door", false},
		"has no end":       {strings.Repeat("x", 2*maxDoorLine), func(string, net.Conn) {}, "a line of more than", false},
		"goes on for ever": {"", func(_ string, c net.Conn) { io.Copy(io.Discard, c) }, "no word from the door", false},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := NewKeyPair()
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, err = Dial(ctx, Target{Address: "192.0.2.1:22", User: "u", Key: key.Signer(), HostKey: key.Public(),
				Door: &Door{Server: listenAt(t, func(c net.Conn) { io.Copy(io.Discard, c) }), Shell: doorShell(t, test.greeting, test.then), Words: "end\n"}})
			if !errors.Is(err, ErrUnreachable) || errors.Is(err, ErrShut) != test.shut || !strings.Contains(fmt.Sprint(err), test.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestWhatADoorKeepsBack has every third of the packets that the guest is told kept
// back until the next one comes, as a virtio channel may do it.
func TestWhatADoorKeepsBack(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	letGo := make(chan struct{})
	shell := doorShell(t, Greeting+"\n", func(_ string, conn net.Conn) {
		close(letGo)
		io.WriteString(conn, Open+"\n")
	})
	target := s.target()
	target.Door = &Door{Shell: shell, Words: "end\n", Server: doorServer(t, s, letGo, func(server io.Writer, conn io.Reader) {
		packet := make([]byte, 64<<10)
		var kept []byte
		for i := 0; ; i++ {
			n, err := conn.Read(packet)
			if err != nil {
				return
			}
			kept = append(kept, packet[:n]...)
			// The first ones are the handshake's: there nothing more comes by itself.
			if i < 12 || i%3 != 0 {
				server.Write(kept)
				kept = nil
			}
		}
	})}
	c, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), keepAliveInterval/2)
	defer cancel()
	for range 10 {
		if err := c.Run(ctx, Command{Shell: "sh", Script: strings.NewReader("exit 0\n")}); err != nil {
			t.Fatal(err)
		}
	}
	// A guest that has answered is left alone.
	for deadline := time.Now().Add(20 * time.Second); ; {
		said := c.conn.said.Load()
		time.Sleep(5 * patience)
		if c.conn.said.Load() == said {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the guest is asked again and again")
		}
	}
}
