// Package recovery is what a device may do on the fallback vhost (DESIGN §9): say hello, and ask for a certificate. The
// password that let it in is a bearer secret in flash, so it alone brings a certificate only for a key that muster knows
// to be the device's; a new key waits for an operator, unless the fleet's policy says otherwise.
package recovery

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"muster/internal/access"
	"muster/internal/downlink"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
	"muster/internal/wire"
)

// Tx is what recovery needs of the store, beyond what enroll does.
type Tx interface {
	enroll.Tx
	Request(id string) (pki.Request, error)
	PutRequest(pki.Request) error
	DropRequest(id string) error
	Requests() ([]pki.Request, error)
}

// Policy is what a fleet can choose. Zero values mean what the comments say.
type Policy struct {
	ApproveNewKeys bool          // a new key is approved at once, by policy: the password is trusted alone
	PerDeviceHour  int           // certificate requests of one device; 12
	PerSecond      float64       // certificate requests of the whole fleet; 20
	RequestLife    time.Duration // an undecided request is dropped after; 30 days
}

// hellosPerRequest is how many sessions a device may need to get one certificate: it may lose the line in between.
const hellosPerRequest = 5

// Bounds of what waits for operators.
const (
	maxWaiting          = 1000 // requests in all
	maxWaitingPerDevice = 3
	keepDecided         = 90 * 24 * time.Hour
)

func (p Policy) withDefaults() Policy {
	p.PerDeviceHour = cmp.Or(p.PerDeviceHour, 12)
	p.PerSecond = cmp.Or(p.PerSecond, 20)
	p.RequestLife = cmp.Or(p.RequestLife, 30*24*time.Hour)
	return p
}

// Config of a Recovery. All fields but Policy and Committed are needed.
type Config struct {
	Update func(context.Context, func(Tx) error) error
	View   func(context.Context, func(Tx) error) error
	Enroll *enroll.Enroller
	Policy Policy
	Log    *slog.Logger
	// Committed, if set, is called after a transaction that may have put something into the outbox. It must not block.
	Committed func()
}

// Recovery is the use case. Its methods are safe for concurrent use.
type Recovery struct {
	c        Config
	policy   Policy
	requests *limiter
	hellos   *limiter
}

// New returns a Recovery. It returns an Invalid error if the policy makes no sense.
func New(c Config) (*Recovery, error) {
	p := c.Policy.withDefaults()
	if p.PerDeviceHour < 1 || p.PerSecond <= 0 || p.RequestLife < 0 {
		return nil, fleet.Errorf(fleet.Invalid, "recovery: rates and times must be positive")
	}
	if c.Committed == nil {
		c.Committed = func() {}
	}
	return &Recovery{c: c, policy: p, requests: newLimiter(rate.Limit(p.PerSecond), p.PerDeviceHour), hellos: newLimiter(hellosPerRequest*rate.Limit(p.PerSecond), hellosPerRequest*p.PerDeviceHour)}, nil
}

// barred says why a device may not use the fallback; empty if it may. The broker has asked the same when it connected; the
// message may have waited in a queue since.
func barred(dev fleet.Device) string {
	switch {
	case dev.Disabled:
		return enroll.CodeDisabled
	case dev.RecoveryOff != "":
		return enroll.CodeRevoked
	}
	return ""
}

// admit returns the device if it may use the fallback, and this message is within the limits of l. over says which limit it
// broke. What a barred device tries is audited, within the same limits.
func (r *Recovery) admit(tx Tx, at time.Time, id fleet.DeviceID, what string, l *limiter) (dev fleet.Device, ok bool, over error, err error) {
	dev, err = tx.Device(id)
	if fleet.Is(err, fleet.NotFound) {
		return dev, false, nil, fleet.Errorf(fleet.Invalid, "message of an unknown device on the fallback")
	}
	if err != nil {
		return dev, false, nil, err
	}
	over = l.allow(id, at)
	why := barred(dev)
	switch {
	case why == "":
		return dev, over == nil, over, nil
	case over != nil:
		return dev, false, nil, nil
	}
	r.c.Log.Warn("a barred device is on the fallback", "device", id, "why", why)
	return dev, false, nil, record(tx, at, id, what, "refused: "+why)
}

// Hello answers the hello of a device on the fallback with what it should do: take a certificate that waits for it. It takes
// part in the transaction of its caller. It returns nil for a device that may not be there, or says hello too often.
func (r *Recovery) Hello(tx Tx, at time.Time, id fleet.DeviceID, h wire.Hello) error {
	_, ok, _, err := r.admit(tx, at, id, "recovery.hello", r.hellos)
	if err != nil || !ok {
		return err
	}
	r.c.Log.Info("a device is on the fallback", "device", id, "version", h.Version, "boot", h.Boot)
	return r.c.Enroll.OpenIntents(tx, at, id, wire.VhostFallback)
}

