//go:build integration

package integration

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"libvirt-driver/integration/runner"
)

// call runs the driver as an administrator does: by hand, with nothing of the runner's in its environment.
func call(t *testing.T, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.Command(binary, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "NO_COLOR=1"}
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestCallsThatMakeNoSenseExitWith64AndSayWhere(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"", "prepare", "config", "cleanup", "run script step", "run", "no-such-command", "--no-such-flag", "prepare --no-such-flag", "list extra", "gc extra"} {
		t.Run(args, func(t *testing.T) {
			exit, stdout, stderr := call(t, strings.Fields(args)...)
			switch {
			case args == "":
				// The way to the help is the help.
				if exit != 0 || !strings.Contains(stdout, "COMMANDS:") {
					t.Errorf("exit code %d, %q, %q", exit, stdout, stderr)
				}
			case exit != 64 || stdout != "" || !strings.HasPrefix(stderr, "libvirt-driver: ") || !strings.Contains(stderr, "see libvirt-driver --help") ||
				strings.Count(stderr, "--help") != 1:
				t.Errorf("exit code %d, %q, %q", exit, stdout, stderr)
			}
		})
	}
}

func TestEveryCommandHasHelpThatFitsATerminal(t *testing.T) {
	t.Parallel()
	_, all, _ := call(t, "--help")
	for _, command := range []string{"config", "prepare", "run", "cleanup", "standby", "list", "gc", "doctor", "version"} {
		if !strings.Contains(all, "\n   "+command+" ") {
			t.Errorf("the driver's help has no command %s:\n%s", command, all)
		}
		exit, help, stderr := call(t, command, "--help")
		if exit != 0 || stderr != "" || !strings.Contains(help, "USAGE:") {
			t.Errorf("%s --help: exit code %d, %q, %q", command, exit, help, stderr)
		}
		if command != "version" && (!strings.Contains(help, "Exits with") || !strings.Contains(help, "Reads ")) {
			t.Errorf("%s --help does not say what it reads and exits with:\n%s", command, help)
		}
		for _, setting := range map[string][]string{
			"prepare": {"reserve_memory", "reserve_disk", "turn"},
			"cleanup": {"pools and networks", "timeouts.destroy"},
		}[command] {
			if !strings.Contains(help, setting) {
				t.Errorf("%s --help does not name %s:\n%s", command, setting, help)
			}
		}
		for line := range strings.Lines(all + help) {
			if columns := len(strings.TrimSuffix(line, "\n")); columns > 100 {
				t.Errorf("%s --help has a line of %d columns: %s", command, columns, line)
			}
		}
	}
	if exit, version, _ := call(t, "version"); exit != 0 || !strings.HasPrefix(version, "libvirt-driver ") {
		t.Errorf("version: exit code %d, %q", exit, version)
	}
}

func TestAStageThatIsCalledWithOtherArgumentsIsTheSystemsFailure(t *testing.T) {
	t.Parallel()
	cfg := newSettings(t, tiny("")).runner(t)
	cfg.Prepare = append(cfg.Prepare, "superfluous")
	ex := start(t, cfg, newJob(runner.Job{}))
	want(t, ex, ex.Prepare(t.Context()), 2, "called with 1 arguments, takes 0: see libvirt-driver prepare --help")
}

func TestTheSettingsFileMayBeNamedInTheEnvironmentAndMustExistThen(t *testing.T) {
	t.Parallel()
	s := newSettings(t, tiny("builds_dir = \"/srv/named-in-the-environment\""))
	cfg := s.runner(t)
	cfg.Commands = runner.Driver(binary)
	cfg.Env = append(cfg.Env, "LIBVIRT_DRIVER_CONFIG="+string(s))
	ex := start(t, cfg, newJob(runner.Job{}))
	if dir := ex.ProjectDir(); !strings.HasPrefix(dir, "/srv/named-in-the-environment/") {
		t.Errorf("the job's folder is %s", dir)
	}
	if err := os.Rename(string(s), string(s)+".away"); err != nil {
		t.Fatal(err)
	}
	want(t, ex, ex.Config(t.Context()), 2, string(s)+": cannot read the settings")
	if err := os.Rename(string(s)+".away", string(s)); err != nil {
		t.Fatal(err)
	}
}
