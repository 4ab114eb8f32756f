package driver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"libvirt-driver/driver/gitlab"
)

const (
	consoleLines = 30      // lines of a guest's console that a failure shows
	consoleBytes = 8 << 10 // bytes at the end of the console's log that are looked at
)

// showConsole puts the last that a guest wrote to its console into the job log.
func (h *Host) showConsole(machine string) {
	lines, err := tail(h.consoleLog(machine))
	switch {
	case err != nil:
		lines = []string{fmt.Sprintf("(cannot be read: %v)", err)}
	case len(lines) == 0:
		lines = []string{"(empty: does the guest have a console on its serial port? Linux: console=ttyS0)"}
	}
	h.Log.Section("guest_console", fmt.Sprintf("The last lines of the guest's console (%s)", machine), lines)
}

// tail returns the last lines of a console's log, made harmless.
func tail(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	text := make([]byte, min(info.Size(), consoleBytes))
	n, err := f.ReadAt(text, info.Size()-int64(len(text)))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	lines := printable(string(text[:n]))
	return lines[max(0, len(lines)-consoleLines):], nil
}

// printable returns the lines of a console that have text, without what is not:
// a guest writes what it likes.
func printable(text string) []string {
	var lines []string
	for line := range strings.SplitSeq(gitlab.Harmless(text), "\n") {
		if line = strings.TrimRight(line, " "); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// removeLogs removes what the host logged of a machine: its console's log, with
// the backups that virtlogd makes of a long one, and libvirt's own log of its
// QEMU. A driver that may not is no reason to fail: libvirt's log rotation has
// them too.
func (h *Host) removeLogs(machine string) error {
	var left []error
	for _, log := range []string{h.consoleLog(machine), qemuLog(machine)} {
		for _, suffix := range []string{"", ".0", ".1", ".2", ".3"} {
			err := os.Remove(log + suffix)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
				left = append(left, err)
			}
		}
	}
	return errors.Join(left...)
}
