package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"muster/internal/ca"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/store/bolt"
)

// nobody is a broker without connections: what closing takes is measured with a real one.
type nobody struct{}

func (nobody) CloseUser(context.Context, string, string) error     { return nil }
func (nobody) UserConnected(context.Context, string) (bool, error) { return false, nil }

// mass revokes n certificates of one issuer, after a drill, and compares what the drill said with what it took.
func mass(ctx context.Context, n int) error {
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
	db, err := bolt.Open(filepath.Join(dir, "muster.db"), bolt.Options{})
	if err != nil {
		return err
	}
	defer db.Close()
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
		return err
	}
	issuer := pki.Issuer{Cert: h.Device.Cert, Key: h.Device.Key}
	if err := crowd(ctx, db, issuer, n); err != nil {
		return err
	}
	drill, err := e.DrillIssuer(ctx, time.Now(), issuer.ID(), "bench")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	defer func() { cancel(); <-done }()
	m, err := e.RevokeIssuer(ctx, time.Now(), issuer.ID(), 1, "bench")
	for err == nil && !m.Done() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		m, _, err = e.MassRevocation(ctx, issuer.ID())
	}
	if err != nil {
		return err
	}
	if m.Revoked != n || drill.Certificates != n {
		return fmt.Errorf("%d of %d certificates were revoked, the drill said %d", m.Revoked, n, drill.Certificates)
	}
	took := m.DoneAt.Sub(m.Since)
	fmt.Printf("  mass revocation of %d certificates: %s, %.0f/s; the drill took %s and said %s\n",
		n, took.Round(time.Millisecond), float64(n)/took.Seconds(), drill.Took.Round(time.Millisecond), drill.Estimate.Round(time.Millisecond))
	return nil
}

// crowd stores n devices with a certificate each.
func crowd(ctx context.Context, db *bolt.DB, issuer pki.Issuer, n int) error {
	leaf := make([]byte, 620)
	const part = 2000
	for from := 0; from < n; from += part {
		err := db.Update(ctx, func(tx *bolt.Tx) error {
			for i := from; i < min(n, from+part); i++ {
				serial, err := ca.NewSerial()
				if err != nil {
					return err
				}
				now, id := time.Now(), fleet.DeviceID(fmt.Sprint("d", i))
				c := pki.Certificate{
					Serial: serial, Device: id, State: pki.Active, PublicKey: leaf[:91], KeyHash: fleet.Hash(fmt.Sprintf("%064x", big.NewInt(int64(i)))),
					Chain: [][]byte{leaf, issuer.Cert.Raw}, NotBefore: now, NotAfter: now.Add(90 * 24 * time.Hour), IntendedAt: now, IssuedAt: now, ActiveAt: now,
				}
				if err := tx.PutCertificate(c); err != nil {
					return err
				}
				if err := tx.PutDevice(fleet.Device{ID: id, Product: "bench", CreatedAt: now, Current: serial}); err != nil {
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
