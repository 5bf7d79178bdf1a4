package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"muster/api"
	"muster/internal/client"
	"muster/internal/fleet"
)

// The files that a device needs.
const (
	keyFile       = "key.pem"           // PKCS #8; made here, never sent
	certFile      = "cert.pem"          // leaf, intermediate
	trustFile     = "trust.pem"         // what servers are checked against
	trustKeyFile  = "trust-key.pem"     // by which new trust bundles are checked
	passwordFile  = "fallback-password" // without a line end
	endpointsFile = "endpoints.json"
	partialDir    = ".partial" // holds what is made until all of it is there
)

// endpoints is endpoints.json.
type endpoints struct {
	Device        string `json:"device"`
	MQTT          string `json:"mqtt"`
	FallbackMQTT  string `json:"fallback_mqtt"`
	HTTPS         string `json:"https"`
	RecoveryHTTPS string `json:"recovery_https"`
}

// kit makes the files of devices. What is the same for all is fetched once.
type kit struct {
	a        *app
	force    bool
	password bool // with a fallback password
	lifetime string
	trust    []byte
	trustKey []byte // by which the device checks new trust bundles, PEM
	ends     api.Endpoints
}

func (a *app) newKit(ctx context.Context, force, password bool, lifetime string) (*kit, error) {
	trust, err := client.Read[api.Trust](a.client.GetTrust(ctx))
	if err != nil {
		return nil, err
	}
	ends, err := client.Read[api.Endpoints](a.client.GetEndpoints(ctx))
	if err != nil {
		return nil, err
	}
	return &kit{a: a, force: force, password: password, lifetime: lifetime, trust: []byte(trust.PEM), trustKey: []byte(trust.KeyPEM), ends: ends}, nil
}

// errKept says that a device has its files already.
var errKept = errors.New("the files exist already: use --force to replace them")

// make writes the files of a device to dir. Interrupted at any point, it can be called again: the key is on disk before
// its certificate is asked for, so that the same certificate comes back, and nothing is in its place before everything is
// there.
func (k *kit) make(ctx context.Context, id, dir string) error {
	if _, err := fleet.ParseDeviceID(id); err != nil { // it becomes a name on this disk
		return err
	}
	partial := filepath.Join(dir, partialDir)
	if !exists(partial) && !k.force && k.any(dir) {
		return errKept
	}
	if err := os.MkdirAll(partial, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	key, err := k.key(filepath.Join(partial, keyFile))
	if err != nil {
		return err
	}
	csr, err := makeCSR(id, key)
	if err != nil {
		return err
	}
	cert, err := client.Read[api.Certificate](k.a.client.IssueCertificate(ctx, id, api.CertificateRequest{CSR: csr, Lifetime: k.lifetime}))
	if err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(partial, certFile), []byte(cert.Chain), 0o644); err != nil {
		return err
	}
	if k.password {
		if err := k.common(ctx, id, partial); err != nil {
			return err
		}
	}
	if err := replaceFile(filepath.Join(partial, trustFile), k.trust, 0o644); err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(partial, trustKeyFile), k.trustKey, 0o644); err != nil {
		return err
	}
	return k.settle(partial, dir)
}

// common writes the password and the addresses.
func (k *kit) common(ctx context.Context, id, dir string) error {
	pw, err := client.Read[api.FallbackPassword](k.a.client.NewFallbackPassword(ctx, id))
	if err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(dir, passwordFile), []byte(pw.Password), 0o600); err != nil {
		return err
	}
	e := endpoints{Device: id, MQTT: k.ends.MQTT, FallbackMQTT: k.ends.FallbackMQTT, HTTPS: k.ends.HTTPS, RecoveryHTTPS: k.ends.RecoveryHTTPS}
	raw, err := json.Marshal(e, jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, endpointsFile), append(raw, '\n'), 0o644)
}

