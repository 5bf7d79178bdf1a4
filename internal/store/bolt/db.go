// Package bolt keeps everything that muster knows in one bbolt file: one writer, one transaction for a state and what
// follows from it (DESIGN §10). Its Tx satisfies the small Tx interface that each use case declares.
package bolt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	bbolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// Options of Open. The zero value is right for a service.
type Options struct {
	// NoSync leaves writes to the operating system: for tests and simulations only.
	NoSync bool
	// LockTimeout is how long to wait for another process to let go of the file; zero means 5 s.
	LockTimeout time.Duration
}

// DB is an open store. Close it once, after everything that uses it has stopped.
type DB struct {
	bolt *bbolt.DB
	path string

	// writer is held by the one writer, so that what watchers see has the order of the commits.
	writer   chan struct{}
	watchers []func(admission.Record)
	removals []func(fleet.DeviceID)
}

// Open opens or creates the store in the file path and brings its schema up to date. A second process is refused after
// Options.LockTimeout.
func Open(path string, o Options) (*DB, error) {
	if o.LockTimeout == 0 {
		o.LockTimeout = 5 * time.Second
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	b, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: o.LockTimeout, NoSync: o.NoSync, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("store: %s is in use by another process: stop it, or name another data directory", path)
	}
	if err != nil {
		return nil, fmt.Errorf("store: %s cannot be opened (restore it from a backup if it is damaged): %w", path, err)
	}
	d := &DB{bolt: b, path: path, writer: make(chan struct{}, 1)}
	if err := b.Update(migrate); err != nil {
		b.Close()
		return nil, fmt.Errorf("store: %s: %w", path, err)
	}
	return d, nil
}

// Close waits for the transactions under way and closes the file.
func (d *DB) Close() error { return d.bolt.Close() }

// Path returns the file that holds the store.
func (d *DB) Path() string { return d.path }

// WatchCredentials makes f hear of every change of what lets a device in: after the commit, before Update returns, in
// the order of the commits. Call it before the first Update.
func (d *DB) WatchCredentials(f func(admission.Record)) { d.watchers = append(d.watchers, f) }

// WatchRemovals makes f hear of every device that was removed, as WatchCredentials does of changes.
func (d *DB) WatchRemovals(f func(fleet.DeviceID)) { d.removals = append(d.removals, f) }

// Update runs f in the one write transaction and commits if f returns nil. It gives up when ctx ends before its turn.
// Errors of f come back as they are; failures of the file are of kind Full or Unavailable.
func (d *DB) Update(ctx context.Context, f func(*Tx) error) error {
	select {
	case d.writer <- struct{}{}:
	case <-ctx.Done():
		return fleet.Wrap(fleet.Unavailable, ctx.Err(), "the store was too busy")
	}
	defer func() { <-d.writer }()

	var records []admission.Record
	var removed []fleet.DeviceID
	err := d.bolt.Update(func(b *bbolt.Tx) error {
		tx := &Tx{b: b, touched: map[fleet.DeviceID]bool{}, headers: map[fleet.RolloutID]*header{}}
		if err := f(tx); err != nil {
			return err
		}
		if err := tx.flush(); err != nil {
			return err
		}
		var err error
		records, removed, err = tx.changedRecords()
		return err
	})
	if err != nil {
		return storeError(err)
	}
	for _, r := range records {
		for _, w := range d.watchers {
			w(r)
		}
	}
	for _, id := range removed {
		for _, w := range d.removals {
			w(id)
		}
	}
	return nil
}

// View runs f in a read transaction: a snapshot that writers do not disturb.
func (d *DB) View(ctx context.Context, f func(*Tx) error) error {
	if err := ctx.Err(); err != nil {
		return fleet.Wrap(fleet.Unavailable, err, "the request was given up")
	}
	return storeError(d.bolt.View(func(b *bbolt.Tx) error { return f(&Tx{b: b}) }))
}

// Credentials calls f with the admission record of every device, in id order.
func (d *DB) Credentials(ctx context.Context, f func(admission.Record)) error {
	return d.View(ctx, func(tx *Tx) error {
		return each(tx, bucketDevices, nil, func(_ []byte, dev fleet.Device) (bool, error) {
			r, err := tx.record(dev)
			if err != nil {
				return false, err
			}
			f(r)
			return true, nil
		})
	})
}

// Backup writes a consistent copy of the whole store to w while it is in use.
func (d *DB) Backup(w io.Writer) (int64, error) {
	var n int64
	err := d.bolt.View(func(b *bbolt.Tx) error {
		var err error
		n, err = b.WriteTo(w)
		return err
	})
	return n, err
}

// storeError gives failures of the file a kind; errors that have one, and nil, pass.
func storeError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*fleet.Error](err); ok {
		return err
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fleet.Wrap(fleet.Full, err, "the store's disk is full: free space, nothing was lost")
	case errors.Is(err, syscall.EIO), errors.Is(err, syscall.EROFS), errors.Is(err, bolterrors.ErrDatabaseNotOpen), errors.Is(err, bolterrors.ErrDatabaseReadOnly):
		return fleet.Wrap(fleet.Unavailable, err, "the store cannot be written")
	}
	return err
}
