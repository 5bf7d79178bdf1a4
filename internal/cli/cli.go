// Package cli is the muster command: what operators type. It speaks only REST, through internal/client; what works
// without a server (keys, signatures) is done on the spot.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"muster/internal/client"
	"muster/internal/fleet"
)

// Exit codes. They are printed by muster --help.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitRefused     = 4
	exitConflict    = 5
	exitUnavailable = 6
	exitOutcome     = 7
	exitInterrupted = 130
)

const exitCodes = `Exit codes:
  0    done
  1    failed; device why: something blocks the device; certs renew: somebody needs attention;
       audit verify: the trail is broken
  2    wrong usage, or a request that musterd found wrong; certs renew: the pass could not be made; audit verify: it
       could not be judged
  3    there is no such thing
  4    refused: no token, a wrong one, or one without the right
  5    conflict: the thing is in another state than the command supposes
  6    musterd cannot be reached, or is too busy; try later
  7    the rollout that was watched was halted, aborted or rolled back
  130  interrupted`

// Env is what a command gets from outside.
type Env struct {
	Args   []string // without the program's name
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Getenv func(string) string
	Now    func() time.Time // nil: time.Now
	// Terminal makes Stdout and Stderr count as terminals of that width; 0: find out.
	Terminal int
}

// outcome is the error of a command that did its work and has bad news.
type outcome struct{ msg string }

func (o *outcome) Error() string { return o.msg }

// usage is the error of a command that was called wrongly.
type usage struct{ msg string }

func (u *usage) Error() string { return u.msg }

func usagef(format string, a ...any) error { return &usage{fmt.Sprintf(format, a...)} }

// Run runs one command and returns its exit code.
func Run(ctx context.Context, env Env) int {
	a := newApp(env)
	root := a.root()
	root.SetArgs(env.Args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		a.ui.note("interrupted")
		return exitInterrupted
	}
	if errors.Is(err, errBlocked) {
		return exitFailed
	}
	code, hints := judge(err, cmd)
	if v, ok := errors.AsType[*ending](err); ok {
		code = v.code
		if v.quiet {
			return code
		}
	}
	a.ui.fail(err, hints)
	return code
}

// judge gives an error its exit code, and what to do about it.
func judge(err error, cmd *cobra.Command) (code int, hints []string) {
	if e, ok := errors.AsType[*client.Error](err); ok {
		return judgeProblem(e)
	}
	if _, ok := errors.AsType[*client.Unreachable](err); ok {
		return exitUnavailable, []string{"is musterd running, and are --url and --ca right? see muster config"}
	}
	if _, ok := errors.AsType[*outcome](err); ok {
		return exitOutcome, nil
	}
	if _, ok := errors.AsType[*noLogin](err); ok {
		return exitRefused, []string{"run muster login, or set MUSTER_URL and MUSTER_TOKEN"}
	}
	if e, ok := errors.AsType[*fleet.Error](err); ok { // of work that is done on the spot
		switch e.Kind {
		case fleet.Invalid, fleet.Unprocessable:
			return exitUsage, nil
		case fleet.NotFound:
			return exitNotFound, nil
		case fleet.Conflict:
			return exitConflict, nil
		}
		return exitFailed, nil
	}
	_, wrong := errors.AsType[*usage](err)
	if text := err.Error(); wrong || cobraUsage(text) {
		return exitUsage, []string{"see " + cmd.CommandPath() + " --help"}
	}
	return exitFailed, nil
}

func judgeProblem(e *client.Error) (int, []string) {
	var id []string
	if e.Status >= 500 && e.RequestID != "" {
		id = []string{"the log of musterd knows this as request " + clean(e.RequestID)}
	}
	switch e.Status {
	case http.StatusNotFound:
		return exitNotFound, nil
	case http.StatusUnauthorized:
		return exitRefused, []string{"run muster login with a token that works"}
	case http.StatusForbidden:
		return exitRefused, nil
	case http.StatusConflict, http.StatusPreconditionFailed:
		return exitConflict, nil
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return exitUnavailable, id
	case http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusRequestEntityTooLarge:
		return exitUsage, nil
	}
	return exitFailed, id
}

