package servercert_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/access"
	"muster/internal/ca"
	"muster/internal/expiry"
	"muster/internal/fleet"
	"muster/internal/servercert"
	"muster/internal/tlsfiles"
)

// issuer is a real CA whose key may be away.
type issuer struct {
	*ca.Hierarchy
	broken error
	before *ca.Hierarchy // of the generation before; nil: there is none
}

func (i *issuer) Issued(chain []*x509.Certificate) bool {
	return i.IssuedServer(chain) || i.before != nil && i.before.IssuedServer(chain)
}
func (i *issuer) Current(chain []*x509.Certificate) bool { return i.SignedServer(chain) }
func (i *issuer) Until() time.Time                       { return i.Server.Cert.NotAfter }
func (i *issuer) New(at time.Time, names []string) (fleet.Serial, []byte, []byte, error) {
	if i.broken != nil {
		return "", nil, nil, i.broken
	}
	s, err := i.NewServer(at, names)
	if err != nil {
		return "", nil, nil, err
	}
	return fleet.SerialOf(leafOf(s.Chain).SerialNumber), s.Chain, s.Key, nil
}

func leafOf(chain []byte) *x509.Certificate {
	block, _ := pem.Decode(chain)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic(err)
	}
	return c
}

// bench is a Keeper over real files and a real CA. Its broker serves what it read last.
type bench struct {
	t      *testing.T
	keeper *servercert.Keeper
	issuer *issuer
	files  map[string]*tlsfiles.Source
	pairs  map[string]tlsfiles.Pair

	mu      sync.Mutex
	audit   []access.Entry
	log     bytes.Buffer
	served  []*x509.Certificate // by the broker
	away    error               // the broker is not there
	reports []error
}

func (b *bench) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.log.Write(p)
}

func (b *bench) logged(words string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.log.String(), words)
}

