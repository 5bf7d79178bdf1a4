package apirig

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"muster/internal/access"
	"muster/internal/ca"
	"muster/internal/expiry"
	"muster/internal/fleet"
	"muster/internal/servercert"
	"muster/internal/tlsfiles"
)

// Expiries serves httpapi.Expiries.
type Expiries func(context.Context, time.Time) ([]expiry.Item, error)

// List implements httpapi.Expiries.
func (e Expiries) List(ctx context.Context, at time.Time) ([]expiry.Item, error) { return e(ctx, at) }

// ServerCertificates makes a keeper of one real server certificate, ops, in files; and of another that a broker elsewhere
// serves. The table is of what they end.
func ServerCertificates(t testing.TB, h *ca.Hierarchy, operators *access.Access) (*servercert.Keeper, Expiries) {
	t.Helper()
	s, err := h.NewServer(time.Now(), []string{"muster.example.com"})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pair := tlsfiles.Pair{Cert: filepath.Join(dir, "ops.crt"), Key: filepath.Join(dir, "ops.key")}
	for path, data := range map[string][]byte{pair.Cert: s.Chain, pair.Key: s.Key} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files, err := tlsfiles.Open(pair)
	if err != nil {
		t.Fatal(err)
	}
	served := files.Chain()
	k := servercert.New(servercert.Config{
		Servers: []servercert.Server{{Name: "ops", Files: files}, {Name: "broker", Doors: []servercert.Door{{Name: "mqtt", Address: "broker.example.com:8883"}}}},
		Issuer:  issuer{h}, Record: operators.Record, Log: slog.New(slog.DiscardHandler), Report: func(error) {},
		Served: func(context.Context, string) ([]*x509.Certificate, error) { return served, nil },
	})
	k.Prove(t.Context(), time.Now())
	return k, func(_ context.Context, at time.Time) ([]expiry.Item, error) {
		items := append(k.Expiring(at), expiry.Item{Name: "old", Kind: "token", NotBefore: at.AddDate(0, 0, -10), NotAfter: at.AddDate(0, 0, -1), Fix: "muster token create, then delete this one"})
		expiry.Sort(items)
		return items, nil
	}
}

type issuer struct{ *ca.Hierarchy }

func (i issuer) Issued(chain []*x509.Certificate) bool  { return i.IssuedServer(chain) }
func (i issuer) Current(chain []*x509.Certificate) bool { return i.SignedServer(chain) }
func (i issuer) Until() time.Time                       { return i.Server.Cert.NotAfter }
func (i issuer) New(at time.Time, names []string) (fleet.Serial, []byte, []byte, error) {
	s, err := i.NewServer(at, names)
	if err != nil {
		return "", nil, nil, err
	}
	block, _ := pem.Decode(s.Chain)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", nil, nil, err
	}
	return fleet.SerialOf(leaf.SerialNumber), s.Chain, s.Key, nil
}
