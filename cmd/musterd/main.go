// Command musterd is the backend of a fleet of devices: broker admission, certificates, firmware, rollouts, recovery.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"muster/internal/app"
	"muster/internal/config"
	"muster/internal/obs"
)

// version is set by the linker.
var version = "dev"

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
	exitConfig = 78 // EX_CONFIG of sysexits.h: do not restart me before the settings were changed
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// usage marks errors of the command line.
type usage struct{ error }

func run(args []string, stdout, stderr io.Writer) int {
	root := command(stdout)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(context.Background())
	if err == nil {
		return 0
	}
	if lines, ok := errors.AsType[config.Errors](err); ok {
		for _, l := range lines {
			fmt.Fprintln(stderr, "error:", l)
		}
		return exitConfig
	}
	fmt.Fprintln(stderr, "error:", err)
	if _, ok := errors.AsType[usage](err); ok {
		return exitUsage
	}
	return exitFailed
}

// settings are the flags that every command has.
type settings struct {
	file string
	sets []string
}

func (s *settings) load() (config.Config, error) {
	file := s.file
	if file == "" {
		file = filepath.Join(config.Default().DataDir, app.FileConfig)
		if _, err := os.Stat(file); err != nil {
			file = "" // built-in defaults, environment and flags
		}
	}
	return config.Load(file, os.Environ(), s.sets)
}

func command(stdout io.Writer) *cobra.Command {
	var s settings
	root := &cobra.Command{
		Use: "musterd", Short: "backend of a fleet of devices", SilenceUsage: true, SilenceErrors: true, Version: version,
		Long: "musterd issues and renews device certificates, decides every login at the broker, serves firmware and rolls it out.\n" +
			"Start with: musterd init --data-dir DIR, then run RabbitMQ with DIR/broker, then musterd serve --config DIR/musterd.yaml",
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage{err} })
	root.PersistentFlags().StringVarP(&s.file, "config", "c", "", "settings file (default: musterd.yaml in /var/lib/muster, if it exists)")
	root.PersistentFlags().StringArrayVar(&s.sets, "set", nil, "setting in place of the file's, key=value; may be repeated")
	root.AddCommand(serveCommand(&s), initCommand(&s, stdout), configCommand(&s, stdout), brokerConfigCommand(&s, stdout),
		fsckCommand(&s, stdout), healthCommand(&s, stdout), backupCommand(&s, stdout), restoreCommand(&s, stdout))
	return root
}

// stopTime is how long requests and batches under way may take after a signal.
const stopTime = 25 * time.Second

func serveCommand(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "serve", Short: "run the service until SIGTERM or Ctrl-C", Args: noArgs,
		Long: "Runs the service. SIGUSR1 writes a consistent copy of the store into the data directory while it runs. SIGHUP takes\n" +
			"over the files of server certificates and of trusted CAs at once; it looks at them each minute anyway.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			if err := c.CheckSecrets(); err != nil {
				return err
			}
			log := obs.Logger(os.Stderr, c.Log.Level, c.Log.Format)
			a, err := app.New(c, version, log)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			copies := make(chan os.Signal, 1)
			signal.Notify(copies, syscall.SIGUSR1)
			defer signal.Stop(copies)
			reloads := make(chan os.Signal, 1)
			signal.Notify(reloads, syscall.SIGHUP)
			defer signal.Stop(reloads)
			if err := a.Start(); err != nil {
				return errors.Join(err, a.Stop(context.Background()))
			}
			addrs := a.Addrs()
			log.Info("musterd serves", "version", version, "ops", addrs.Ops, "devices", addrs.Devices, "recovery", addrs.Recovery, "broker_auth", addrs.BrokerAuth)
			for ctx.Err() == nil {
				select {
				case <-ctx.Done():
				case <-reloads:
					a.ReloadCertificates()
				case <-copies:
					to := c.Path("muster-" + time.Now().UTC().Format("20060102T150405Z") + ".backup")
					n, err := a.BackupNow(ctx, to)
					log.Info("backup", "file", to, "bytes", n, "error", err)
				}
			}
			stop() // a second Ctrl-C ends at once
			log.Info("musterd stops")
			within, cancel := context.WithTimeout(context.Background(), stopTime)
			defer cancel()
			return a.Stop(within)
		},
	}
}

