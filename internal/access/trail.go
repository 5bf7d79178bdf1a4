package access

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"sync"
	"time"

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
	AuditGenesis() (Genesis, error)
	AuditHead() (Head, error)
	// AuditEntry returns one entry, or a NotFound error.
	AuditEntry(seq uint64) (Entry, error)
	// AuditEntries and Checkpoints return up to limit (0: all) after number after, in order.
	AuditEntries(after uint64, limit int) ([]Entry, error)
	Checkpoints(after uint64, limit int) ([]SignedCheckpoint, error)
	// LastCheckpoint returns the zero SignedCheckpoint if there is none.
	LastCheckpoint() (SignedCheckpoint, error)
	PutCheckpoint(SignedCheckpoint) error
	// AuditKeys are all public keys that ever signed, the newest last.
	AuditKeys() ([]AuditKey, error)
	PutAuditKey(AuditKey) error
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
	key AuditKey

	mu sync.Mutex // one checkpoint at a time
}

// NewTrail returns a Trail. A signer that is not EC P-256 is Unprocessable.
func NewTrail(c TrailConfig) (*Trail, error) {
	key, err := NewAuditKey(c.Signer.Public(), time.Time{})
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
	due := false
	err := t.c.View(ctx, func(tx TrailTx) error {
		head, last, err := ends(tx)
		if err != nil {
			return err
		}
		n := head.Seq - min(last.Seq, head.Seq)
		due = n > 0 && (force || n >= CheckpointEntries || at.Sub(last.At) >= CheckpointAge)
		if last.Seq > head.Seq { // the end is gone: say so
			due = true
		}
		return nil
	})
	if err != nil || !due {
		return err
	}
	_, err = t.sign(ctx, at)
	return err
}

func ends(tx TrailTx) (Head, SignedCheckpoint, error) {
	head, err := tx.AuditHead()
	if err != nil {
		return Head{}, SignedCheckpoint{}, err
	}
	last, err := tx.LastCheckpoint()
	return head, last, err
}

// Checkpoint puts the wish of an operator on record and makes a checkpoint that covers it. A trail that is broken since
// the last checkpoint is a Conflict.
func (t *Trail) Checkpoint(ctx context.Context, at time.Time, by string) (SignedCheckpoint, error) {
	err := t.c.Update(ctx, func(tx TrailTx) error { return tx.Audit(Entry{At: at, Who: by, What: "audit.checkpoint"}) })
	if err != nil {
		return SignedCheckpoint{}, err
	}
	return t.sign(ctx, at)
}

// sign verifies what was written since the last checkpoint, and signs the end. Nothing that is broken is signed: that
// would make it look sound.
func (t *Trail) sign(ctx context.Context, at time.Time) (SignedCheckpoint, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var g Genesis
	var start, head Head
	err := t.c.View(ctx, func(tx TrailTx) error {
		var last SignedCheckpoint
		var err error
		if g, err = tx.AuditGenesis(); err != nil {
			return err
		}
		if head, last, err = ends(tx); err != nil {
			return err
		}
		start, err = t.startOf(tx, g, last)
		return err
	})
	for err == nil && start.Seq < head.Seq {
		err = t.c.View(ctx, func(tx TrailTx) error { start, err = follow(tx, start, head.Seq); return err })
	}
	if b, ok := errors.AsType[*Broken](err); ok {
		return SignedCheckpoint{}, &fleet.Error{Kind: fleet.Conflict, Code: "audit_broken", Msg: "the audit trail is broken since its last checkpoint and is not signed: " + b.Msg, Err: b}
	}
	if err != nil {
		return SignedCheckpoint{}, err
	}
	if head.Seq == 0 {
		return SignedCheckpoint{}, fleet.Coded(fleet.Conflict, "audit_empty", "the audit trail is empty")
	}
	c, err := SignCheckpoint(Checkpoint{Origin: g.Origin, Seq: head.Seq, Hash: start.Hash, At: at}, t.c.Signer)
	if err != nil {
		return SignedCheckpoint{}, err
	}
	if err := t.c.Update(ctx, func(tx TrailTx) error { return tx.PutCheckpoint(c) }); err != nil {
		return SignedCheckpoint{}, err
	}
	t.c.Log.Info("audit checkpoint", "origin", g.Origin, "entry", c.Seq, "hash", c.Hash, "key", c.KeyID, "checkpoint", c.JWS)
	return c, nil
}