// settle moves what was made into its place. The partial folder goes last: as long as it is there, the files are not
// taken for complete.
func (k *kit) settle(partial, dir string) error {
	for _, f := range k.files() {
		if from := filepath.Join(partial, f); exists(from) {
			if err := os.Rename(from, filepath.Join(dir, f)); err != nil {
				return err
			}
		}
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	return os.RemoveAll(partial)
}

func (k *kit) files() []string {
	return []string{keyFile, certFile, trustFile, trustKeyFile, passwordFile, endpointsFile}
}

func (k *kit) any(dir string) bool {
	for _, f := range k.files() {
		if exists(filepath.Join(dir, f)) {
			return true
		}
	}
	return false
}

// key returns the key of an interrupted run, or a new one that is safe on disk.
func (k *kit) key(path string) (*ecdsa.PrivateKey, error) {
	if raw, err := os.ReadFile(path); err == nil {
		if block, _ := pem.Decode(raw); block != nil {
			if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if ec, ok := key.(*ecdsa.PrivateKey); ok && ec.Curve == elliptic.P256() {
					return ec, nil
				}
			}
		}
		return nil, fmt.Errorf("%s holds no key that was made here: remove it and run again", path)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, replaceFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// makeCSR returns a certificate request for key (PKCS #10), PEM.
func makeCSR(id string, key *ecdsa.PrivateKey) (string, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: id}}, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

func (a *app) deviceCredentials() *cobra.Command {
	var out, lifetime string
	var force, all bool
	p := api.ListDevicesParams{}
	c := &cobra.Command{
		Use: "credentials ID... --out DIR | credentials --all --out DIR", Short: "write what a device needs: key, certificate, trust, fallback password, addresses",
		Long: `Writes key.pem, cert.pem, trust.pem, trust-key.pem, fallback-password and endpoints.json. The key is made here and never leaves this
machine; only a request with its public half is sent.

For one device the files go to DIR, for several to DIR/<id>. Files that exist are kept unless --force is given; with several
devices, those that have their files are passed over. An interrupted run can be repeated and goes on where it was.
The fallback password of the device is replaced.`,
		Example: "  muster device credentials sensor-0001 --out ./sensor-0001\n  muster device credentials --all --product sensor --out ./factory",
	}
	f := c.Flags()
	f.StringVar(&out, "out", "", "folder to write to")
	f.BoolVar(&force, "force", false, "replace files that exist")
	f.BoolVar(&all, "all", false, "of every device, or those of --product and --label")
	f.StringVar(&p.Product, "product", "", "with --all: only of this product")
	f.StringArrayVar(&p.Label, "label", nil, "with --all: only with this label, key=value")
	f.StringVar(&lifetime, "lifetime", "", "how long the certificate is good, if shorter than the policy says")
	_ = c.MarkFlagRequired("out")
	return a.online(c, func(ctx context.Context, args []string) error {
		if all == (len(args) > 0) {
			return usagef("name devices, or give --all")
		}
		k, err := a.newKit(ctx, force, true, lifetime)
		if err != nil {
			return err
		}
		if len(args) == 1 {
			if err := k.make(ctx, args[0], out); err != nil {
				return atPath(err, out)
			}
			return a.ui.show(map[string]string{"device": args[0], "dir": out}, func() { a.ui.printf("wrote the credentials of %s to %s\n", args[0], out) })
		}
		if all {
			ds, err := a.devices(ctx, p, 0)
			if err != nil {
				return err
			}
			for _, d := range ds {
				args = append(args, d.ID)
			}
		}
		return k.many(ctx, args, out)
	})
}

func atPath(err error, dir string) error {
	if errors.Is(err, errKept) {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return err
}

// many makes the files of several devices, a few at a time. One that fails does not keep the others from theirs.
func (k *kit) many(ctx context.Context, ids []string, out string) error {
	var wrote, kept, failed atomic.Int64
	results := make([]error, len(ids))
	m := k.a.ui.meter("writing credentials", int64(len(ids)), func(n int64) string { return fmt.Sprint(n) })
	var g errgroup.Group
	g.SetLimit(8)
	progress := make(chan struct{}, len(ids))
	for i, id := range ids {
		g.Go(func() error {
			defer func() { progress <- struct{}{} }()
			switch err := k.make(ctx, id, filepath.Join(out, id)); {
			case err == nil:
				wrote.Add(1)
			case errors.Is(err, errKept):
				kept.Add(1)
			default:
				failed.Add(1)
				results[i] = err
			}
			return nil
		})
		for drained := false; !drained; {
			select {
			case <-progress:
				m.set(wrote.Load() + kept.Load() + failed.Load())
			default:
				drained = true
			}
		}
	}
	_ = g.Wait() // each failure is in results
	m.end()
	for i, err := range results {
		if err != nil {
			k.a.ui.note("%s: %s", clean(ids[i]), clean(err.Error()))
		}
	}
	sum := map[string]int64{"written": wrote.Load(), "kept": kept.Load(), "failed": failed.Load()}
	if err := k.a.ui.show(sum, func() {
		k.a.ui.printf("wrote %d, kept %d, failed %d\n", sum["written"], sum["kept"], sum["failed"])
	}); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if n := failed.Load(); n > 0 {
		return fmt.Errorf("%d of %d devices have no credentials; run again to go on", n, len(ids))
	}
	return nil
}

func (a *app) deviceEnroll() *cobra.Command {
	var csr, out, lifetime string
	var force bool
	c := &cobra.Command{
		Use: "enroll ID --csr FILE | enroll ID --out DIR", Short: "issue a certificate", Args: cobra.ExactArgs(1),
		Long: `With --csr, sends a certificate request (PKCS #10, PEM; - for standard input) and prints the certificate and its
intermediate. With --out, makes the key here and writes key.pem, cert.pem and trust.pem to DIR.`,
		Example: "  openssl req -new -key key.pem -subj /CN=x | muster device enroll sensor-0001 --csr -",
	}
	f := c.Flags()
	f.StringVar(&csr, "csr", "", "file with the request, or -")
	f.StringVar(&out, "out", "", "folder to write to")
	f.BoolVar(&force, "force", false, "replace files that exist")
	f.StringVar(&lifetime, "lifetime", "", "how long the certificate is good, if shorter than the policy says")
	c.MarkFlagsMutuallyExclusive("csr", "out")
	c.MarkFlagsOneRequired("csr", "out")
	return a.online(c, func(ctx context.Context, args []string) error {
		if out != "" {
			k, err := a.newKit(ctx, force, false, lifetime)
			if err != nil {
				return err
			}
			if err := k.make(ctx, args[0], out); err != nil {
				return atPath(err, out)
			}
			return a.ui.show(map[string]string{"device": args[0], "dir": out}, func() { a.ui.printf("wrote key and certificate of %s to %s\n", args[0], out) })
		}
		raw, err := a.readInput(csr, 64<<10)
		if err != nil {
			return err
		}
		cert, err := client.Read[api.Certificate](a.client.IssueCertificate(ctx, args[0], api.CertificateRequest{CSR: string(raw), Lifetime: lifetime}))
		if err != nil {
			return err
		}
		return a.ui.show(cert, func() { a.ui.printf("%s", cert.Chain) })
	})
}
