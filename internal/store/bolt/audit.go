package bolt

import (
	"bytes"
	"fmt"

	json "github.com/go-json-experiment/json/v1"

	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/fleet"
)

// The audit trail is a chain of hashes (audit.HashEntry). Its bucket's own sequence counts the entries that were ever
// appended, so that a missing end shows.

var keyGenesis = []byte("audit-genesis") // in bucketMeta

// Audit appends e to the audit trail, gives it its number and links it to the entry before.
func (tx *Tx) Audit(e access.Entry) error {
	if tx.trail == nil {
		head, err := tx.AuditHead()
		if err != nil {
			return err
		}
		tx.trail = &head
	}
	e = tx.trail.Link(e)
	b := tx.b.Bucket(bucketAudit)
	b.FillPercent = 0.95 // its keys only ever grow: pages need no room in between
	if err := put(tx, bucketAudit, be64(e.Seq), e); err != nil {
		return err
	}
	*tx.trail = audit.Head{Seq: e.Seq, Hash: e.Hash}
	return b.SetSequence(e.Seq)
}

// AuditGenesis returns what the audit trail begins with.
func (tx *Tx) AuditGenesis() (audit.Genesis, error) {
	return must[audit.Genesis](tx, bucketMeta, keyGenesis, "beginning of the audit trail: restore the store from a backup")
}

// AuditHead returns the number of entries that were ever appended to the audit trail, and the hash of the last that is there.
func (tx *Tx) AuditHead() (audit.Head, error) {
	b := tx.b.Bucket(bucketAudit)
	k, raw := b.Cursor().Last()
	if k == nil {
		g, err := tx.AuditGenesis()
		return audit.Head{Seq: b.Sequence(), Hash: g.Hash()}, err
	}
	var e access.Entry
	if err := json.Unmarshal(raw, &e); err != nil {
		return audit.Head{}, fmt.Errorf("store: audit line %x: %w", k, err)
	}
	return audit.Head{Seq: b.Sequence(), Hash: e.Hash}, nil
}

// AuditEntry returns one line of the audit trail, or a NotFound error.
func (tx *Tx) AuditEntry(seq uint64) (access.Entry, error) {
	return must[access.Entry](tx, bucketAudit, be64(seq), "line of the audit trail")
}

// AuditEntries returns up to limit lines of the audit trail after number after, oldest first.
func (tx *Tx) AuditEntries(after uint64, limit int) ([]access.Entry, error) {
	return numbered[access.Entry](tx, bucketAudit, after, limit)
}

// AuditBefore returns up to limit lines of the audit trail before number before, newest first; 0 begins with the newest.
func (tx *Tx) AuditBefore(before uint64, limit int) ([]access.Entry, error) {
	var out []access.Entry
	c := tx.b.Bucket(bucketAudit).Cursor()
	k, raw := c.Last()
	if before != 0 {
		if k, _ = c.Seek(be64(before)); k == nil {
			k, raw = c.Last()
		} else {
			k, raw = c.Prev()
		}
	}
	for ; k != nil && (limit <= 0 || len(out) < limit); k, raw = c.Prev() {
		var e access.Entry
		if err := json.Unmarshal(raw, &e); err != nil {
			return nil, fmt.Errorf("store: audit line %x: %w", k, err)
		}
		out = append(out, e)
	}
	return out, nil
}

// Checkpoints returns up to limit checkpoints of the audit trail after that of entry after, in order.
func (tx *Tx) Checkpoints(after uint64, limit int) ([]audit.SignedCheckpoint, error) {
	return numbered[audit.SignedCheckpoint](tx, bucketCheckpoints, after, limit)
}

// LastCheckpoint returns the newest checkpoint, or the zero one if there is none.
func (tx *Tx) LastCheckpoint() (audit.SignedCheckpoint, error) {
	k, _ := tx.b.Bucket(bucketCheckpoints).Cursor().Last()
	if k == nil {
		return audit.SignedCheckpoint{}, nil
	}
	c, _, err := get[audit.SignedCheckpoint](tx, bucketCheckpoints, k)
	return c, err
}

// PutCheckpoint stores a checkpoint; one of the same entry is replaced.
func (tx *Tx) PutCheckpoint(c audit.SignedCheckpoint) error {
	return put(tx, bucketCheckpoints, be64(c.Seq), c)
}

// AuditKeys returns every public key that signs checkpoints or once did, the newest last.
func (tx *Tx) AuditKeys() ([]audit.Key, error) {
	return all[audit.Key](tx, bucketAuditKeys, nil)
}

// PutAuditKey appends a public key.
func (tx *Tx) PutAuditKey(k audit.Key) error {
	return appendNumbered(tx, bucketAuditKeys, nil, func(uint64) any { return k })
}

// checkAudit follows the chain of the audit trail, and compares its checkpoints with it.
func checkAudit(tx *Tx, say func(string, ...any)) error {
	g, err := tx.AuditGenesis()
	if err != nil {
		return err
	}
	ring, err := keyring(tx)
	if err != nil {
		return err
	}
	points := tx.b.Bucket(bucketCheckpoints).Cursor()
	pk, raw := points.First()
	head := g.Head()
	err = each(tx, bucketAudit, nil, func(k []byte, e access.Entry) (bool, error) {
		if !bytes.Equal(k, be64(e.Seq)) {
			say("audit: entry %d names itself %d", seqOf(k), e.Seq)
			return false, nil
		}
		next, err := head.Next(e)
		if err != nil {
			say("audit: %v", err)
			return false, nil
		}
		for head = next; pk != nil && seqOf(pk) <= head.Seq; pk, raw = points.Next() {
			if why := checkPoint(raw, g, head, ring); why != "" {
				say("audit: checkpoint of entry %d: %s", seqOf(pk), why)
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	if n := tx.b.Bucket(bucketAudit).Sequence(); n != head.Seq {
		say("audit: %d entries were written, and the chain holds up to entry %d", n, head.Seq)
	}
	if pk != nil {
		say("audit: a checkpoint vouches for entry %d, and the chain holds up to entry %d", seqOf(pk), head.Seq)
	}
	return nil
}

// checkPoint says what is wrong with a stored checkpoint of the entry at head; "" is nothing.
func checkPoint(raw []byte, g audit.Genesis, head audit.Head, ring audit.Keyring) string {
	var s audit.SignedCheckpoint
	if err := json.Unmarshal(raw, &s); err != nil {
		return err.Error()
	}
	c, err := audit.OpenCheckpoint(s.JWS, ring)
	switch {
	case err != nil:
		return err.Error()
	case s.Seq != c.Seq || s.Hash != c.Hash || !s.At.Equal(c.At) || s.KeyID != c.KeyID:
		return "it is not what was signed"
	case c.Origin != g.Origin || c.Seq != head.Seq || c.Hash != head.Hash:
		return "it vouches for another past"
	}
	return ""
}

// keyring holds the keys that the store knows. That they are the right ones, only who holds one elsewhere can say.
func keyring(tx *Tx) (audit.Keyring, error) {
	keys, err := tx.AuditKeys()
	if err != nil || len(keys) == 0 {
		return audit.Keyring{}, err
	}
	var text bytes.Buffer
	for _, k := range keys {
		text.Write(k.PEM())
	}
	ring, err := audit.ParseKeyring(text.Bytes())
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "audit keys")
	}
	return ring, nil
}
