// Command issue measures issued certificates per second, from a certificate request to the committed certificate with its
// outbox entry, against bare x509.CreateCertificate with one fsync per batch, in turns in one process. It prints
//
//	ratio issue <value> aim 0.6
//	ratio issue-all-cores <value> aim 0.6
//
// against a bare loop, and against bare signing on every core. Values are medians over the rounds of ours / baseline.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	bbolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"

	"muster/internal/ca"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

func main() {
	n := flag.Int("certificates", 2048, "certificates in each measurement")
	batch := flag.Int("batch", 256, "requests in one transaction, as musterd batches them")
	rounds := flag.Int("rounds", 7, "rounds; each measures all three")
	flag.Parse()
	if err := run(*n, *batch, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench issue:", err)
		os.Exit(1)
	}
}

// applicant is a device with its request.
type applicant struct {
	id  fleet.DeviceID
	key *ecdsa.PrivateKey
	csr []byte
}

func run(n, batch, rounds int) error {
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h, err := ca.Create(ca.CreateOptions{At: time.Now()})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var single, all, ours []float64
	for round := range rounds {
		who, err := applicants(n, round)
		if err != nil {
			return err
		}
		path := func(name string) string { return filepath.Join(dir, fmt.Sprint(name, round, ".db")) }
		m, err := muster(ctx, path("muster"), h, who, batch)
		if err != nil {
			return err
		}
		one, err := bare(path("one"), h, who, batch, 1)
		if err != nil {
			return err
		}
		many, err := bare(path("all"), h, who, batch, runtime.GOMAXPROCS(0))
		if err != nil {
			return err
		}
		ours, single, all = append(ours, m), append(single, m/one), append(all, m/many)
		fmt.Printf("  round %d: muster %.0f/s, bare %.0f/s, bare on %d cores %.0f/s\n", round+1, m, one, runtime.GOMAXPROCS(0), many)
	}
	fmt.Printf("  median: muster %.0f certificates/s\n", median(ours))
	fmt.Printf("ratio issue %.2f aim 0.6\n", median(single))
	fmt.Printf("ratio issue-all-cores %.2f aim 0.6\n", median(all))
	return nil
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

func applicants(n, round int) ([]applicant, error) {
	out := make([]applicant, n)
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range out {
		g.Go(func() error {
			id := fmt.Sprintf("bench-%d-%d", round, i)
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return err
			}
			csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: id}}, key)
			out[i] = applicant{fleet.DeviceID(id), key, csr}
			return err
		})
	}
	return out, g.Wait()
}

// muster takes the requests as they come over MQTT, a batch a transaction, and signs them as musterd does.
func muster(ctx context.Context, path string, h *ca.Hierarchy, who []applicant, batch int) (float64, error) {
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		return 0, err
	}
	defer db.Close()
	records := &struct{ *enroll.Enroller }{} // the use case comes after the authority that it uses
	authority, err := ca.NewAuthority(h, pki.KeyPolicy{}, records)
	if err != nil {
		return 0, err
	}
	e, err := enroll.New(enroll.Config{
		Update: func(ctx context.Context, f func(enroll.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: authority, Sessions: nobody{}, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		return 0, err
	}
	records.Enroller = e
	err = db.Update(ctx, func(tx *bolt.Tx) error {
		for _, a := range who {
			if err := tx.PutDevice(fleet.Device{ID: a.id, Product: "bench"}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	began := time.Now()
	// Requests go on coming while those before them are signed, as in musterd.
	var g errgroup.Group
	signed := make(chan struct{}, 1)
	g.Go(func() error {
		defer close(signed)
		for part := range slices.Chunk(who, batch) {
			err := db.Update(ctx, func(tx *bolt.Tx) error {
				for _, a := range part {
					if err := e.RequestByCSR(tx, time.Now(), a.id, a.csr, pki.ViaMQTT); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
			select {
			case signed <- struct{}{}:
			default:
			}
		}
		return nil
	})
	g.Go(func() error {
		for range signed {
			if err := e.SignPending(ctx); err != nil {
				return err
			}
		}
		return e.SignPending(ctx)
	})
	if err := g.Wait(); err != nil {
		return 0, err
	}
	took := time.Since(began)
	return float64(len(who)) / took.Seconds(), check(ctx, db, who)
}

// check makes sure that the work was done.
func check(ctx context.Context, db *bolt.DB, who []applicant) error {
	return db.View(ctx, func(tx *bolt.Tx) error {
		for _, a := range who {
			d, err := tx.Device(a.id)
			if err != nil {
				return err
			}
			if d.Next == "" {
				return fmt.Errorf("%s has no certificate", a.id)
			}
		}
		return nil
	})
}

// bare signs with the standard library and stores the bytes, one sync per batch.
func bare(path string, h *ca.Hierarchy, who []applicant, batch, workers int) (float64, error) {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	began := time.Now()
	n := uint64(0)
	for part := range slices.Chunk(who, batch) {
		ders := make([][]byte, len(part))
		var g errgroup.Group
		g.SetLimit(workers)
		for i, a := range part {
			sign := func() (err error) { ders[i], err = create(h, a); return err }
			if workers == 1 {
				if err := sign(); err != nil {
					return 0, err
				}
				continue
			}
			g.Go(sign)
		}
		if err := g.Wait(); err != nil {
			return 0, err
		}
		err := db.Update(func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("certs"))
			if err != nil {
				return err
			}
			for _, der := range ders {
				n++
				err = errors.Join(err, b.Put(binary.BigEndian.AppendUint64(nil, n), der))
			}
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	return float64(len(who)) / time.Since(began).Seconds(), nil
}

func create(h *ca.Hierarchy, a applicant) ([]byte, error) {
	serial, err := ca.NewSerial()
	if err != nil {
		return nil, err
	}
	uri, err := url.Parse(wire.CertUser(a.id, serial))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial.Big(), Subject: pkix.Name{CommonName: string(a.id)}, DNSNames: []string{string(a.id)}, URIs: []*url.URL{uri},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(90 * 24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, h.Device.Cert, a.key.Public(), h.Device.Key)
}

// nobody has no sessions to close.
type nobody struct{}

func (nobody) CloseUser(context.Context, string, string) error     { return nil }
func (nobody) UserConnected(context.Context, string) (bool, error) { return false, nil }
