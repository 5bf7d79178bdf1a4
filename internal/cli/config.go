package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"muster/api"
	"muster/internal/client"
)

// settings is how musterd is reached: ~/.config/muster/config.yaml.
type settings struct {
	URL   string `yaml:"url"`
	CA    string `yaml:"ca,omitempty"` // PEM
	Token string `yaml:"token"`
}

// noLogin says that something needed to reach musterd is not set.
type noLogin struct{ what string }

func (e *noLogin) Error() string { return "it is not known " + e.what }

// configFile returns where muster login writes.
func (a *app) configFile() (string, error) {
	if f := a.env.Getenv("MUSTER_CONFIG"); f != "" {
		return f, nil
	}
	dir := a.env.Getenv("XDG_CONFIG_HOME")
	if dir == "" {
		home := a.env.Getenv("HOME")
		if home == "" {
			return "", errors.New("neither MUSTER_CONFIG, XDG_CONFIG_HOME nor HOME is set, so there is no place for the configuration")
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "muster", "config.yaml"), nil
}

// readConfig reads the configuration file; without one it is empty. A file that others can read has lost its secret.
func (a *app) readConfig() (settings, error) {
	path, err := a.configFile()
	if err != nil {
		return settings{}, nil
	}
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return settings{}, nil
	}
	if err != nil {
		return settings{}, err
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return settings{}, fmt.Errorf("%s holds a token and can be read by others: chmod 600 it, and replace the token", path)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return settings{}, err
	}
	var s settings
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	if err := d.Decode(&s); err != nil && !errors.Is(err, io.EOF) {
		return settings{}, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// resolve finds out how to reach musterd: flags, then the environment, then the file.
func (a *app) resolve() (settings, error) {
	s, err := a.readConfig()
	if err != nil {
		return s, err
	}
	s.URL = first(a.flags.url, a.env.Getenv("MUSTER_URL"), s.URL)
	if file := first(a.flags.ca, a.env.Getenv("MUSTER_CA")); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return s, fmt.Errorf("the CA: %w", err)
		}
		s.CA = string(pem)
	}
	switch file := first(a.flags.tokenFile, a.env.Getenv("MUSTER_TOKEN_FILE")); {
	case a.flags.tokenFile == "" && a.env.Getenv("MUSTER_TOKEN") != "":
		s.Token = a.env.Getenv("MUSTER_TOKEN")
	case file != "":
		if s.Token, err = a.readToken(file); err != nil {
			return s, err
		}
	}
	return s, nil
}

// readToken reads a token from a file, or from standard input if it is -.
func (a *app) readToken(file string) (string, error) {
	var raw []byte
	var err error
	if file == "-" {
		raw, err = io.ReadAll(io.LimitReader(a.env.Stdin, 4096))
	} else {
		raw, err = os.ReadFile(file)
	}
	if err != nil {
		return "", fmt.Errorf("the token: %w", err)
	}
	token := strings.TrimSpace(string(raw))
	if !strings.HasPrefix(token, "mst_") || strings.ContainsAny(token, " \t\r\n") {
		return "", usagef("the token file holds no token: it is one word that begins with mst_")
	}
	return token, nil
}

func first(ss ...string) string {
	for _, s := range ss {
		if s != "" {
			return s
		}
	}
	return ""
}

// connect makes the client.
func (a *app) connect() error {
	s, err := a.resolve()
	if err != nil {
		return err
	}
	if s.URL == "" {
		return &noLogin{"where musterd is"}
	}
	if s.Token == "" {
		return &noLogin{"which token to use"}
	}
	a.client, err = newClient(s)
	return err
}

func newClient(s settings) (*client.Client, error) {
	c, err := client.New(client.Config{URL: s.URL, Token: s.Token, CA: []byte(s.CA), Agent: "muster/" + version()})
	if err != nil {
		return nil, &usage{err.Error()}
	}
	return c, nil
}

func (a *app) loginCmd() *cobra.Command {
	c := &cobra.Command{
		Use: "login --url URL [--ca FILE] [--token-file FILE]", Args: cobra.NoArgs,
		Short: "try a token and remember it",
		Long: `Tries the token and writes it, with the address and the CA, to ~/.config/muster/config.yaml, which only you can read.
Without --token-file the token is read from standard input. Tokens are never given on the command line: others could see them.`,
	}
	c.RunE = func(cmd *cobra.Command, _ []string) error { return a.login(cmd.Context()) }
	return c
}

func (a *app) login(ctx context.Context) error {
	if a.flags.tokenFile == "" && a.env.Getenv("MUSTER_TOKEN") == "" && a.env.Getenv("MUSTER_TOKEN_FILE") == "" {
		if a.ui.errTTY {
			a.ui.note("paste the token, then press enter and ctrl-d")
		}
		a.flags.tokenFile = "-"
	}
	s, err := a.resolve()
	if err != nil {
		return err
	}
	if s.URL == "" {
		return usagef("--url is needed")
	}
	c, err := newClient(s)
	if err != nil {
		return err
	}
	me, err := client.Read[api.Token](c.WhoAmI(ctx))
	if err != nil {
		return err
	}
	path, err := a.configFile()
	if err != nil {
		return err
	}
	raw, err := yaml.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := replaceFile(path, raw, 0o600); err != nil {
		return err
	}
	return a.ui.show(me, func() {
		a.ui.printf("logged in to %s as %s (%s)\n", clean(s.URL), clean(me.Name), me.Role)
	})
}

func (a *app) configCmd() *cobra.Command {
	return &cobra.Command{
		Use: "config", Short: "show how musterd would be reached", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s, err := a.resolve()
			if err != nil {
				return err
			}
			file, _ := a.configFile()
			shown := map[string]string{"file": file, "url": s.URL, "ca": "the system's", "token": "not set"}
			if s.CA != "" {
				shown["ca"] = "one of its own"
			}
			if s.Token != "" {
				shown["token"] = "set, not shown"
			}
			return a.ui.show(shown, func() {
				a.ui.facts("file", shown["file"], "url", first(shown["url"], "not set"), "ca", shown["ca"], "token", shown["token"])
			})
		},
	}
}

func (a *app) showVersion(ctx context.Context) error {
	out := struct {
		Muster  string       `json:"muster"`
		Musterd *api.Version `json:"musterd,omitempty"`
	}{Muster: version()}
	if err := a.connect(); err == nil {
		v, err := client.Read[api.Version](a.client.GetVersion(ctx))
		if err != nil {
			a.ui.note("musterd did not tell its version: %s", clean(err.Error()))
		} else {
			out.Musterd = &v
		}
	}
	return a.ui.show(out, func() {
		a.ui.printf("muster   %s\n", out.Muster)
		if v := out.Musterd; v != nil {
			a.ui.printf("musterd  %s %s\n", clean(v.Version), clean(v.Commit))
		}
	})
}
