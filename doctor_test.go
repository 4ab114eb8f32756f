package main

import (
	"os/exec"
	"strings"
	"testing"

	"libvirt-driver/driver/doctor"
)

func TestFindingsFitATerminalAndTheirRemediesCanBePasted(t *testing.T) {
	const remedy = "printf '%s,' 'two words' \\\n    more &&\necho done |\n    cat"
	findings := []doctor.Finding{
		{Check: "libvirt", Level: doctor.OK, Found: "libvirt 9.0.0, QEMU 7.2.22"},
		{Check: "volume", Subject: strings.Repeat("long", 20), Level: doctor.Failure, Found: strings.Repeat("some words ", 30), Remedy: remedy},
		{Check: "bridge", Subject: "default", Level: doctor.Warning, Found: "slow", Remedy: "true"},
		{Check: "space", Level: doctor.Failure, Found: "full"},
		{Check: "kvm", Level: doctor.Skipped, Found: "libvirt cannot be asked"},
	}
	var b strings.Builder
	for _, f := range findings {
		printFinding(&b, f)
	}
	printSummary(&b, findings)
	text := b.String()
	for line := range strings.Lines(text) {
		if columns := len([]rune(strings.TrimSuffix(line, "\n"))); columns > 100 {
			t.Errorf("a line of %d columns: %s", columns, line)
		}
	}
	for _, want := range []string{
		"ok       libvirt                    libvirt 9.0.0, QEMU 7.2.22\n",
		"failure  volume longlonglonglonglo… some words",
		"\n  printf '%s,' 'two words' \\\n      more &&\n  echo done |\n      cat\n\n",
		"\nskipped  kvm                        libvirt cannot be asked\n",
		"\n1 ok, 2 failures, 1 warning, 1 skipped\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the table lacks %q:\n%s", want, text)
		}
	}
	_, pasted, _ := strings.Cut(text, "\n  printf")
	pasted, _, _ = strings.Cut("  printf"+pasted, "\n\n")
	if out, err := exec.Command("bash", "-c", pasted).CombinedOutput(); err != nil || string(out) != "two words,more,done\n" {
		t.Errorf("what is pasted says %q, %v", out, err)
	}
}
