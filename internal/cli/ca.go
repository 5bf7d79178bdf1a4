package cli

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"muster/internal/ca/ceremony"
	"muster/internal/ca/keystore"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func (a *app) caCmd() *cobra.Command {
	root := group("root", "make and use root CAs, on a machine without network and musterd", a.caRootCreate(), a.caRootShow(), a.caRootSign(), a.caRootCrossSign())
	root.Long = `The root CAs of a fleet sign two intermediates and lie in a safe for the rest of their life. These commands need neither
network nor musterd. Each signature gets a line in ceremonies.log beside the root, and a copy in issued/.

A fleet with an offline root is made so:

  offline   muster ca root create --name acme --out /media/stick/acme-root
  server    musterd init --data-dir DIR --root-certs root.crt,spare-root.crt
            (makes the intermediates' keys, and DIR/init/device-ca.csr and server-ca.csr)
  offline   muster ca root sign --root /media/stick/acme-root --csr device-ca.csr --profile device-ca --out device-ca.crt
            muster ca root sign --root /media/stick/acme-root --csr server-ca.csr --profile server-ca --out server-ca.crt
  server    musterd init --data-dir DIR --import device-ca.crt,server-ca.crt`
	return group("ca", "the roots of the fleet's certificates (offline)", root)
}

// caCert is a CA certificate as shown.
type caCert struct {
	Subject   string       `json:"subject"`
	Issuer    string       `json:"issuer"`
	Serial    fleet.Serial `json:"serial"`
	KeySHA256 fleet.Hash   `json:"key_sha256"`
	NotBefore time.Time    `json:"not_before"`
	NotAfter  time.Time    `json:"not_after"`
	File      string       `json:"file,omitempty"`
}

func showCert(c *x509.Certificate, file string) caCert {
	return caCert{
		Subject: c.Subject.CommonName, Issuer: c.Issuer.CommonName, Serial: fleet.SerialOf(c.SerialNumber), KeySHA256: pki.KeyHash(c.RawSubjectPublicKeyInfo),
		NotBefore: c.NotBefore, NotAfter: c.NotAfter, File: file,
	}
}

func (a *app) printCACert(c caCert) {
	a.ui.facts("subject", c.Subject, "issuer", c.Issuer, "serial", string(c.Serial), "key sha256", string(c.KeySHA256),
		"not before", c.NotBefore, "not after", c.NotAfter, "file", c.File)
}

const year = 365 * 24 * time.Hour

func years(n int, flag string) (time.Duration, error) {
	if n < 1 || n > 100 {
		return 0, usagef("--%s is 1 to 100", flag)
	}
	return time.Duration(n) * year, nil
}

