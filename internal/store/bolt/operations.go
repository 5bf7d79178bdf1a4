package bolt

import (
	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/uplink"
)

// Enqueue puts e at the end of the outbox and gives it its number.
func (tx *Tx) Enqueue(e downlink.Entry) error {
	return appendNumbered(tx, bucketOutbox, nil, func(seq uint64) any { e.Seq = seq; return e })
}

// Outbox returns the first limit entries of the outbox.
func (tx *Tx) Outbox(limit int) ([]downlink.Entry, error) {
	return numbered[downlink.Entry](tx, bucketOutbox, 0, limit)
}

// OutboxAfter returns up to limit entries of the outbox after number after.
func (tx *Tx) OutboxAfter(after uint64, limit int) ([]downlink.Entry, error) {
	return numbered[downlink.Entry](tx, bucketOutbox, after, limit)
}

// DropOutbox removes entries from the outbox; those that are gone already do not matter.
func (tx *Tx) DropOutbox(seqs []uint64) error {
	b := tx.b.Bucket(bucketOutbox)
	for _, s := range seqs {
		if err := b.Delete(be64(s)); err != nil {
			return err
		}
	}
	return nil
}

// Quarantine stores q and gives it its number. Beyond uplink.MaxQuarantined, the oldest entry goes.
func (tx *Tx) Quarantine(q uplink.Quarantined) error {
	err := appendNumbered(tx, bucketQuarantine, nil, func(seq uint64) any { q.Seq = seq; return q })
	if err != nil {
		return err
	}
	c := tx.b.Bucket(bucketQuarantine).Cursor()
	first, _ := c.First()
	last, _ := c.Last()
	// Dropped entries leave gaps, so the span of numbers only bounds the count from above: cheap, and never too many.
	if seqOf(last)-seqOf(first) >= uplink.MaxQuarantined {
		return tx.b.Bucket(bucketQuarantine).Delete(first)
	}
	return nil
}

// Quarantined returns up to limit entries after number after, oldest first.
func (tx *Tx) Quarantined(after uint64, limit int) ([]uplink.Quarantined, error) {
	return numbered[uplink.Quarantined](tx, bucketQuarantine, after, limit)
}

// QuarantinedOne returns one entry, or a NotFound error.
func (tx *Tx) QuarantinedOne(seq uint64) (uplink.Quarantined, error) {
	return must[uplink.Quarantined](tx, bucketQuarantine, be64(seq), "quarantined message")
}

// DropQuarantined removes one entry, or returns a NotFound error.
func (tx *Tx) DropQuarantined(seq uint64) error {
	if _, err := tx.QuarantinedOne(seq); err != nil {
		return err
	}
	return tx.b.Bucket(bucketQuarantine).Delete(be64(seq))
}

// Token returns the operator token of that name, or a NotFound error.
func (tx *Tx) Token(name string) (access.Token, error) {
	return must[access.Token](tx, bucketTokens, []byte(name), "token")
}

// TokenBySHA256 returns the operator token whose secret has that hash, or a NotFound error.
func (tx *Tx) TokenBySHA256(h fleet.Hash) (access.Token, error) {
	name := tx.b.Bucket(bucketTokensBySHA).Get([]byte(h))
	if name == nil {
		return access.Token{}, fleet.Errorf(fleet.NotFound, "no such token")
	}
	return tx.Token(string(name))
}

// PutToken stores t. A name that is taken by another secret is a Conflict.
func (tx *Tx) PutToken(t access.Token) error {
	old, ok, err := get[access.Token](tx, bucketTokens, []byte(t.Name))
	if err != nil {
		return err
	}
	if ok && old.SHA256 != t.SHA256 {
		return fleet.Coded(fleet.Conflict, "token_exists", "a token of this name exists: delete it first, or choose another name")
	}
	if err := tx.b.Bucket(bucketTokensBySHA).Put([]byte(t.SHA256), []byte(t.Name)); err != nil {
		return err
	}
	return put(tx, bucketTokens, []byte(t.Name), t)
}

// DeleteToken removes a token, or returns a NotFound error.
func (tx *Tx) DeleteToken(name string) error {
	t, err := tx.Token(name)
	if err != nil {
		return err
	}
	if err := tx.b.Bucket(bucketTokensBySHA).Delete([]byte(t.SHA256)); err != nil {
		return err
	}
	return tx.b.Bucket(bucketTokens).Delete([]byte(name))
}

// Tokens returns all operator tokens, in name order.
func (tx *Tx) Tokens() ([]access.Token, error) { return all[access.Token](tx, bucketTokens, nil) }
