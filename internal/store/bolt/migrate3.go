package bolt

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	json "github.com/go-json-experiment/json/v1"
	bbolt "go.etcd.io/bbolt"

	"muster/internal/access"
	"muster/internal/audit"
)

// toSchema3 makes a chain of the audit trail: what is there is linked as it is found, and an entry says so.
func toSchema3(b *bbolt.Tx) error {
	at := time.Now()
	n, gaps, err := beginTrail(b, at)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("%d entries from before the chain are linked as they were found", n)
	if gaps {
		text += "; their numbers had gaps and are new"
	}
	return (&Tx{b: b}).Audit(access.Entry{At: at, Who: access.Muster, What: "audit.chain", Details: text})
}

// beginTrail makes the genesis of the audit trail and links the entries that are there. n is how many; gaps says whether
// their numbers were not 1 to n, as they are now.
func beginTrail(b *bbolt.Tx, at time.Time) (n uint64, gaps bool, err error) {
	trail := b.Bucket(bucketAudit)
	c := trail.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		n++
		gaps = gaps || seqOf(k) != n
	}
	var origin [16]byte
	_, _ = rand.Read(origin[:]) // never fails (crypto/rand)
	g := audit.Genesis{Origin: hex.EncodeToString(origin[:]), At: at.Round(0).UTC(), Adopted: n}
	if err := put(&Tx{b: b}, bucketMeta, keyGenesis, g); err != nil {
		return 0, false, err
	}
	// A page of entries is read before it is written: bbolt's cursors do not follow writes.
	const page = 1000
	head, from := g.Head(), be64(0)
	for {
		var keys [][]byte
		var entries []access.Entry
		c := trail.Cursor()
		for k, raw := c.Seek(from); k != nil && len(keys) < page; k, raw = c.Next() {
			var e access.Entry
			if err := json.Unmarshal(raw, &e); err != nil {
				return 0, false, fmt.Errorf("audit line %x: %w", k, err)
			}
			keys, entries = append(keys, bytes.Clone(k)), append(entries, e)
		}
		if len(keys) == 0 {
			return n, gaps, trail.SetSequence(n)
		}
		for i, e := range entries {
			e = head.Link(e)
			head = audit.Head{Seq: e.Seq, Hash: e.Hash}
			if err := trail.Delete(keys[i]); err != nil {
				return 0, false, err
			}
			if err := put(&Tx{b: b}, bucketAudit, be64(e.Seq), e); err != nil {
				return 0, false, err
			}
		}
		from = be64(seqOf(keys[len(keys)-1]) + 1)
	}
}
