// Package audit is the audit trail as a document: entries in a chain of hashes, signed checkpoints, and exports that
// anybody can verify who has the public key.
//
// The audit trail is a hash chain: each entry holds the hash of the one before, so that nothing in it can be changed,
// removed, inserted or moved without changing every hash that follows, and those are signed (checkpoint.go).
//
// A hash is the SHA-256 of a name that says what is hashed, a zero byte, the version of the encoding (1), and the fields
// in a fixed order. Numbers are big-endian and of fixed length, a time is its Unix seconds (64 bits) and nanoseconds (32
// bits), a text is its length in bytes (32 bits) and its UTF-8 bytes. So two different entries never have the same
// encoding:
//
//	entry:   "muster audit entry" 0 1 · text prev · u64 seq · time at · text who · text what · text on · text details
//	genesis: "muster audit genesis" 0 1 · text origin · time at · u64 adopted
//
// Hashes within it (prev) are texts of 64 hexadecimal digits.
package audit

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"iter"
	"strings"
	"time"

	"muster/internal/fleet"
)

// chainVersion is the version of the encoding.
const chainVersion = 1

// Genesis is what the chain begins with; its hash takes the place of the entry before the first.
type Genesis struct {
	// Origin names the trail: a text that no other trail has, so that no entry or checkpoint of another fleet fits here.
	Origin string    `json:"origin"`
	At     time.Time `json:"at"` // when the chain was begun
	// Adopted is the number of the last entry that was there before the chain was: entries up to it were linked at At, as
	// they were found then.
	Adopted uint64 `json:"adopted,omitempty"`
}

// Hash returns the hash of g.
func (g Genesis) Hash() fleet.Hash {
	e := newEncoder("muster audit genesis")
	e.text(g.Origin)
	e.time(g.At)
	e.number(g.Adopted)
	return e.sum()
}

// Head returns where the chain stands before its first entry.
func (g Genesis) Head() Head { return Head{Hash: g.Hash()} }

// HashEntry returns the hash of e when it follows an entry with the hash prev. It does not read e.Prev and e.Hash.
func HashEntry(prev fleet.Hash, e Entry) fleet.Hash {
	enc := newEncoder("muster audit entry")
	enc.text(string(prev))
	enc.number(e.Seq)
	enc.time(e.At)
	for _, s := range []string{e.Who, e.What, e.On, e.Details} {
		enc.text(s)
	}
	return enc.sum()
}

type encoder struct {
	h   hash.Hash
	buf [12]byte
}

func newEncoder(what string) *encoder {
	e := &encoder{h: sha256.New()}
	e.h.Write([]byte(what))
	e.h.Write([]byte{0, chainVersion})
	return e
}

func (e *encoder) text(s string) {
	binary.BigEndian.PutUint32(e.buf[:], uint32(len(s)))
	e.h.Write(e.buf[:4])
	e.h.Write([]byte(s))
}

func (e *encoder) number(n uint64) {
	binary.BigEndian.PutUint64(e.buf[:], n)
	e.h.Write(e.buf[:8])
}

func (e *encoder) time(t time.Time) {
	binary.BigEndian.PutUint64(e.buf[:], uint64(t.Unix()))
	binary.BigEndian.PutUint32(e.buf[8:], uint32(t.Nanosecond()))
	e.h.Write(e.buf[:12])
}

func (e *encoder) sum() fleet.Hash { return fleet.HashOf([32]byte(e.h.Sum(nil))) }

// Entry is one line of the audit trail.
type Entry struct {
	Seq     uint64     `json:"seq"` // from 1, without gaps; given by the store
	At      time.Time  `json:"at"`
	Who     string     `json:"who"`  // token name, device:<id> or muster itself
	What    string     `json:"what"` // certificate.revoke, rollout.start, …
	On      string     `json:"on,omitempty"`
	Details string     `json:"details,omitempty"`
	Prev    fleet.Hash `json:"prev,omitempty"` // hash of entry Seq-1; of the Genesis for the first
	Hash    fleet.Hash `json:"hash,omitempty"` // of all of the above: HashEntry
}

