// Package apirig runs the whole REST API for tests of it and of its clients: the real use cases over a real store and a
// real CA. Only the broker is missing; nobody is connected.
package apirig

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/blob"
	"muster/internal/ca"
	"muster/internal/dispatch"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/httpapi"
	"muster/internal/inventory"
	"muster/internal/ota"
	"muster/internal/pki"
	"muster/internal/recovery"
	"muster/internal/revocation"
	"muster/internal/rotation"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/trust"
	"muster/internal/uplink"
)

// MaxImage is the largest image that the rig takes, in bytes.
const MaxImage = 1 << 20

// Rig is the API and what is behind it.
type Rig struct {
	DB          *bolt.DB
	Access      *access.Access
	Trail       *access.Trail
	AuditKey    *ecdsa.PrivateKey // signs checkpoints
	Enroll      *enroll.Enroller
	Rollouts    *dispatch.Dispatcher
	Config      httpapi.Config
	Tokens      map[access.Role]string // one for each role, named t-<role>
	Trust       []byte                 // what devices trust, PEM
	Authorities *Authorities           // that rotations replace
	TrustKey    *ecdsa.PrivateKey      // signs trust bundles
	Issuer      pki.Issuer             // of device certificates
	Log         *Log
}

// hierarchy is one CA for all tests of a process: making keys is slow.
var hierarchy = sync.OnceValues(func() (*ca.Hierarchy, error) {
	return ca.Create(ca.CreateOptions{At: time.Now().AddDate(-1, 0, 0), RootLife: 50 * 365 * 24 * time.Hour, IntermediateLife: 40 * 365 * 24 * time.Hour})
})

