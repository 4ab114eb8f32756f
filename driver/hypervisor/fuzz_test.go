package hypervisor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"libvirt.org/go/libvirtxml"
)

// peer answers calls as a script says: of each part of it a byte says what to
// send, two how many bytes follow, and those are the payload.
type peer struct {
	mu     sync.Mutex
	script []byte
	polite bool   // the connection is opened as by a real libvirtd
	silent bool   // at the end of the script nothing comes any more
	end    func() // called then
}

// part takes the next part of the script.
func (p *peer) part() (kind byte, payload []byte, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.script) < 3 {
		p.end()
		return 0, nil, false
	}
	kind, n := p.script[0], int(binary.BigEndian.Uint16(p.script[1:]))
	n = min(n, len(p.script)-3)
	payload, p.script = p.script[3:3+n], p.script[3+n:]
	return kind, payload, true
}

func (p *peer) serve(conn net.Conn) {
	defer conn.Close()
	for {
		h, _, err := readCall(conn)
		if err != nil {
			return
		}
		reply := func(status uint32, payload []byte) {
			conn.Write(frame(h.procedure, kindReply, h.serial, status, payload))
		}
		if p.polite && h.procedure == (procedure{remote, 1}) {
			reply(statusOK, nil)
			continue
		}
		if p.polite && h.procedure == (procedure{remote, 66}) {
			reply(statusOK, words(1, 0))
			continue
		}
		for answered := false; !answered; {
			kind, payload, ok := p.part()
			if !ok {
				if p.silent {
					readCall(conn) // until the client closes it
				}
				return
			}
			answered = true
			switch kind % 7 {
			case 0:
				reply(statusOK, payload)
			case 1:
				reply(statusError, payload)
			case 2:
				reply(statusOK, payload)
				reply(statusOK, payload)
			case 3:
				conn.Write(frame(h.procedure, kindStream, h.serial, statusContinue, payload))
			case 4:
				conn.Write(frame(lifecycleEvent, kindMessage, 0, statusOK, payload))
				answered = false
			case 5:
				conn.Write(payload)
			case 6:
				conn.Write(frame(procedure{remote, uint32(len(payload))}, kindMessage, h.serial, statusOK, payload))
				answered = false
			}
		}
	}
}

// fuzzedCalls are the methods of Connection, and what their errors must name.
var fuzzedCalls = []struct {
	names string
	call  func(context.Context, *testing.T, *Connection) error
}{
	{"volume v in pool p", func(ctx context.Context, t *testing.T, c *Connection) error {
		_, err := c.Volume(ctx, "p", "v")
		return err
	}},
	{"volumes of pool p", func(ctx context.Context, t *testing.T, c *Connection) error {
		volumes, err := c.Volumes(ctx, "p")
		for _, v := range volumes {
			checkVolume(t, v)
		}
		return err
	}},
	{"volume v on b in pool p", func(ctx context.Context, t *testing.T, c *Connection) error {
		v, err := c.CreateOverlay(ctx, "v", Volume{Pool: "p", Name: "b", Path: "/b", Capacity: 1}, "raw", 0)
		if err == nil && (v.Name != "v" || v.Pool != "p") {
			t.Errorf("created %+v", v)
		}
		return err
	}},
	{"volume v from pool p", func(ctx context.Context, t *testing.T, c *Connection) error {
		_, err := c.DeleteVolume(ctx, "p", "v")
		return err
	}},
	{"space of pool p", func(ctx context.Context, t *testing.T, c *Connection) error {
		_, err := c.PoolSpace(ctx, "p")
		return err
	}},
	{"list domains", func(ctx context.Context, t *testing.T, c *Connection) error {
		domains, err := c.Domains(ctx, "n")
		for _, d := range domains {
			checkState(t, d.State)
		}
		return err
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		return c.DefineDomain(ctx, "d", "<domain/>")
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error { return c.StartDomain(ctx, "d") }},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error { return c.DestroyDomain(ctx, "d") }},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error { return c.UndefineDomain(ctx, "d") }},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		text, found, err := c.Metadata(ctx, "d", "n")
		if (err != nil || !found) && text != "" {
			t.Errorf("metadata %q of a domain that is not found: %v", text, err)
		}
		return err
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		return c.SetMetadata(ctx, "d", "n", "p", "<m/>")
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		s, err := c.State(ctx, "d")
		if err == nil {
			checkState(t, s)
		}
		return err
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		s, err := c.Watch(ctx, "d", func(s State) bool { return s.Kind != Running })
		if err == nil && s.Kind == Running {
			t.Errorf("watched until %v", s)
		}
		return err
	}},
	{"network n", func(ctx context.Context, t *testing.T, c *Connection) error {
		_, err := c.KeepsLeases(ctx, "n")
		return err
	}},
	{"network n", func(ctx context.Context, t *testing.T, c *Connection) error {
		leases, err := c.Leases(ctx, "n", "m")
		checkLeases(t, leases, time.Now().Add(-time.Minute))
		return err
	}},
	{"network n", func(ctx context.Context, t *testing.T, c *Connection) error {
		held, servers, err := c.held(ctx, "n", "m")
		if err != nil && len(held)+len(servers) > 0 {
			t.Errorf("leases %v, servers %v with error %v", held, servers, err)
		}
		return wrap(err, "network n")
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		found, err := c.Addresses(ctx, "d", "52:54:00:00:00:01", Agent)
		for _, a := range found {
			checkAddress(t, a)
		}
		return err
	}},
	{"the host's memory", func(ctx context.Context, t *testing.T, c *Connection) error {
		_, err := c.Memory(ctx)
		return err
	}},
	{"capabilities", func(ctx context.Context, t *testing.T, c *Connection) error {
		caps, err := c.Capabilities(ctx, "auto", "")
		if err == nil && caps.VirtType != "kvm" && caps.VirtType != "qemu" {
			t.Errorf("capabilities %+v", caps)
		}
		return wrap(err, "capabilities")
	}},
	{"domain d", func(ctx context.Context, t *testing.T, c *Connection) error {
		return c.FilterAddress(ctx, "d", "52:54:00:00:00:01", netip.MustParseAddr("192.0.2.1"))
	}},
}