// Head is the end of a chain: the number and the hash of its last entry.
type Head struct {
	Seq  uint64     `json:"seq"`
	Hash fleet.Hash `json:"hash"`
}

// Longest texts of an entry, in bytes. Longer ones are cut, so that a line of an export has an end.
const (
	maxWord    = 256 // who, what
	maxOn      = 512
	maxDetails = 4096
)

// Link returns e as the entry after h: with its number, its links, its time in UTC, and texts that are UTF-8 and of
// bounded length, so that it reads back as it was hashed.
func (h Head) Link(e Entry) Entry {
	e.At = e.At.Round(0).UTC()
	e.Who, e.What, e.On, e.Details = fit(e.Who, maxWord), fit(e.What, maxWord), fit(e.On, maxOn), fit(e.Details, maxDetails)
	e.Seq, e.Prev = h.Seq+1, h.Hash
	e.Hash = HashEntry(e.Prev, e)
	return e
}

// fit returns s as UTF-8 of at most max bytes; what was cut off shows as an ellipsis.
func fit(s string, max int) string {
	const cut = "…"
	if s = strings.ToValidUTF8(s, "\uFFFD"); len(s) <= max {
		return s
	}
	return strings.ToValidUTF8(s[:max-len(cut)], "") + cut
}

// Next returns the head after e, or a *Broken that says why e does not follow h.
func (h Head) Next(e Entry) (Head, error) {
	switch {
	case e.Seq > h.Seq+1:
		return h, Break(h.Seq+1, Missing, "%s missing: after %d comes %d", Span(h.Seq+1, e.Seq-1), h.Seq, e.Seq)
	case e.Seq <= h.Seq:
		return h, Break(e.Seq, Disordered, "entry %d comes after entry %d", e.Seq, h.Seq)
	case HashEntry(e.Prev, e) != e.Hash:
		return h, Break(e.Seq, Changed, "entry %d was changed: its content does not have the hash that it names", e.Seq)
	case e.Prev != h.Hash && h.Seq == 0:
		return h, Break(e.Seq, Unlinked, "entry 1 does not follow the beginning of this trail: what stood before it was removed, or it comes from another trail")
	case e.Prev != h.Hash:
		return h, Break(e.Seq, Unlinked, "entries %d and %d do not fit together: one of them was replaced", h.Seq, e.Seq)
	}
	return Head{e.Seq, e.Hash}, nil
}

// Span names the entries from first to last, with its verb.
func Span(first, last uint64) string {
	if first >= last {
		return fmt.Sprintf("entry %d is", first)
	}
	return fmt.Sprintf("entries %d to %d are", first, last)
}

// VerifyChain returns the head of the entries that follow start, in order. It ends at the first error: a *Broken if the
// chain does not hold, or what the iterator says.
func VerifyChain(start Head, entries iter.Seq2[Entry, error]) (Head, error) {
	for e, err := range entries {
		if err != nil {
			return start, err
		}
		if start, err = start.Next(e); err != nil {
			return start, err
		}
	}
	return start, nil
}

// Fault says in one word what is wrong with a trail.
type Fault string

// Faults.
const (
	Changed    Fault = "changed"    // an entry is not what was hashed
	Missing    Fault = "missing"    // entries are gone
	Disordered Fault = "disordered" // entries or checkpoints stand in the wrong place, or twice
	Unlinked   Fault = "unlinked"   // an entry does not follow the one before
	Forked     Fault = "forked"     // a signed checkpoint vouches for another past
	Signature  Fault = "signature"  // a checkpoint is not signed by the audit key
)

// Broken is the error of a trail that is not what was recorded.
type Broken struct {
	Seq   uint64 // the first entry of which this can be said
	Fault Fault
	Msg   string
}

func (b *Broken) Error() string { return b.Msg }

// Break returns a *Broken.
func Break(seq uint64, f Fault, format string, a ...any) error {
	return &Broken{seq, f, fmt.Sprintf(format, a...)}
}
