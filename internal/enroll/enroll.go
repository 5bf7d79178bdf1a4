// Package enroll gives devices their certificates and takes them away: intent, signature, delivery, promotion, renewal,
// revocation, and the fallback password that goes with a certificate (DESIGN §7, §9).
//
// The order of steps is what keeps it safe. The intent (serial, device, key) is committed before anything is signed, so
// a crash never leaves a certificate that muster does not know; the certificate, the device's slot and the message to the
// device are committed together. What a transaction promises for later, such as closing connections, is stored with it and
// finished after a restart.
package enroll

import (
	"context"
	"log/slog"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// Tx is what enroll needs of the store.
type Tx interface {
	Device(fleet.DeviceID) (fleet.Device, error)
	PutDevice(fleet.Device) error
	DropDevice(fleet.DeviceID) error
	Devices(after fleet.DeviceID, limit int) ([]fleet.Device, error)
	Status(fleet.DeviceID) (fleet.Status, error)

	Certificate(fleet.Serial) (pki.Certificate, error)
	PutCertificate(pki.Certificate) error
	CertificatesOf(fleet.DeviceID) ([]pki.Certificate, error)
	CertificatesByKey(fleet.Hash) ([]pki.Certificate, error)
	IntendedCertificates(limit int) ([]pki.Certificate, error)
	CertificatesEnding(before time.Time, limit int) ([]pki.Certificate, error)
	CertificatesDue(at time.Time, limit int) ([]pki.Certificate, error)
	SupersededCertificates(before time.Time, limit int) ([]pki.Certificate, error)
	CertificatesAfter(after fleet.Serial, limit int) ([]pki.Certificate, error)

	MassRevocation(pki.IssuerID) (m pki.MassRevocation, ok bool, err error)
	PutMassRevocation(pki.MassRevocation) error
	MassRevocations() ([]pki.MassRevocation, error)

	CertificatePolicy() (p pki.Policy, ok bool, err error)
	PutCertificatePolicy(pki.Policy) error

	Enrolment(fleet.DeviceID) (e pki.Enrolment, ok bool, err error)
	PutEnrolment(pki.Enrolment) error
	DropEnrolment(fleet.DeviceID) error

	BlockedKey(fleet.Hash) (k pki.BlockedKey, ok bool, err error)
	PutBlockedKey(pki.BlockedKey) error
	DropBlockedKey(fleet.Hash) error
	BlockedKeys() ([]pki.BlockedKey, error)

	Request(id string) (pki.Request, error)
	PutRequest(pki.Request) error
	Requests() ([]pki.Request, error)

	PutClosing(pki.Closing) error
	Closings() ([]pki.Closing, error)
	DropClosing(user string) error

	Enqueue(downlink.Entry) error
	Audit(access.Entry) error
}

// Authority signs.
type Authority interface {
	// NewSerial returns a serial that was never used.
	NewSerial() (fleet.Serial, error)
	// Sign returns an Unprocessable error for an order that can never be signed. After any other it is tried again.
	Sign(ctx context.Context, o pki.Order) (pki.Signed, error)
	// KeyHashes returns the hashes of the CA's own keys, which no device may use. A rotation brings new ones.
	KeyHashes() []fleet.Hash
}

// Sessions knows and closes the live connections of a broker user, in whichever vhost.
type Sessions interface {
	// CloseUser closes all connections of a user; it is no error if there is none. The reason is shown to the client.
	CloseUser(ctx context.Context, user, reason string) error
	// UserConnected reports whether a user has a connection.
	UserConnected(ctx context.Context, user string) (bool, error)
}

// Policy is what a fleet can choose. Zero values mean what the comments say.
type Policy struct {
	Lifetime    time.Duration // of a certificate, unless other terms were put in force; 90 days
	MinLifetime time.Duration // an operator may not ask for less; one minute
	Backdate    time.Duration // a slow clock of the broker must not refuse a new certificate; one hour
	Grace       time.Duration // from superseded to revoked, unless other terms were put in force; one day
	MaxLockOut  float64       // share of the fleet that a change of terms may lock out without force; 0.01
	AskAgain    time.Duration // a device that was asked to renew is asked again after; six hours
	PerDay      int           // certificates that a device may ask for itself in a day; 24
	Keys        pki.KeyPolicy
	// ApproveEST makes a new key that comes by EST wait for an operator; the zero value does not.
	ApproveEST bool
}

func (p Policy) withDefaults() Policy {
	set := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	set(&p.Lifetime, 90*24*time.Hour)
	set(&p.MinLifetime, time.Minute)
	set(&p.Backdate, time.Hour)
	set(&p.Grace, 24*time.Hour)
	set(&p.AskAgain, 6*time.Hour)
	if p.MaxLockOut == 0 {
		p.MaxLockOut = 0.01
	}
	if p.PerDay == 0 {
		p.PerDay = 24
	}
	return p
}

// Config of an Enroller. All fields but Policy and Committed are needed.
type Config struct {
	Update    func(context.Context, func(Tx) error) error
	View      func(context.Context, func(Tx) error) error
	Authority Authority
	Sessions  Sessions
	Policy    Policy
	Log       *slog.Logger
	// Terms, if set, tells of a lifetime of its own for the next certificate of a device.
	Terms func(tx Tx, dev fleet.DeviceID) (lifetime time.Duration, ok bool, err error)
	// Renewing, if set, hears of each step of a renewal, in the transaction that stores it.
	Renewing func(tx Tx, at time.Time, dev fleet.DeviceID, step Step) error
	// Refusals, if set, begins to watch for logins of a device that the broker is told to refuse: seen returns them, oldest
	// first, and stop ends it.
	Refusals func(fleet.DeviceID) (seen func() []Refusal, stop func())
	// Revoked, if set, is called after a certificate was revoked by somebody's order. It must not block.
	Revoked func()
	// Committed, if set, is called after a transaction that may have put something into the outbox. It must not block.
	Committed func()
}

// Step is a step of a device on its way to a new certificate.
type Step string

// The steps before the last one, which is a connection with it.
const (
	Requested Step = "requested" // its request is stored
	Signed    Step = "signed"    // the certificate is on its way to it
	Stored    Step = "stored"    // it says that it has stored it
)

// Enroller is the use case. Its methods are safe for concurrent use. Those that take a Tx take part in the transaction of
// their caller; call Kick after its commit.
type Enroller struct {
	c       Config
	policy  Policy
	signers int

	toSign  chan struct{} // capacity 1: there may be intents
	toClose chan struct{} // capacity 1: there may be promises to close connections
	toMass  chan struct{} // capacity 1: there may be a mass revocation

	mu       sync.Mutex
	signing  map[fleet.Serial]bool // guarded by mu: being signed at this moment
	settling map[string]bool       // guarded by mu: users whose connections are being closed
	failing  error                 // guarded by mu: why signing does not work now
}

// New returns an Enroller. It returns an Invalid error if the policy makes no sense.
func New(c Config) (*Enroller, error) {
	p := c.Policy.withDefaults()
	if p.Lifetime < time.Second || p.MinLifetime > p.Lifetime || p.Backdate < 0 || p.Grace < 0 || p.AskAgain < 0 || p.PerDay < 1 || p.MaxLockOut < 0 || p.MaxLockOut > 1 {
		return nil, fleet.Errorf(fleet.Invalid, "certificates: lifetime %s, minimum %s, grace %s and the rest of the policy do not fit together", p.Lifetime, p.MinLifetime, p.Grace)
	}
	if c.Committed == nil {
		c.Committed = func() {}
	}
	if c.Refusals == nil {
		c.Refusals = func(fleet.DeviceID) (func() []Refusal, func()) { return func() []Refusal { return nil }, func() {} }
	}
	if c.Revoked == nil {
		c.Revoked = func() {}
	}
	if c.Terms == nil {
		c.Terms = func(Tx, fleet.DeviceID) (time.Duration, bool, error) { return 0, false, nil }
	}
	if c.Renewing == nil {
		c.Renewing = func(Tx, time.Time, fleet.DeviceID, Step) error { return nil }
	}
	return &Enroller{
		c: c, policy: p, signers: runtime.GOMAXPROCS(0),
		toSign: make(chan struct{}, 1), toClose: make(chan struct{}, 1), toMass: make(chan struct{}, 1),
		signing: map[fleet.Serial]bool{}, settling: map[string]bool{},
	}, nil
}

// Policy returns the policy in force, defaults filled in.
func (e *Enroller) Policy() Policy { return e.policy }

// Kick tells Run that there may be something to sign. It never blocks.
func (e *Enroller) Kick() { kick(e.toSign) }

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run signs what is intended, closes the connections that were promised to be and carries out mass revocations, until ctx ends. What a crash left
// behind comes first. Run it once.
func (e *Enroller) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { e.signLoop(ctx); return nil })
	g.Go(func() error { e.closeLoop(ctx); return nil })
	g.Go(func() error { e.massLoop(ctx); return nil })
	return g.Wait()
}