// CSR takes a certificate request (PKCS #10, DER) that came over the fallback, in the transaction of its caller. For a key
// of the device's own it stores the intent; for a new one a request that waits for an operator, unless the policy approves
// it. What is refused is answered to the device and returns nil. The error is Invalid if the request cannot be read.
func (r *Recovery) CSR(tx Tx, at time.Time, id fleet.DeviceID, csr []byte) error {
	if len(csr) > pki.MaxCSR {
		return fleet.Errorf(fleet.Invalid, "certificate request longer than %d bytes", pki.MaxCSR)
	}
	dev, ok, over, err := r.admit(tx, at, id, "recovery.request", r.requests)
	if over != nil {
		return r.tooFast(tx, at, id, over)
	}
	if err != nil || !ok {
		return err
	}
	// Reading checks a signature: only now, behind the limits.
	key, err := r.c.Enroll.ReadCSR(id, csr)
	if err != nil {
		return r.c.Enroll.Refuse(tx, at, id, pki.ViaRecovery, err)
	}
	known, err := knownKey(tx, dev, key.KeyHash)
	switch {
	case err != nil:
		return r.c.Enroll.Refuse(tx, at, id, pki.ViaRecovery, err)
	case known, r.policy.ApproveNewKeys:
		if err := record(tx, at, id, "recovery.request", "key "+requestID(key.KeyHash)+keyWords(known)); err != nil {
			return err
		}
		return r.c.Enroll.RequestKey(tx, at, id, key, pki.ViaRecovery, "")
	}
	return r.hold(tx, at, id, key)
}

func keyWords(known bool) string {
	if known {
		return " is known"
	}
	return " is new, approved by policy"
}

// tooFast answers a request that is over a limit. The fleet's limit is answered, so that a device knows when to come again;
// a device over its own has been told often enough.
func (r *Recovery) tooFast(tx Tx, at time.Time, id fleet.DeviceID, over error) error {
	if over == errDevice {
		r.c.Log.Debug("a device asks too often on the fallback", "device", id)
		return nil
	}
	r.c.Log.Warn("the fallback is busy; a device was put off", "device", id)
	return say(tx, at, id, enroll.CodeLater)
}

// knownKey reports whether the key with that hash belongs to one of dev's own certificates that can be trusted: expired and
// superseded ones count, revoked ones do not (DESIGN §9). The errors are coded refusals.
func knownKey(tx Tx, dev fleet.Device, h fleet.Hash) (bool, error) {
	list, err := tx.CertificatesByKey(h)
	if err != nil {
		return false, err
	}
	known := false
	for _, c := range list {
		switch {
		case c.Device != dev.ID:
			return false, fleet.Coded(fleet.Conflict, pki.CodeKeyInUse, "this key is another device's")
		case c.Untrusted():
			return false, fleet.Coded(fleet.Forbidden, pki.CodeKeyRevoked, "this key belongs to a revoked certificate")
		case len(c.Chain) > 0: // it was signed: an intent proves nothing yet
			known = true
		}
	}
	_, blocked, err := tx.BlockedKey(h)
	if err == nil && blocked {
		err = pki.KeyKnown()
	}
	return known, err
}

// requestID is the name of a request: 64 bits of the key's hash.
func requestID(h fleet.Hash) string { return string(h[:16]) }

// hold keeps a request with a new key for an operator.
func (r *Recovery) hold(tx Tx, at time.Time, id fleet.DeviceID, key pki.CSR) error {
	old, err := tx.Request(requestID(key.KeyHash))
	switch {
	case fleet.Is(err, fleet.NotFound):
	case err != nil:
		return err
	case old.Device != id || old.KeyHash != key.KeyHash:
		return say(tx, at, id, pki.CodeKeyInUse)
	case old.State == pki.Waiting:
		return say(tx, at, id, enroll.CodeWait)
	case old.State == pki.Denied:
		return say(tx, at, id, enroll.CodeDenied)
	default: // approved, and its certificate never came to be
		return r.c.Enroll.RequestKey(tx, at, id, key, pki.ViaRecovery, old.By)
	}
	room, err := roomFor(tx, id)
	if err != nil {
		return err
	}
	if !room {
		r.c.Log.Warn("too many certificate requests wait for an operator", "device", id)
		return say(tx, at, id, enroll.CodeLater)
	}
	q := pki.Request{ID: requestID(key.KeyHash), Device: id, PublicKey: key.PublicKey, KeyHash: key.KeyHash, State: pki.Waiting, AskedAt: at}
	if err := tx.PutRequest(q); err != nil {
		return err
	}
	if err := record(tx, at, id, "recovery.request", "key "+q.ID+" is new, waits for an operator"); err != nil {
		return err
	}
	return say(tx, at, id, enroll.CodeWait)
}

// roomFor reports whether one more request of a device may wait.
func roomFor(tx Tx, id fleet.DeviceID) (bool, error) {
	list, err := tx.Requests()
	if err != nil {
		return false, err
	}
	all, own := 0, 0
	for _, q := range list {
		if q.State != pki.Waiting {
			continue
		}
		all++
		if q.Device == id {
			own++
		}
	}
	return all < maxWaiting && own < maxWaitingPerDevice, nil
}

// say answers a device on the fallback with a code.
func say(tx Tx, at time.Time, id fleet.DeviceID, code string) error {
	return tx.Enqueue(downlink.Entry{Device: id, Vhost: wire.VhostFallback, Kind: downlink.No, Ref: code, At: at})
}

func record(tx Tx, at time.Time, id fleet.DeviceID, what, details string) error {
	return tx.Audit(access.Entry{At: at, Who: "device:" + string(id), What: what, On: string(id), Details: details})
}

// Requests returns all requests, decided ones too, the oldest first.
func (r *Recovery) Requests(ctx context.Context) (list []pki.Request, err error) {
	err = r.c.View(ctx, func(tx Tx) error { list, err = tx.Requests(); return err })
	slices.SortStableFunc(list, func(a, b pki.Request) int { return a.AskedAt.Compare(b.AskedAt) })
	return list, err
}