// Whatever sits at libvirtd's socket and whatever it answers: each method comes
// back, soon after its context has ended at the latest, allocates little, and its
// error says what was attempted on what.
func FuzzReplies(f *testing.F) {
	f.Add(uint8(12), uint8(1), []byte{})

	var current atomic.Pointer[peer]
	path := filepath.Join(f.TempDir(), "sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go current.Load().serve(conn)
		}
	}()
	f.Fuzz(func(t *testing.T, which, manners uint8, script []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		current.Store(&peer{script: script, polite: manners&1 != 0, silent: manners&2 != 0, end: cancel})
		c := New("qemu:///system", path)
		c.grace = time.Millisecond
		defer c.Close()
		method := fuzzedCalls[int(which)%len(fuzzedCalls)]
		before := allocated()
		err := within(t, func() error { return method.call(ctx, t, c) })
		if grown, most := allocated()-before, uint64(4<<20+1000*len(script)); grown > most {
			t.Errorf("%d bytes are allocated, more than %d", grown, most)
		}
		if err != nil && !strings.Contains(err.Error(), method.names) {
			t.Errorf("error %q does not name %s", err, method.names)
		}
	})
}

// Only whole packets pass that answer a call, each once, or that are events; and
// go-libvirt can decode those.
func FuzzFrames(f *testing.F) {
	f.Add(uint8(1), frame(procedure{remote, 23}, kindReply, 1, statusOK, make([]byte, 24)))
	f.Fuzz(func(t *testing.T, which uint8, stream []byte) {
		numbers := make([]procedure, 0, len(answers))
		for p := range answers {
			numbers = append(numbers, p)
		}
		slices.SortFunc(numbers, func(a, b procedure) int {
			return cmp.Or(cmp.Compare(a.program, b.program), cmp.Compare(a.number, b.number))
		})
		asked := numbers[int(which)%len(numbers)]

		conn := &framedConn{Conn: replay{bytes.NewReader(stream)}}
		for serial := range int32(3) {
			call := frame(asked, kindCall, serial+1, statusOK, []byte("arguments"))
			cut := int(which) % len(call) // as the writer's buffer may
			for _, half := range [][]byte{call[:cut], call[cut:]} {
				if _, err := conn.Write(half); err != nil {
					t.Fatal(err)
				}
			}
		}
		answered := map[int32]bool{}
		for {
			h, payload, err := readCall(conn)
			if err != nil {
				break
			}
			switch {
			case h.kind == kindMessage && h.procedure == lifecycleEvent:
			case h.procedure != asked || h.serial < 1 || h.serial > 3:
				t.Errorf("what nobody asked for passes: %+v", h)
			case h.status == statusContinue && streams[asked]:
			case h.status != statusOK && h.status != statusError:
				t.Errorf("status %d passes", h.status)
			case h.status == statusError && (len(payload) < 20 || binary.BigEndian.Uint32(payload) == 0):
				t.Errorf("an error passes that is none: %q", payload)
			case h.status == statusOK && answers[asked] != nil && len(payload) < 4:
				t.Errorf("an answer passes that is none: %q", payload)
			case answered[h.serial] && !streams[asked]:
				t.Errorf("call %d is answered twice", h.serial)
			default:
				answered[h.serial] = true
			}
		}
	})
}