func (a *app) caRootCreate() *cobra.Command {
	o := ceremony.NewRoots{Keys: map[string]string{}}
	var pass, root, spare string
	var life int
	c := &cobra.Command{
		Use: "create --name NAME --out DIR", Short: "make a root and a spare root", Args: cobra.NoArgs,
		Long: `Makes two roots in the new folder DIR: the one in use, and a spare that devices trust from the first day and that signs
nothing until the first is lost. Keep them apart once made, in different places; take only root.crt and spare-root.crt to the server.

The keys are files under a passphrase, unless --root-key or --spare-key names one in a key manager by URI. This program can use: ` + strings.Join(keystore.Kinds(), ", ") + ".",
	}
	f := c.Flags()
	f.StringVar(&o.Name, "name", "", "name of the fleet: stands in the names of its CAs")
	f.StringVar(&o.Dir, "out", "", "new folder for the roots")
	f.StringVar(&pass, "passphrase-file", "", "file with the passphrase of the keys, or - for standard input; without, it is asked for")
	f.StringVar(&root, "root-key", "", "URI of the root's key in a key manager")
	f.StringVar(&spare, "spare-key", "", "URI of the spare root's key in a key manager")
	f.BoolVar(&o.CreateKeys, "create-keys", false, "make the keys that --root-key and --spare-key name")
	f.IntVar(&life, "years", 25, "how long the roots hold")
	_ = c.MarkFlagRequired("name")
	_ = c.MarkFlagRequired("out")
	c.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		if o.Life, err = years(life, "years"); err != nil {
			return err
		}
		if _, err := os.Lstat(o.Dir); err == nil { // before anybody has typed a passphrase twice
			return fleet.Errorf(fleet.Conflict, "%s exists already: a root is never overwritten; choose a new folder", o.Dir)
		}
		o.Keys[ceremony.Root], o.Keys[ceremony.Spare] = root, spare
		for _, ref := range o.Keys {
			if ref == "" || strings.HasPrefix(ref, "softkms:") {
				if o.Passphrase, err = a.keyPassphrase(pass, "passphrase for the roots' keys", true); err != nil {
					return err
				}
				break
			}
		}
		o.At, o.By = a.env.Now(), actor()
		list, err := ceremony.Create(cmd.Context(), o)
		if err != nil {
			return err
		}
		out := []caCert{showCert(list[0], o.Dir+"/"+ceremony.Root+".crt"), showCert(list[1], o.Dir+"/"+ceremony.Spare+".crt")}
		return a.ui.show(out, func() {
			for i, c := range out {
				if i > 0 {
					a.ui.printf("\n")
				}
				a.printCACert(c)
			}
			a.ui.note("next, on the server: musterd init --root-certs root.crt,spare-root.crt")
			a.ui.note("keep the two keys apart, and the passphrase apart from both")
		})
	}
	return c
}

func (a *app) caRootShow() *cobra.Command {
	var dir string
	c := &cobra.Command{Use: "show --root DIR", Short: "show the roots of a folder, what they signed, and the record", Args: cobra.NoArgs}
	c.Flags().StringVar(&dir, "root", "", "folder of the roots")
	_ = c.MarkFlagRequired("root")
	c.RunE = func(*cobra.Command, []string) error {
		out := struct {
			Roots  []caCert `json:"roots"`
			Issued []caCert `json:"issued"`
			Record string   `json:"record"`
		}{Issued: []caCert{}}
		for _, which := range []string{ceremony.Root, ceremony.Spare} {
			c, err := ceremony.Certificate(dir, which)
			if fleet.Is(err, fleet.NotFound) && which == ceremony.Spare {
				continue // kept elsewhere
			}
			if err != nil {
				return err
			}
			out.Roots = append(out.Roots, showCert(c, dir+"/"+which+".crt"))
		}
		issued, err := ceremony.Issued(dir)
		if err != nil {
			return err
		}
		for _, c := range issued {
			out.Issued = append(out.Issued, showCert(c, ""))
		}
		if out.Record, err = ceremony.Record(dir); err != nil {
			return err
		}
		return a.ui.show(out, func() {
			for _, c := range out.Roots {
				a.printCACert(c)
				a.ui.printf("\n")
			}
			if len(out.Issued) > 0 {
				t := a.ui.table("SUBJECT", "ISSUER", "SERIAL", "ENDS", "KEY")
				for _, c := range out.Issued {
					t.row(clean(c.Subject), clean(c.Issuer), c.Serial, text(c.NotAfter), short(string(c.KeySHA256)))
				}
				t.print()
				a.ui.printf("\n")
			}
			for line := range strings.Lines(out.Record) {
				a.ui.printf("%s\n", clean(strings.TrimRight(line, "\n")))
			}
		})
	}
	return c
}

// signing flags that sign and cross-sign share.
type rootFlags struct {
	dir, with, pass, out string
	yes                  bool
}

