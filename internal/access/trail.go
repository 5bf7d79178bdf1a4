package access

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"sync"
	"time"

	"muster/internal/audit"
	"muster/internal/fleet"
)

// When checkpoints are made by themselves.
const (
	CheckpointEntries = 1000             // as soon as so many entries are not signed yet
	CheckpointAge     = time.Hour        // or when the last one is so old and something was written since
	checkpointLook    = 15 * time.Second // how often that is looked at
	trailPage         = 500              // entries that are read in one transaction
)

// TrailTx is what a Trail needs of the store.
type TrailTx interface {
	Audit(Entry) error
	AuditGenesis() (audit.Genesis, error)
	// AuditHead returns how many entries were ever appended, and the hash of the last that is there.
	AuditHead() (audit.Head, error)
	// AuditEntry returns one entry, or a NotFound error.
	AuditEntry(seq uint64) (Entry, error)
	// AuditEntries and Checkpoints return up to limit (0: all) after number after, in order.
	AuditEntries(after uint64, limit int) ([]Entry, error)
	Checkpoints(after uint64, limit int) ([]audit.SignedCheckpoint, error)
	// LastCheckpoint returns the zero SignedCheckpoint if there is none.
	LastCheckpoint() (audit.SignedCheckpoint, error)
	PutCheckpoint(audit.SignedCheckpoint) error
	// AuditKeys are all public keys that ever signed, the newest last.
	AuditKeys() ([]audit.Key, error)
	PutAuditKey(audit.Key) error
}

// TrailConfig configures a Trail. All fields are needed.
type TrailConfig struct {
	Update func(context.Context, func(TrailTx) error) error
	View   func(context.Context, func(TrailTx) error) error
	Signer crypto.Signer // EC P-256
	// Log gets each signed checkpoint: whoever collects the log has a witness outside of this machine.
	Log *slog.Logger
}

// Trail signs the audit trail and shows it. Its methods may be called at any time.
type Trail struct {
	c   TrailConfig
	key audit.Key

	mu       sync.Mutex // one checkpoint at a time
	failures uint64     // of checkpoints, guarded by count
	count    sync.Mutex
}

// NewTrail returns a Trail. A signer that is not EC P-256 is Unprocessable.
func NewTrail(c TrailConfig) (*Trail, error) {
	key, err := audit.NewKey(c.Signer.Public(), time.Time{})
	if err != nil {
		return nil, err
	}
	return &Trail{c: c, key: key}, nil
}

// Register makes the public key known to the store, with an entry in the trail, if it is new. Call it before Run.
func (t *Trail) Register(ctx context.Context, at time.Time) error {
	return t.c.Update(ctx, func(tx TrailTx) error {
		keys, err := tx.AuditKeys()
		if err != nil {
			return err
		}
		if len(keys) > 0 && keys[len(keys)-1].ID == t.key.ID {
			return nil
		}
		k := t.key
		k.Since = at.Round(0).UTC()
		if err := tx.PutAuditKey(k); err != nil {
			return err
		}
		return tx.Audit(Entry{At: at, Who: Muster, What: "audit.key", On: k.ID, Details: "checkpoints are signed with this key from now on"})
	})
}

// Run makes checkpoints until ctx ends: every CheckpointEntries entries, every CheckpointAge if something was written,
// at its start and at its end. The trail since the last checkpoint is verified before it is signed; report is told of a
// trail that is broken there, which is not signed any more, and nil when all is well.
func (t *Trail) Run(ctx context.Context, report func(error)) error {
	tick := time.NewTicker(checkpointLook)
	defer tick.Stop()
	said := ""
	look := func(ctx context.Context, force bool) {
		err := t.checkpointIfDue(ctx, time.Now(), force)
		if ctx.Err() != nil {
			return
		}
		if err != nil && err.Error() != said {
			t.c.Log.Error("the audit trail could not be signed", "error", err)
		}
		if said = ""; err != nil {
			said = err.Error()
		}
		report(err)
	}
	for look(ctx, true); ; look(ctx, false) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			look(last, true)
			return ctx.Err()
		}
	}
}

func (t *Trail) checkpointIfDue(ctx context.Context, at time.Time, force bool) error {
	s, err := t.State(ctx)
	if err != nil {
		return err
	}
	due := s.Unsigned > 0 && (force || s.Unsigned >= CheckpointEntries || at.Sub(s.SignedAt) >= CheckpointAge)
	if !due && s.SignedTo <= s.Entries { // a checkpoint of what is not there any more must be told
		return nil
	}
	_, err = t.sign(ctx, at)
	return err
}

// TrailState says how far the trail is signed.
type TrailState struct {
	Entries  uint64    // that were written
	SignedTo uint64    // number of the last entry that a checkpoint vouches for; 0: none
	SignedAt time.Time // time of that checkpoint
	Unsigned uint64    // entries after it
	Failures uint64    // checkpoints that could not be made since the process began
}

// State returns how far the trail is signed.
func (t *Trail) State(ctx context.Context) (s TrailState, err error) {
	err = t.c.View(ctx, func(tx TrailTx) error {
		head, last, err := ends(tx)
		s = TrailState{Entries: head.Seq, SignedTo: last.Seq, SignedAt: last.At, Unsigned: head.Seq - min(last.Seq, head.Seq)}
		return err
	})
	t.count.Lock()
	defer t.count.Unlock()
	s.Failures = t.failures
	return s, err
}

