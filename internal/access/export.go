package access

import (
	"context"
	"sort"
	"time"

	"muster/internal/audit"
	"muster/internal/fleet"
)

// Range says which part of the trail is exported. The zero value is all of it.
type Range struct {
	After uint64 // begin with the entry after this one
	// Since and Until, if set, are times. Entries stand in the order of their commits, and their times are those of the
	// calls: an export begins up to sinceSlack earlier, and goes on to the first checkpoint after Until, which vouches for
	// all of it.
	Since, Until time.Time
}

const sinceSlack = time.Minute

// Export calls emit with an export of a part of the trail, in pieces of whole lines. Each piece is read in a transaction
// of its own; what is written meanwhile may or may not be in it. An entry After that is not there is NotFound, before
// anything is emitted.
func (t *Trail) Export(ctx context.Context, r Range, emit func([]byte) error) error {
	x := exporter{until: r.Until}
	if err := t.c.View(ctx, func(tx TrailTx) error { return x.begin(tx, r) }); err != nil {
		return err
	}
	for !x.done {
		if err := t.c.View(ctx, x.page); err != nil {
			return err
		}
		if err := emit(x.buf); err != nil {
			return err
		}
		x.buf = x.buf[:0]
	}
	return nil
}

// exporter copies the trail line by line, as it is: what is broken must show at who verifies.
type exporter struct {
	until  time.Time
	at     audit.Head
	signed bool // a checkpoint of the last line was exported
	buf    []byte
	done   bool
}

func (x *exporter) line(l audit.ExportLine) (err error) {
	x.buf, err = l.Append(x.buf)
	return err
}

func (x *exporter) begin(tx TrailTx, r Range) error {
	g, err := tx.AuditGenesis()
	if err != nil {
		return err
	}
	x.at = g.Head()
	if err := x.line(audit.ExportLine{Genesis: &g}); err != nil {
		return err
	}
	if !r.Since.IsZero() {
		first, err := firstSince(tx, r.Since.Add(-sinceSlack))
		if err != nil {
			return err
		}
		r.After = max(r.After, first-1)
	}
	if r.After > 0 {
		e, err := tx.AuditEntry(r.After)
		if err != nil {
			return err
		}
		x.at = audit.Head{Seq: e.Seq, Hash: e.Hash}
		if err := x.line(audit.ExportLine{From: &audit.Head{Seq: e.Seq, Hash: e.Hash}}); err != nil {
			return err
		}
	}
	keys, err := tx.AuditKeys()
	if err != nil {
		return err
	}
	for i := range keys {
		if err := x.line(audit.ExportLine{Key: &keys[i]}); err != nil {
			return err
		}
	}
	return nil
}

// firstSince returns the number of the first entry from a time on; that after the last, if none is. In a trail with holes
// it is the first of all.
func firstSince(tx TrailTx, since time.Time) (uint64, error) {
	head, err := tx.AuditHead()
	if err != nil {
		return 1, err
	}
	i := sort.Search(int(head.Seq), func(i int) bool {
		e, getErr := tx.AuditEntry(uint64(i) + 1)
		if getErr != nil {
			err = getErr
		}
		return !e.At.Before(since)
	})
	if fleet.Is(err, fleet.NotFound) {
		return 1, nil
	}
	return uint64(i) + 1, err
}

// page exports the next entries, each with its checkpoint, and at the end what comes of checkpoints whose entries are gone.
func (x *exporter) page(tx TrailTx) error {
	es, err := tx.AuditEntries(x.at.Seq, trailPage)
	if err != nil {
		return err
	}
	cs, err := tx.Checkpoints(x.at.Seq, trailPage)
	if err != nil {
		return err
	}
	for i := range es {
		if x.signed && !x.until.IsZero() && es[i].At.After(x.until) {
			return x.end(x.at)
		}
		if cs, err = x.checkpoints(cs, es[i].Seq-1); err != nil {
			return err
		}
		if err := x.line(audit.ExportLine{Entry: &es[i]}); err != nil {
			return err
		}
		x.at, x.signed = audit.Head{Seq: es[i].Seq, Hash: es[i].Hash}, false
		if cs, err = x.checkpoints(cs, es[i].Seq); err != nil {
			return err
		}
	}
	if len(es) == trailPage {
		return nil
	}
	if _, err := x.checkpoints(cs, ^uint64(0)); err != nil {
		return err
	}
	head, err := tx.AuditHead()
	if err != nil {
		return err
	}
	return x.end(head)
}

// checkpoints exports the checkpoints up to that of entry last, and returns the others.
func (x *exporter) checkpoints(cs []audit.SignedCheckpoint, last uint64) ([]audit.SignedCheckpoint, error) {
	for ; len(cs) > 0 && cs[0].Seq <= last; cs = cs[1:] {
		if err := x.line(audit.ExportLine{Checkpoint: cs[0].JWS}); err != nil {
			return cs, err
		}
		x.signed = cs[0].Seq == x.at.Seq
	}
	return cs, nil
}

func (x *exporter) end(h audit.Head) error {
	x.done = true
	return x.line(audit.ExportLine{End: &h})
}
