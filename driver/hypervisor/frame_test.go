package hypervisor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"net"
	"path/filepath"
	"reflect"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// frame makes a packet.
func frame(p procedure, kind uint32, serial int32, status uint32, payload []byte) []byte {
	packet := binary.BigEndian.AppendUint32(nil, uint32(minPacket+len(payload)))
	for _, word := range []uint32{p.program, 1, p.number, kind, uint32(serial), status} {
		packet = binary.BigEndian.AppendUint32(packet, word)
	}
	return append(packet, payload...)
}

// counted makes a string of a packet; what it says of its length is said.
func counted(said uint32, text string) []byte {
	b := append(binary.BigEndian.AppendUint32(nil, said), text...)
	return append(b, make([]byte, -len(text)&3)...)
}

func words(w ...uint32) (b []byte) {
	for _, word := range w {
		b = binary.BigEndian.AppendUint32(b, word)
	}
	return b
}

// failed makes the payload of an error.
func failed(code libvirt.ErrorNumber, text string) []byte {
	return append(append(words(uint32(code), 10, 1), counted(uint32(len(text)), text)...), words(2, 0, 0, 0, 0, 0, 0)...)
}

// readCall reads a call of the client.
func readCall(r io.Reader) (header, []byte, error) {
	head := make([]byte, minPacket)
	if _, err := io.ReadFull(r, head); err != nil {
		return header{}, nil, err
	}
	h := parseHeader(head)
	payload := make([]byte, h.length-minPacket)
	_, err := io.ReadFull(r, payload)
	return h, payload, err
}

// allocated returns how many bytes the process has allocated so far.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// libvirtd is a daemon that opens the connection as a real one does and then
// answers each call by answer.
func libvirtd(t testing.TB, answer func(conn net.Conn, h header) []byte) *Connection {
	return daemon(t, func(conn net.Conn) {
		defer conn.Close()
		for {
			h, _, err := readCall(conn)
			if err != nil {
				return
			}
			var packet []byte
			switch h.procedure {
			case procedure{remote, 1}:
				packet = frame(h.procedure, kindReply, h.serial, statusOK, nil)
			case procedure{remote, 66}:
				packet = frame(h.procedure, kindReply, h.serial, statusOK, words(1, 0))
			default:
				packet = answer(conn, h)
			}
			if _, err := conn.Write(packet); err != nil {
				return
			}
		}
	})
}

// What go-libvirt would do with each of these: allocate gigabytes or fail to,
// block for ever, whatever the context says, or panic.
func TestAnswersThatCannotBeAreRefused(t *testing.T) {
	lookup, active, leases := procedure{remote, 46}, procedure{remote, 152}, procedure{remote, 341}
	aNetwork := append(counted(7, "default"), make([]byte, libvirt.UUIDBuflen)...)
	for name, test := range map[string]struct {
		answer []byte // to NetworkGetDhcpLeases, but for the serial
		twice  bool
		want   string
	}{
		"a string longer than its packet":  {frame(leases, kindReply, 0, statusOK, append(words(1), counted(0x7ffffffc, "virbr0")...)), false, "NetworkGetDhcpLeasesRet"},
		"an array longer than its packet":  {frame(leases, kindReply, 0, statusOK, words(0x7fffffff)), false, "NetworkGetDhcpLeasesRet"},
		"an error longer than its packet":  {frame(leases, kindReply, 0, statusError, append(words(1, 1, 1), counted(0x7ffffffc, "")...)), false, "failure"},
		"nothing":                          {frame(leases, kindReply, 0, statusOK, nil), false, "NetworkGetDhcpLeasesRet"},
		"an error that is none":            {frame(leases, kindReply, 0, statusError, failed(libvirt.ErrOk, "success")), false, "failed with no error"},
		"what another call asks for":       {frame(procedure{remote, 7}, kindReply, 0, statusOK, counted(3, "abc")), false, "answered as 7"},
		"an event in the answer's place":   {frame(lifecycleEvent, kindReply, 0, statusOK, words(0)), false, "answered as 318"},
		"data where none was asked for":    {frame(leases, kindStream, 0, statusContinue, []byte("data")), false, "status 2"},
		"an event longer than its packet":  {frame(lifecycleEvent, kindMessage, 0, statusOK, append(words(1), counted(0x7ffffffc, "")...)), false, "LifecycleMsg"},
		"the right one, and again":         {frame(leases, kindReply, 0, statusOK, words(0, 0)), true, ""},
		"the right one, after other kinds": {bytes.Join([][]byte{frame(procedure{remote, 330}, kindMessage, 0, statusOK, words(1, 0x7fffffff)), frame(procedure{0x6b656570, 1}, kindMessage, 0, statusOK, nil), frame(leases, kindReply, 99, statusOK, nil), frame(leases, kindReply, 0, statusOK, words(0, 0))}, nil), false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := libvirtd(t, func(conn net.Conn, h header) []byte {
				switch h.procedure {
				case lookup:
					return frame(lookup, kindReply, h.serial, statusOK, aNetwork)
				case active:
					return frame(active, kindReply, h.serial, statusOK, words(1))
				}
				packet := bytes.Clone(test.answer)
				// The last packet of the answer is the one with the serial.
				last := packet
				for n := binary.BigEndian.Uint32(last); int(n) < len(last); n = binary.BigEndian.Uint32(last) {
					last = last[n:]
				}
				binary.BigEndian.PutUint32(last[20:], uint32(h.serial))
				if test.twice {
					packet = append(packet, packet...)
				}
				return packet
			})
			before := allocated()
			for range 3 { // a call may block the one after it
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				err := within(t, func() error { _, err := c.Leases(ctx, "default", "52:54:00:00:00:01"); return err })
				cancel()
				switch {
				case test.want == "" && err != nil:
					t.Errorf("error: %v", err)
				case test.want != "" && (!errors.Is(err, errNonsense) || !strings.Contains(err.Error(), test.want)):
					t.Errorf("error: %v; want one with %s", err, test.want)
				}
			}
			if grown := allocated() - before; grown > 4<<20 {
				t.Errorf("%d bytes were allocated", grown)
			}
		})
	}
}