// rereads makes the broker serve what its files hold.
func (b *bench) rereads() {
	cert, _, err := b.pairs["broker"].Load()
	if err != nil {
		b.t.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.served = []*x509.Certificate{cert.Leaf}
}

func write(t *testing.T, p tlsfiles.Pair, s ca.Server) {
	t.Helper()
	for path, data := range map[string][]byte{p.Cert: s.Chain, p.Key: s.Key} {
		if err := os.WriteFile(path+".new", data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
}

func hierarchy(t *testing.T, at time.Time) *ca.Hierarchy {
	t.Helper()
	h, err := ca.Create(ca.CreateOptions{At: at})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var names = []string{"iot.example.com", "localhost", "127.0.0.1", "::1"}

func open(t *testing.T, at time.Time) *bench {
	t.Helper()
	b := &bench{t: t, issuer: &issuer{Hierarchy: hierarchy(t, at)}, files: map[string]*tlsfiles.Source{}, pairs: map[string]tlsfiles.Pair{}}
	dir := t.TempDir()
	for _, name := range []string{"ops", "broker"} {
		s, err := b.issuer.NewServer(at, names)
		if err != nil {
			t.Fatal(err)
		}
		b.pairs[name] = tlsfiles.Pair{Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
		write(t, b.pairs[name], s)
		if b.files[name], err = tlsfiles.Open(b.pairs[name]); err != nil {
			t.Fatal(err)
		}
	}
	b.rereads()
	b.keeper = servercert.New(servercert.Config{
		Servers: []servercert.Server{
			{Name: "ops", Files: b.files["ops"]},
			{Name: "broker", Files: b.files["broker"], Doors: []servercert.Door{{Name: "mqtt", Address: "broker:8883"}}},
			{Name: "elsewhere", Doors: []servercert.Door{{Name: "amqps", Address: "other:5671"}}},
		},
		Issuer: b.issuer,
		Record: func(_ context.Context, e access.Entry) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.audit = append(b.audit, e)
			return nil
		},
		Served: func(_ context.Context, address string) ([]*x509.Certificate, error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.served, b.away
		},
		Log:    slog.New(slog.NewTextHandler(b, nil)),
		Report: func(err error) { b.mu.Lock(); defer b.mu.Unlock(); b.reports = append(b.reports, err) },
	})
	return b
}

func (b *bench) serial(name string) fleet.Serial {
	return fleet.SerialOf(b.files[name].Chain()[0].SerialNumber)
}

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// Four years of daily passes: renewed after two thirds of each life, each with a key and serial of its own, for the same
// names, on record before it is in use; and no more once the CA's own end leaves nothing to gain.
func TestCertificatesRenewByThemselves(t *testing.T) {
	b := open(t, start)
	var keys []string
	last := b.files["ops"].Chain()[0]
	for day := range 5*365 - 2 {
		at := start.AddDate(0, 0, day)
		b.keeper.Pass(t.Context(), at)
		leaf := b.files["ops"].Chain()[0]
		if !at.Before(leaf.NotAfter) {
			t.Fatalf("day %d: the certificate ended", day)
		}
		if leaf.Equal(last) {
			if at.After(servercert.RenewsAt(leaf).AddDate(0, 0, 1)) && b.issuer.Until().Sub(leaf.NotAfter) >= 24*time.Hour {
				t.Fatalf("day %d: due since %s", day, servercert.RenewsAt(leaf))
			}
			continue
		}
		if at.Before(servercert.RenewsAt(last)) {
			t.Fatalf("day %d: renewed before it was due", day)
		}
		if leaf.Subject.CommonName != "iot.example.com" || !slices.Equal(leaf.DNSNames, last.DNSNames) || len(leaf.IPAddresses) != 2 {
			t.Fatalf("names %s %v %v", leaf.Subject, leaf.DNSNames, leaf.IPAddresses)
		}
		key := string(leaf.RawSubjectPublicKeyInfo)
		if slices.Contains(keys, key) || leaf.SerialNumber.Cmp(last.SerialNumber) == 0 {
			t.Fatal("a key or a serial was used again")
		}
		keys, last = append(keys, key), leaf
	}
	if len(keys) != 6 { // after 243 days each, until the certificate ends with the CA
		t.Errorf("%d renewals", len(keys))
	}
	for _, e := range b.audit {
		if e.Who != "muster" || e.What != "server-certificate.renew" || !strings.Contains(e.Details, "replaces") {
			t.Errorf("%+v", e)
		}
	}
	if len(b.audit) != 12 {
		t.Errorf("%d lines for two certificates", len(b.audit))
	}
}

func TestACertificateOfAnotherCAIsTakenOverButNeverRenewed(t *testing.T) {
	b := open(t, start)
	theirs, err := hierarchy(t, start).NewServer(start, names)
	if err != nil {
		t.Fatal(err)
	}
	write(t, b.pairs["ops"], theirs)
	late := start.AddDate(0, 11, 0)
	b.keeper.Pass(t.Context(), late)
	want := leafOf(theirs.Chain)
	if !b.files["ops"].Chain()[0].Equal(want) {
		t.Fatal("the new file is not in use")
	}
	if info, err := os.Lstat(b.pairs["ops"].Cert); err != nil || info.Mode()&os.ModeSymlink != 0 {
		t.Errorf("the operator's file was touched: %v, %v", info, err)
	}
	if _, err := b.keeper.Renew(t.Context(), late, "ops", "anna"); !fleet.Is(err, fleet.Conflict) || !strings.Contains(err.Error(), "another CA") {
		t.Errorf("asked for it: %v", err)
	}
	if _, err := b.keeper.Renew(t.Context(), late, "nothing", "anna"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("an unknown one: %v", err)
	}
	if _, err := b.keeper.Renew(t.Context(), late, "elsewhere", "anna"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("one that is not here: %v", err)
	}
	i := slices.IndexFunc(b.keeper.Expiring(late), func(i expiry.Item) bool { return i.Name == "ops" })
	if item := b.keeper.Expiring(late)[i]; item.Level(late) != expiry.Tenth || !item.Renews.IsZero() || !strings.Contains(item.Fix, "the CA that issued it") {
		t.Errorf("%+v", item)
	}
}

func TestABadFileIsRefusedSaidOnceAndNotRenewedOver(t *testing.T) {
	b := open(t, start)
	before := b.serial("ops")
	if err := os.WriteFile(b.pairs["ops"].Cert, []byte("-----BEGIN"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		b.keeper.Pass(t.Context(), start.AddDate(0, 10, 0))
	}
	if b.serial("ops") != before || b.logged("are refused") != 1 {
		t.Errorf("in use %s, before %s; said %d times", b.serial("ops"), before, b.logged("are refused"))
	}
	if err := b.keeper.Health(start); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("health: %v", err)
	}
	if _, err := b.keeper.Renew(t.Context(), start, "ops", "anna"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("renewed over it: %v", err)
	}
}

// A CA key that does not answer is asked again with growing pauses, at most an hour apart, and the fleet is told.
func TestAFailedRenewalIsTriedAgain(t *testing.T) {
	b := open(t, start)
	b.issuer.broken = errors.New("the HSM is away")
	at := start.AddDate(0, 9, 0)
	for range 6 * 60 {
		b.keeper.Pass(t.Context(), at)
		at = at.Add(time.Minute)
	}
	if n := b.logged("could not be renewed"); n < 2*8 || n > 2*13 {
		t.Errorf("%d attempts for two certificates in six hours", n)
	}
	if err := b.keeper.Health(at); err == nil || !strings.Contains(err.Error(), "HSM") || len(b.audit) != 0 {
		t.Errorf("health %v, %d lines of audit", err, len(b.audit))
	}
	b.issuer.broken = nil
	for range 61 {
		b.keeper.Pass(t.Context(), at)
		at = at.Add(time.Minute)
	}
	if err := b.keeper.Health(at); err != nil || len(b.audit) != 2 {
		t.Errorf("it is back: %v, %d lines", err, len(b.audit))
	}
}

// What is not on record is not in use.
func TestWithoutARecordNothingIsRenewed(t *testing.T) {
	b := open(t, start)
	k := servercert.New(servercert.Config{
		Servers: []servercert.Server{{Name: "ops", Files: b.files["ops"]}}, Issuer: b.issuer, Log: slog.New(slog.DiscardHandler),
		Record: func(context.Context, access.Entry) error { return errors.New("disk full") },
	})
	before := b.serial("ops")
	if _, err := k.Renew(t.Context(), start, "ops", "anna"); err == nil || b.serial("ops") != before {
		t.Errorf("%v, serial changed: %v", err, b.serial("ops") != before)
	}
}

// A broker that goes on serving the old certificate is a fault after five minutes, and well again when it has read its files.
func TestTheBrokerIsHeldToItsFiles(t *testing.T) {
	at := time.Now()
	b := open(t, at)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		// The bubble's clock stands at 2000: certificates of it, and a broker that read them.
		b.issuer.Hierarchy = hierarchy(t, time.Now())
		for _, name := range []string{"ops", "broker"} {
			s, err := b.issuer.NewServer(time.Now(), names)
			if err != nil {
				t.Fatal(err)
			}
			write(t, b.pairs[name], s)
		}
		b.rereads()
		b.keeper.Reload(time.Now())
		done := make(chan struct{})
		go func() { defer close(done); _ = b.keeper.Run(ctx) }()
		last := func() error {
			synctest.Wait()
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.reports[len(b.reports)-1]
		}
		time.Sleep(2 * time.Minute)
		if err := last(); err != nil {
			t.Fatal(err)
		}
		st, err := b.keeper.Renew(t.Context(), time.Now(), "broker", "anna")
		if err != nil || st.Doors[0].Proven || st.Doors[0].Serial == st.Serial {
			t.Fatalf("%+v, %v", st, err)
		}
		time.Sleep(4 * time.Minute)
		if err := last(); err != nil {
			t.Errorf("after four minutes: %v", err)
		}
		time.Sleep(3 * time.Minute)
		if err := last(); err == nil || !strings.Contains(err.Error(), "broker:8883") {
			t.Errorf("after seven minutes: %v", err)
		}
		if n := b.logged("serves another certificate"); n != 1 {
			t.Errorf("said %d times", n)
		}
		b.rereads()
		time.Sleep(time.Minute)
		if err := last(); err != nil {
			t.Errorf("it has read its files: %v", err)
		}
		if st := b.keeper.List(time.Now())[1]; !st.Doors[0].Proven || b.audit[0].Who != "anna" {
			t.Errorf("%+v, %+v", st, b.audit)
		}
		b.mu.Lock()
		b.away = errors.New("connection refused")
		b.mu.Unlock()
		time.Sleep(10 * time.Minute)
		if err := last(); err != nil {
			t.Errorf("a broker that is away is another part's fault: %v", err)
		}
		if st := b.keeper.List(time.Now())[1]; st.Doors[0].Serial != st.Serial || st.Doors[0].Error == "" {
			t.Errorf("%+v", st.Doors)
		}
		cancel()
		<-done
	})
}

// A new server CA signs all of them anew at the next pass, however fresh they are; also when its end is not later.
func TestAnotherServerCAReplacesWhatTheOneBeforeSigned(t *testing.T) {
	b := open(t, start)
	was := b.files["ops"].Chain()[0]
	b.issuer.before, b.issuer.Hierarchy = b.issuer.Hierarchy, hierarchy(t, start)
	b.keeper.Pass(t.Context(), start.Add(time.Hour))
	chain := b.files["ops"].Chain()
	if chain[0].Equal(was) || !b.issuer.Current(chain) || len(chain[0].DNSNames) != len(was.DNSNames) || len(b.audit) != 2 {
		t.Fatalf("%s by %s, %d lines of audit", chain[0].SerialNumber, chain[0].Issuer, len(b.audit))
	}
	b.keeper.Pass(t.Context(), start.Add(2*time.Hour))
	if !b.files["ops"].Chain()[0].Equal(chain[0]) {
		t.Error("and once more")
	}
	b.issuer.before = nil // forgotten: what it signed is not ours any more
	b.issuer.Hierarchy = hierarchy(t, start)
	b.keeper.Pass(t.Context(), start.Add(3*time.Hour))
	if !b.files["ops"].Chain()[0].Equal(chain[0]) {
		t.Error("a certificate of an unknown CA was replaced")
	}
}
