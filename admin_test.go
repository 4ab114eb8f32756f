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

func TestMetricsTellWhichWayAMachineCame(t *testing.T) {
	var out strings.Builder
	if err := printMetrics(&out, []driver.Machine{
		{Job: 1, Image: "debian:12", Start: "boot", Disk: 3}, {Job: 2, Image: "debian:12", Start: "boot", Disk: 4},
		{Image: "debian:12", Start: "standby", Disk: 5}, {Job: 3, Image: "a\"\n", Start: "memory"},
	}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`libvirt_driver_machines{image="debian:12",start="boot",use="job"} 2`,
		`libvirt_driver_disk_bytes{image="debian:12",start="boot",use="job"} 7`,
		`libvirt_driver_machines{image="debian:12",start="standby",use="ready"} 1`,
		`libvirt_driver_machines{image="a\"\n",start="memory",use="job"} 1`,
	} {
		if !strings.Contains(out.String(), line+"\n") {
			t.Errorf("no line %s in\n%s", line, out.String())
		}
	}
}
