package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"muster/internal/ca"
	"muster/internal/ca/ceremony"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

type onDisk struct {
	*ca.Hierarchy
	dir string
}

var begin = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

var writing sync.Once

// written is a hierarchy on disk, once: encrypting its keys takes seconds.
func written(passphrase []byte) (h onDisk, err error) {
	writing.Do(func() {
		if shared.Hierarchy, err = ca.Create(ca.CreateOptions{At: begin, Name: "lamps"}); err != nil {
			return
		}
		var dir string
		if dir, err = os.MkdirTemp("", "muster-ca-*"); err != nil {
			return
		}
		shared.dir = filepath.Join(dir, "pki")
		err = ca.Write(shared.Hierarchy, shared.dir, passphrase)
	})
	return shared, err
}

var shared onDisk

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.dir != "" {
		os.RemoveAll(filepath.Dir(shared.dir))
	}
	os.Exit(code)
}

// firstGeneration returns a store of its own with one hierarchy in it.
func firstGeneration(t *testing.T) (ca.Store, *ca.Hierarchy) {
	t.Helper()
	s := ca.Store{Dir: filepath.Join(t.TempDir(), "pki"), Passphrase: []byte("a passphrase for tests")}
	h, err := written(s.Passphrase)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.Dir, os.DirFS(h.dir)); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"root.key", "spare-root.key", "device-ca.key", "server-ca.key"} {
		if err := os.Chmod(filepath.Join(s.Dir, f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s, h.Hierarchy
}

func load(t *testing.T, s ca.Store, n int64) *ca.Hierarchy {
	t.Helper()
	h, err := s.Load(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// rotate makes generation n out of the one before with the roots' keys that lie there.
func rotate(t *testing.T, s ca.Store, at time.Time, n int64, kind pki.RotationKind) *ca.Hierarchy {
	t.Helper()
	for range 2 { // a crash may have come before it was on record
		if err := s.Prepare(t.Context(), n, n-1, kind, ca.Keys{}); err != nil {
			t.Fatal(err)
		}
	}
	certs, ok, err := s.SignHere(at, n, n-1, kind)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	for range 2 {
		if err := s.Complete(at, n, n-1, kind, certs); err != nil {
			t.Fatal(err)
		}
	}
	return only(t, s, n)
}

// only returns the certificates of a generation.
func only(t *testing.T, s ca.Store, n int64) *ca.Hierarchy {
	t.Helper()
	h, err := s.Certificates(n)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func pool(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// serverLeads says whether a server's chain of h leads to roots, as a device checks it: with what the server shows, only.
func serverLeads(t *testing.T, h *ca.Hierarchy, at time.Time, roots *x509.CertPool) error {
	t.Helper()
	s, err := h.NewServer(at, []string{"muster.example"})
	if err != nil {
		t.Fatal(err)
	}
	certs, err := pki.ParseChainPEM(s.Chain)
	if err != nil {
		t.Fatal(err)
	}
	_, err = certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: pool(certs[1:]...), CurrentTime: at, DNSName: "muster.example"})
	return err
}

func TestGenerations(t *testing.T) {
	at := begin
	s, first := firstGeneration(t)

	one := rotate(t, s, at.AddDate(1, 0, 0), 1, pki.RotateDeviceCA)
	if !one.Root.Cert.Equal(first.Root.Cert) || !one.Spare.Cert.Equal(first.Spare.Cert) || !one.Server.Cert.Equal(first.Server.Cert) || one.Cross != nil {
		t.Error("a new device CA changed something else")
	}
	if one.Device.Cert.Equal(first.Device.Cert) || one.Device.Cert.Subject.CommonName != "lamps devices 2" {
		t.Errorf("the device CA is %s", one.Device.Cert.Subject)
	}

	two := rotate(t, s, at.AddDate(2, 0, 0), 2, pki.RotateServerCA)
	if !two.Device.Cert.Equal(one.Device.Cert) || two.Server.Cert.Equal(one.Server.Cert) {
		t.Error("not just the server CA changed")
	}

	later := at.AddDate(3, 0, 0)
	rotate(t, s, later, 3, pki.RotateRoot)
	three := load(t, s, 3) // with its keys
	switch {
	case !three.Root.Cert.Equal(first.Spare.Cert):
		t.Error("the spare root did not become the root")
	case three.Spare.Cert.Equal(first.Root.Cert) || three.Spare.Cert.Equal(first.Spare.Cert) || three.Spare.Cert.Subject.CommonName != "lamps root 5 (spare)":
		t.Errorf("the spare is %s", three.Spare.Cert.Subject)
	case three.Device.Cert.Equal(two.Device.Cert) || three.Server.Cert.Equal(two.Server.Cert):
		t.Error("the intermediates stayed")
	}
	// A device with only the old root believes the new servers by the cross-certificate, one with only the new root does, too.
	for name, roots := range map[string]*x509.CertPool{"old": pool(first.Root.Cert), "new": pool(three.Root.Cert)} {
		if err := serverLeads(t, three, later, roots); err != nil {
			t.Errorf("%s root: %v", name, err)
		}
	}
	if err := serverLeads(t, three, later, pool(three.Spare.Cert)); err == nil {
		t.Error("the new spare vouches for a server")
	}
	if got := only(t, s, 0); !got.Device.Cert.Equal(first.Device.Cert) {
		t.Error("generation 0 changed")
	}
	for _, n := range []int64{1, 3} {
		for _, f := range []string{"device-ca.key", "server-ca.key", "root.key", "spare-root.key", "keys.json"} {
			info, err := os.Stat(filepath.Join(s.Dir, "generation-"+fmt.Sprint(n), f))
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s of %d: %v %v", f, n, info, err)
			}
		}
	}
}

// offline is a ceremony's machine: roots that are not at muster's.
type offline struct{ root, next, stranger ceremony.Signer }

func newOffline(t *testing.T, at time.Time) offline {
	t.Helper()
	make := func(name string) ceremony.Signer {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ceremony.SignRoot(ceremony.Terms{At: at, Name: name, Life: ceremony.RootLife}, key)
		if err != nil {
			t.Fatal(err)
		}
		return ceremony.Signer{Cert: c, Key: key}
	}
	return offline{make("root A"), make("root B"), make("root C")}
}

func signRequest(t *testing.T, at time.Time, by ceremony.Signer, r ca.Request, profile ceremony.Profile) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(r.PEM)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if pki.KeyHash(csr.RawSubjectPublicKeyInfo) != r.KeyHash {
		t.Error("the hash is of another key")
	}
	c, err := ceremony.SignIntermediate(ceremony.Terms{At: at, Name: "inter " + string(profile), Life: ceremony.IntermediateLife}, profile, by, csr.RawSubjectPublicKeyInfo)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestGenerationFromACeremony(t *testing.T) {
	at := begin
	s, first := firstGeneration(t)
	away := newOffline(t, at)
	for _, f := range []string{"root.key", "spare-root.key"} {
		if err := os.Remove(filepath.Join(s.Dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Prepare(t.Context(), 1, 0, pki.RotateRoot, ca.Keys{}); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := s.SignHere(at, 1, 0, pki.RotateRoot); ok || err != nil {
		t.Fatalf("signed without the keys of the roots: %v %v", ok, err)
	}
	reqs, err := s.Requests(1, pki.RotateRoot)
	if err != nil || len(reqs) != 2 {
		t.Fatal(len(reqs), err)
	}
	device, server := signRequest(t, at, away.root, reqs[0], ceremony.DeviceCA), signRequest(t, at, away.root, reqs[1], ceremony.ServerCA)
	byOld := signRequest(t, at, ceremony.Signer{Cert: first.Root.Cert, Key: first.Root.Key}, reqs[0], ceremony.DeviceCA)
	byStranger := signRequest(t, at, away.stranger, reqs[1], ceremony.ServerCA)
	swapped := signRequest(t, at, away.root, reqs[0], ceremony.ServerCA)
	cross, err := ceremony.CrossSign(at, ceremony.Signer{Cert: first.Root.Cert, Key: first.Root.Key}, away.root.Cert)
	if err != nil {
		t.Fatal(err)
	}
	badCross, err := ceremony.CrossSign(at, away.next, away.root.Cert)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		certs []*x509.Certificate
		want  string
	}{
		{"nothing", nil, "device-ca is missing"},
		{"one of two", []*x509.Certificate{device, away.root.Cert}, "server-ca is missing"},
		{"without the root", []*x509.Certificate{device, server}, `bring the certificate of "root A"`},
		{"by the root that goes", []*x509.Certificate{byOld, server, away.root.Cert}, "to be replaced"},
		{"by two roots", []*x509.Certificate{device, byStranger, away.root.Cert, away.stranger.Cert}, "different roots"},
		{"for the other use", []*x509.Certificate{swapped, server, away.root.Cert}, "profile"},
		{"two spares", []*x509.Certificate{device, server, away.root.Cert, away.next.Cert, away.stranger.Cert}, "more than one"},
		{"somebody's cross-certificate", []*x509.Certificate{device, server, away.root.Cert, badCross}, "neither"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := s.Complete(at, 1, 0, pki.RotateRoot, c.certs)
			if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if _, err := s.Certificates(1); err == nil {
				t.Error("it can be loaded all the same")
			}
		})
	}
	if err := s.Complete(at, 1, 0, pki.RotateRoot, []*x509.Certificate{cross, away.next.Cert, away.root.Cert, server, device}); err != nil {
		t.Fatal(err)
	}
	h := load(t, s, 1)
	if !h.Root.Cert.Equal(away.root.Cert) || !h.Spare.Cert.Equal(away.next.Cert) || h.Cross == nil {
		t.Errorf("%+v", h)
	}
	if err := serverLeads(t, h, at, pool(first.Root.Cert)); err != nil {
		t.Error(err)
	}
	// A root that is new to the fleet leaves the spare what it is.
	if err := s.Complete(at, 1, 0, pki.RotateRoot, []*x509.Certificate{away.root.Cert, server, device}); err != nil {
		t.Fatal(err)
	}
	if h := only(t, s, 1); !h.Spare.Cert.Equal(first.Spare.Cert) {
		t.Error("the spare changed")
	}
}

func TestWhatARotationDoesNotTake(t *testing.T) {
	at := begin
	s, _ := firstGeneration(t)
	if err := s.Prepare(t.Context(), 1, 0, pki.RotateDeviceCA, ca.Keys{Server: "softkms:path=x"}); !fleet.Is(err, fleet.Invalid) {
		t.Error(err)
	}
	if err := s.Prepare(t.Context(), 2, 1, pki.RotateDeviceCA, ca.Keys{}); !fleet.Is(err, fleet.Invalid) {
		t.Error("out of a generation that is not there:", err)
	}
	if err := s.Prepare(t.Context(), 1, 0, pki.RotateDeviceCA, ca.Keys{}); err != nil {
		t.Fatal(err)
	}
	reqs, err := s.Requests(1, pki.RotateDeviceCA)
	if err != nil {
		t.Fatal(err)
	}
	away := newOffline(t, at)
	err = s.Complete(at, 1, 0, pki.RotateDeviceCA, []*x509.Certificate{signRequest(t, at, away.root, reqs[0], ceremony.DeviceCA), away.root.Cert})
	if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "not the root in use") {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir, "generation-1", "keys.json"), []byte("null, or worse"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context(), 1); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "backup") {
		t.Error(err)
	}
}

// A probe has the form of a device, so that it gets through a handshake, and a serial that nobody knows.
func TestProbe(t *testing.T) {
	at := time.Now()
	h, err := ca.Create(ca.CreateOptions{At: at})
	if err != nil {
		t.Fatal(err)
	}
	probe, err := h.Probe(at)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(probe.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != wire.CertUser(ca.ProbeName, fleet.SerialOf(leaf.SerialNumber)) || !slices.Equal(leaf.DNSNames, []string{ca.ProbeName}) || leaf.IsCA || leaf.NotAfter.Sub(at) > 15*time.Minute {
		t.Errorf("%+v", leaf)
	}
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) {
		t.Error(leaf.ExtKeyUsage)
	}
	cas := x509.NewCertPool()
	cas.AppendCertsFromPEM(h.ClientCAs())
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: cas, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
}
