package hypervisor

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"sync"

	"github.com/digitalocean/go-libvirt"
)

// Bounds of a packet of libvirt's protocol in bytes, its own length field
// included: a bare header, and the most that libvirt sends. See
// https://libvirt.org/kbase/internals/rpc.html.
const (
	minPacket = 28
	maxPacket = 32 << 20
)

// Kinds and statuses of packets, as that page has them.
const (
	kindCall    = 0
	kindReply   = 1
	kindMessage = 2
	kindStream  = 3

	statusOK       = 0
	statusError    = 1
	statusContinue = 2
)

// header is what a packet begins with. Everything is big-endian.
type header struct {
	length uint32
	procedure
	kind   uint32
	serial int32
	status uint32
}

func parseHeader(packet []byte) header {
	word := func(i int) uint32 { return binary.BigEndian.Uint32(packet[4*i:]) }
	return header{word(0), procedure{word(1), word(3)}, word(4), int32(word(5)), word(6)}
}

// errNonsense is libvirtd, or whoever listens on its socket, breaking its
// protocol. To try again would end in the same.
var errNonsense = errors.New("libvirtd does not keep to its protocol")

// framedConn lets pass what go-libvirt asked for and can decode. That believes
// what it reads: it allocates as much as any length in a packet says, two
// answers to one call block it for ever, and an event of a kind that was not
// asked for makes it panic.
//
// So each packet is read to its end and checked first: an answer by the call
// that it is for, of which there is one. What nobody asked for is dropped, as
// go-libvirt means to do too. What cannot be decoded ends the connection.
type framedConn struct {
	net.Conn
	in     *bufio.Reader // of Conn; made by the first Read
	packet []byte        // what is still to be delivered of a packet that may pass

	sent []byte // what has been written of the header of a call
	rest int    // what is still to be written of that call after its header

	mu     sync.Mutex
	calls  map[int32]*call // calls that wait for an answer, by serial
	broken error           // why the connection was given up
}

// call is a call that waits for an answer.
type call struct {
	procedure
	streaming bool // it has been answered, and data follows
}

// nonsense returns how libvirtd broke its protocol, if it did.
func (c *framedConn) nonsense() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// Write writes calls, and notes them.
func (c *framedConn) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		if c.rest > 0 {
			n := min(len(rest), c.rest)
			c.rest, rest = c.rest-n, rest[n:]
			continue
		}
		n := min(len(rest), minPacket-len(c.sent))
		c.sent, rest = append(c.sent, rest[:n]...), rest[n:]
		if len(c.sent) < minPacket {
			break
		}
		h := parseHeader(c.sent)
		c.sent, c.rest = nil, int(h.length)-minPacket
		if h.kind != kindCall {
			continue // data of a stream
		}
		if _, known := answers[h.procedure]; !known {
			return 0, fmt.Errorf("procedure %d of program %#x: nothing says what answers it", h.number, h.program)
		}
		c.mu.Lock()
		if c.calls == nil {
			c.calls = map[int32]*call{}
		}
		c.calls[h.serial] = &call{procedure: h.procedure}
		c.mu.Unlock()
	}
	return c.Conn.Write(p)
}

func (c *framedConn) Read(p []byte) (int, error) {
	for len(c.packet) == 0 {
		packet, err := c.next()
		if err != nil {
			return 0, err
		}
		wanted, err := c.admit(packet)
		if err != nil {
			c.mu.Lock()
			c.broken = fmt.Errorf("%w: %w", errNonsense, err)
			c.mu.Unlock()
			return 0, c.broken
		}
		if wanted {
			c.packet = packet
		}
	}
	n := copy(p, c.packet)
	c.packet = c.packet[n:]
	return n, nil
}

// next reads a packet. It allocates little more than what has come, whatever is said
// to come.
func (c *framedConn) next() ([]byte, error) {
	if c.in == nil {
		c.in = bufio.NewReader(c.Conn)
	}
	word, err := c.in.Peek(4)
	if err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(word)
	if length < minPacket || length > maxPacket {
		err := fmt.Errorf("%w: a packet of %d bytes", errNonsense, length)
		c.mu.Lock()
		c.broken = err
		c.mu.Unlock()
		return nil, err
	}
	packet := bytes.NewBuffer(make([]byte, 0, min(length, 64<<10)+bytes.MinRead))
	_, err = io.CopyN(packet, c.in, int64(length))
	return packet.Bytes(), err
}

