package app

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/ca/keystore"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
)

// fileAuditKey is, in pki.dir, the key that signs the audit trail, unless pki.audit_key names another.
const fileAuditKey = "audit.key"

// openTrail opens the key of the audit trail, and makes one where there was none: that is on record then (Trail.Register),
// and at odds with what an auditor has pinned if there was another before.
func (a *App) openTrail(passphrase []byte) error {
	signer, err := a.auditSigner(passphrase)
	if err != nil {
		return fmt.Errorf("audit key: %w", err)
	}
	a.trail, err = access.NewTrail(access.TrailConfig{
		Update: update(a.store, func(tx *bolt.Tx) access.TrailTx { return tx }),
		View:   view(a.store, func(tx *bolt.Tx) access.TrailTx { return tx }),
		Signer: signer, Log: a.log,
	})
	if err != nil {
		return err
	}
	state := func() access.TrailState {
		s, err := a.trail.State(context.Background())
		if err != nil {
			a.log.Debug("the state of the audit trail cannot be read", "error", err)
		}
		return s
	}
	a.metrics.Gauge("muster_audit_entries", "Entries of the audit trail.", func() float64 { return float64(state().Entries) })
	a.metrics.Gauge("muster_audit_unsigned_entries", "Entries of the audit trail that no checkpoint vouches for yet.", func() float64 { return float64(state().Unsigned) })
	a.metrics.Counter("muster_audit_failures_total", "Checkpoints of the audit trail that could not be made.", func() float64 { return float64(state().Failures) })
	return nil
}

func (a *App) auditSigner(passphrase []byte) (crypto.Signer, error) {
	if ref := a.c.PKI.AuditKey; ref != "" {
		key, err := keystore.Open(context.Background(), ref, passphrase)
		if fleet.Is(err, fleet.Unavailable) {
			key, err = a.auditKeyLater(ref, passphrase, err)
		}
		if err != nil {
			return nil, err
		}
		a.life.onStop("audit key", func(context.Context) error { return key.Close() })
		return key, nil
	}
	path := filepath.Join(a.c.Path(a.c.PKI.Dir), fileAuditKey)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := makeAuditKey(path, passphrase); err != nil {
			return nil, err
		}
		a.log.Info("a key for the audit trail was made", "file", path)
	}
	return keystore.ReadFile(path, passphrase)
}

// auditKeyLater returns a key whose manager is away now: a trail that cannot be signed for a while is no reason to keep
// devices out. Which key it is, the store knows from the time before; without one there is only the error why.
func (a *App) auditKeyLater(ref string, passphrase []byte, why error) (*keystore.Key, error) {
	var keys []audit.Key
	err := a.store.View(context.Background(), func(tx *bolt.Tx) (err error) { keys, err = tx.AuditKeys(); return err })
	if err != nil || len(keys) == 0 {
		return nil, errors.Join(why, err)
	}
	pub, err := x509.ParsePKIXPublicKey(keys[len(keys)-1].PublicKey)
	if err != nil {
		return nil, errors.Join(why, err)
	}
	known, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, why
	}
	a.log.Error("the audit key is away: the trail is signed when it is back", "error", why)
	return keystore.Later(ref, passphrase, known)
}

// makeAuditKey writes a new key, which appears whole or not at all.
func makeAuditKey(path string, passphrase []byte) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	part := path + ".new"
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := keystore.WriteFile(part, key, passphrase); err != nil {
		return err
	}
	return os.Rename(part, path)
}

// startTrail is first of all, and so ends last: its final checkpoint vouches for what the other parts wrote at their end.
func (a *App) startTrail() error {
	if err := a.trail.Register(context.Background(), time.Now()); err != nil {
		return err
	}
	a.life.task("audit", func(ctx context.Context) error { return a.trail.Run(ctx, a.report("audit")) }, a.report("audit"))
	a.life.task("logins", a.operators.Run, a.report("logins"))
	return nil
}
