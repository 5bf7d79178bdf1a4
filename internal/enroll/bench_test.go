package enroll_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"net/url"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	bbolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

// benchBatch is how many requests come in one batch of the uplink, and how many certificates share an fsync.
const benchBatch = 256

type applicant struct {
	id  fleet.DeviceID
	key *ecdsa.PrivateKey
	csr []byte
}

func applicants(b *testing.B, from int) []applicant {
	out := make([]applicant, benchBatch)
	for i := range out {
		id := fleet.DeviceID(fmt.Sprint("bench-", from+i))
		k := newKey(b)
		out[i] = applicant{id, k, csrOf(b, k, id)}
	}
	return out
}

// BenchmarkIssue measures certificates per second: CSR in, committed certificate in the slot and delivery in the outbox
// out, on a real store with fsync. bare is the least that any CA must do, one fsync a batch; the ratio to it is the aim.
func BenchmarkIssue(b *testing.B) {
	h, err := hierarchy()
	if err != nil {
		b.Fatal(err)
	}
	bare := func(b *testing.B, workers int) {
		db, err := bbolt.Open(filepath.Join(b.TempDir(), "bare.db"), 0o600, nil)
		if err != nil {
			b.Fatal(err)
		}
		defer db.Close()
		who := applicants(b, 0)
		n, start := uint64(0), cpu(b)
		for b.Loop() {
			ders := make([][]byte, benchBatch)
			var g errgroup.Group
			g.SetLimit(workers)
			for i, a := range who {
				g.Go(func() (err error) {
					s, err := sharedSerial()
					if err != nil {
						return err
					}
					uri, err := url.Parse(wire.CertUser(a.id, s))
					if err != nil {
						return err
					}
					tpl := &x509.Certificate{
						SerialNumber: s.Big(), Subject: pkix.Name{CommonName: string(a.id)}, DNSNames: []string{string(a.id)}, URIs: []*url.URL{uri},
						NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * day), KeyUsage: x509.KeyUsageDigitalSignature,
						ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
					}
					ders[i], err = x509.CreateCertificate(rand.Reader, tpl, h.Device.Cert, a.key.Public(), h.Device.Key)
					return err
				})
			}
			if err := g.Wait(); err != nil {
				b.Fatal(err)
			}
			err := db.Update(func(tx *bbolt.Tx) error {
				bucket, err := tx.CreateBucketIfNotExists([]byte("certs"))
				if err != nil {
					return err
				}
				for _, der := range ders {
					n++
					if err := bucket.Put(binary.BigEndian.AppendUint64(nil, n), der); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		}
		report(b, b.N*benchBatch, cpu(b)-start)
	}
	b.Run("bare", func(b *testing.B) { bare(b, 1) })
	b.Run("bare-all-cores", func(b *testing.B) { bare(b, runtime.GOMAXPROCS(0)) })
	b.Run("muster", benchMuster)
}

func sharedSerial() (fleet.Serial, error) {
	a, err := sharedAuthority()
	if err != nil {
		return "", err
	}
	return a.NewSerial()
}

func benchMuster(b *testing.B) {
	db, err := bolt.Open(filepath.Join(b.TempDir(), "muster.db"), bolt.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	a, err := sharedAuthority()
	if err != nil {
		b.Fatal(err)
	}
	r := &rig{t: b, db: db}
	e, err := enroll.New(enroll.Config{
		Update: r.update, View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: a, Sessions: &broker{}, Log: quiet(),
	})
	if err != nil {
		b.Fatal(err)
	}
	// The uplink goes on storing requests while others are signed, as in a service.
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	var all []applicant
	for i := range b.N {
		all = append(all, applicants(b, i*benchBatch)...)
	}
	for batch := range slices.Chunk(all, benchBatch) {
		r.do(func(tx *bolt.Tx) error {
			for _, a := range batch {
				if err := tx.PutDevice(fleet.Device{ID: a.id, Product: "pump"}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	b.ResetTimer()
	start := cpu(b)
	for batch := range slices.Chunk(all, benchBatch) {
		r.do(func(tx *bolt.Tx) error {
			for _, a := range batch {
				if err := e.RequestByCSR(tx, time.Now(), a.id, a.csr, pki.ViaMQTT); err != nil {
					return err
				}
			}
			return nil
		})
		e.Kick()
	}
	for open := true; open; {
		err := db.View(ctx, func(tx *bolt.Tx) error {
			left, err := tx.IntendedCertificates(1)
			open = len(left) > 0
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
		time.Sleep(time.Millisecond) // a pause of the poll, within the measure
	}
	b.StopTimer()
	spent := cpu(b) - start
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	for _, a := range all {
		if r.device(a.id).Next == "" {
			b.Fatalf("%s was not issued a certificate", a.id)
		}
	}
	report(b, len(all), spent)
}

// cpu returns the processor time of this process: unlike the time on the wall, others on the machine do not change it.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func report(b *testing.B, n int, spent time.Duration) {
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "certs/s")
	b.ReportMetric(float64(spent.Microseconds())/float64(n), "cpu-µs/cert")
}
