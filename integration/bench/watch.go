package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// boot is a guest's way to its SSH server, as seen from outside while a prepare
// call waits for it. Its times follow each other.
type boot struct {
	// started is when libvirt said that the domain runs.
	started time.Time
	// asked is when the guest's first DHCP packet came.
	asked time.Time
	// addressed is when the DHCP server acknowledged the guest's address.
	addressed time.Time
	// listening is when the guest's port 22 answered.
	listening time.Time
	// connected is when it answered to who is to log in, of whose connection greeted
	// is when the server sent its version, and keyed when it was done with exchanging
	// keys. What comes then is encrypted. They are zero where that was not seen.
	connected, greeted, keyed time.Time
}

// watch looks at the packets on the guests' bridge, where one guest at a time
// boots. It asks for no connection to the guest's SSH server, and so starts no
// process there: to a SYN that it sends the guest's kernel answers by itself,
// and the host's kernel, which knows of no such connection, resets it.
type watch struct {
	// wire is read and written frame by frame.
	wire *os.File
	// mac and address are the host's own on the bridge.
	mac     net.HardwareAddr
	address netip.Addr

	done chan struct{}
	seen boot // but for started
	err  error
}

const (
	// probing is the time between two SYNs, and so how exact listening is.
	probing = 20 * time.Millisecond
	// prober is the port that SYNs come from: beyond what Linux gives to
	// connections by default.
	prober = 61022
	ssh    = 22
)

// watch begins to watch the boot of the next guest. What it returns ends that,
// once the guest has booted, and says what was seen.
func (h *host) watch() (end func() (boot, error), err error) {
	// Only sockets that ask for all protocols see what this host itself sends.
	protocol := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, syscall.ETH_P_ALL))
	socket, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("watch the packets on %s: socket: %w", h.bridge.Name, err)
	}
	err = syscall.Bind(socket, &syscall.SockaddrLinklayer{Protocol: protocol, Ifindex: h.bridge.Index})
	if err != nil {
		syscall.Close(socket)
		return nil, fmt.Errorf("watch the packets on %s: bind: %w", h.bridge.Name, err)
	}
	begun := time.Now()
	w := newWatch(os.NewFile(uintptr(socket), "packets"), h.bridge.HardwareAddr, h.address)
	return func() (boot, error) {
		seen, err := w.end()
		if err != nil {
			return seen, fmt.Errorf("watch the packets on %s: %w", h.bridge.Name, err)
		}
		if seen.started = h.lastStart(); seen.started.Before(begun) {
			return seen, errors.New("libvirt has not said that the guest started")
		}
		return seen, nil
	}, nil
}

func newWatch(wire *os.File, mac net.HardwareAddr, address netip.Addr) *watch {
	w := &watch{wire: wire, mac: mac, address: address, done: make(chan struct{})}
	go w.follow()
	return w
}

// end ends the watch and returns what was seen.
func (w *watch) end() (boot, error) {
	w.wire.Close()
	<-w.done
	switch {
	case w.err != nil && !errors.Is(w.err, os.ErrClosed):
		return w.seen, w.err
	case w.seen.addressed.IsZero():
		return w.seen, errors.New("no DHCP server has given the guest an address")
	case w.seen.listening.IsZero():
		return w.seen, fmt.Errorf("the guest's port %d has not answered", ssh)
	}
	return w.seen, nil
}

// follow reads packets until the guest's SSH server has exchanged keys with who
// is to log in.
func (w *watch) follow() {
	defer close(w.done)
	frame := make([]byte, 68<<10) // the kernel cuts what is sent into packets later
	var guest netip.Addr
	var probe []byte
	var talk greeting
	for w.seen.keyed.IsZero() {
		n, err := w.wire.Read(frame)
		now := time.Now()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !w.seen.listening.IsZero():
			w.err = w.wire.SetReadDeadline(time.Time{})
			continue
		case errors.Is(err, os.ErrDeadlineExceeded):
			if _, w.err = w.wire.Write(probe); w.err == nil {
				w.err = w.wire.SetReadDeadline(now.Add(probing))
			}
			if w.err != nil {
				return
			}
			continue
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil:
			w.err = err
			return
		}
		if lease := acknowledged(frame[:n]); lease != nil {
			if w.seen.addressed.IsZero() {
				w.seen.addressed = now
			}
			guest, _ = netip.AddrFromSlice(lease.YourIPAddr.To4())
			probe = syn(w.mac, lease.ClientHWAddr, w.address, guest)
			if w.err = w.wire.SetReadDeadline(now); w.err != nil {
				return
			}
		}
		if w.seen.asked.IsZero() && asks(frame[:n]) {
			w.seen.asked = now
		}
		if from := answered(frame[:n]); w.seen.listening.IsZero() && from.IsValid() && from == guest {
			w.seen.listening = now
		}
		if protocol, from, segment := ipv4(frame[:n]); protocol == syscall.IPPROTO_TCP && from == guest {
			talk.read(segment, now)
			w.seen.connected, w.seen.greeted, w.seen.keyed = talk.connected, talk.greeted, talk.keyed
		}
	}
}

// asks reports whether the frame has a DHCP client's message.
func asks(frame []byte) bool {
	protocol, _, datagram := ipv4(frame)
	return protocol == syscall.IPPROTO_UDP && len(datagram) >= 8 &&
		binary.BigEndian.Uint16(datagram) == dhcpv4.ClientPort && binary.BigEndian.Uint16(datagram[2:]) == dhcpv4.ServerPort
}

