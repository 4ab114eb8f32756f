package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"libvirt-driver/driver"
	"libvirt-driver/driver/doctor"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// onlyWarnings is doctor's exit code when jobs run, but something is not as it
// should be.
const onlyWarnings = 2

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:            "doctor",
		Usage:           "check this host from libvirt's socket to the inside of a guest",
		UsageText:       "libvirt-driver [--config FILE] doctor [--boot IMAGE] [--concurrent N] [--json]",
		Description:     doctorHelp,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "boot", Usage: "boot a guest of `IMAGE`, look at it from within, and remove it"},
			&cli.IntFlag{Name: "concurrent", Usage: "count with `N` jobs at once", DefaultText: "concurrent of GitLab Runner"},
			jsonFlag,
		},
		Action: func(c *cli.Context) error {
			switch {
			case c.NArg() != 0:
				return fmt.Errorf("doctor takes no arguments: see libvirt-driver doctor --help")
			case c.IsSet("concurrent") && c.Int("concurrent") < 1:
				return fmt.Errorf("--concurrent %d: give 1 or more", c.Int("concurrent"))
			case c.IsSet("boot") && c.String("boot") == "":
				return fmt.Errorf("--boot: name an image")
			}
			return examine(c)
		},
	}
}

// examine lets the doctor see the host, and prints what comes of it.
func examine(c *cli.Context) error {
	locks, err := driver.LockDir()
	if err != nil {
		return failed(c, err)
	}
	findings := []doctor.Finding{}
	d := &doctor.Doctor{
		Config:     c.String("config"),
		Concurrent: c.Int("concurrent"),
		Boot:       c.String("boot"),
		Open: func(s *settings.Settings) doctor.Hypervisor {
			return hypervisor.New(s.URI, s.Socket)
		},
		Connect: func(ctx context.Context, target sshexec.Target) (driver.Shell, error) {
			return sshexec.Dial(ctx, target)
		},
		LockDir: locks,
		Log:     gitlab.NewLog(os.Stderr, true),
		Report: func(found doctor.Finding) {
			findings = append(findings, found)
			if !c.Bool("json") {
				printFinding(os.Stdout, found)
			}
		},
	}
	worst, err := d.Examine(c.Context)
	if c.Bool("json") {
		if printed := printJSON(os.Stdout, findings); printed != nil {
			return failed(c, printed)
		}
	}
	if err != nil {
		return failed(c, err)
	}
	if !c.Bool("json") {
		printSummary(os.Stdout, findings)
	}
	switch worst {
	case doctor.Failure:
		return cli.Exit("", 1)
	case doctor.Warning:
		return cli.Exit("", onlyWarnings)
	}
	return nil
}

const (
	findingWidth  = 100 // columns of a terminal
	findingIndent = 36  // columns before what was found
)

// printFinding prints one finding: how it is, what was looked at, and what is
// so; below it the commands that mend it, as they can be pasted.
func printFinding(w io.Writer, f doctor.Finding) {
	name := f.Check
	if f.Subject != "" {
		name += " " + f.Subject
	}
	head := fmt.Sprintf("%-8s %-26s ", f.Level, clip(name, 26))
	for _, line := range wrap(f.Found, findingWidth-findingIndent) {
		fmt.Fprintln(w, strings.TrimRight(head+line, " "))
		head = strings.Repeat(" ", findingIndent)
	}
	if f.Remedy == "" {
		return
	}
	for line := range strings.SplitSeq(f.Remedy, "\n") {
		fmt.Fprintln(w, "  "+line)
	}
	fmt.Fprintln(w)
}

// printSummary prints what all findings together say.
func printSummary(w io.Writer, findings []doctor.Finding) {
	n := map[doctor.Level]int{}
	for _, f := range findings {
		n[f.Level]++
	}
	parts := []string{fmt.Sprintf("%d ok", n[doctor.OK])}
	for _, level := range []doctor.Level{doctor.Failure, doctor.Warning, doctor.Skipped} {
		switch {
		case n[level] == 1 || n[level] > 0 && level == doctor.Skipped:
			parts = append(parts, fmt.Sprintf("%d %s", n[level], level))
		case n[level] > 0:
			parts = append(parts, fmt.Sprintf("%d %ss", n[level], level))
		}
	}
	fmt.Fprintln(w, strings.Join(parts, ", "))
}

// wrap breaks text between words into lines of at most width columns; a longer
// word has a line of its own.
func wrap(text string, width int) []string {
	lines := []string{""}
	for _, word := range strings.Fields(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case len([]rune(*last))+1+len([]rune(word)) > width:
			lines = append(lines, word)
		default:
			*last += " " + word
		}
	}
	return lines
}
