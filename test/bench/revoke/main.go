// Command revoke measures what a revocation takes: from an operator's call to the device's socket closed, on a real RabbitMQ
// with connected devices; how long it takes to sign a revocation list of 100 000 entries; and to revoke every certificate of an
// issuer. It prints
//
//	ratio revoke-median <value> aim 1
//	ratio revoke-worst <value> aim 1
//	ratio crl <value> aim 0.005
//	ratio crl-store <value> aim 0.001
//
// The first two are 50 ms and one second divided by the median and the worst. The last two are bare SHA-256 over the bytes of
// the list and one signature, divided by making the list from records in memory, and from the store; medians over the rounds.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/api"
	"muster/internal/ca"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/revocation"
	"muster/internal/simdev"
	"muster/internal/store/bolt"
	"muster/test/world"
)

func main() {
	n := flag.Int("devices", 200, "devices that are connected and revoked one after the other")
	entries := flag.Int("entries", 100_000, "certificates on the list")
	whole := flag.Int("mass", 10_000, "certificates of one issuer that are revoked by one order")
	rounds := flag.Int("rounds", 7, "rounds for the list")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := errors.Join(closing(ctx, *n), lists(ctx, *entries, *rounds), mass(ctx, *whole)); err != nil {
		fmt.Fprintln(os.Stderr, "bench revoke:", err)
		os.Exit(1)
	}
}

// Aims of the time from the call to the closed socket.
const (
	aimMedian = 50 * time.Millisecond
	aimWorst  = time.Second
)

// closing revokes n connected devices and watches their sockets.
func closing(ctx context.Context, n int) (err error) {
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	w, err := world.Start(ctx, world.Options{Dir: filepath.Join(dir, "world"), Say: func(s string) { fmt.Println(s) }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop(context.Background())) }()
	devs := world.NewDevices()
	defer devs.Stop()
	serials, err := connect(ctx, w, devs, dir, n)
	if err != nil {
		return err
	}

	// An operator's answer waits for the looks that follow; the next device does not.
	var answers errgroup.Group
	var took []time.Duration
	for i, s := range serials {
		id, mark, begin := deviceID(i), devs.Mark(), time.Now()
		answers.Go(func() error {
			out, err := w.Muster(ctx, "certs", "revoke", string(s), "--output", "json")
			if err != nil {
				return err
			}
			var r []api.RevocationReport
			if err := json.Unmarshal([]byte(out), &r); err != nil || len(r) != 1 || !r[0].Clean || r[0].Connections != 1 {
				return fmt.Errorf("%s: no proof in %s (%w)", id, out, err)
			}
			return nil
		})
		if err := devs.Await(ctx, "closed", func() bool { return len(devs.Since(mark, id, simdev.Disconnected)) > 0 }); err != nil {
			return errors.Join(err, answers.Wait())
		}
		took = append(took, devs.Since(mark, id, simdev.Disconnected)[0].At.Sub(begin))
	}
	if err := answers.Wait(); err != nil {
		return err
	}
	slices.Sort(took)
	median, worst := took[len(took)/2], took[len(took)-1]
	fmt.Printf("  revoke to socket closed, %d devices: median %s, 95 %% %s, worst %s\n", n, median.Round(100*time.Microsecond), took[len(took)*95/100].Round(100*time.Microsecond), worst.Round(100*time.Microsecond))
	fmt.Printf("ratio revoke-median %.2f aim 1\n", float64(aimMedian)/float64(median))
	fmt.Printf("ratio revoke-worst %.2f aim 1\n", float64(aimWorst)/float64(worst))
	return nil
}

func deviceID(i int) fleet.DeviceID { return fleet.DeviceID(fmt.Sprintf("bench-%04d", i)) }

