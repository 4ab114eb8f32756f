package main

import (
	"strings"
	"testing"
	"time"

	"libvirt-driver/driver"
)

func TestADisksSizeIsShownInWholeUnits(t *testing.T) {
	for want, size := range map[string]uint64{
		"0 B": 1023, "1 KiB": 1024, "192 KiB": 196999, "1023 KiB": 1<<20 - 1, "1 MiB": 1 << 20, "301 MiB": 301<<20 + 999999,
	} {
		var table strings.Builder
		if err := printMachines(&table, []driver.Machine{{Volume: "v", Disk: size, Created: time.Now()}}); err != nil {
			t.Fatal(err)
		}
		if line := strings.TrimSpace(table.String()); !strings.HasSuffix(line, "  "+want) {
			t.Errorf("%d bytes: want %s in\n%s", size, want, line)
		}
	}
}
