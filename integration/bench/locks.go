package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watchLocks counts the driver's locks again and again until end is called, which
// returns how many were held at a time, at most.
func watchLocks() (end func() int) {
	const often = 20 * time.Millisecond
	over, done := make(chan struct{}), make(chan int)
	go func() {
		for most := 0; ; {
			most = max(most, countLocks(records))
			select {
			case <-over:
				done <- most
				return
			case <-time.After(often):
			}
		}
	}()
	return func() int {
		close(over)
		return <-done
	}
}

// countLocks counts the locks of flock(2) on files of a folder's file system. On
// a host of the bench's own nobody but the driver has any there.
//
// https://man7.org/linux/man-pages/man5/proc_locks.5.html
func countLocks(folder string) (n int) {
	info, err := os.Stat(folder)
	if err != nil {
		return 0 // nothing has made it yet
	}
	stat := info.Sys().(*syscall.Stat_t)
	device := fmt.Sprintf(" %02x:%02x:", unix.Major(stat.Dev), unix.Minor(stat.Dev))
	table, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(table)) {
		if strings.Contains(line, " FLOCK ") && strings.Contains(line, device) {
			n++
		}
	}
	return n
}