// connect enrols n devices and waits until they are all known to be online. It returns their certificates.
func connect(ctx context.Context, w *world.World, devs *world.Devices, dir string, n int) ([]fleet.Serial, error) {
	var csv strings.Builder
	csv.WriteString("id,product\n")
	for i := range n {
		fmt.Fprintf(&csv, "%s,bench\n", deviceID(i))
	}
	fleetFile, kits := filepath.Join(dir, "fleet.csv"), filepath.Join(dir, "credentials")
	if err := os.WriteFile(fleetFile, []byte(csv.String()), 0o600); err != nil {
		return nil, err
	}
	for _, args := range [][]string{{"device", "add", "--from", fleetFile}, {"device", "credentials", "--all", "--product", "bench", "--out", kits}} {
		if _, err := w.Muster(ctx, args...); err != nil {
			return nil, err
		}
	}
	for i := range n {
		_, err := devs.Run(filepath.Join(kits, string(deviceID(i))), func(c *simdev.Config) {
			c.Timing = simdev.DefaultTiming() // one that was thrown out stays away for a while
			c.Timing.Spread, c.Timing.BackoffBase = 5*time.Second, 30*time.Second
		})
		if err != nil {
			return nil, err
		}
	}
	var serials []fleet.Serial
	err := devs.Await(ctx, "all connected", func() bool {
		for i := range n {
			if devs.Get(deviceID(i)).Counts().Answers == 0 {
				return false
			}
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	for i := 0; i < n; {
		out, err := w.Muster(ctx, "device", "show", string(deviceID(i)), "--output", "json")
		if err != nil {
			return nil, err
		}
		var d api.Device
		if err := json.Unmarshal([]byte(out), &d); err != nil {
			return nil, err
		}
		if d.Status.Online && d.Current != "" { // the broker's word of it may come late
			serials = append(serials, fleet.Serial(d.Current))
			i++
		}
	}
	return serials, nil
}

// lists makes lists of n entries and compares them with what hashing and signing their bytes alone takes.
func lists(ctx context.Context, n, rounds int) error {
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h, err := ca.Create(ca.CreateOptions{At: time.Now()})
	if err != nil {
		return err
	}
	issuer := pki.Issuer{Cert: h.Device.Cert, Key: h.Device.Key}
	db, err := bolt.Open(filepath.Join(dir, "muster.db"), bolt.Options{})
	if err != nil {
		return err
	}
	defer db.Close()
	certs, err := revoked(ctx, db, issuer, n)
	if err != nil {
		return err
	}
	use := revocation.New(revocation.Config{
		Update: func(ctx context.Context, f func(revocation.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(revocation.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Issuers: func() []pki.Issuer { return []pki.Issuer{issuer} }, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	var memory, store []float64
	for round := range rounds {
		at := time.Now()
		l, err := issuer.SignList(at, 7*24*time.Hour, int64(round+1), certs)
		if err != nil {
			return err
		}
		made := time.Since(at)
		at = time.Now()
		kept, err := use.SignNow(ctx, at, issuer.ID(), "bench")
		if err != nil {
			return err
		}
		stored := time.Since(at)
		if err := check(issuer, n, l, kept); err != nil {
			return err
		}
		at = time.Now()
		sum := sha256.Sum256(l.DER)
		if _, err := ecdsa.SignASN1(rand.Reader, h.Device.Key.(*ecdsa.PrivateKey), sum[:]); err != nil {
			return err
		}
		bare := time.Since(at)
		memory, store = append(memory, bare.Seconds()/made.Seconds()), append(store, bare.Seconds()/stored.Seconds())
		fmt.Printf("  round %d: list of %d entries, %d bytes: %s, from the store %s; bare hash and signature %s\n",
			round+1, n, len(l.DER), made.Round(time.Millisecond), stored.Round(time.Millisecond), bare.Round(100*time.Microsecond))
	}
	fmt.Printf("ratio crl %.3f aim 0.005\n", median(memory))
	fmt.Printf("ratio crl-store %.4f aim 0.001\n", median(store))
	return nil
}

// check makes sure that the work was done.
func check(issuer pki.Issuer, n int, ls ...pki.List) error {
	for _, l := range ls {
		crl, err := x509.ParseRevocationList(l.DER)
		if err != nil {
			return err
		}
		if err := crl.CheckSignatureFrom(issuer.Cert); err != nil {
			return err
		}
		if len(crl.RevokedCertificateEntries) != n {
			return fmt.Errorf("the list has %d entries, want %d", len(crl.RevokedCertificateEntries), n)
		}
	}
	return nil
}

// revoked stores n revoked certificates with chains of the usual length.
func revoked(ctx context.Context, db *bolt.DB, issuer pki.Issuer, n int) ([]pki.Certificate, error) {
	leaf := make([]byte, 620)
	var out []pki.Certificate
	for i := range n {
		serial, err := ca.NewSerial()
		if err != nil {
			return nil, err
		}
		now := time.Now()
		out = append(out, pki.Certificate{
			Serial: serial, Device: fleet.DeviceID(fmt.Sprint("d", i)), State: pki.Revoked, Reason: i % 2, PublicKey: leaf[:91],
			KeyHash: fleet.Hash(fmt.Sprintf("%064x", big.NewInt(int64(i)))), Chain: [][]byte{leaf, issuer.Cert.Raw},
			NotBefore: now, NotAfter: now.Add(90 * 24 * time.Hour), IntendedAt: now, IssuedAt: now, RevokedAt: now,
		})
	}
	for part := range slices.Chunk(out, 5000) {
		err := db.Update(ctx, func(tx *bolt.Tx) error {
			for _, c := range part {
				if err := tx.PutCertificate(c); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}