func ends(tx TrailTx) (audit.Head, audit.SignedCheckpoint, error) {
	head, err := tx.AuditHead()
	if err != nil {
		return audit.Head{}, audit.SignedCheckpoint{}, err
	}
	last, err := tx.LastCheckpoint()
	return head, last, err
}

// Checkpoint puts the wish of an operator on record and makes a checkpoint that covers it. A trail that is broken since
// the last checkpoint is a Conflict.
func (t *Trail) Checkpoint(ctx context.Context, at time.Time, by string) (audit.SignedCheckpoint, error) {
	err := t.c.Update(ctx, func(tx TrailTx) error { return tx.Audit(Entry{At: at, Who: by, What: "audit.checkpoint"}) })
	if err != nil {
		return audit.SignedCheckpoint{}, err
	}
	return t.sign(ctx, at)
}

// sign verifies what was written since the last checkpoint, and signs the end. Nothing that is broken is signed: that
// would make it look sound.
func (t *Trail) sign(ctx context.Context, at time.Time) (audit.SignedCheckpoint, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, origin, err := t.signEnd(ctx, at)
	if err != nil {
		t.count.Lock()
		t.failures++
		t.count.Unlock()
		if b, ok := errors.AsType[*audit.Broken](err); ok {
			err = &fleet.Error{Kind: fleet.Conflict, Code: "audit_broken", Msg: "the audit trail is broken since its last checkpoint and is not signed: " + b.Msg, Err: b}
		}
		return audit.SignedCheckpoint{}, err
	}
	t.c.Log.Info("audit checkpoint", "origin", origin, "entry", c.Seq, "hash", c.Hash, "key", c.KeyID, "checkpoint", c.JWS)
	return c, nil
}

func (t *Trail) signEnd(ctx context.Context, at time.Time) (c audit.SignedCheckpoint, origin string, err error) {
	var start, head audit.Head
	err = t.c.View(ctx, func(tx TrailTx) error {
		g, err := tx.AuditGenesis()
		if err != nil {
			return err
		}
		var last audit.SignedCheckpoint
		if head, last, err = ends(tx); err != nil {
			return err
		}
		origin = g.Origin
		start, err = startOf(tx, g, last)
		return err
	})
	for err == nil && start.Seq < head.Seq {
		err = t.c.View(ctx, func(tx TrailTx) (err error) { start, err = follow(tx, start, head.Seq); return err })
	}
	if err != nil {
		return c, origin, err
	}
	if head.Seq == 0 {
		return c, origin, fleet.Coded(fleet.Conflict, "audit_empty", "the audit trail is empty")
	}
	if c, err = audit.SignCheckpoint(audit.Checkpoint{Origin: origin, Seq: start.Seq, Hash: start.Hash, At: at}, t.c.Signer); err != nil {
		return c, origin, err
	}
	return c, origin, t.c.Update(ctx, func(tx TrailTx) error { return tx.PutCheckpoint(c) })
}

// startOf returns where verification before signing begins: at the last checkpoint, whose entry must still be there.
func startOf(tx TrailTx, g audit.Genesis, last audit.SignedCheckpoint) (audit.Head, error) {
	if last.JWS == "" {
		return g.Head(), nil
	}
	e, err := tx.AuditEntry(last.Seq)
	if fleet.Is(err, fleet.NotFound) {
		return audit.Head{}, audit.Break(last.Seq, audit.Missing, "entry %d is missing: a checkpoint vouches for it", last.Seq)
	}
	if err != nil {
		return audit.Head{}, err
	}
	if !last.VouchesFor(e) {
		return audit.Head{}, audit.Break(last.Seq, audit.Forked, "entry %d is not the one that its checkpoint vouches for", last.Seq)
	}
	return audit.Head{Seq: last.Seq, Hash: last.Hash}, nil
}

// follow verifies the next page of entries, up to number last.
func follow(tx TrailTx, start audit.Head, last uint64) (audit.Head, error) {
	es, err := tx.AuditEntries(start.Seq, int(min(trailPage, last-start.Seq)))
	if err != nil {
		return start, err
	}
	if len(es) == 0 {
		return start, audit.Break(start.Seq+1, audit.Missing, "%s missing", audit.Span(start.Seq+1, last))
	}
	for _, e := range es {
		if start, err = start.Next(e); err != nil {
			return start, err
		}
	}
	return start, nil
}

// Checkpoints returns up to limit checkpoints after the one of entry after, in order.
func (t *Trail) Checkpoints(ctx context.Context, after uint64, limit int) (cs []audit.SignedCheckpoint, err error) {
	err = t.c.View(ctx, func(tx TrailTx) error { cs, err = tx.Checkpoints(after, limit); return err })
	return cs, err
}

// Keys returns the public keys that sign checkpoints or once did, the one in use last.
func (t *Trail) Keys(ctx context.Context) (ks []audit.Key, err error) {
	err = t.c.View(ctx, func(tx TrailTx) error { ks, err = tx.AuditKeys(); return err })
	return ks, err
}
