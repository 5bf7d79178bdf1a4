package access

import (
	"context"
	"crypto/subtle"
	"strings"
	"time"

	"muster/internal/fleet"
)

// Tx is what access needs of the store.
type Tx interface {
	Token(name string) (Token, error)
	TokenBySHA256(fleet.Hash) (Token, error)
	PutToken(Token) error
	DeleteToken(name string) error
	Tokens() ([]Token, error)
	Audit(Entry) error
	AuditBefore(before uint64, limit int) ([]Entry, error)
}

// Config of an Access. All fields are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
}

// Access gives out tokens, checks them and keeps the audit trail. Its methods may be called at any time.
type Access struct {
	c      Config
	fail   *limiter
	logins *logins
}

// New returns an Access.
func New(c Config) *Access {
	return &Access{c: c, fail: newLimiter(failBurst, failEvery, failPeers), logins: newLogins()}
}

// Bounds of the life of a token.
const (
	MinTTL = time.Minute
	MaxTTL = 10 * 365 * 24 * time.Hour
)

// Muster is who the audit trail names when no operator is behind an act. No token can have this name.
const Muster = "muster"

// BootstrapName is the name of the token that Bootstrap makes.
const BootstrapName = "admin"

// Principal is who a call comes from.
type Principal struct {
	Name      string
	Role      Role
	CreatedAt time.Time
	ExpiresAt time.Time // zero: never
	CreatedBy string
}

// Create makes a token and returns its secret, which is kept nowhere. ttl 0 means that it never expires. A bad name, role
// or ttl is Invalid, a name that is taken a Conflict.
func (a *Access) Create(ctx context.Context, at time.Time, name string, role Role, ttl time.Duration, by string) (secret string, t Token, err error) {
	if err := checkName(name); err != nil {
		return "", Token{}, err
	}
	if _, err := ParseRole(string(role)); err != nil {
		return "", Token{}, err
	}
	if ttl != 0 && (ttl < MinTTL || ttl > MaxTTL) {
		return "", Token{}, fleet.Errorf(fleet.Invalid, "expiry: use 1m to %dh, or never", int(MaxTTL.Hours()))
	}
	err = a.c.Update(ctx, func(tx Tx) error {
		secret, t, err = create(tx, at, name, role, ttl, by)
		return err
	})
	if err != nil {
		return "", Token{}, err
	}
	return secret, t, nil
}

// Bootstrap makes the first token, an admin's that never expires. It is a Conflict if there is a live admin token
// already.
func (a *Access) Bootstrap(ctx context.Context, at time.Time) (secret string, t Token, err error) {
	err = a.c.Update(ctx, func(tx Tx) error {
		ts, err := tx.Tokens()
		if err != nil {
			return err
		}
		if liveAdmins(ts, at) > 0 {
			return fleet.Coded(fleet.Conflict, "admin_exists", "there is an admin token already: make others with it")
		}
		// One that has expired, and whose name is needed, has done its service.
		if _, err := tx.Token(BootstrapName); err == nil {
			if err := tx.DeleteToken(BootstrapName); err != nil {
				return err
			}
		}
		secret, t, err = create(tx, at, BootstrapName, Admin, 0, Muster)
		return err
	})
	if err != nil {
		return "", Token{}, err
	}
	return secret, t, nil
}

func create(tx Tx, at time.Time, name string, role Role, ttl time.Duration, by string) (string, Token, error) {
	if _, err := tx.Token(name); err == nil {
		return "", Token{}, fleet.Coded(fleet.Conflict, "token_exists", "a token of this name exists: delete it first, or choose another name")
	} else if !fleet.Is(err, fleet.NotFound) {
		return "", Token{}, err
	}
	secret := newSecret()
	hash, _ := hashOf(secret)
	t := Token{Name: name, SHA256: hash, Role: role, CreatedAt: at.Round(0).UTC(), CreatedBy: by}
	if ttl > 0 {
		t.ExpiresAt = t.CreatedAt.Add(ttl)
	}
	if err := tx.PutToken(t); err != nil {
		return "", Token{}, err
	}
	return secret, t, tx.Audit(Entry{At: t.CreatedAt, Who: by, What: "token.create", On: name, Details: "role " + string(role)})
}