func TestDataOfAStreamPassesAndEndsIt(t *testing.T) {
	download := procedure{remote, 209}
	c := libvirtd(t, func(conn net.Conn, h header) []byte {
		return bytes.Join([][]byte{
			frame(download, kindReply, h.serial, statusOK, nil),
			frame(download, kindStream, h.serial, statusContinue, []byte("some ")),
			frame(download, kindStream, h.serial, statusContinue, []byte("data")),
			frame(download, kindStream, h.serial, statusContinue, nil),
			frame(download, kindStream, h.serial, statusOK, nil),
		}, nil)
	})
	for range 3 {
		var data bytes.Buffer
		err := within(t, func() error {
			return c.do(t.Context(), func(rpc *libvirt.Libvirt) error {
				data.Reset()
				return rpc.StorageVolDownload(libvirt.StorageVol{}, &data, 0, 9, 0)
			})
		})
		if err != nil || data.String() != "some data" {
			t.Fatalf("%q, %v", data.String(), err)
		}
	}
}

// go-libvirt itself says which procedure a call is, and by the type's name into
// what its answer is decoded.
func TestEveryCallThatIsMadeHasItsAnswer(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	// What ConnectToURI and LifecycleEvents are made of.
	names := map[string]bool{"AuthList": true, "AuthPolkit": true,
		"ConnectDomainEventCallbackRegisterAny": true, "ConnectDomainEventCallbackDeregisterAny": true}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if method, ok := call.Fun.(*ast.SelectorExpr); ok {
					if on, ok := method.X.(*ast.Ident); ok && on.Name == "rpc" {
						names[method.Sel.Name] = true
					}
				}
			}
			return true
		})
	}
	delete(names, "ConnectToURI")
	delete(names, "LifecycleEvents")
	delete(names, "NetworkUpdateCompat") // which makes these two
	names["ConnectSupportsFeature"], names["NetworkUpdate"] = true, true
	if len(names) < 20 {
		t.Fatalf("only %d calls are found: %v", len(names), names)
	}
	for name := range names {
		client, server := net.Pipe()
		made := make(chan procedure, 10)
		go func() {
			defer server.Close()
			for {
				h, _, err := readCall(server)
				if err != nil {
					return
				}
				made <- h.procedure
				payload, status := failed(libvirt.ErrInternalError, "no"), uint32(statusError)
				switch h.procedure {
				case procedure{remote, 1}:
					payload, status = nil, statusOK
				case procedure{remote, 66}:
					payload, status = words(0), statusOK
				}
				server.Write(frame(h.procedure, kindReply, h.serial, status, payload))
			}
		}()
		rpc := libvirt.NewWithDialer(dialers.NewAlreadyConnected(&framedConn{Conn: client}))
		if err := rpc.ConnectToURI("test:///default"); err != nil {
			t.Fatal(err)
		}
		<-made // AuthList
		<-made // ConnectOpen
		method := reflect.ValueOf(rpc).MethodByName(name)
		var args []reflect.Value
		for i := range method.Type().NumIn() {
			args = append(args, reflect.Zero(method.Type().In(i)))
		}
		results := method.Call(args)
		client.Close()
		if err, _ := results[len(results)-1].Interface().(error); err != nil && !is(err, libvirt.ErrInternalError) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		p := <-made
		into := "nothing"
		if answer := answers[p]; answer != nil {
			into = reflect.TypeOf(answer).Name()
		}
		if want := map[bool]string{true: "nothing", false: name + "Ret"}[method.Type().NumOut() == 1]; into != want && name != "QEMUDomainAgentCommand" {
			t.Errorf("%s is procedure %d, and its answer is decoded into %s, not %s", name, p.number, want, into)
		}
	}
}

func TestACallWithoutAnAnswerIsNotMade(t *testing.T) {
	c := libvirtd(t, func(_ net.Conn, h header) []byte {
		return frame(h.procedure, kindReply, h.serial, statusOK, words(0))
	})
	err := within(t, func() error {
		return c.do(t.Context(), func(rpc *libvirt.Libvirt) error { _, err := rpc.NodeGetFreeMemory(); return err })
	})
	if err == nil || !strings.Contains(err.Error(), "nothing says what answers it") {
		t.Errorf("error: %v", err)
	}
}
