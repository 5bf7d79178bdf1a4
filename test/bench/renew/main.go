// Command renew measures what a pass of renewals costs over stored fleets of growing size: finding who is due, by a dry
// run, with the same number of due devices in each fleet; then with ten times as many due ones in the largest. It prints
//
//	ratio sweep-flat <value> aim 0.5   a pass over the smallest fleet / the same number of due devices in the largest one
//	ratio sweep-due <value> aim 0.5    ten times the pass over so many due devices / a pass over ten times as many
//
// Values near 1 say that a pass costs in proportion to the due devices, and not to the stored ones. It says as well how
// long the walks over the whole fleet take: the status by days left, and the forecast of lock-outs.
package main

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"muster/internal/ca"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

const (
	day      = 24 * time.Hour
	lifetime = 90 * day
	rounds   = 5
)

func main() {
	small := flag.Int("small", 10_000, "devices of the smallest fleet")
	large := flag.Int("large", 1_000_000, "devices of the largest fleet")
	due := flag.Int("due", 1000, "due devices; ten times as many in the last measure")
	flag.Parse()
	if err := run(*small, *large, *due); err != nil {
		fmt.Fprintln(os.Stderr, "bench renew:", err)
		os.Exit(1)
	}
}

func run(small, large, due int) error {
	if 10*due > small {
		return fmt.Errorf("the smallest fleet must have ten times as many devices as are due")
	}
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h, err := ca.Create(ca.CreateOptions{At: time.Now()})
	if err != nil {
		return err
	}
	authority, err := ca.NewAuthority(h, pki.KeyPolicy{}, nil)
	if err != nil {
		return err
	}
	var flat [2]time.Duration
	var more time.Duration
	for i, n := range []int{small, large} {
		s, err := open(filepath.Join(dir, fmt.Sprint(n, ".db")), authority)
		if err != nil {
			return err
		}
		if err := s.settle(n, due); err != nil {
			return err
		}
		if flat[i], err = s.pass(0, due); err != nil {
			return err
		}
		if n == large {
			if more, err = s.pass(lifetime/2, 10*due); err != nil {
				return err
			}
			if err := s.walks(); err != nil {
				return err
			}
		}
		if err := s.db.Close(); err != nil {
			return err
		}
		fmt.Printf("%9d devices, %d due: a pass takes %s, %s for each due one\n", n, due, flat[i].Round(10*time.Microsecond), (flat[i] / time.Duration(due)).Round(100*time.Nanosecond))
	}
	fmt.Printf("%9d devices, %d due: a pass takes %s, %s for each due one\n", large, 10*due, more.Round(10*time.Microsecond), (more / time.Duration(10*due)).Round(100*time.Nanosecond))
	fmt.Printf("ratio sweep-flat %.2f aim 0.5\n", flat[0].Seconds()/flat[1].Seconds())
	fmt.Printf("ratio sweep-due %.2f aim 0.5\n", 10*flat[1].Seconds()/more.Seconds())
	return nil
}

// site is a store and the use case over it. Writing the fleet does not wait for the disk: what is measured only reads.
type site struct {
	db *bolt.DB
	e  *enroll.Enroller
	at time.Time
}

func open(path string, a *ca.Authority) (*site, error) {
	db, err := bolt.Open(path, bolt.Options{NoSync: true})
	if err != nil {
		return nil, err
	}
	s := &site{db: db, at: time.Now()}
	s.e, err = enroll.New(enroll.Config{
		Update: func(ctx context.Context, f func(enroll.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(enroll.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Authority: a, Sessions: nobody{}, Log: slog.New(slog.DiscardHandler),
	})
	return s, err
}

// nobody is a broker without connections.
type nobody struct{}

func (nobody) CloseUser(context.Context, string, string) error     { return nil }
func (nobody) UserConnected(context.Context, string) (bool, error) { return false, nil }

// settle stores n devices with a certificate each: due of them are past their window, ten times as many will be half a
// lifetime later, and all others were issued just now.
func (s *site) settle(n, due int) error {
	chain := [][]byte{make([]byte, 700), make([]byte, 550)} // as long as real ones
	step := max(1, n/due)
	for from := 0; from < n; from += 20_000 {
		err := s.db.Update(context.Background(), func(tx *bolt.Tx) error {
			for i := from; i < min(from+20_000, n); i++ {
				id := fleet.DeviceID(fmt.Sprintf("d%07d", i))
				issued := s.at.Add(-time.Duration(i%1000) * lifetime / 100_000) // within the last hundredth of a lifetime
				switch {
				case i%step == 0 && i/step < due:
					issued = s.at.Add(-lifetime * 8 / 10)
				case i%max(1, step/10) == 0:
					issued = s.at.Add(-lifetime * 4 / 10)
				}
				hash := fleet.HashOf(sha256.Sum256([]byte(id)))
				serial := fleet.Serial("5" + hash[:31])
				c := pki.Certificate{
					Serial: serial, Device: id, State: pki.Active, Via: pki.ViaMQTT, PublicKey: make([]byte, 91), KeyHash: hash, Chain: chain,
					NotBefore: issued.Add(-time.Hour), NotAfter: issued.Add(lifetime), IntendedAt: issued, IssuedAt: issued, ActiveAt: issued,
				}
				if err := tx.PutCertificate(c); err != nil {
					return err
				}
				if err := tx.PutDevice(fleet.Device{ID: id, Product: "lamp", CreatedAt: issued, Current: serial}); err != nil {
					return err
				}
				st := fleet.Status{Device: id, Online: i%4 != 0, Vhost: wire.VhostDevices, LastSeen: s.at, Sessions: []time.Time{issued, s.at.Add(-day)}}
				if err := tx.PutStatus(st); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// pass returns the median time of a dry run at a time from now, which must find at least that many due devices.
func (s *site) pass(later time.Duration, due int) (time.Duration, error) {
	var took []time.Duration
	for range rounds {
		began := time.Now()
		r, err := s.e.RenewPass(context.Background(), s.at.Add(later), enroll.RenewOptions{DryRun: true})
		if err != nil {
			return 0, err
		}
		took = append(took, time.Since(began))
		if r.Due != due {
			return 0, fmt.Errorf("%d devices are due, want %d", r.Due, due)
		}
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// walks says what the looks at the whole fleet cost.
func (s *site) walks() error {
	began := time.Now()
	status, err := s.e.FleetStatus(context.Background(), s.at)
	if err != nil {
		return err
	}
	took := time.Since(began)
	began = time.Now()
	f, err := s.e.Forecast(context.Background(), s.at, enroll.ForecastOptions{Limit: 100})
	if err != nil {
		return err
	}
	fmt.Printf("status of the fleet: %s; forecast of %d devices: %s (due %d)\n", took.Round(time.Millisecond), f.Devices, time.Since(began).Round(time.Millisecond), status.Due)
	return nil
}
