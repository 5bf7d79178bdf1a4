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
	"muster/internal/fleet"
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
			if fleet.Is(err, fleet.Invalid) { // another start would not help, and could lock a token whose PIN is wrong
				return config.Errors{err.Error()}
			}
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

// initFlags are what musterd init was told.
type initFlags struct {
	dir, tokenFile         string
	names, roots, imported []string
	ifMissing, createKeys  bool
}

const initLong = `Makes everything that a new musterd needs, in an empty directory. The roots of its CA are made with it; take root.key and
spare-root.key away, musterd does not need them.

With roots on a machine of their own (muster ca root), it is done in two steps:
  musterd init --data-dir DIR --root-certs root.crt,spare-root.crt
  (sign DIR/init/device-ca.csr and server-ca.csr there)
  musterd init --data-dir DIR --import device-ca.crt,server-ca.crt

The keys of the CA's intermediates are encrypted files, or lie in a key manager: --set pki.device_key=URI --set pki.server_key=URI. With
--create-keys they are made there. The URIs go to the settings file.`

func initCommand(s *settings, out io.Writer) *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use: "init --data-dir DIR", Short: "make CA, certificates, secrets, the first admin token and the broker's configuration", Args: noArgs, Long: initLong,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.settings(s)
			if err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(c.DataDir, app.FileConfig)); err == nil && f.ifMissing {
				fmt.Fprintf(out, "%s holds a muster already: nothing to do\n", c.DataDir)
				return nil
			}
			if f.tokenFile != "" {
				if _, err := os.Lstat(f.tokenFile); err == nil {
					return fmt.Errorf("%s exists: name a new file for the token", f.tokenFile)
				}
			}
			if host, err := os.Hostname(); err == nil && len(f.names) == 0 {
				f.names = []string{host}
			}
			o := app.InitOptions{Names: f.names, CreateKeys: f.createKeys}
			if len(f.roots) > 0 {
				return f.prepare(cmd.Context(), c, o, out)
			}
			var made app.Made
			if len(f.imported) > 0 {
				made, err = app.ImportInit(cmd.Context(), c, f.imported)
			} else {
				made, err = app.InitWith(cmd.Context(), c, o)
			}
			if err != nil {
				return err
			}
			return f.tell(c, made, out)
		},
	}
	cmd.Flags().StringVar(&f.dir, "data-dir", "", "new directory for everything (default: data_dir of the settings)")
	cmd.Flags().StringSliceVar(&f.names, "name", nil, "DNS name or IP address of this machine, for the server certificates; may be repeated (default: the host name)")
	cmd.Flags().BoolVar(&f.ifMissing, "if-missing", false, "do nothing, and succeed, if the directory holds a muster already")
	cmd.Flags().StringVar(&f.tokenFile, "token-file", "", "write the admin token into this new file instead of showing it")
	cmd.Flags().StringSliceVar(&f.roots, "root-certs", nil, "begin with an offline root: files with the certificates of root and spare root")
	cmd.Flags().StringSliceVar(&f.imported, "import", nil, "end it: files with the certificates that the root signed")
	cmd.Flags().BoolVar(&f.createKeys, "create-keys", false, "make the keys that pki.device_key, pki.server_key and pki.audit_key name")
	cmd.MarkFlagsMutuallyExclusive("root-certs", "import")
	cmd.MarkFlagsMutuallyExclusive("create-keys", "import")
	cmd.MarkFlagsMutuallyExclusive("name", "import")
	return cmd
}

// settings loads the settings: those of the first step where this is the second.
func (f *initFlags) settings(s *settings) (config.Config, error) {
	sets := append([]string{}, s.sets...)
	if f.dir != "" {
		abs, err := filepath.Abs(f.dir)
		if err != nil {
			return config.Config{}, err
		}
		sets = append(sets, "data_dir="+abs)
	}
	c, err := config.Load(s.file, os.Environ(), sets)
	if err != nil || len(f.imported) == 0 {
		return c, err
	}
	pending, err := app.PendingConfig(c.DataDir)
	if err != nil {
		return c, err
	}
	return config.Load(pending, os.Environ(), sets)
}

func (f *initFlags) prepare(ctx context.Context, c config.Config, o app.InitOptions, out io.Writer) error {
	made, err := app.PrepareInit(ctx, c, o, f.roots)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "made the keys of the CA in %s; their certificates are missing\n", c.DataDir)
	for _, r := range made {
		fmt.Fprintf(out, "\n  request     %s\n  key sha256  %s   (compare it where it is signed)\n  sign it     muster ca root sign --root DIR --csr %s --profile %s --out %s.crt\n",
			r.File, r.KeyHash, filepath.Base(r.File), r.Profile, r.Profile)
	}
	fmt.Fprintf(out, "\nnext: musterd init --data-dir %s --import device-ca.crt,server-ca.crt\n", c.DataDir)
	return nil
}

func (f *initFlags) tell(c config.Config, made app.Made, out io.Writer) error {
	fmt.Fprintf(out, "made %s\n\n", c.DataDir)
	fmt.Fprintf(out, "  settings          %s\n", made.Config)
	if len(f.imported) > 0 {
		fmt.Fprintf(out, "  CA                %s   (its root is elsewhere)\n", c.Path(c.PKI.Dir))
	} else {
		fmt.Fprintf(out, "  CA                %s   (root.key and spare-root.key: keep them offline, musterd does not need them)\n", c.Path(c.PKI.Dir))
	}
	fmt.Fprintf(out, "  broker            %s   (RabbitMQ's whole configuration)\n", c.Path(c.Broker.ConfigDir))
	fmt.Fprintf(out, "  trust of clients  %s\n\n", filepath.Join(c.Path(c.PKI.Dir), "trust-bundle.pem"))
	if f.tokenFile != "" {
		if err := os.WriteFile(f.tokenFile, []byte(made.Token+"\n"), 0o600); err != nil {
			return err
		}
		fmt.Fprintf(out, "first admin token in %s\n", f.tokenFile)
	} else {
		fmt.Fprintf(out, "first admin token, shown this once:\n\n  %s\n", made.Token)
	}
	fmt.Fprintf(out, "\nnext: start RabbitMQ with that configuration, then musterd serve --config %s\n", made.Config)
	return nil
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
			"restart it after a change. RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=\"-ssl ssl_pem_cache_clean 2000\" has it\n" +
			"take over renewed certificates within seconds.",
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
