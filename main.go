// Command libvirt-driver runs each job of GitLab Runner's Custom executor in a
// libvirt virtual machine of its own.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"libvirt-driver/driver"
	"libvirt-driver/driver/gitlab"
	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// version is stamped by the release build.
var version = "devel"

// usageFailure is the exit code for a command line that makes no sense, and for
// a stage that is not called by GitLab Runner. The runner takes it, like every
// code that it did not ask for, as a failure of the system.
const usageFailure = 64

func main() {
	// A reader that goes away is an error of the write, not the driver's end: the
	// script in the guest is still to be ended.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	code := run(ctx, os.Args)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	err := app().RunContext(ctx, args)
	var exit cli.ExitCoder
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	fmt.Fprintf(os.Stderr, "libvirt-driver: %v: see libvirt-driver --help\n", err)
	return usageFailure
}

func app() *cli.App {
	return &cli.App{
		Name:            "libvirt-driver",
		Usage:           "run each GitLab CI job in a fresh libvirt virtual machine",
		UsageText:       "libvirt-driver [--config FILE] COMMAND [ARGUMENTS]",
		Description:     description,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		HideVersion:     true,
		Flags: []cli.Flag{&cli.StringFlag{
			Name:    "config",
			Usage:   "settings `FILE`, if not " + settings.DefaultPath,
			EnvVars: []string{"LIBVIRT_DRIVER_CONFIG"},
		}},
		Commands: []*cli.Command{
			command("config", "tell GitLab Runner how to use the driver (config_exec)", "", configHelp,
				func(_ context.Context, s *driver.Stage, _ []string) error { return s.Config(os.Stdout) }),
			command("prepare", "make the job's machine and wait until it can run scripts (prepare_exec)", "", prepareHelp,
				func(ctx context.Context, s *driver.Stage, _ []string) error { return s.Prepare(ctx) }),
			command("run", "run a script in the job's machine (run_exec)", "SCRIPT SUBSTAGE", runHelp,
				func(ctx context.Context, s *driver.Stage, args []string) error { return s.Run(ctx, args[0]) }),
			command("cleanup", "remove the job's machine and all that belongs to it (cleanup_exec)", "", cleanupHelp,
				func(ctx context.Context, s *driver.Stage, _ []string) error { return s.Cleanup(ctx) }),
			keepCommand(),
			finishCommand(),
			standbyCommand(),
			listCommand(),
			gcCommand(),
			doctorCommand(),
			{
				Name:            "version",
				Usage:           "print the driver's version",
				HideHelpCommand: true,
				OnUsageError:    usageError,
				Action: func(*cli.Context) error {
					fmt.Println("libvirt-driver", version)
					return nil
				},
			},
		},
		CommandNotFound: func(c *cli.Context, name string) {
			fmt.Fprintf(os.Stderr, "libvirt-driver: there is no command %q: see libvirt-driver --help\n", name)
			os.Exit(usageFailure)
		},
		// Errors are reported once, by the code that knows what they mean.
		ExitErrHandler: func(*cli.Context, error) {},
	}
}

// usageError keeps a wrong flag from being answered with a screenful of help.
func usageError(_ *cli.Context, err error, _ bool) error { return err }

// command makes the command of a stage. It is the one place where an error
// becomes an exit code.
func command(name, usage, argsUsage, help string, do stage) *cli.Command {
	return &cli.Command{
		Name:            name,
		Usage:           usage,
		UsageText:       strings.TrimSpace("libvirt-driver [--config FILE] " + name + " " + argsUsage),
		ArgsUsage:       argsUsage,
		Description:     help,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		Action: func(c *cli.Context) error {
			environment, err := gitlab.ReadEnvironment(os.Environ())
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			log := gitlab.NewLog(os.Stderr, os.Getenv("NO_COLOR") != "")
			err = perform(c, environment, log, do)
			if err == nil {
				return nil
			}
			code, unsaid := environment.Exit(err)
			// A script has had its own say, and the runner reports its exit code.
			if !gitlab.IsScriptFailure(err) || unsaid != nil {
				log.Error(fmt.Errorf("%s: %w", name, errors.Join(err, unsaid)))
			}
			return cli.Exit("", code)
		},
	}
}

// stage is what a command does, given its arguments.
type stage func(context.Context, *driver.Stage, []string) error

// perform puts a stage together and runs it.
func perform(c *cli.Context, environment *gitlab.Environment, log *gitlab.Log, do stage) error {
	if want := len(strings.Fields(c.Command.ArgsUsage)); c.NArg() != want {
		return fmt.Errorf("called with %d arguments, takes %d: see libvirt-driver %s --help", c.NArg(), want, c.Command.Name)
	}
	if err := environment.ClearExitCode(); err != nil {
		return err
	}
	configured, err := settings.Load(c.String("config"))
	if err != nil {
		return fmt.Errorf("settings:\n%w", err)
	}
	host, err := newHost(configured, log)
	if err != nil {
		return err
	}
	defer host.Hypervisor.Close()
	stage := &driver.Stage{Maker: *newMaker(host), Environment: environment, Stdout: os.Stdout, Stderr: os.Stderr}
	if configured.EarlyCleanup {
		stage.StartFinisher = driver.StartFinisher
	}
	return do(c.Context, stage, c.Args().Slice())
}

// keepCommand is for the prepare stage alone to call.
func keepCommand() *cli.Command {
	return &cli.Command{
		Name:      "keep",
		Hidden:    true,
		UsageText: "libvirt-driver keep DIR DOMAIN",
		Action: func(c *cli.Context) error {
			if c.NArg() != 2 {
				return errors.New("keep is for the driver itself to call")
			}
			return driver.Keep(c.Context, c.Args().Get(0), c.Args().Get(1), os.Stdin, os.Stdout)
		},
	}
}

// finishCommand is for the cleanup stage alone to call.
func finishCommand() *cli.Command {
	return &cli.Command{
		Name:      "finish",
		Hidden:    true,
		UsageText: "libvirt-driver finish MACHINE",
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return errors.New("finish is for the driver itself to call")
			}
			var configured settings.Settings
			if err := json.NewDecoder(os.Stdin).Decode(&configured); err != nil {
				return fmt.Errorf("finish: read the settings that cleanup hands on: %w", err)
			}
			host, err := newHost(&configured, gitlab.NewLog(io.Discard, true))
			if err != nil {
				return err
			}
			defer host.Hypervisor.Close()
			return host.Finish(c.Context, c.Args().First())
		},
	}
}

// newMaker returns what makes machines on a host.
func newMaker(host *driver.Host) *driver.Maker {
	maker := &driver.Maker{
		Host: *host,
		Connect: func(ctx context.Context, target sshexec.Target) (driver.Shell, error) {
			return sshexec.Dial(ctx, target)
		},
		ConnectRelay: func(ctx context.Context, path, token string) (driver.Shell, error) {
			return sshexec.DialRelay(ctx, path, token)
		},
	}
	if host.Settings.KeepConnection {
		maker.StartKeeper = driver.StartKeeper
	}
	return maker
}

// newHost returns the host as the settings have it. Nothing is dialled yet.
func newHost(configured *settings.Settings, log *gitlab.Log) (*driver.Host, error) {
	locks, err := driver.LockDir()
	if err != nil {
		return nil, err
	}
	connection := hypervisor.New(configured.URI, configured.Socket)
	connection.Away = func(err error) { log.Note("waiting for libvirtd: %v", err) }
	return &driver.Host{
		Settings:   configured,
		Hypervisor: connection,
		LockDir:    locks,
		Version:    version,
		Log:        log,
	}, nil
}