// greeting is what an SSH server says before it encrypts, on the newest of its
// connections: https://www.rfc-editor.org/rfc/rfc4253
type greeting struct {
	connected, greeted, keyed time.Time

	port uint16 // the client's
	next uint32 // the sequence number of what comes next
	text []byte // what has come and is not understood yet
}

// read reads a TCP segment from the guest.
func (g *greeting) read(segment []byte, now time.Time) {
	if len(segment) < 20 || binary.BigEndian.Uint16(segment) != ssh {
		return
	}
	port, sequence := binary.BigEndian.Uint16(segment[2:]), binary.BigEndian.Uint32(segment[4:])
	header := int(segment[12]>>4) * 4
	switch {
	case port == prober || header < 20 || header > len(segment):
		return
	case segment[13]&(tcpSYN|tcpACK) == tcpSYN|tcpACK:
		if port != g.port {
			*g = greeting{connected: now, port: port, next: sequence + 1}
		}
		return
	case port != g.port || sequence != g.next: // sent once more
		return
	}
	data := segment[header:]
	g.next += uint32(len(data))
	g.text = append(g.text, data...)
	for g.greeted.IsZero() {
		line, rest, found := bytes.Cut(g.text, []byte("\n"))
		if !found {
			return
		}
		g.text = rest
		if bytes.HasPrefix(line, []byte("SSH-")) {
			g.greeted = now
		}
	}
	const newKeys = 21
	for len(g.text) >= 6 && g.keyed.IsZero() {
		packet := 4 + int(binary.BigEndian.Uint32(g.text)) // then a byte about padding, then the message
		if g.text[5] == newKeys {
			g.keyed = now
		}
		if packet > len(g.text) {
			return
		}
		g.text = g.text[packet:]
	}
}

// acknowledged returns the DHCP server's acknowledgement, if the frame is one
// that gives an address.
func acknowledged(frame []byte) *dhcpv4.DHCPv4 {
	protocol, _, datagram := ipv4(frame)
	if protocol != syscall.IPPROTO_UDP || len(datagram) < 8 ||
		binary.BigEndian.Uint16(datagram) != dhcpv4.ServerPort || binary.BigEndian.Uint16(datagram[2:]) != dhcpv4.ClientPort {
		return nil
	}
	message, err := dhcpv4.FromBytes(datagram[8:])
	if err != nil || message.MessageType() != dhcpv4.MessageTypeAck || message.YourIPAddr.IsUnspecified() {
		return nil
	}
	return message
}

// The flags of a TCP segment: https://www.rfc-editor.org/rfc/rfc9293#section-3.1
const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// answered returns whose SSH port accepts a connection, if the frame says so.
func answered(frame []byte) netip.Addr {
	protocol, from, segment := ipv4(frame)
	if protocol != syscall.IPPROTO_TCP || len(segment) < 20 ||
		binary.BigEndian.Uint16(segment) != ssh || segment[13]&(tcpSYN|tcpACK) != tcpSYN|tcpACK {
		return netip.Addr{}
	}
	return from
}

// ipv4 takes an Ethernet frame with an IPv4 packet apart. Of every other frame
// there is nothing.
func ipv4(frame []byte) (protocol byte, from netip.Addr, payload []byte) {
	const ethernet, shortest = 14, 20
	if len(frame) < ethernet+shortest || binary.BigEndian.Uint16(frame[12:]) != syscall.ETH_P_IP {
		return 0, netip.Addr{}, nil
	}
	packet := frame[ethernet:]
	header := int(packet[0]&0x0f) * 4
	total := min(int(binary.BigEndian.Uint16(packet[2:])), len(packet)) // short frames are padded
	if header < shortest || total < header {
		return 0, netip.Addr{}, nil
	}
	from, _ = netip.AddrFromSlice(packet[12:16])
	return packet[9], from, packet[header:total]
}

// syn makes the frame that asks a guest's SSH port for a connection. It goes to
// the guest's MAC address as it is: had the host to ask for that first, too early
// a question would cost everyone who asks next a second.
func syn(fromMAC, toMAC net.HardwareAddr, from, to netip.Addr) []byte {
	segment := make([]byte, 20)
	binary.BigEndian.PutUint16(segment[0:], prober)
	binary.BigEndian.PutUint16(segment[2:], ssh)
	segment[12] = byte(len(segment) / 4 << 4)
	segment[13] = tcpSYN
	binary.BigEndian.PutUint16(segment[14:], 1024) // window
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = append(pseudo, 0, syscall.IPPROTO_TCP, 0, byte(len(segment)))
	binary.BigEndian.PutUint16(segment[16:], checksum(append(pseudo, segment...)))

	header := make([]byte, 12, 20)
	header[0] = 4<<4 | 5
	binary.BigEndian.PutUint16(header[2:], uint16(20+len(segment)))
	header[8] = 64 // hops
	header[9] = syscall.IPPROTO_TCP
	header = append(append(header, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(header[10:], checksum(header))

	frame := append(append([]byte{}, toMAC...), fromMAC...)
	frame = binary.BigEndian.AppendUint16(frame, syscall.ETH_P_IP)
	return append(append(frame, header...), segment...)
}

// checksum is that of IP and TCP, https://www.rfc-editor.org/rfc/rfc1071, of an
// even number of bytes.
func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
