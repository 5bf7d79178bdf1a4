package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"path/filepath"
	"testing"
	"time"

	"muster/api"
	"muster/internal/simdev"
)

// A new trust bundle reaches devices that are connected at once, the others when they come; who does not have it is named;
// nothing old, foreign or deadly is published.
func TestATrustBundleReachesEveryDevice(t *testing.T) {
	w := theFragile(t)
	s := newScene(t, w, "trusting")
	ids := s.add(3)
	s.runAll(ids[:2], nil)
	first := read[api.TrustBundle](s, "trust", "show")
	roots := s.write("roots.pem", []byte(first.RootsPEM))
	key := filepath.Join(w.Config.Path(w.Config.PKI.Dir), "trust.key")
	pass := w.Config.Path(w.Config.PKI.PassphraseFile)
	sign := func(version int64, key, pass, roots string) string {
		out := filepath.Join(s.dir, fmt.Sprint("bundle-", version, "-", filepath.Base(key), filepath.Base(roots)))
		s.muster("trust", "sign", "--key", key, "--passphrase-file", pass, "--version", fmt.Sprint(version), "--root", roots, "--out", out)
		return out
	}
	for _, id := range ids[:2] { // it may still be taking the one in force
		s.await(string(id)+" has the one in force", func() bool { return s.device(id).Status.Trust == first.Version })
	}
	next, mark := first.Version+1, s.devs.Mark()
	s.muster("trust", "publish", "--signed", sign(next, key, pass, roots))
	for _, id := range ids[:2] {
		s.await(string(id)+" stores it", func() bool { return s.did(mark, id, simdev.TrustStored) == 1 })
		s.await(string(id)+" says so", func() bool { return s.device(id).Status.Trust == next })
	}
	spread := read[api.TrustSpread](s, "trust", "status", "--limit", "500")
	named := map[string]bool{}
	for _, d := range spread.Stragglers {
		named[d.Device] = true
	}
	if spread.Version != next || !named[string(ids[2])] || named[string(ids[0])] {
		t.Errorf("got %+v", spread)
	}
	s.run(ids[2], nil) // one that comes late
	s.await("the late one stores it", func() bool { return s.device(ids[2]).Status.Trust == next })

	other := filepath.Join(s.dir, "other.key")
	s.muster("firmware", "keygen", "--out", other, "--passphrase-file", pass)
	for name, file := range map[string]string{
		"an old version":      sign(1, key, pass, roots),
		"another key's":       sign(next+1, other, pass, roots),
		"of roots not in use": sign(next+1, key, pass, s.strangeRoot()),
	} {
		if out, err := w.Muster(s.ctx, "trust", "publish", "--signed", file); err == nil {
			t.Errorf("%s was published: %s", name, out)
		}
	}
	if now := read[api.TrustBundle](s, "trust", "show"); now.Version != next {
		t.Errorf("version %d is in force", now.Version)
	}
}

// strangeRoot writes a root that muster does not know.
func (s *scene) strangeRoot() string {
	s.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "strange"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		s.Fatal(err)
	}
	return s.write("strange.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