// replay is a connection on which a stream comes and everything can be sent.
type replay struct{ *bytes.Reader }

func (replay) Write(p []byte) (int, error)      { return len(p), nil }
func (replay) Close() error                     { return nil }
func (replay) LocalAddr() net.Addr              { return nil }
func (replay) RemoteAddr() net.Addr             { return nil }
func (replay) SetDeadline(time.Time) error      { return nil }
func (replay) SetReadDeadline(time.Time) error  { return nil }
func (replay) SetWriteDeadline(time.Time) error { return nil }

func checkState(t *testing.T, s State) {
	t.Helper()
	if !slices.Contains([]Kind{Running, Paused, Off, Crashed, Gone}, s.Kind) {
		t.Errorf("state %+v", s)
	}
}

// checkAddress checks that a guest's address can be dialled and leads neither to
// the host nor to everyone.
func checkAddress(t *testing.T, a netip.Addr) {
	t.Helper()
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() {
		t.Errorf("address %v", a)
	}
	if s := a.String(); strings.Trim(s, "0123456789abcdef.:") != "" {
		t.Errorf("address %q", s)
	}
}

// checkLeases checks what is promised of leases.
func checkLeases(t *testing.T, found []Lease, now time.Time) {
	t.Helper()
	for i, l := range found {
		checkAddress(t, l.Address)
		if l.Expiry.Unix() != 0 && !l.Expiry.After(now) {
			t.Errorf("lease %v has ended at %v", l, now)
		}
		if i == 0 {
			continue
		}
		before := found[i-1]
		if l.Address.Is4() && !before.Address.Is4() || l.Address.Is4() == before.Address.Is4() && l.Expiry.After(before.Expiry) {
			t.Errorf("lease %v comes after %v", l, before)
		}
	}
}

func FuzzLeases(f *testing.F) {
	f.Add("192.0.2.1", int64(2000), "192.0.2.2", int64(3000), "2001:db8::1", int64(4000), int64(1000))
	f.Fuzz(func(t *testing.T, ip1 string, end1 int64, ip2 string, end2 int64, ip3 string, end3, now int64) {
		reply := []libvirt.NetworkDhcpLease{{Ipaddr: ip1, Expirytime: end1}, {Ipaddr: ip2, Expirytime: end2}, {Ipaddr: ip3, Expirytime: end3}}
		found := leases(reply, time.Unix(now, 0))
		checkLeases(t, found, time.Unix(now, 0))
		for _, l := range found {
			if !slices.ContainsFunc(reply, func(r libvirt.NetworkDhcpLease) bool {
				a, err := netip.ParseAddr(r.Ipaddr)
				return err == nil && a.Unmap() == l.Address && r.Expirytime == l.Expiry.Unix()
			}) {
				t.Errorf("lease %v is none of %v", l, reply)
			}
		}
	})
}

// What a guest's agent says of its addresses.
func FuzzAddresses(f *testing.F) {
	f.Add("52:54:00:00:00:01", "192.0.2.1", "2001:db8::1")
	f.Fuzz(func(t *testing.T, hwaddr, first, second string) {
		const mac = "52:54:00:00:00:01"
		found := addresses([]libvirt.DomainInterface{
			{Name: "lo", Addrs: []libvirt.DomainIPAddr{{Addr: "192.0.2.9"}}},
			{Name: "eth0", Hwaddr: libvirt.OptString{hwaddr}, Addrs: []libvirt.DomainIPAddr{{Addr: first}, {Addr: second}}},
		}, mac)
		if len(found) > 0 && hwaddr != mac || len(found) > 2 {
			t.Errorf("addresses %v of %q", found, hwaddr)
		}
		for _, a := range found {
			checkAddress(t, a)
		}
		if len(found) == 2 && found[1].Is4() && !found[0].Is4() {
			t.Errorf("IPv4 comes last in %v", found)
		}
	})
}