// cobraUsage recognises cobra's own complaints, which have no type.
func cobraUsage(s string) bool {
	for _, p := range []string{"unknown command", "unknown flag", "unknown shorthand", "required flag", "invalid argument", "flag needs an argument", "accepts ", "requires at least", "bad flag syntax", "if any flags in the group", "at least one of the flags"} {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

// app is one invocation.
type app struct {
	env    Env
	ui     *ui
	flags  struct{ url, ca, tokenFile, output string }
	client *client.Client // after connect
}

func newApp(env Env) *app {
	if env.Now == nil {
		env.Now = time.Now
	}
	u := &ui{out: env.Stdout, err: env.Stderr, now: env.Now, width: 80, colour: env.Getenv("NO_COLOR") == "" && env.Getenv("TERM") != "dumb"}
	u.tty, u.width = terminal(env.Stdout, env.Terminal)
	u.size = func() (int, int) { return terminalSize(env.Stdout, env.Terminal) }
	u.errTTY, _ = terminal(env.Stderr, env.Terminal)
	return &app{env: env, ui: u}
}

func terminal(w io.Writer, forced int) (bool, int) {
	if forced > 0 {
		return true, forced
	}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return false, 80
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil || width < 40 {
		width = 80
	}
	return true, width
}

// terminalSize is the size at this moment, columns and rows: a person may change it at any time.
func terminalSize(w io.Writer, forced int) (width, height int) {
	if f, ok := w.(*os.File); ok && forced == 0 {
		if width, height, err := term.GetSize(int(f.Fd())); err == nil && width >= 20 && height >= 3 {
			return width, height
		}
	}
	return cmp.Or(forced, 80), 24
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "muster",
		Short: "steer a fleet of devices: certificates, firmware, rollouts",
		Long: `muster speaks to musterd, the backend of a device fleet, over its REST API.

It finds musterd by flags, then by MUSTER_URL, MUSTER_CA and MUSTER_TOKEN or MUSTER_TOKEN_FILE, then by what
muster login wrote.

` + exitCodes,
		SilenceErrors: true, SilenceUsage: true, Version: version(),
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch a.flags.output {
			case "table":
			case "json":
				a.ui.json = true
			default:
				return usagef("--output is table or json")
			}
			return nil
		},
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	f := root.PersistentFlags()
	f.StringVar(&a.flags.url, "url", "", "where musterd is, https://host:port")
	f.StringVar(&a.flags.ca, "ca", "", "file with the certificates, PEM, that musterd is checked against")
	f.StringVar(&a.flags.tokenFile, "token-file", "", "file with the token")
	f.StringVarP(&a.flags.output, "output", "o", "table", "table or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usage{err.Error()} })
	root.AddCommand(a.deviceCmd(), a.provisionCmd(), a.targetCmd(), a.certsCmd(), a.serverCertsCmd(), a.expiriesCmd(), a.firmwareCmd(), a.rolloutCmd(), a.trustCmd(), a.rotationCmd(), a.caCmd(), a.recoveryCmd(), a.quarantineCmd(),
		a.tokenCmd(), a.auditCmd(), a.loginCmd(), a.configCmd(), a.versionCmd())
	return root
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() }}
	c.AddCommand(subs...)
	return c
}

// online makes a command that speaks to musterd.
func (a *app) online(c *cobra.Command, run func(ctx context.Context, args []string) error) *cobra.Command {
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := a.connect(); err != nil {
			return err
		}
		return run(cmd.Context(), args)
	}
	return c
}

// version is that of the build.
func version() string {
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "unknown"
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "show the version of muster, and of musterd if it can be reached", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.showVersion(cmd.Context()) },
	}
}