func (r *rootFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&r.dir, "root", "", "folder of the root")
	f.StringVar(&r.with, "with", ceremony.Root, "which root of the folder signs: root or spare-root")
	f.StringVar(&r.pass, "passphrase-file", "", "file with the passphrase of the root's key, or - for standard input; without, it is asked for")
	f.StringVar(&r.out, "out", "", "new file for the certificate")
	f.BoolVar(&r.yes, "yes", false, "do not ask")
	_ = c.MarkFlagRequired("root")
	_ = c.MarkFlagRequired("out")
	_ = c.RegisterFlagCompletionFunc("with", cobra.FixedCompletions([]string{ceremony.Root, ceremony.Spare}, cobra.ShellCompDirectiveNoFileComp))
}

func (a *app) openRoot(ctx context.Context, r rootFlags) (*ceremony.Folder, error) {
	if r.with != ceremony.Root && r.with != ceremony.Spare {
		return nil, usagef("--with is %s or %s", ceremony.Root, ceremony.Spare)
	}
	if exists(r.out) {
		return nil, fleet.Errorf(fleet.Conflict, "%s exists already: name a new file with --out", r.out)
	}
	if _, err := ceremony.Certificate(r.dir, r.with); err != nil {
		return nil, err
	}
	var pass []byte
	if ceremony.NeedsPassphrase(r.dir, r.with) {
		var err error
		if pass, err = a.keyPassphrase(r.pass, "passphrase of the root's key", false); err != nil {
			return nil, err
		}
	}
	return ceremony.Open(ctx, r.dir, r.with, pass)
}

func (a *app) caRootSign() *cobra.Command {
	var r rootFlags
	var csr, profile, name string
	var life int
	c := &cobra.Command{
		Use: "sign --root DIR --csr FILE --profile device-ca|server-ca --out FILE", Short: "sign the request of an intermediate", Args: cobra.NoArgs,
		Long: `Signs an intermediate, after showing what it will be and asking. Only the key is taken from the request, which must be EC P-256
or P-384 and must have signed the request; names and extensions in it are ignored. The same key again is a renewal: it keeps its name.`,
	}
	r.add(c)
	c.Flags().StringVar(&csr, "csr", "", "file with the request, PEM")
	c.Flags().StringVar(&profile, "profile", "", "device-ca: signs device certificates; server-ca: signs those of the broker and of listeners")
	c.Flags().StringVar(&name, "name", "", "name of the intermediate (default: the fleet's name, what it is for, and the next number)")
	c.Flags().IntVar(&life, "years", 5, "how long the intermediate holds; at most as long as the root")
	_ = c.MarkFlagRequired("csr")
	_ = c.MarkFlagRequired("profile")
	_ = c.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions([]string{string(ceremony.DeviceCA), string(ceremony.ServerCA)}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		o := ceremony.Intermediate{Profile: ceremony.Profile(profile), Name: name}
		if _, ok := o.Profile.Use(); !ok {
			return usagef("--profile is %s or %s", ceremony.DeviceCA, ceremony.ServerCA)
		}
		if o.Life, err = years(life, "years"); err != nil {
			return err
		}
		raw, err := ceremony.ReadSome(csr, pki.MaxCSR)
		if err != nil {
			return err
		}
		if o.CSR, err = pki.ParseCACSRPEM(raw); err != nil {
			return err
		}
		root, err := a.openRoot(cmd.Context(), r)
		if err != nil {
			return err
		}
		defer root.Close()
		if o, err = root.Plan(o); err != nil {
			return err
		}
		at := a.env.Now()
		end := at.Add(o.Life)
		if end.After(root.Cert.NotAfter) {
			end = root.Cert.NotAfter
		}
		if err := a.confirm(r, "root", root.Cert.Subject.CommonName, "profile", profile, "subject", o.Name, "key sha256", string(o.CSR.KeyHash), "not after", end.UTC()); err != nil {
			return err
		}
		cert, err := root.Sign(at, actor(), o)
		if err != nil {
			return err
		}
		return a.handOut(cert, r.out)
	}
	return c
}