// Health returns why certificates cannot be signed at the moment, nil if they can.
func (e *Enroller) Health() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.failing
}

// Certificate returns the record of a serial, or a NotFound error.
func (e *Enroller) Certificate(ctx context.Context, s fleet.Serial) (c pki.Certificate, err error) {
	err = e.c.View(ctx, func(tx Tx) error { c, err = tx.Certificate(s); return err })
	return c, err
}

// CertificatesOf returns all certificates of a device, oldest first, or a NotFound error if there is no such device.
func (e *Enroller) CertificatesOf(ctx context.Context, id fleet.DeviceID) (list []pki.Certificate, err error) {
	err = e.c.View(ctx, func(tx Tx) error {
		if _, err := tx.Device(id); err != nil {
			return err
		}
		list, err = tx.CertificatesOf(id)
		return err
	})
	return list, err
}

// CertificatesEnding returns up to limit issued, active and superseded certificates that end before before, soonest first.
func (e *Enroller) CertificatesEnding(ctx context.Context, before time.Time, limit int) (list []pki.Certificate, err error) {
	err = e.c.View(ctx, func(tx Tx) error { list, err = tx.CertificatesEnding(before, limit); return err })
	return list, err
}

// self is who muster is in the audit trail.
const self = "muster"

func deviceActor(id fleet.DeviceID) string { return "device:" + string(id) }

// wait returns false if ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