// New makes a Rig that ends with the test. Certificates are signed while the test runs.
func New(t testing.TB) *Rig {
	t.Helper()
	h, err := hierarchy()
	if err != nil {
		t.Fatal(err)
	}
	authority, err := ca.NewAuthority(h, pki.KeyPolicy{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	db := storetest.Open(t)
	images, err := blob.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = images.Close() })

	r := &Rig{DB: db, Tokens: map[access.Role]string{}, Log: &Log{}}
	log := slog.New(slog.NewTextHandler(r.Log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	r.Access = access.New(access.Config{Update: Use[access.Tx](db.Update), View: Use[access.Tx](db.View)})
	if r.AuditKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	r.Trail, err = access.NewTrail(access.TrailConfig{Update: Use[access.TrailTx](db.Update), View: Use[access.TrailTx](db.View), Signer: r.AuditKey, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Trail.Register(context.Background(), time.Now()); err != nil {
		t.Fatal(err)
	}
	r.Enroll, err = enroll.New(enroll.Config{
		Update: Use[enroll.Tx](db.Update), View: Use[enroll.Tx](db.View), Authority: authority, Sessions: nobody{}, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := recovery.New(recovery.Config{Update: Use[recovery.Tx](db.Update), View: Use[recovery.Tx](db.View), Enroll: r.Enroll, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	r.Rollouts = dispatch.New(dispatch.Config{
		Update: Use[dispatch.Tx](db.Update), View: Use[dispatch.Tx](db.View), PresenceKnown: func() bool { return true }, Committed: func() {}, Log: log,
	})
	r.Trust = h.TrustBundle()
	roots := []*x509.Certificate{h.Root.Cert, h.Spare.Cert}
	r.Issuer = pki.Issuer{Cert: h.Device.Cert, Key: h.Device.Key}
	lists := revocation.New(revocation.Config{
		Update: Use[revocation.Tx](db.Update), View: Use[revocation.Tx](db.View), Log: log,
		Issuers: func() []pki.Issuer { return []pki.Issuer{r.Issuer} },
	})
	r.TrustKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r.Authorities = NewAuthorities(h)
	bundles := trust.New(trust.Config{
		Update: Use[trust.Tx](db.Update), View: Use[trust.Tx](db.View), Key: &r.TrustKey.PublicKey, Signer: r.TrustKey,
		InUse: r.rootsInUse, Log: log, Committed: func() {},
	})
	if err := bundles.First(context.Background(), time.Now(), roots); err != nil {
		t.Fatal(err)
	}
	rotations := rotation.New(rotation.Config{
		Update: Use[rotation.Tx](db.Update), View: Use[rotation.Tx](db.View), Authorities: r.Authorities, Trust: TrustOfDevices{bundles}, Log: log,
		Holders: func(ctx context.Context, id pki.IssuerID, limit int) (int, []string, error) {
			n, ids, err := r.Enroll.Holders(ctx, id, limit)
			var named []string
			for _, id := range ids {
				named = append(named, string(id))
			}
			return n, named, err
		},
		Retire: func(ctx context.Context, at time.Time, id pki.IssuerID, by string) error {
			_, err := r.Enroll.RetireIssuer(ctx, at, id, by)
			return err
		},
	})
	servers, table := ServerCertificates(t, h, r.Access)
	r.Config = httpapi.Config{
		Servers: servers, Expiries: table,
		Devices: inventory.New(inventory.Config{Update: Use[inventory.Tx](db.Update), View: Use[inventory.Tx](db.View)}),
		Doors:   r.Enroll, Certificates: r.Enroll, Recovery: rec, Rollouts: r.Rollouts, Quarantine: Quarantine{db}, Operators: r.Access, Trail: r.Trail,
		TrustBundles: bundles, Rotations: rotations, TrustKey: &r.TrustKey.PublicKey, Lists: lists,
		Firmware:  ota.New(ota.Config{Update: Use[ota.Tx](db.Update), View: Use[ota.Tx](db.View), Images: images, MaxImage: MaxImage}),
		Trust:     func(context.Context) ([]byte, error) { return r.Trust, nil },
		Endpoints: api.Endpoints{MQTT: "broker.example.com:8883", FallbackMQTT: "broker.example.com:8884", HTTPS: "muster.example.com:8443", RecoveryHTTPS: "muster.example.com:8444"},
		Version:   api.Version{Version: "0.1.0", Go: "go1.26", API: "v1"}, Log: log, MaxImage: MaxImage,
		Livez:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") }),
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "muster_up 1\n") }),
	}
	return r
}

// AddTokens makes a token for each role, as of at.
func (r *Rig) AddTokens(t testing.TB, at time.Time) {
	t.Helper()
	for _, role := range []access.Role{access.Viewer, access.Operator, access.Admin} {
		secret, _, err := r.Access.Create(context.Background(), at, "t-"+string(role), role, 0, "test")
		if err != nil {
			t.Fatal(err)
		}
		r.Tokens[role] = secret
	}
}

// Serve serves h over TLS until the test ends, and returns its URL and a file with the CA to check it against.
func Serve(t testing.TB, h http.Handler, log *slog.Logger) (url, caFile string) {
	t.Helper()
	ts := httptest.NewUnstartedServer(h)
	ts.Config = httpapi.HTTPServer(h, log)
	ts.EnableHTTP2 = true
	ts.StartTLS()
	t.Cleanup(ts.Close)
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return ts.URL, caFile
}

// Use turns a transaction of the store into that of a use case.
func Use[T any](do func(context.Context, func(*bolt.Tx) error) error) func(context.Context, func(T) error) error {
	return func(ctx context.Context, f func(T) error) error {
		return do(ctx, func(tx *bolt.Tx) error { return f(any(tx).(T)) })
	}
}

// nobody is a broker without connections.
type nobody struct{}

func (nobody) CloseUser(context.Context, string, string) error     { return nil }
func (nobody) UserConnected(context.Context, string) (bool, error) { return false, nil }

// Quarantine serves httpapi.Quarantine from the store.
type Quarantine struct{ DB *bolt.DB }

// Quarantined implements httpapi.Quarantine.
func (q Quarantine) Quarantined(ctx context.Context, after uint64, limit int) (out []uplink.Quarantined, err error) {
	err = q.DB.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.Quarantined(after, limit); return err })
	return out, err
}

// QuarantinedOne implements httpapi.Quarantine.
func (q Quarantine) QuarantinedOne(ctx context.Context, seq uint64) (out uplink.Quarantined, err error) {
	err = q.DB.View(ctx, func(tx *bolt.Tx) (err error) { out, err = tx.QuarantinedOne(seq); return err })
	return out, err
}

// DropQuarantined implements httpapi.Quarantine.
func (q Quarantine) DropQuarantined(ctx context.Context, at time.Time, seq uint64, by string) error {
	return q.DB.Update(ctx, func(tx *bolt.Tx) error {
		if err := tx.DropQuarantined(seq); err != nil {
			return err
		}
		return tx.Audit(access.Entry{At: at, Who: by, What: "quarantine.drop", On: strconv.FormatUint(seq, 10)})
	})
}

// Devices adds n devices of product lamp, d000 on.
func (r *Rig) Devices(t testing.TB, n int, at time.Time) {
	t.Helper()
	err := r.DB.Update(context.Background(), func(tx *bolt.Tx) error {
		for i := range n {
			id := fleet.DeviceID("d" + strconv.Itoa(1000 + i)[1:])
			if err := tx.PutDevice(fleet.Device{ID: id, Product: "lamp", CreatedAt: at}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Log keeps what was logged.
type Log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// String returns all of it.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
