package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"libvirt-driver/driver"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/settings"
)

// The commands of an administrator. Tables and JSON go to standard output,
// everything else to standard error.

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "print JSON in place of a table"}

func listCommand() *cli.Command {
	return &cli.Command{
		Name:            "list",
		Usage:           "show the driver's machines on this host",
		UsageText:       "libvirt-driver [--config FILE] list [--json | --metrics]",
		Description:     listHelp,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		Flags: []cli.Flag{jsonFlag, &cli.BoolFlag{
			Name: "metrics", Usage: "print how many there are, for Prometheus, in place of a table",
		}},
		Action: onHost(func(c *cli.Context, host *driver.Host) error {
			machines, err := host.List(c.Context)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(os.Stdout, machines)
			}
			if c.Bool("metrics") {
				return printMetrics(os.Stdout, machines)
			}
			return printMachines(os.Stdout, machines)
		}),
	}
}

func gcCommand() *cli.Command {
	return &cli.Command{
		Name:            "gc",
		Usage:           "remove the machines whose jobs are over",
		UsageText:       "libvirt-driver [--config FILE] gc [--older-than AGE] [--dry-run] [--json]",
		Description:     gcHelp,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "older-than", Usage: "remove machines older than `AGE`, whatever they do", Value: 24 * time.Hour},
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be removed"},
			jsonFlag,
		},
		Action: onHost(func(c *cli.Context, host *driver.Host) error {
			age := c.Duration("older-than")
			if age < time.Minute {
				return fmt.Errorf("--older-than %v: jobs that run would lose their machines; give a minute or more", age)
			}
			collected, err := host.Collect(c.Context, age, c.Bool("dry-run"))
			if c.Bool("json") {
				if printed := printJSON(os.Stdout, collected); printed != nil {
					return printed
				}
				return err
			}
			for _, each := range collected {
				printCollection(os.Stdout, each, c.Bool("dry-run"))
			}
			return err
		}),
	}
}

func standbyCommand() *cli.Command {
	return &cli.Command{
		Name:            "standby",
		Usage:           "keep machines ready for jobs to come, as a service",
		UsageText:       "libvirt-driver [--config FILE] standby [--drain]",
		Description:     standbyHelp,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		Flags:           []cli.Flag{&cli.BoolFlag{Name: "drain", Usage: "remove the machines that stand ready, and exit"}},
		Action: onHost(func(c *cli.Context, host *driver.Host) error {
			if !c.Bool("drain") {
				return newMaker(host).KeepStandby(c.Context)
			}
			n, err := host.Drain(c.Context)
			fmt.Printf("removed %d machines that stood ready\n", n)
			return err
		}),
	}
}

// onHost makes the action of an administrator's command.
func onHost(do func(*cli.Context, *driver.Host) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.NArg() != 0 {
			return fmt.Errorf("%s takes no arguments", c.Command.Name)
		}
		configured, err := settings.Load(c.String("config"))
		if err != nil {
			return failed(c, fmt.Errorf("settings:\n%w", err))
		}
		host, err := newHost(configured, gitlab.NewLog(os.Stderr, true))
		if err != nil {
			return failed(c, err)
		}
		defer host.Hypervisor.Close()
		if err := do(c, host); err != nil {
			return failed(c, err)
		}
		return nil
	}
}

// failed reports why an administrator's command did not do what it should.
func failed(c *cli.Context, err error) error {
	fmt.Fprintf(os.Stderr, "libvirt-driver: %s: %s\n", c.Command.Name, gitlab.Harmless(err.Error()))
	return cli.Exit("", 1)
}

// printMachines prints machines as a table of at most 100 columns.
func printMachines(w io.Writer, machines []driver.Machine) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "JOB\tPROJECT\tIMAGE\tSTART\tAGE\tSTATE\tADDRESS\tDISK")
	for _, m := range machines {
		disk := "none"
		if m.Volume != "" {
			disk = settings.FormatSize(whole(m.Disk))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", number(m.Job), number(m.Project), dash(clip(m.Image, 18)), m.Start, age(m.Created),
			clip(m.State, 24), dash(clip(m.Address, 21)), disk)
	}
	return table.Flush()
}

// printMetrics prints how many machines there are of each kind, and what their
// disks take, in the format of
// https://prometheus.io/docs/instrumenting/exposition_formats/.
func printMetrics(w io.Writer, machines []driver.Machine) error {
	count, disk := map[string]int{}, map[string]uint64{}
	for _, m := range machines {
		use := "job"
		switch {
		case m.Job == 0 && m.Start == "memory":
			use = "saved"
		case m.Job == 0:
			use = "ready"
		}
		// Quote writes what the format's strings cannot hold in the ways that they have.
		kind := fmt.Sprintf("{image=%q,start=%q,use=%q}", gitlab.Harmless(m.Image), m.Start, use)
		count[kind]++
		disk[kind] += m.Disk
	}
	_, err := fmt.Fprint(w, "# HELP libvirt_driver_machines Machines on this host.\n# TYPE libvirt_driver_machines gauge\n")
	for _, kind := range slices.Sorted(maps.Keys(count)) {
		fmt.Fprintf(w, "libvirt_driver_machines%s %d\n", kind, count[kind])
	}
	fmt.Fprint(w, "# HELP libvirt_driver_disk_bytes What their disks take of the host's.\n# TYPE libvirt_driver_disk_bytes gauge\n")
	for _, kind := range slices.Sorted(maps.Keys(disk)) {
		_, err = fmt.Fprintf(w, "libvirt_driver_disk_bytes%s %d\n", kind, disk[kind])
	}
	return err
}

// whole drops what a size has beyond whole MiB, or KiB where it has no MiB.
func whole(size uint64) uint64 {
	if size < 1<<20 {
		return size &^ (1<<10 - 1)
	}
	return size &^ (1<<20 - 1)
}

func printCollection(w io.Writer, c driver.Collection, dryRun bool) {
	switch {
	case dryRun:
		fmt.Fprintf(w, "would remove %s: %s\n", c.Machine.Name, c.Why)
	case c.Removed:
		fmt.Fprintf(w, "removed %s: %s\n", c.Machine.Name, c.Why)
	}
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// age returns how long ago a machine was made, as people say it.
func age(made time.Time) string {
	d := time.Since(made)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// number shows an id of GitLab's, which are never 0.
func number(id int64) string {
	if id == 0 {
		return "-"
	}
	return strconv.FormatInt(id, 10)
}

func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func clip(text string, width int) string {
	if runes := []rune(text); len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return text
}
