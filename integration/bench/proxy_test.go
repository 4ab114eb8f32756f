package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// packet makes a packet of libvirt's protocol.
func packet(number, kind, serial uint32, payload int) []byte {
	p := binary.BigEndian.AppendUint32(nil, uint32(28+payload))
	for _, word := range []uint32{remote, 1, number, kind, serial, 0} {
		p = binary.BigEndian.AppendUint32(p, word)
	}
	return append(p, make([]byte, payload)...)
}

func TestProxy(t *testing.T) {
	dir := t.TempDir()
	libvirtd, err := net.Listen("unix", filepath.Join(dir, "libvirtd"))
	if err != nil {
		t.Fatal(err)
	}
	defer libvirtd.Close()
	p, err := newProxy(filepath.Join(dir, "bench"), filepath.Join(dir, "libvirtd"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	client, err := net.Dial("unix", filepath.Join(dir, "bench"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := libvirtd.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	pass := func(from, to net.Conn, data []byte) {
		t.Helper()
		if _, err := from.Write(data); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(data))
		if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("what was written came as % x (%v)", got, err)
		}
	}
	const data = 3 // a stream's
	calls := append(append(packet(93, kindCall, 1, 500), packet(93, data, 1, 100)...), packet(350, kindCall, 2, 0)...)
	pass(client, server, calls[:13])
	pass(client, server, calls[13:])
	time.Sleep(10 * time.Millisecond)
	const event = 2
	pass(server, client, packet(318, event, 2, 40)) // which has the serial of no call
	pass(server, client, packet(93, kindReply, 1, 300))

	seen := p.take()
	if len(seen) != 2 || seen[0].procedure != (procedure{remote, 93}) || seen[1].procedure != (procedure{remote, 350}) {
		t.Fatalf("calls %+v", seen)
	}
	if took := taken(seen, createOverlay); took < 0.01 || taken(seen, nil) != took || !seen[1].answered.IsZero() {
		t.Errorf("the overlay took %v s; %+v", took, seen)
	}
	if at := last(seen, nil); at != seen[0].answered || !last(seen, define).IsZero() {
		t.Errorf("the last answer at %v; %+v", at, seen)
	}
	if n := len(inside(seen, seen[0].sent, seen[1].sent.Add(1))); n != 2 {
		t.Errorf("%d calls, want both", n)
	}
	if again := p.take(); len(again) != 0 {
		t.Errorf("calls are told twice: %+v", again)
	}
	if got := (procedure{remote, 93}).String() + ", " + (procedure{1, 2}).String(); got != "StorageVolCreateXML, procedure 2 of program 0x1" {
		t.Error(got)
	}
	client.Close()
	if _, err := server.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the client has gone, libvirtd is told %v", err)
	}
}