// admit reports whether a packet may pass; the error ends the connection.
func (c *framedConn) admit(packet []byte) (wanted bool, err error) {
	h, payload := parseHeader(packet), packet[minPacket:]
	switch h.kind {
	case kindMessage:
		if h.procedure != lifecycleEvent {
			return false, nil
		}
		return true, decodes(h.procedure, libvirt.DomainEventCallbackLifecycleMsg{}, payload)
	case kindReply, kindStream:
		return c.answer(h, payload)
	}
	return false, nil
}

// answer is admit for what answers a call.
func (c *framedConn) answer(h header, payload []byte) (wanted bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.calls[h.serial]
	switch {
	case call == nil:
		return false, nil
	case h.procedure != call.procedure:
		return false, fmt.Errorf("procedure %d is answered as %d of program %#x", call.number, h.number, h.program)
	case h.status == statusError:
		delete(c.calls, h.serial)
		if err := decodes(h.procedure, failure{}, payload); err != nil {
			return false, err
		}
		if binary.BigEndian.Uint32(payload) == 0 { // which go-libvirt would take for success
			return false, fmt.Errorf("procedure %d has failed with no error", h.number)
		}
		return true, nil
	case h.status == statusContinue && call.streaming:
		if len(payload) == 0 { // the end of the data
			delete(c.calls, h.serial)
		}
		return true, nil
	case h.status != statusOK:
		return false, fmt.Errorf("procedure %d is answered with status %d", h.number, h.status)
	case call.streaming: // all is confirmed
		delete(c.calls, h.serial)
		return true, nil
	case streams[h.procedure]:
		call.streaming = true
	default:
		delete(c.calls, h.serial)
	}
	return true, decodes(h.procedure, answers[h.procedure], payload)
}

// decodes returns an error unless payload holds all that a value like want is
// decoded from. nil is decoded from nothing.
func decodes(p procedure, want any, payload []byte) error {
	if want == nil {
		return nil
	}
	if _, ok := skip(reflect.TypeOf(want), payload); !ok {
		return fmt.Errorf("procedure %d: %d bytes hold no %T", p.number, len(payload), want)
	}
	return nil
}

// skip returns what follows a value of type t in data, and whether data holds
// one: all lengths in it are of what is there. It knows the types that libvirt's
// answers are made of. See https://www.rfc-editor.org/rfc/rfc4506.
func skip(t reflect.Type, data []byte) (rest []byte, ok bool) {
	switch t.Kind() {
	case reflect.Bool, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Uint8, reflect.Uint16, reflect.Uint32:
		return after(data, 4)
	case reflect.Int64, reflect.Uint64:
		return after(data, 8)
	case reflect.String:
		return afterCounted(data)
	case reflect.Array: // of bytes: there are no others
		return after(data, uint64(t.Len()))
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return afterCounted(data)
		}
		if len(data) < 4 {
			return nil, false
		}
		count := binary.BigEndian.Uint32(data)
		data, ok = data[4:], true
		for ; count > 0 && ok; count-- { // no element is empty
			data, ok = skip(t.Elem(), data)
		}
		return data, ok
	case reflect.Struct:
		ok = true
		for i := 0; i < t.NumField() && ok; i++ {
			data, ok = skip(t.Field(i).Type, data)
		}
		return data, ok
	}
	return nil, false
}

// afterCounted returns what follows bytes that their number precedes.
func afterCounted(data []byte) (rest []byte, ok bool) {
	if len(data) < 4 {
		return nil, false
	}
	return after(data[4:], uint64(binary.BigEndian.Uint32(data)))
}

// after returns what follows n bytes, which are filled up to a multiple of 4.
func after(data []byte, n uint64) (rest []byte, ok bool) {
	n = (n + 3) &^ 3
	if n > uint64(len(data)) {
		return nil, false
	}
	return data[n:], true
}
