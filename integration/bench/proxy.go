package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// proxy stands between the driver and libvirtd and notes every call that passes:
// what it asks for, when it came, when it was answered.
type proxy struct {
	listener net.Listener
	to       string // libvirtd's socket

	mu    sync.Mutex
	calls []*rpc
}

// rpc is a call to libvirtd.
type rpc struct {
	procedure
	sent, answered time.Time // answered is zero for one that was not
}

// procedure is a procedure of libvirt's protocol:
// https://gitlab.com/libvirt/libvirt/-/blob/master/src/remote/remote_protocol.x
type procedure struct{ program, number uint32 }

// remote is the program of all but a few procedures.
const remote = 0x20008086

// Procedures of which the time counts.
var (
	createOverlay  = []procedure{{remote, 93}}
	define         = []procedure{{remote, 350}}
	startOrRestore = []procedure{{remote, 196}, {remote, 10}, {remote, 54}, {remote, 233}, {remote, 441}}
	suspend        = []procedure{{remote, 34}}
	destroy        = []procedure{{remote, 234}}
	undefine       = []procedure{{remote, 231}}
	deleteVolume   = []procedure{{remote, 94}}
)

// names are the procedures' that the driver's jobs may call.
var names = map[procedure]string{
	{remote, 1}: "ConnectOpen", {remote, 2}: "ConnectClose", {remote, 7}: "ConnectGetCapabilities",
	{remote, 10}: "DomainCreateXML", {remote, 14}: "DomainGetXMLDesc", {remote, 16}: "DomainGetInfo",
	{remote, 23}: "DomainLookupByName", {remote, 70}: "AuthPolkit", {remote, 317}: "ConnectDomainEventCallbackDeregisterAny",
	{remote, 28}: "DomainResume", {remote, 34}: "DomainSuspend", {remote, 43}: "NetworkGetXMLDesc",
	{remote, 46}: "NetworkLookupByName", {remote, 54}: "DomainRestore", {remote, 66}: "AuthList",
	{remote, 83}: "StoragePoolRefresh", {remote, 84}: "StoragePoolLookupByName", {remote, 87}: "StoragePoolGetInfo",
	{remote, 88}: "StoragePoolGetXMLDesc", {remote, 93}: "StorageVolCreateXML", {remote, 94}: "StorageVolDelete",
	{remote, 95}: "StorageVolLookupByName", {remote, 98}: "StorageVolGetInfo", {remote, 99}: "StorageVolGetXMLDesc",
	{remote, 100}: "StorageVolGetPath", {remote, 152}: "NetworkIsActive", {remote, 165}: "StorageVolWipe",
	{remote, 196}: "DomainCreateWithFlags", {remote, 208}: "StorageVolUpload", {remote, 209}: "StorageVolDownload",
	{remote, 212}: "DomainGetState", {remote, 228}: "NodeGetMemoryStats", {remote, 231}: "DomainUndefineFlags",
	{remote, 233}: "DomainRestoreFlags", {remote, 234}: "DomainDestroyFlags", {remote, 264}: "DomainSetMetadata",
	{remote, 265}: "DomainGetMetadata", {remote, 273}: "ConnectListAllDomains", {remote, 282}: "StoragePoolListAllVolumes",
	{remote, 316}: "ConnectDomainEventCallbackRegisterAny", {remote, 341}: "NetworkGetDhcpLeases",
	{remote, 342}: "ConnectGetDomainCapabilities", {remote, 350}: "DomainDefineXMLFlags",
	{remote, 353}: "DomainInterfaceAddresses", {remote, 441}: "DomainRestoreParams",
}

func (p procedure) String() string {
	if name, ok := names[p]; ok {
		return name
	}
	return fmt.Sprintf("procedure %d of program %#x", p.number, p.program)
}

// newProxy listens at a path for who would go to libvirtd's socket.
func newProxy(path, to string) (*proxy, error) {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("stand before libvirtd: %w", err)
	}
	p := &proxy{listener: listener, to: to}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(client)
		}
	}()
	return p, nil
}

// close lets nobody in any more. Connections end as their clients do.
func (p *proxy) close() { p.listener.Close() }

// take returns the calls since it was last asked.
func (p *proxy) take() []rpc {
	p.mu.Lock()
	defer p.mu.Unlock()
	calls := make([]rpc, len(p.calls))
	for i, c := range p.calls {
		calls[i] = *c
	}
	p.calls = nil
	return calls
}

// serve passes on what a client and libvirtd say to each other, until one of
// them ends.
func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	libvirtd, err := net.Dial("unix", p.to)
	if err != nil {
		return // as a libvirtd that is away
	}
	defer libvirtd.Close()
	waiting := map[uint32]*rpc{} // by the call's serial
	both := make(chan struct{}, 2)
	pass := func(to io.Writer, from io.Reader, see func(header)) {
		_, _ = io.Copy(to, io.TeeReader(from, &packets{see: see}))
		both <- struct{}{}
	}
	go pass(libvirtd, client, func(h header) {
		if h.kind != kindCall {
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		c := &rpc{procedure: h.procedure, sent: time.Now()}
		p.calls, waiting[h.serial] = append(p.calls, c), c
	})
	go pass(client, libvirtd, func(h header) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if c := waiting[h.serial]; c != nil && h.kind == kindReply {
			c.answered = time.Now()
			delete(waiting, h.serial)
		}
	})
	<-both
}

// header is what a packet of libvirt's protocol says of itself:
// https://libvirt.org/kbase/internals/rpc.html
type header struct {
	procedure
	kind, serial uint32
}

const (
	kindCall  = 0
	kindReply = 1
)

// packets sees the headers in a stream of packets.
type packets struct {
	see  func(header)
	head []byte // what has come of a packet's header
	rest int    // what is still to come of a packet after its header
}

var errNoPacket = errors.New("no packet of libvirt's protocol")

func (p *packets) Write(data []byte) (int, error) {
	const size = 28
	for at := data; len(at) > 0; {
		if p.rest > 0 {
			n := min(len(at), p.rest)
			p.rest, at = p.rest-n, at[n:]
			continue
		}
		n := min(len(at), size-len(p.head))
		p.head, at = append(p.head, at[:n]...), at[n:]
		if len(p.head) < size {
			break
		}
		word := func(i int) uint32 { return binary.BigEndian.Uint32(p.head[4*i:]) }
		if word(0) < size {
			return 0, errNoPacket
		}
		p.see(header{procedure{word(1), word(3)}, word(4), word(5)})
		p.head, p.rest = p.head[:0], int(word(0))-size
	}
	return len(data), nil
}

// inside returns the calls that were made from one time to another.
func inside(calls []rpc, from, to time.Time) []rpc {
	var some []rpc
	for _, c := range calls {
		if !c.sent.Before(from) && c.sent.Before(to) {
			some = append(some, c)
		}
	}
	return some
}

// taken is how many seconds libvirtd took for the calls of some procedures; nil
// is all.
func taken(calls []rpc, some []procedure) float64 {
	var all float64
	for _, c := range calls {
		if (some == nil || slices.Contains(some, c.procedure)) && !c.answered.IsZero() {
			all += between(c.sent, c.answered)
		}
	}
	return all
}

// last is when the last call of some procedures was answered, nil being all; zero
// when none was.
func last(calls []rpc, some []procedure) time.Time {
	var at time.Time
	for _, c := range calls {
		if (some == nil || slices.Contains(some, c.procedure)) && c.answered.After(at) {
			at = c.answered
		}
	}
	return at
}