func initCommand(s *settings, out io.Writer) *cobra.Command {
	var dir, tokenFile string
	var names []string
	var ifMissing bool
	cmd := &cobra.Command{
		Use: "init --data-dir DIR", Short: "make CA, certificates, secrets, the first admin token and the broker's configuration", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sets := append([]string{}, s.sets...)
			if dir != "" {
				abs, err := filepath.Abs(dir)
				if err != nil {
					return err
				}
				sets = append(sets, "data_dir="+abs)
			}
			c, err := config.Load(s.file, os.Environ(), sets)
			if err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(c.DataDir, app.FileConfig)); err == nil && ifMissing {
				fmt.Fprintf(out, "%s holds a muster already: nothing to do\n", c.DataDir)
				return nil
			}
			if tokenFile != "" {
				if _, err := os.Lstat(tokenFile); err == nil {
					return fmt.Errorf("%s exists: name a new file for the token", tokenFile)
				}
			}
			if host, err := os.Hostname(); err == nil && len(names) == 0 {
				names = []string{host}
			}
			made, err := app.Init(cmd.Context(), c, names)
			if err != nil {
				return err
			}
			fmt.Fprintf(out, "made %s\n\n", c.DataDir)
			fmt.Fprintf(out, "  settings          %s\n", made.Config)
			fmt.Fprintf(out, "  CA                %s   (root.key and spare-root.key: keep them offline, musterd does not need them)\n", c.Path(c.PKI.Dir))
			fmt.Fprintf(out, "  broker            %s   (RabbitMQ's whole configuration)\n", c.Path(c.Broker.ConfigDir))
			fmt.Fprintf(out, "  trust of clients  %s\n\n", filepath.Join(c.Path(c.PKI.Dir), "trust-bundle.pem"))
			if tokenFile != "" {
				if err := os.WriteFile(tokenFile, []byte(made.Token+"\n"), 0o600); err != nil {
					return err
				}
				fmt.Fprintf(out, "first admin token in %s\n", tokenFile)
			} else {
				fmt.Fprintf(out, "first admin token, shown this once:\n\n  %s\n", made.Token)
			}
			fmt.Fprintf(out, "\nnext: start RabbitMQ with that configuration, then musterd serve --config %s\n", made.Config)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "data-dir", "", "new directory for everything (default: data_dir of the settings)")
	cmd.Flags().StringSliceVar(&names, "name", nil, "DNS name or IP address of this machine, for the server certificates; may be repeated (default: the host name)")
	cmd.Flags().BoolVar(&ifMissing, "if-missing", false, "do nothing, and succeed, if the directory holds a muster already")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "write the admin token into this new file instead of showing it")
	return cmd
}

func configCommand(s *settings, out io.Writer) *cobra.Command {
	parent := &cobra.Command{Use: "config", Short: "look at the settings", Args: noArgs}
	parent.AddCommand(&cobra.Command{
		Use: "check", Short: "check the settings and print what is in force; secrets are not shown", Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			c.Show(out)
			return c.CheckSecrets()
		},
	})
	return parent
}

func brokerConfigCommand(s *settings, out io.Writer) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "broker-config", Short: "render RabbitMQ's whole configuration from the settings", Args: noArgs,
		Long: "Renders rabbitmq.conf, advanced.config, enabled_plugins and definitions.json. Run RabbitMQ with\n" +
			"RABBITMQ_CONFIG_FILE, RABBITMQ_ADVANCED_CONFIG_FILE and RABBITMQ_ENABLED_PLUGINS_FILE pointing at them, and\n" +
			"restart it after a change.",
		RunE: func(*cobra.Command, []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			if dir == "" {
				dir = c.Path(c.Broker.ConfigDir)
			}
			files, err := app.WriteBrokerConfig(&c, dir)
			for _, f := range files {
				fmt.Fprintln(out, f)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "out", "", "folder to write to (default: broker.config_dir)")
	return cmd
}

func fsckCommand(s *settings, out io.Writer) *cobra.Command {
	return &cobra.Command{
		Use: "fsck", Short: "check the store of a stopped musterd", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			found, err := app.Fsck(cmd.Context(), c)
			if err != nil {
				return err
			}
			for _, f := range found {
				fmt.Fprintln(out, f)
			}
			if len(found) > 0 {
				return fmt.Errorf("%d findings: restore a backup, or report them", len(found))
			}
			fmt.Fprintln(out, "the store is sound")
			return nil
		},
	}
}

func backupCommand(s *settings, out io.Writer) *cobra.Command {
	return &cobra.Command{
		Use: "backup FILE", Short: "copy the store of a stopped musterd into a new file (a running one: SIGUSR1)", Args: exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			n, err := app.Backup(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(out, "%s: %d bytes, checked\n", args[0], n)
			return nil
		},
	}
}

func restoreCommand(s *settings, out io.Writer) *cobra.Command {
	return &cobra.Command{
		Use: "restore FILE", Short: "put a backup in place of the store of a stopped musterd", Args: exactArgs(1),
		Long: "Puts a checked backup in place of the store. Revocations made since the backup are not in it: make them again before\n" +
			"devices come back.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			kept, err := app.Restore(cmd.Context(), c, args[0], time.Now())
			if err != nil {
				return err
			}
			fmt.Fprintln(out, "restored")
			if kept != "" {
				fmt.Fprintln(out, "the store that was there:", kept)
			}
			return nil
		},
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usage{err}
	}
	return nil
}

func exactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(n)(cmd, args); err != nil {
			return usage{err}
		}
		return nil
	}
}
