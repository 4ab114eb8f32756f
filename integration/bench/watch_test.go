package main

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var (
	hostMAC      = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	guestMAC     = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}
	hostAddress  = netip.MustParseAddr("192.168.122.1")
	guestAddress = netip.MustParseAddr("192.168.122.7")
)

// fromGuest makes a frame with an IPv4 packet of the guest's.
func fromGuest(protocol byte, payload []byte) []byte {
	frame := append(append([]byte{}, hostMAC...), guestMAC...)
	frame = append(frame, 0x08, 0x00, 0x45, 0)
	frame = binary.BigEndian.AppendUint16(frame, uint16(20+len(payload)))
	frame = append(frame, 0, 0, 0, 0, 64, protocol, 0, 0)
	frame = append(append(frame, guestAddress.AsSlice()...), hostAddress.AsSlice()...)
	return append(frame, payload...)
}

func segment(from, to uint16, flags byte) []byte {
	s := make([]byte, 20)
	binary.BigEndian.PutUint16(s, from)
	binary.BigEndian.PutUint16(s[2:], to)
	s[12], s[13] = 5<<4, flags
	return s
}

// answer makes a frame with a DHCP server's message. Who it is from does not
// matter here.
func answer(t *testing.T, kind dhcpv4.MessageType) []byte {
	t.Helper()
	message, err := dhcpv4.New(dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(guestMAC),
		dhcpv4.WithYourIP(guestAddress.AsSlice()))
	if err != nil {
		t.Fatal(err)
	}
	message.OpCode = dhcpv4.OpcodeBootReply
	text := message.ToBytes()
	datagram := binary.BigEndian.AppendUint16([]byte{0, 67, 0, 68}, uint16(8+len(text)))
	return fromGuest(syscall.IPPROTO_UDP, append(append(datagram, 0, 0), text...))
}

func TestAcknowledged(t *testing.T) {
	ack := answer(t, dhcpv4.MessageTypeAck)
	lease := acknowledged(ack)
	if lease == nil || !lease.YourIPAddr.Equal(guestAddress.AsSlice()) || lease.ClientHWAddr.String() != guestMAC.String() {
		t.Fatalf("acknowledgement %v, want %v for %v", lease, guestAddress, guestMAC)
	}
	if lease := acknowledged(answer(t, dhcpv4.MessageTypeOffer)); lease != nil {
		t.Errorf("an offer was taken for an acknowledgement: %v", lease)
	}
	for n := range len(ack) {
		if lease := acknowledged(ack[:n:n]); lease != nil && n < 14+20+8+240 {
			t.Fatalf("%d bytes were taken for an acknowledgement", n)
		}
	}
}

func TestAnswered(t *testing.T) {
	for _, test := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"accepted", fromGuest(syscall.IPPROTO_TCP, segment(22, prober, tcpSYN|tcpACK)), true},
		{"accepted, padded", append(fromGuest(syscall.IPPROTO_TCP, segment(22, 40000, tcpSYN|tcpACK)), 0, 0, 0, 0, 0, 0), true},
		{"refused", fromGuest(syscall.IPPROTO_TCP, segment(22, prober, 0x04|tcpACK)), false},
		{"data", fromGuest(syscall.IPPROTO_TCP, segment(22, prober, tcpACK)), false},
		{"another port", fromGuest(syscall.IPPROTO_TCP, segment(80, prober, tcpSYN|tcpACK)), false},
		{"UDP", fromGuest(syscall.IPPROTO_UDP, segment(22, prober, tcpSYN|tcpACK)), false},
		{"a question", syn(guestMAC, hostMAC, guestAddress, hostAddress), false},
	} {
		if from := answered(test.frame); from.IsValid() != test.want || test.want && from != guestAddress {
			t.Errorf("%s: answered by %v", test.name, from)
		}
	}
	accepted := fromGuest(syscall.IPPROTO_TCP, segment(22, prober, tcpSYN|tcpACK))
	for n := range len(accepted) {
		if from := answered(accepted[:n:n]); from.IsValid() {
			t.Errorf("%d bytes were taken for an answer", n)
		}
	}
}

func TestChecksum(t *testing.T) {
	// The example of RFC 1071, section 3.
	if got := checksum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}); got != ^uint16(0xddf2) {
		t.Errorf("checksum %#04x, want %#04x", got, ^uint16(0xddf2))
	}
}

func TestSyn(t *testing.T) {
	frame := syn(hostMAC, guestMAC, hostAddress, guestAddress)
	if !bytes.HasPrefix(frame, append(append([]byte{}, guestMAC...), hostMAC...)) {
		t.Errorf("the frame begins with % x", frame[:12])
	}
	protocol, from, tcp := ipv4(frame)
	if protocol != syscall.IPPROTO_TCP || from != hostAddress || len(tcp) != 20 {
		t.Fatalf("protocol %d from %v with %d bytes", protocol, from, len(tcp))
	}
	if got := checksum(frame[14:34]); got != 0 {
		t.Errorf("the header's checksum is off by %#04x", got)
	}
	pseudo := append(append(hostAddress.AsSlice(), guestAddress.AsSlice()...), 0, 6, 0, 20)
	if got := checksum(append(pseudo, tcp...)); got != 0 {
		t.Errorf("the segment's checksum is off by %#04x", got)
	}
}

