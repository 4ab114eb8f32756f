package hypervisor

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// Bounds of a packet of libvirt's protocol in bytes, its own length field
// included: a bare header, and the most that libvirt sends. See
// https://libvirt.org/kbase/internals/rpc.html.
const (
	minPacket = 28
	maxPacket = 32 << 20
)

// framedConn refuses packets of an impossible length. go-libvirt allocates what
// the length says, and panics when it is shorter than a header.
type framedConn struct {
	net.Conn
	head []byte // what is still to be delivered of a length field
	left int    // what is still to be read of the packet after it
}

func (c *framedConn) Read(p []byte) (int, error) {
	if len(c.head) == 0 && c.left == 0 {
		head := make([]byte, 4)
		if _, err := io.ReadFull(c.Conn, head); err != nil {
			return 0, err
		}
		length := binary.BigEndian.Uint32(head)
		if length < minPacket || length > maxPacket {
			return 0, fmt.Errorf("libvirtd sent a packet of %d bytes: %w", length, io.ErrUnexpectedEOF)
		}
		c.head, c.left = head, int(length)-len(head)
	}
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}
