package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Noticed tells, until ctx ends, whenever this host's kernel learns something of a
// MAC address: a bridge that its guest has sent its first packet, or the ARP table
// its address. What comes while nobody receives is told as one. Where the guests'
// networks are not this process's nothing comes.
//
// https://man7.org/linux/man-pages/man7/rtnetlink.7.html
func (c *Connection) Noticed(ctx context.Context, mac string) (<-chan struct{}, error) {
	hardware, err := net.ParseMAC(mac)
	if err != nil {
		return nil, wrap(err, "look out for %s", mac)
	}
	number, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, wrap(os.NewSyscallError("socket", err), "look out for %s", mac)
	}
	socket := os.NewFile(uintptr(number), "netlink")
	if err := unix.Bind(number, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_NEIGH}); err != nil {
		socket.Close()
		return nil, wrap(os.NewSyscallError("bind", err), "look out for %s", mac)
	}
	context.AfterFunc(ctx, func() { socket.Close() })
	told := make(chan struct{}, 1)
	go func() {
		message := make([]byte, 8<<10)
		for {
			n, err := socket.Read(message)
			// A message that was lost for want of room may have been the one.
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			if err != nil || bytes.Contains(message[:n], hardware) {
				select {
				case told <- struct{}{}:
				default:
				}
			}
		}
	}()
	return told, nil
}