// Delete removes a token; it stops working with the commit. The last admin token that works is a Conflict: without one,
// nobody could make another.
func (a *Access) Delete(ctx context.Context, at time.Time, name, by string) error {
	return a.c.Update(ctx, func(tx Tx) error {
		t, err := tx.Token(name)
		if err != nil {
			return err
		}
		ts, err := tx.Tokens()
		if err != nil {
			return err
		}
		if t.Role == Admin && t.Live(at) && liveAdmins(ts, at) == 1 {
			return fleet.Coded(fleet.Conflict, "last_admin", "token %s is the last admin token: make another first", name)
		}
		if err := tx.DeleteToken(name); err != nil {
			return err
		}
		return tx.Audit(Entry{At: at.Round(0).UTC(), Who: by, What: "token.delete", On: name})
	})
}

// Tokens returns all tokens, in name order.
func (a *Access) Tokens(ctx context.Context) (ts []Token, err error) {
	err = a.c.View(ctx, func(tx Tx) error { ts, err = tx.Tokens(); return err })
	return ts, err
}

// Authenticate returns who a token belongs to. from is where the call comes from, an address. What cannot be a token is
// refused before the store is asked; every refusal is the same Unauthorized error, and TooMany once from has failed too
// often. A token that works is never slowed down, whoever else fails from the same address. Logins and refusals go on
// record (logins.go).
func (a *Access) Authenticate(ctx context.Context, at time.Time, from, secret string) (Principal, error) {
	hash, ok := hashOf(secret)
	if !ok && secret == "" {
		return Principal{}, a.refuse(at, from, "no token")
	}
	if !ok {
		return Principal{}, a.refuse(at, from, "no well-formed token")
	}
	var t Token
	err := a.c.View(ctx, func(tx Tx) (err error) { t, err = tx.TokenBySHA256(hash); return err })
	if err != nil && !fleet.Is(err, fleet.NotFound) {
		return Principal{}, err
	}
	same := subtle.ConstantTimeCompare([]byte(t.SHA256), []byte(hash)) == 1
	if err != nil || !same {
		return Principal{}, a.refuse(at, from, "unknown token")
	}
	if !t.Live(at) {
		return Principal{}, a.refuse(at, from, "expired token "+t.Name)
	}
	a.login(ctx, at, from, t)
	return Principal{t.Name, t.Role, t.CreatedAt, t.ExpiresAt, t.CreatedBy}, nil
}

func (a *Access) refuse(at time.Time, from, why string) error {
	a.logins.refuse(at, from, why)
	if !a.fail.allow(at, from) {
		return fleet.Coded(fleet.TooMany, "too_many_failures", "too many calls without a valid token came from this address: wait, and check the token")
	}
	return fleet.Errorf(fleet.Unauthorized, "the token is missing, unknown or expired: send Authorization: Bearer and a token")
}

// Record appends a line to the audit trail, for an act that no other transaction records.
func (a *Access) Record(ctx context.Context, e Entry) error {
	e.At = e.At.Round(0).UTC()
	return a.c.Update(ctx, func(tx Tx) error { return tx.Audit(e) })
}

// Audit returns up to limit lines of the audit trail before number before, newest first; 0 begins with the newest.
func (a *Access) Audit(ctx context.Context, before uint64, limit int) (es []Entry, err error) {
	err = a.c.View(ctx, func(tx Tx) error { es, err = tx.AuditBefore(before, limit); return err })
	return es, err
}

func checkName(name string) error {
	if _, err := fleet.ParseDeviceID(name); err != nil || name == Muster || strings.HasPrefix(name, "device-") {
		return fleet.Errorf(fleet.Invalid, "token name: use 1 to %d of a-z, 0-9 and -, neither first nor last a -; not %s or device-…", fleet.MaxDeviceIDLen, Muster)
	}
	return nil
}

func liveAdmins(ts []Token, at time.Time) int {
	n := 0
	for _, t := range ts {
		if t.Role == Admin && t.Live(at) {
			n++
		}
	}
	return n
}