// The host's ARP table, in which guests have entries.
func FuzzNeighbours(f *testing.F) {
	f.Add("192.0.2.3        0x1         0x2         52:54:00:00:00:02     *        virbr0\n", "52:54:00:00:00:02")
	f.Fuzz(func(t *testing.T, table, mac string) {
		for _, a := range neighbours(table, mac) {
			checkAddress(t, a)
			if mac == "" || !strings.Contains(table, mac) {
				t.Errorf("address %v of %q, which is not in the table", a, mac)
			}
		}
	})
}

// checkVolume checks that list can show a volume.
func checkVolume(t *testing.T, v Volume) {
	t.Helper()
	if year := v.Modified.Year(); !v.Modified.IsZero() && (year < 1970 || year > 9999) {
		t.Errorf("modified in the year %d", year)
	}
	if _, err := json.Marshal(v); err != nil {
		t.Error(err)
	}
}

func FuzzVolumeXML(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		v, err := parseVolume("p", text)
		if err != nil {
			return
		}
		if v.Pool != "p" {
			t.Errorf("volume %+v", v)
		}
		checkVolume(t, v)
	})
}

func FuzzNetworkXML(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		keeps, err := keepsLeases(text)
		if err != nil && keeps {
			t.Errorf("keeps leases, and %v", err)
		}
		// As libvirt's own type has it, which takes more of the document for an error.
		var network libvirtxml.Network
		if err2 := network.Unmarshal(text); err2 == nil {
			lends := slices.ContainsFunc(network.IPs, func(ip libvirtxml.NetworkIP) bool {
				return ip.DHCP != nil && len(ip.DHCP.Ranges)+len(ip.DHCP.Hosts) > 0
			})
			if err != nil || keeps != lends {
				t.Errorf("keeps leases: %v, %v, not %v", keeps, err, lends)
			}
		}
		servers, _ := serversOf(text)
		for _, s := range servers {
			// A server of every address there is would get every release.
			if !s.IsValid() || s.Bits() == 0 && s.Addr().Is4() || !s.Contains(s.Addr()) {
				t.Errorf("server %v", s)
			}
		}
	})
}

func FuzzCapabilitiesXML(f *testing.F) {
	f.Fuzz(func(t *testing.T, host, domain, virtType, machine string) {
		caps, err := choose(host, virtType, machine)
		if err != nil {
			return
		}
		if virtType == "auto" && caps.VirtType != "kvm" && caps.VirtType != "qemu" || virtType != "auto" && caps.VirtType != virtType {
			t.Errorf("type %q, asked for %q", caps.VirtType, virtType)
		}
		if machine != "" && caps.MachineType != machine {
			t.Errorf("machine %q, asked for %q", caps.MachineType, machine)
		}
		full, err := caps.complete(domain)
		if full.VirtType != caps.VirtType || full.Arch != caps.Arch || caps.MachineType != "" && full.MachineType != caps.MachineType {
			t.Errorf("%+v became %+v (%v)", caps, full, err)
		}
	})
}

// What is sent to a DHCP server is one whole message about one address.
func FuzzRelease(f *testing.F) {
	f.Add("192.0.2.9", "52:54:00:01:02:03", "ff:00:01", "192.0.2.1")
	f.Fuzz(func(t *testing.T, ip, mac, client, from string) {
		address, ok := usable(ip)
		server, ok2 := usable(from)
		if !ok || !ok2 || !address.Is4() || !server.Is4() {
			return
		}
		lease := libvirt.NetworkDhcpLease{Ipaddr: ip, Mac: libvirt.OptString{mac}, Clientid: libvirt.OptString{client}}
		message, err := releaseMessage(lease, address, server)
		if err != nil {
			return
		}
		m, err := dhcpv4.FromBytes(message.ToBytes())
		if err != nil {
			t.Fatalf("%v: %v", message, err)
		}
		hardware, err := net.ParseMAC(mac)
		if err != nil {
			t.Fatalf("a release for MAC %q", mac)
		}
		if m.OpCode != dhcpv4.OpcodeBootRequest || m.MessageType() != dhcpv4.MessageTypeRelease ||
			m.ClientIPAddr.String() != address.String() || m.ServerIdentifier().String() != server.String() || !bytes.Equal(m.ClientHWAddr, hardware) {
			t.Errorf("message: %v", m.Summary())
		}
		id, err := hex.DecodeString(strings.ReplaceAll(client, ":", ""))
		if err != nil || !bytes.Equal(m.Options.Get(dhcpv4.OptionClientIdentifier), id) {
			t.Errorf("client id %x of %q (%v)", m.Options.Get(dhcpv4.OptionClientIdentifier), client, err)
		}
	})
}
