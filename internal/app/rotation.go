package app

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/ca"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/rotation"
	"muster/internal/trust"
)

// rotator makes the use case that replaces CAs.
func (a *App) rotator(view, update func(context.Context, func(rotation.Tx) error) error) *rotation.Rotator {
	return rotation.New(rotation.Config{
		View: view, Update: update, Authorities: authorities{a}, Trust: trustOfDevices{a.trust}, Log: a.log, Follow: 20 * time.Second,
		Holders: func(ctx context.Context, id pki.IssuerID, limit int) (int, []string, error) {
			n, named, err := a.enroll.Holders(ctx, id, limit)
			return n, namesOf(named), err
		},
		Retire: func(ctx context.Context, at time.Time, id pki.IssuerID, by string) error {
			_, err := a.enroll.RetireIssuer(ctx, at, id, by)
			return err
		},
	})
}

func namesOf(ids []fleet.DeviceID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = string(id)
	}
	return out
}

// trustOfDevices is the trust bundle as a rotation sees it.
type trustOfDevices struct{ p *trust.Publisher }

func (t trustOfDevices) Roots(ctx context.Context) (int64, [][]byte, [][]byte, error) {
	b, err := t.p.Current(ctx)
	return b.Version, b.Roots, b.Cross, err
}

func (t trustOfDevices) Publish(ctx context.Context, at time.Time, roots, cross []*x509.Certificate, by string) (int64, error) {
	b, err := t.p.Make(ctx, at, roots, cross, false, by)
	return b.Version, err
}

func (t trustOfDevices) Lacking(ctx context.Context, limit int) (int, []string, error) {
	s, err := t.p.Spread(ctx, limit)
	var named []string
	for _, d := range s.Stragglers {
		named = append(named, string(d.Device))
	}
	return s.Devices - s.Acked, named, err
}

// authorities are the CAs as a rotation sees them.
type authorities struct{ a *App }

// Prepare implements rotation.Authorities.
func (s authorities) Prepare(ctx context.Context, at time.Time, r pki.Rotation, keys rotation.Keys) (ready bool, err error) {
	g := s.a.cas
	if err := g.files.SetAside(at, r.ID); err != nil { // no record knows it
		return false, err
	}
	if err := g.files.Prepare(ctx, r.ID, r.From, r.Kind, ca.Keys(keys)); err != nil {
		return false, err
	}
	certs, here, err := g.files.SignHere(at, r.ID, r.From, r.Kind)
	if err != nil || !here {
		return false, err
	}
	return true, s.Import(at, r, certs)
}

// Requests implements rotation.Authorities.
func (s authorities) Requests(r pki.Rotation) (out []rotation.Request, err error) {
	list, err := s.a.cas.files.Requests(r.ID, r.Kind)
	for _, q := range list {
		out = append(out, rotation.Request{Profile: string(q.Profile), PEM: string(q.PEM), KeyHash: q.KeyHash})
	}
	return out, err
}

// Import implements rotation.Authorities.
func (s authorities) Import(at time.Time, r pki.Rotation, certs []*x509.Certificate) error {
	return s.a.cas.files.Complete(at, r.ID, r.From, r.Kind, certs)
}

// Generation implements rotation.Authorities.
func (s authorities) Generation(n int64) (rotation.Generation, error) {
	h, err := s.a.cas.files.Certificates(n)
	if err != nil {
		return rotation.Generation{}, err
	}
	return rotation.Generation{Root: h.Root.Cert, Spare: h.Spare.Cert, Cross: h.Cross, Device: h.Device.Cert, Server: h.Server.Cert}, nil
}

// Check implements rotation.Authorities.
func (s authorities) Check(n int64) error {
	h := s.a.cas.now.Load().all[n]
	if h == nil {
		return fleet.Errorf(fleet.Unavailable, "the keys of generation %d of the CAs are not loaded yet", n)
	}
	return h.Check()
}

// Apply implements rotation.Authorities. What is trusted goes before what signs: a certificate never comes to a door that does
// not know its CA.
func (s authorities) Apply(ctx context.Context, list []pki.Rotation) error {
	a := s.a
	if err := a.cas.load(ctx, list); err != nil {
		return err
	}
	err := errors.Join(a.credentials.trustDevices(a.cas.deviceCAs()), a.writeBrokerTrust())
	a.credentials.keeper.Pass(ctx, time.Now())
	return err
}

// writeBrokerTrust puts into broker.tls_dir what the broker trusts in clients, and what clients of the broker trust. RabbitMQ
// reads the first at every handshake (brokerconf). A broker on another machine gets the files by whoever brought them there.
func (a *App) writeBrokerTrust() error {
	dir := a.c.Path(a.c.Broker.TLSDir)
	changed := false
	for name, text := range map[string][]byte{fileDeviceCA: a.cas.clientCAs(), fileTrust: pemOf(a.cas.roots())} {
		path := filepath.Join(dir, name)
		have, err := os.ReadFile(path)
		if err == nil && sameCertificates(have, text) {
			continue
		}
		mode := os.FileMode(0o644)
		if info, err := os.Stat(path); err == nil {
			mode = info.Mode().Perm()
		}
		if err := replaceFile(path, text, mode); err != nil {
			return fmt.Errorf("what the broker trusts cannot be written: %w", err)
		}
		a.log.Info("certificates that are trusted changed", "file", path)
		changed = true
	}
	// Erlang takes over a file only if its time is later than its last look, and that may have been during the rename.
	now := time.Now()
	if err := os.Chtimes(filepath.Join(dir, fileDeviceCA), now, now); err != nil && !errors.Is(err, os.ErrPermission) {
		return err
	}
	if changed {
		a.credentials.reloadTrust(true, a.log.Warn)
	}
	return nil
}

