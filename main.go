// Command libvirt-driver runs each job of GitLab Runner's Custom executor in a
// libvirt virtual machine of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
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
		HideVersion:     true,
		Flags: []cli.Flag{&cli.StringFlag{
			Name:    "config",
			Usage:   "read settings from `FILE`; without it from " + settings.DefaultPath + ", which may be missing",
			EnvVars: []string{"LIBVIRT_DRIVER_CONFIG"},
		}},
		Commands: []*cli.Command{
			{
				Name:        "config",
				Usage:       "tell GitLab Runner how to use the driver (config_exec)",
				Description: configHelp,
				Action:      stage("config", 0, func(c *cli.Context, s *driver.Stage) error { return s.Config(os.Stdout) }),
			},
			{
				Name:        "prepare",
				Usage:       "make the job's machine and wait until it can run scripts (prepare_exec)",
				Description: prepareHelp,
				Action:      stage("prepare", 0, func(c *cli.Context, s *driver.Stage) error { return s.Prepare(c.Context) }),
			},
			{
				Name:        "run",
				Usage:       "run a script in the job's machine (run_exec)",
				ArgsUsage:   "SCRIPT SUBSTAGE",
				Description: runHelp,
				Action:      stage("run", 2, func(c *cli.Context, s *driver.Stage) error { return s.Run(c.Context, c.Args().First()) }),
			},
			{
				Name:        "cleanup",
				Usage:       "remove the job's machine and all that belongs to it (cleanup_exec)",
				Description: cleanupHelp,
				Action:      stage("cleanup", 0, func(c *cli.Context, s *driver.Stage) error { return s.Cleanup(c.Context) }),
			},
			{
				Name:  "version",
				Usage: "print the driver's version",
				Action: func(c *cli.Context) error {
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

// stage makes the action of a stage's command. It is the one place where an
// error becomes an exit code.
func stage(name string, args int, do func(*cli.Context, *driver.Stage) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		log := gitlab.NewLog(os.Stderr, os.Getenv("NO_COLOR") != "")
		fail := func(code int, err error) error {
			log.Error(fmt.Errorf("%s: %w", name, err))
			return cli.Exit("", code)
		}
		environment, err := gitlab.ReadEnvironment(os.Environ())
		if err != nil {
			return fail(usageFailure, err)
		}
		if c.NArg() != args {
			return fail(environment.SystemFailure, fmt.Errorf("called with %d arguments, takes %d: see libvirt-driver %s --help",
				c.NArg(), args, name))
		}
		err = perform(c, environment, log, do)
		if err == nil {
			return nil
		}
		code, unsaid := environment.Exit(err)
		return fail(code, errors.Join(err, unsaid))
	}
}

// perform puts a stage together and runs it.
func perform(c *cli.Context, environment *gitlab.Environment, log *gitlab.Log, do func(*cli.Context, *driver.Stage) error) error {
	if err := environment.ClearExitCode(); err != nil {
		return err
	}
	configured, err := settings.Load(c.String("config"))
	if err != nil {
		return fmt.Errorf("settings:\n%w", err)
	}
	connection := hypervisor.New(configured.URI, configured.Socket)
	defer connection.Close()
	return do(c, &driver.Stage{
		Settings:    configured,
		Environment: environment,
		Hypervisor:  connection,
		Connect: func(ctx context.Context, target sshexec.Target) (driver.Shell, error) {
			return sshexec.Dial(ctx, target)
		},
		Log:     log,
		Stdout:  os.Stdout,
		Stderr:  os.Stderr,
		Version: version,
	})
}