// startOf returns where verification before signing begins: at the last checkpoint, whose entry must still be there.
func (t *Trail) startOf(tx TrailTx, g Genesis, last SignedCheckpoint) (Head, error) {
	if last.JWS == "" {
		return g.Head(), nil
	}
	e, err := tx.AuditEntry(last.Seq)
	if fleet.Is(err, fleet.NotFound) {
		return Head{}, broken(last.Seq, Missing, "entry %d is missing: a checkpoint vouches for it", last.Seq)
	}
	if err != nil {
		return Head{}, err
	}
	if e.Hash != last.Hash || HashEntry(e.Prev, e) != e.Hash {
		return Head{}, broken(last.Seq, Forked, "entry %d is not the one that its checkpoint vouches for", last.Seq)
	}
	return Head{last.Seq, last.Hash}, nil
}

// follow verifies the next page of entries, up to number last.
func follow(tx TrailTx, start Head, last uint64) (Head, error) {
	es, err := tx.AuditEntries(start.Seq, int(min(trailPage, last-start.Seq)))
	if err != nil {
		return start, err
	}
	if len(es) == 0 {
		return start, broken(start.Seq+1, Missing, "%s missing", span(start.Seq+1, last))
	}
	for _, e := range es {
		if start, err = start.Next(e); err != nil {
			return start, err
		}
	}
	return start, nil
}

// Checkpoints returns up to limit checkpoints after the one of entry after, in order.
func (t *Trail) Checkpoints(ctx context.Context, after uint64, limit int) (cs []SignedCheckpoint, err error) {
	err = t.c.View(ctx, func(tx TrailTx) error { cs, err = tx.Checkpoints(after, limit); return err })
	return cs, err
}

// Keys returns the public keys that sign checkpoints or once did, the one in use last.
func (t *Trail) Keys(ctx context.Context) (ks []AuditKey, err error) {
	err = t.c.View(ctx, func(tx TrailTx) error { ks, err = tx.AuditKeys(); return err })
	return ks, err
}

// Export calls emit with an export of the trail after entry after (0: all of it), in pieces of whole lines. Each piece is
// read in a transaction of its own; what is written meanwhile may or may not be in it. An entry that is not there is
// NotFound, before anything is emitted.
func (t *Trail) Export(ctx context.Context, after uint64, emit func([]byte) error) error {
	var b []byte
	at := Head{}
	err := t.c.View(ctx, func(tx TrailTx) error {
		g, err := tx.AuditGenesis()
		if err != nil {
			return err
		}
		if b, err = (ExportLine{Genesis: &g}).Append(nil); err != nil {
			return err
		}
		if at = g.Head(); after == 0 {
			return nil
		}
		e, err := tx.AuditEntry(after)
		if err != nil {
			return err
		}
		at = Head{e.Seq, e.Hash}
		b, err = ExportLine{From: &at}.Append(b)
		return err
	})
	for err == nil {
		more := false
		err = t.c.View(ctx, func(tx TrailTx) error {
			b, at, more, err = exportPage(tx, b, at)
			return err
		})
		if err != nil {
			return err
		}
		if !more {
			if b, err = (ExportLine{End: &at}).Append(b); err != nil {
				return err
			}
		}
		if err = emit(b); err != nil || !more {
			return err
		}
		b = b[:0]
	}
	return err
}

// exportPage appends the next entries, each with its checkpoint, and what comes of checkpoints whose entries are gone. It
// copies what is there and judges nothing.
func exportPage(tx TrailTx, b []byte, at Head) (_ []byte, _ Head, more bool, err error) {
	es, err := tx.AuditEntries(at.Seq, trailPage)
	if err != nil {
		return b, at, false, err
	}
	more = len(es) == trailPage
	cs, err := tx.Checkpoints(at.Seq, trailPage)
	if err != nil {
		return b, at, false, err
	}
	for i := range es {
		for ; len(cs) > 0 && cs[0].Seq < es[i].Seq; cs = cs[1:] {
			if b, err = (ExportLine{Checkpoint: cs[0].JWS}).Append(b); err != nil {
				return b, at, false, err
			}
		}
		if b, err = (ExportLine{Entry: &es[i]}).Append(b); err != nil {
			return b, at, false, err
		}
		at = Head{es[i].Seq, es[i].Hash}
		if len(cs) > 0 && cs[0].Seq == at.Seq {
			if b, err = (ExportLine{Checkpoint: cs[0].JWS}).Append(b); err != nil {
				return b, at, false, err
			}
			cs = cs[1:]
		}
	}
	if !more {
		for ; len(cs) > 0; cs = cs[1:] {
			if b, err = (ExportLine{Checkpoint: cs[0].JWS}).Append(b); err != nil {
				return b, at, false, err
			}
		}
	}
	return b, at, more, nil
}
