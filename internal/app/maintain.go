package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/config"
	"muster/internal/store/bolt"
)

// Fsck checks the store of a musterd that is not running and returns a line for each finding.
func Fsck(ctx context.Context, c config.Config) (found []string, err error) {
	path := c.Path(fileStore)
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("no store: %w", err)
	}
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return db.Check(ctx)
}

// Backup writes a consistent copy of the store into a new file and checks the copy. While musterd runs, the store is its
// own: it makes the copy itself on a signal (Serve), so this is for a stopped one.
func Backup(ctx context.Context, c config.Config, to string) (int64, error) {
	if _, err := os.Stat(c.Path(fileStore)); err != nil {
		return 0, fmt.Errorf("no store: %w", err)
	}
	db, err := bolt.Open(c.Path(fileStore), bolt.Options{})
	if err != nil {
		return 0, err
	}
	n, err := backup(ctx, db.Backup, to)
	return n, errors.Join(err, db.Close())
}

// BackupNow is Backup for a running App.
func (a *App) BackupNow(ctx context.Context, to string) (int64, error) {
	return backup(ctx, a.store.Backup, to)
}

func backup(ctx context.Context, write func(io.Writer) (int64, error), to string) (n int64, err error) {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(to))
		}
	}()
	n, err = write(f)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return 0, err
	}
	found, err := check(ctx, to)
	if err != nil {
		return n, err
	}
	// A broken audit trail is no reason to have no backup: it is evidence, and fsck, /readyz and restore tell of it.
	if i := slices.IndexFunc(found, func(s string) bool { return !strings.HasPrefix(s, "audit: ") }); i >= 0 {
		err = fmt.Errorf("the copy is not sound: %s", found[i])
	}
	return n, err
}

func check(ctx context.Context, path string) ([]string, error) {
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		return nil, err
	}
	found, err := db.Check(ctx)
	return found, errors.Join(err, db.Close())
}

// Restore puts a backup in place of the store of a musterd that is not running. The store that was there is kept beside
// it, and its new name returned; empty if there was none. The audit trail says from then on that it goes on from a backup:
// whoever kept a later checkpoint finds out, and should know why.
func Restore(ctx context.Context, c config.Config, from string, at time.Time) (kept string, err error) {
	found, err := check(ctx, from)
	if err != nil {
		return "", err
	}
	if len(found) > 0 {
		return "", fmt.Errorf("the backup is not sound, nothing was changed: %s", found[0])
	}
	path := c.Path(fileStore)
	details := "there was no store"
	if _, err := os.Stat(path); err == nil {
		db, err := bolt.Open(path, bolt.Options{LockTimeout: time.Second}) // proves that nobody uses it
		if err != nil {
			return "", err
		}
		var end audit.Head
		err = db.View(ctx, func(tx *bolt.Tx) (err error) { end, err = tx.AuditHead(); return err })
		if err := errors.Join(err, db.Close()); err != nil {
			return "", err
		}
		details = fmt.Sprintf("the store before ended with entry %d, hash %s", end.Seq, end.Hash)
		kept = path + ".before-restore-" + at.UTC().Format("20060102T150405Z")
	}
	src, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer src.Close()
	content, err := io.ReadAll(src)
	if err != nil {
		return "", err
	}
	if err := replaceFile(path+".restored", content, 0o600); err != nil {
		return "", err
	}
	if err := noteRestore(ctx, path+".restored", at, filepath.Base(from), details); err != nil {
		return "", err
	}
	if kept != "" {
		if err := os.Rename(path, kept); err != nil {
			return "", err
		}
	}
	return kept, os.Rename(path+".restored", path)
}

// noteRestore puts on record, in the copy of a backup, that it takes the place of another store.
func noteRestore(ctx context.Context, path string, at time.Time, name, details string) error {
	db, err := bolt.Open(path, bolt.Options{})
	if err != nil {
		return err
	}
	err = db.Update(ctx, func(tx *bolt.Tx) error {
		return tx.Audit(access.Entry{At: at, Who: access.Muster, What: "store.restore", On: name, Details: details})
	})
	return errors.Join(err, db.Close())
}