// wires makes two ends of a wire that keeps frames apart.
func wires(t *testing.T) (bench, guest *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	bench, guest = os.NewFile(uintptr(fds[0]), "bench"), os.NewFile(uintptr(fds[1]), "guest")
	t.Cleanup(func() { guest.Close() })
	if err := guest.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return bench, guest
}

func TestWatch(t *testing.T) {
	wire, guest := wires(t)
	w := newWatch(wire, hostMAC, hostAddress)
	send := func(frame []byte) {
		t.Helper()
		if _, err := guest.Write(frame); err != nil {
			t.Fatal(err)
		}
	}
	send(fromGuest(syscall.IPPROTO_UDP, []byte{0, 68, 0, 67, 0, 8, 0, 0}))
	// Nothing is asked before the guest has its address.
	send(answer(t, dhcpv4.MessageTypeOffer))
	acknowledgedAt := time.Now()
	send(answer(t, dhcpv4.MessageTypeAck))
	question := make([]byte, 4096)
	for range 3 {
		n, err := guest.Read(question)
		if err != nil {
			t.Fatal(err)
		}
		if want := syn(hostMAC, guestMAC, hostAddress, guestAddress); !bytes.Equal(question[:n], want) {
			t.Fatalf("the guest is asked % x, want % x", question[:n], want)
		}
		send(fromGuest(syscall.IPPROTO_TCP, segment(22, prober, 0x04|tcpACK)))
	}
	answeredAt := time.Now()
	send(fromGuest(syscall.IPPROTO_TCP, segment(22, prober, tcpSYN|tcpACK)))
	loginAt := time.Now()
	for _, s := range sshServer() {
		send(fromGuest(syscall.IPPROTO_TCP, s))
	}
	<-w.done
	seen, err := w.end()
	if err != nil {
		t.Fatal(err)
	}
	if seen.addressed.Before(acknowledgedAt) || seen.addressed.After(answeredAt) || seen.listening.Before(answeredAt) {
		t.Errorf("address at %v, SSH at %v; sent at %v and %v", seen.addressed, seen.listening, acknowledgedAt, answeredAt)
	}
	if seen.asked.IsZero() || seen.asked.After(seen.addressed) || seen.connected.Before(loginAt) || seen.greeted.Before(seen.connected) || seen.keyed.Before(seen.greeted) {
		t.Errorf("seen %+v, SSH from %v on", seen, loginAt)
	}
}

// sshServer is what a server says on a connection until it encrypts, in segments
// that do not keep to its packets.
func sshServer() [][]byte {
	packet := func(kind byte, size int) []byte {
		p := binary.BigEndian.AppendUint32(nil, uint32(size))
		return append(append(p, 4, kind), make([]byte, size-2)...)
	}
	text := []byte("a line before\r\nSSH-2.0-OpenSSH_9.2\r\n")
	text = append(append(append(text, packet(20, 900)...), packet(31, 200)...), packet(21, 12)...)
	text = append(text, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff) // encrypted
	segments := [][]byte{segment(22, 40000, tcpSYN|tcpACK)}
	binary.BigEndian.PutUint32(segments[0][4:], 0xfffffff0) // the numbers come round
	sequence := uint32(0xfffffff1)
	for len(text) > 0 {
		n := min(len(text), 100)
		s := segment(22, 40000, tcpACK)
		binary.BigEndian.PutUint32(s[4:], sequence)
		segments = append(segments, append(s, text[:n]...))
		text, sequence = text[n:], sequence+uint32(n)
	}
	return segments
}

func TestGreeting(t *testing.T) {
	segments := sshServer()
	at := func(i int) time.Time { return time.Unix(int64(1000+i), 0) }
	var g greeting
	for i, s := range segments {
		g.read(s, at(i))
		g.read(s, at(i+500)) // sent once more
	}
	// 20 bytes of a line, 40 of the version; 904 and 204 of packets; the 16 that end it.
	if g.connected != at(0) || g.greeted != at(1) || g.keyed != at(12) {
		t.Errorf("connected %v, greeted %v, keyed %v of %d segments", g.connected.Unix(), g.greeted.Unix(), g.keyed.Unix(), len(segments))
	}
	for i, s := range segments {
		for n := range len(s) {
			g.read(s[:n], at(i)) // of whatever length
		}
	}
	again := segment(22, 40001, tcpSYN|tcpACK)
	g.read(again, at(700))
	if g.connected != at(700) || !g.greeted.IsZero() || !g.keyed.IsZero() {
		t.Errorf("a new connection: %+v", g)
	}
}

func TestWatchSeesTooLittle(t *testing.T) {
	wire, _ := wires(t)
	if _, err := newWatch(wire, hostMAC, hostAddress).end(); err == nil {
		t.Error("no packets were enough")
	}
	wire, guest := wires(t)
	w := newWatch(wire, hostMAC, hostAddress)
	if _, err := guest.Write(answer(t, dhcpv4.MessageTypeAck)); err != nil {
		t.Fatal(err)
	}
	if _, err := guest.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.end(); err == nil {
		t.Error("an address alone was enough")
	}
}
