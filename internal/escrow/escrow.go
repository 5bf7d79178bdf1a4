// Package escrow seals what an operator must keep of each device - the keys that are burnt into its eFuses, and how its flash is
// laid out - to the operator's age recipients (age-encryption.org/v1). Only the matching identities open it; muster keeps
// none, and nothing of this is ever in its store. A sealed record is an ordinary age file over JSON: `age -d` reads it as well.
package escrow

import (
	"bytes"
	"errors"
	"io"
	"strings"

	"filippo.io/age"
	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
	"muster/internal/provision"
)

// Extension ends the names of sealed records.
const Extension = ".age"

// Codes of errors.
const (
	CodeRecipient = "escrow-recipient" // not a recipient of age
	CodeIdentity  = "escrow-identity"  // not an identity of age, or none that opens the record
	CodeRecord    = "escrow-record"    // not a sealed record
)

// Limits, bytes.
const (
	maxRecord = 1 << 20
	maxKeys   = 64 << 10
)

// Recipients are whom records are sealed to; each of them can open them alone.
type Recipients []age.Recipient

// ParseRecipients reads recipients (age1...), one a line; lines that start with # are left out. Anything else, an identity
// (AGE-SECRET-KEY-1...) above all, is an Invalid error that holds nothing of it.
func ParseRecipients(text string) (Recipients, error) {
	if len(text) > maxKeys {
		return nil, fleet.Coded(fleet.TooLarge, CodeRecipient, "the list of recipients has more than %d bytes", maxKeys)
	}
	if strings.Contains(strings.ToUpper(text), "AGE-SECRET-KEY-") {
		return nil, fleet.Coded(fleet.Invalid, CodeRecipient, "that is an identity, which is secret: give its recipient (age-keygen -y), and keep the identity away from the factory")
	}
	rs, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil {
		return nil, fleet.Coded(fleet.Invalid, CodeRecipient, "not a recipient of age, which starts with age1: age-keygen makes one")
	}
	return rs, nil
}

// Seal writes a record so that only the recipients can read it.
func Seal(w io.Writer, to Recipients, r provision.Record) error {
	if len(to) == 0 {
		return fleet.Coded(fleet.Invalid, CodeRecipient, "the record of %s has no recipient", r.Device)
	}
	clear, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		return fleet.Wrap(fleet.Internal, err, "encode the record of %s", r.Device)
	}
	sealed, err := age.Encrypt(w, to...)
	if err != nil {
		return fleet.Wrap(fleet.Internal, err, "seal the record of %s", r.Device)
	}
	if _, err := sealed.Write(clear); err != nil {
		return fleet.Wrap(fleet.Internal, err, "seal the record of %s", r.Device)
	}
	if err := sealed.Close(); err != nil {
		return fleet.Wrap(fleet.Internal, err, "seal the record of %s", r.Device)
	}
	return nil
}

// Identities open records.
type Identities []age.Identity

// ParseIdentities reads identities (AGE-SECRET-KEY-1...) as age-keygen writes them. Errors are Invalid and hold nothing of them.
func ParseIdentities(text []byte) (Identities, error) {
	if len(text) > maxKeys {
		return nil, fleet.Coded(fleet.TooLarge, CodeIdentity, "the file of identities has more than %d bytes", maxKeys)
	}
	if bytes.HasPrefix(text, []byte("age-encryption.org/")) {
		return nil, fleet.Coded(fleet.Invalid, CodeIdentity, "the identity is encrypted itself: decrypt it first (age -d), and give the outcome by - for standard input")
	}
	ids, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		return nil, fleet.Coded(fleet.Invalid, CodeIdentity, "not an identity of age, which starts with AGE-SECRET-KEY-1")
	}
	return ids, nil
}

// Open reads a sealed record. That none of the identities opens it is a Conflict; that it is none, or damaged, is Invalid.
func Open(r io.Reader, ids Identities) (provision.Record, error) {
	var rec provision.Record
	clear, err := age.Decrypt(io.LimitReader(r, maxRecord), ids...)
	if none, ok := errors.AsType[*age.NoIdentityMatchError](err); ok && none != nil {
		return rec, fleet.Coded(fleet.Conflict, CodeIdentity, "the record is sealed to somebody else: this identity does not open it")
	}
	if err != nil {
		return rec, fleet.Coded(fleet.Invalid, CodeRecord, "not a sealed record of muster, or damaged")
	}
	text, err := io.ReadAll(io.LimitReader(clear, maxRecord))
	if err != nil {
		return rec, fleet.Coded(fleet.Invalid, CodeRecord, "the sealed record is damaged")
	}
	if err := json.Unmarshal(text, &rec); err != nil || rec.Version < 1 {
		return provision.Record{}, fleet.Coded(fleet.Invalid, CodeRecord, "what was sealed is no record of a device")
	}
	return rec, nil
}