// sameCertificates reports whether two PEM texts hold the same set: an operator's comments are no reason to write anew.
func sameCertificates(a, b []byte) bool {
	x, y := certificatesIn(a), certificatesIn(b)
	less := func(a, b []byte) int { return bytes.Compare(a, b) }
	slices.SortFunc(x, less)
	slices.SortFunc(y, less)
	return slices.EqualFunc(x, y, bytes.Equal)
}

func pemOf(certs []*x509.Certificate) []byte {
	var out bytes.Buffer
	var seen []*x509.Certificate
	for _, c := range certs {
		if slices.ContainsFunc(seen, c.Equal) {
			continue
		}
		seen = append(seen, c)
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return out.Bytes()
}

// proofDoor is a place where a rotation proves itself.
type proofDoor struct {
	name, address string
	mutual        bool // it lets in who has a certificate
}

func (a *App) proofDoors() (out []proofDoor) {
	for _, d := range brokerDoors(&a.c) {
		out = append(out, proofDoor{"broker-" + d.Name, d.Address, d.Name == "mqtt"})
	}
	addrs := a.Addrs()
	return append(out, proofDoor{certDevices, reachable(addrs.Devices), true}, proofDoor{"recovery", reachable(addrs.Recovery), false}, proofDoor{certOps, reachable(addrs.Ops), false})
}

// reachable turns the address of a listener on all interfaces into one that can be dialled.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("localhost", port)
	}
	return addr
}

// proofTime is how long a handshake may take.
const proofTime = 10 * time.Second

// Prove implements rotation.Authorities.
func (s authorities) Prove(ctx context.Context, clients []int64, roots int64) []pki.Proof {
	a := s.a
	pool, unknown := x509.NewCertPool(), ""
	if h, err := a.cas.files.Certificates(roots); err != nil {
		unknown = err.Error()
	} else {
		pool.AddCert(h.Root.Cert)
		pool.AddCert(h.Spare.Cert)
	}
	var out []pki.Proof
	var probes []*tls.Certificate
	var doors []proofDoor
	add := func(d proofDoor, client int64, probe *tls.Certificate, refused string) {
		out = append(out, pki.Proof{Door: d.name, Client: client, Roots: roots, Refused: refused, Unverified: unknown})
		probes, doors = append(probes, probe), append(doors, d)
	}
	certs := map[int64]*tls.Certificate{}
	faults := map[int64]string{}
	for _, n := range clients {
		c, err := a.cas.probe(time.Now(), n)
		if err != nil {
			faults[n] = err.Error()
			continue
		}
		certs[n] = c
	}
	for _, d := range a.proofDoors() {
		if !d.mutual {
			add(d, pki.NoClient, nil, "")
			continue
		}
		for _, n := range clients {
			add(d, n, certs[n], faults[n])
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range out {
		if out[i].Refused != "" || unknown != "" {
			continue
		}
		g.Go(func() error { a.prove(ctx, doors[i], probes[i], pool, &out[i]); return nil })
	}
	_ = g.Wait() // faults are in the proofs
	return out
}

// prove makes one handshake. It stays at TLS 1.2, in which a server refuses a client's certificate before the handshake ends;
// in 1.3 the client would learn of it later, or never.
func (a *App) prove(ctx context.Context, d proofDoor, client *tls.Certificate, roots *x509.CertPool, p *pki.Proof) {
	within, cancel := context.WithTimeout(ctx, proofTime)
	defer cancel()
	name := a.c.Broker.ServerName
	if name == "" {
		name = hostOf(d.address)
	}
	conf := &tls.Config{InsecureSkipVerify: true, ServerName: name, MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12} // the chain is verified below
	if client != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return client, nil }
	}
	dialer := tls.Dialer{Config: conf}
	p.At = time.Now()
	conn, err := dialer.DialContext(within, "tcp", d.address)
	if err != nil {
		p.Refused = err.Error()
		return
	}
	defer conn.Close()
	chain := conn.(*tls.Conn).ConnectionState().PeerCertificates
	if len(chain) == 0 {
		p.Unverified = "it shows no certificate"
		return
	}
	p.Issuer = fmt.Sprintf("%x", chain[0].AuthorityKeyId)
	if !a.cas.Issued(chain) {
		p.Foreign = true
		return
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: p.At, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		p.Unverified = err.Error()
	}
}

var _ enroll.Authority = (*generations)(nil)