func (a *app) caRootCrossSign() *cobra.Command {
	var r rootFlags
	var other string
	c := &cobra.Command{
		Use: "cross-sign --root DIR --cert OTHER-ROOT.crt --out FILE", Short: "sign another root, for devices that trust only this one", Args: cobra.NoArgs,
		Long: `Signs the name and the key of another root, after showing it and asking. Servers send the result behind their chain, and devices
that trust only this root accept what the other one signed. With the old root in DIR and the new one's certificate it is RFC 4210's
NewWithOld; the other way round OldWithNew. It ends with the first of the two roots.`,
	}
	r.add(c)
	c.Flags().StringVar(&other, "cert", "", "file with the certificate of the other root, PEM")
	_ = c.MarkFlagRequired("cert")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		o, err := ceremony.ReadCertificate(other)
		if err != nil {
			return err
		}
		if err := ceremony.CheckRoot(o); err != nil {
			return err
		}
		root, err := a.openRoot(cmd.Context(), r)
		if err != nil {
			return err
		}
		defer root.Close()
		end := o.NotAfter
		if end.After(root.Cert.NotAfter) {
			end = root.Cert.NotAfter
		}
		if err := a.confirm(r, "root", root.Cert.Subject.CommonName, "profile", "cross-certificate of a root", "subject", o.Subject.CommonName,
			"key sha256", string(pki.KeyHash(o.RawSubjectPublicKeyInfo)), "not after", end); err != nil {
			return err
		}
		cert, err := root.CrossSign(a.env.Now(), actor(), o)
		if err != nil {
			return err
		}
		return a.handOut(cert, r.out)
	}
	return c
}

func (a *app) handOut(c *x509.Certificate, file string) error {
	if err := ceremony.Write(file, c); err != nil {
		return fmt.Errorf("it is signed and on record, and lies in issued/%s.crt beside the root: %w", fleet.SerialOf(c.SerialNumber), err)
	}
	out := showCert(c, file)
	return a.ui.show(out, func() {
		a.ui.printf("signed\n")
		a.printCACert(out)
	})
}

// errDeclined ends a command whose question was not answered with yes.
var errDeclined = errors.New("nothing was signed")

// confirm shows what is about to be signed and asks whether to.
func (a *app) confirm(r rootFlags, facts ...any) error {
	if !a.ui.json {
		a.ui.printf("about to sign\n")
		a.ui.facts(facts...)
	}
	if r.yes {
		return nil
	}
	if r.pass == "-" {
		return usagef("standard input holds the passphrase: give --yes, or another --passphrase-file")
	}
	a.ui.note("compare the key's hash with what the server printed. Sign? Type yes:")
	line, err := bufio.NewReader(a.env.Stdin).ReadString('\n')
	if err != nil && line == "" {
		return usagef("nobody answered: give --yes in a script")
	}
	if strings.TrimSpace(line) != "yes" {
		return errDeclined
	}
	return nil
}

// keyPassphrase comes from a file, or from a person, who types a new one twice.
func (a *app) keyPassphrase(file, what string, fresh bool) ([]byte, error) {
	if file != "" {
		return a.passphrase(file)
	}
	in, ok := a.env.Stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, usagef("there is no terminal to ask for the passphrase: give --passphrase-file")
	}
	ask := func(what string) ([]byte, error) {
		_, _ = fmt.Fprintf(a.ui.err, "%s: ", what)
		p, err := term.ReadPassword(int(in.Fd()))
		_, _ = fmt.Fprintln(a.ui.err)
		return p, err
	}
	first, err := ask(what)
	if err != nil || !fresh {
		return first, err
	}
	again, err := ask("once more")
	if err == nil && !bytes.Equal(first, again) {
		err = usagef("the two passphrases differ")
	}
	return first, err
}

// actor is who sits at this machine, for the record.
func actor() (by ceremony.Actor) {
	if u, err := user.Current(); err == nil {
		by.User = u.Username
	}
	if s := os.Getenv("SUDO_USER"); s != "" && s != by.User {
		by.User += " for " + s
	}
	by.Host, _ = os.Hostname()
	return by
}
