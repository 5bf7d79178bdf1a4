package app

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"muster/configs"
	"muster/internal/ca"
	"muster/internal/ca/ceremony"
	"muster/internal/config"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// dirInit is what a muster whose root is elsewhere keeps between PrepareInit and ImportInit: the requests of its
// intermediates, its settings, and the names of its servers.
const (
	dirInit     = "init"
	fileNames   = "names"
	deviceCSR   = "device-ca.csr"
	serverCSR   = "server-ca.csr"
	deviceCAReq = "devices"
	serverCAReq = "servers"
)

// Request is a certificate request of an intermediate, for the offline root.
type Request struct {
	File    string
	Profile ceremony.Profile
	KeyHash fleet.Hash // to be compared where it is signed
}

// PrepareInit begins a muster whose root is on another machine: it makes the secrets and the keys of the intermediates,
// and the requests for their certificates. roots are the files with the certificates of the root and of the spare root.
// ImportInit ends it. What it made is complete or gone.
func PrepareInit(ctx context.Context, c config.Config, o InitOptions, roots []string) (made []Request, err error) {
	if len(roots) != 2 {
		return nil, errors.New("name two files: the certificate of the root, and that of the spare root, which devices trust from the first day")
	}
	var certs []*x509.Certificate
	for _, file := range roots {
		cert, err := ceremony.ReadCertificate(file)
		if err != nil {
			return nil, err
		}
		if now := time.Now(); now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
			return nil, fmt.Errorf("%s holds from %s to %s, not now: check the clocks of both machines", file, cert.NotBefore.Format(time.DateTime), cert.NotAfter.Format(time.DateTime))
		}
		certs = append(certs, cert)
	}
	clear, err := freshDir(c.DataDir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, clear())
		}
	}()
	if err := makeSecrets(&c); err != nil {
		return nil, err
	}
	passphrase, err := c.Secret(c.PKI.PassphraseFile)
	if err != nil {
		return nil, err
	}
	if o.CreateKeys {
		if err := makeKeys(ctx, &c, []byte(passphrase)); err != nil {
			return nil, err
		}
	}
	device, server, err := ca.Prepare(ctx, c.Path(c.PKI.Dir), []byte(passphrase), certs[0], certs[1], keysOf(&c))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeKey(device), closeKey(server)) }()
	dir := filepath.Join(c.DataDir, dirInit)
	for _, r := range []struct {
		file, name string
		profile    ceremony.Profile
		key        crypto.Signer
	}{{deviceCSR, deviceCAReq, ceremony.DeviceCA, device}, {serverCSR, serverCAReq, ceremony.ServerCA, server}} {
		der, err := ceremony.Request(r.name, r.key)
		if err != nil {
			return nil, err
		}
		spki, err := x509.MarshalPKIXPublicKey(r.key.Public())
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, r.file)
		if err := writeNew(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), 0o644); err != nil {
			return nil, err
		}
		made = append(made, Request{File: path, Profile: r.profile, KeyHash: pki.KeyHash(spki)})
	}
	return made, errors.Join(
		writeNew(filepath.Join(dir, fileNames), []byte(strings.Join(o.Names, "\n")+"\n"), 0o600),
		writeNew(filepath.Join(dir, FileConfig), []byte(c.Render(configs.Musterd)), 0o600),
	)
}

func closeKey(key crypto.Signer) error {
	if k, ok := key.(io.Closer); ok {
		return k.Close()
	}
	return nil
}

// PendingConfig is the settings file that PrepareInit wrote, or a NotFound error.
func PendingConfig(dataDir string) (string, error) {
	if _, err := os.Stat(filepath.Join(dataDir, FileConfig)); err == nil {
		return "", fleet.Errorf(fleet.Conflict, "%s holds a muster already", dataDir)
	}
	path := filepath.Join(dataDir, dirInit, FileConfig)
	if _, err := os.Stat(path); err != nil {
		return "", fleet.Wrap(fleet.NotFound, err, "%s does not wait for certificates: begin with musterd init --root-certs", dataDir)
	}
	return path, nil
}

// ImportInit ends what PrepareInit began, with the certificates that the root signed, in files. It may be tried again after
// whatever failure.
func ImportInit(ctx context.Context, c config.Config, files []string) (made Made, err error) {
	if _, err := PendingConfig(c.DataDir); err != nil {
		return Made{}, err
	}
	var certs []*x509.Certificate
	for _, file := range files {
		text, err := ceremony.ReadSome(file, pki.MaxChainPEM)
		if err != nil {
			return Made{}, err
		}
		list, err := pki.ParseChainPEM(text)
		if err != nil {
			return Made{}, fmt.Errorf("%s: %w", file, err)
		}
		certs = append(certs, list...)
	}
	names, err := os.ReadFile(filepath.Join(c.DataDir, dirInit, fileNames))
	if err != nil {
		return Made{}, err
	}
	passphrase, err := c.Secret(c.PKI.PassphraseFile)
	if err != nil {
		return Made{}, err
	}
	hierarchy, err := ca.Import(ctx, time.Now(), c.Path(c.PKI.Dir), []byte(passphrase), keysOf(&c), certs)
	if err != nil {
		return Made{}, err
	}
	defer func() { err = errors.Join(err, hierarchy.Close()) }()
	if err := errors.Join(ca.Complete(hierarchy, c.Path(c.PKI.Dir)), removeHalf(&c)); err != nil {
		return Made{}, err
	}
	if made, err = complete(ctx, &c, hierarchy, strings.Fields(string(names))); err != nil {
		return Made{}, err
	}
	return made, os.RemoveAll(filepath.Join(c.DataDir, dirInit))
}

// removeHalf removes what an ImportInit that did not come to its end left behind: files of a muster that never was. What
// the settings put outside of the data directory is not touched.
func removeHalf(c *config.Config) error {
	tlsDir := c.Path(c.Broker.TLSDir)
	files := []string{
		c.Path(c.TLS.DevicesCert), c.Path(c.TLS.DevicesKey), c.Path(c.TLS.OpsCert), c.Path(c.TLS.OpsKey), c.Path(c.TLS.BrokerAuthCert), c.Path(c.TLS.BrokerAuthKey),
		filepath.Join(tlsDir, fileBrokerCert), filepath.Join(tlsDir, fileBrokerKey), filepath.Join(tlsDir, fileDeviceCA), filepath.Join(tlsDir, fileTrust),
		filepath.Join(tlsDir, fileAuthClientCert), filepath.Join(tlsDir, fileAuthClientKey), c.Path(fileStore),
	}
	for _, f := range files {
		if in, err := filepath.Rel(c.DataDir, f); err != nil || !filepath.IsLocal(in) {
			continue
		}
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
