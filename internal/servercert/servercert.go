// Package servercert keeps the certificates by which muster and its broker prove themselves to devices and operators: it
// renews those that muster's own CA issued, each with a new key, takes over files that somebody else replaced, and looks by
// handshakes whether the broker serves what its files hold. What came from another CA it never touches.
package servercert

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"muster/internal/access"
	"muster/internal/expiry"
	"muster/internal/fleet"
)

// Files are the two files of a certificate and what is served from them. It is tlsfiles.Source.
type Files interface {
	Chain() []*x509.Certificate // as served, leaf first
	File() string
	// Reload serves the files if they changed, or at any rate if force is set. It returns why they are refused once.
	Reload(at time.Time, force bool) (changed bool, err error)
	Refused() error
	// Replace puts a new pair into the files, whole or not at all, and serves it.
	Replace(at time.Time, name string, chain, key []byte) error
	Touch() error // sets the files' times to now
}

// Issuer is muster's own CA for servers.
type Issuer interface {
	// Issued reports whether a chain comes from it, in this generation or an earlier one.
	Issued(chain []*x509.Certificate) bool
	// Current reports whether a chain comes from the CA that signs now: the generation before is to be replaced.
	Current(chain []*x509.Certificate) bool
	// Until is the end of the CA: nothing it signs holds longer.
	Until() time.Time
	// New makes a key and a certificate for names. Nothing of it is stored.
	New(at time.Time, names []string) (serial fleet.Serial, chain, key []byte, err error)
}

// Door is a place where the broker serves a certificate.
type Door struct {
	Name    string // mqtt, fallback, amqps, management
	Address string // host:port
}

// Server is a certificate that is kept.
type Server struct {
	Name  string // devices, ops, broker-auth, broker
	Files Files  // nil: they are not on this machine; the doors are watched all the same
	Doors []Door // where another program serves it; none for muster's own listeners
}

// Config of a Keeper. All fields are needed.
type Config struct {
	Servers []Server
	Issuer  Issuer
	// Record stores a line of the audit trail.
	Record func(context.Context, access.Entry) error
	// Served returns the chain that is served at an address, leaf first, by a TLS handshake.
	Served func(ctx context.Context, address string) ([]*x509.Certificate, error)
	Log    *slog.Logger
	// Report is told how the certificates are, after each pass; nil is well.
	Report func(error)
}

// Schedule of a Keeper.
const (
	every      = time.Minute     // a pass
	everyProof = 2 * time.Second // while a door does not serve what the files hold
	proofTime  = 5 * time.Minute // then it is a fault: Erlang's PEM cache looks every 2 min (rabbitmq.md §4.7)
	doorTime   = 10 * time.Second
	maxPause   = time.Hour // between attempts to renew that fail
)

// Keeper is the use case. Its methods are safe for concurrent use.
type Keeper struct {
	c Config

	work sync.Mutex // one renewal or reload at a time

	mu      sync.Mutex
	renewal map[string]attempt // by server, failed ones
	doors   map[string]door    // by server and door
}

type attempt struct {
	err   error
	pause time.Duration
	next  time.Time
}

// door is what was seen at a door.
type door struct {
	leaf  *x509.Certificate // nil: nothing yet
	at    time.Time         // of the last handshake
	err   error             // of the last handshake
	since time.Time         // since when it serves another one than the files hold; zero: it serves that
	said  bool              // that it does not
}

// New returns a Keeper. It starts nothing.
func New(c Config) *Keeper {
	return &Keeper{c: c, renewal: map[string]attempt{}, doors: map[string]door{}}
}

// RenewsAt returns when a certificate is renewed: after two thirds of its life.
func RenewsAt(leaf *x509.Certificate) time.Time {
	return leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 2 / 3)
}

// minGain is how much longer a new certificate must hold. Where the CA's own end is near there is nothing to gain, and
// renewals would follow each other ever faster.
const minGain = 24 * time.Hour

// due reports whether s should be renewed at that time.
func (k *Keeper) due(at time.Time, s Server) bool {
	chain := s.Files.Chain()
	if s.Files.Refused() != nil || !k.c.Issuer.Issued(chain) {
		return false
	}
	return !k.c.Issuer.Current(chain) || !at.Before(RenewsAt(chain[0])) && k.gains(chain[0])
}

func (k *Keeper) gains(leaf *x509.Certificate) bool {
	return k.c.Issuer.Until().Sub(leaf.NotAfter) >= minGain
}

// Run makes a pass each minute until ctx ends; and looks more often while a door does not serve what it should.
func (k *Keeper) Run(ctx context.Context) error {
	for {
		k.Pass(ctx, time.Now())
		k.Prove(ctx, time.Now())
		k.c.Report(k.Health(time.Now()))
		wait := every
		if k.unproven(time.Now()) {
			wait = everyProof
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// Pass takes over files that changed and renews what is due. What fails is logged, tried again later, and told by Health.
func (k *Keeper) Pass(ctx context.Context, at time.Time) {
	k.work.Lock()
	defer k.work.Unlock()
	for _, s := range k.c.Servers {
		if s.Files == nil || ctx.Err() != nil {
			continue
		}
		k.reload(at, s, false)
		if !k.due(at, s) || !k.mayTry(at, s.Name) {
			continue
		}
		if _, err := k.renew(ctx, at, s, "muster"); err != nil && ctx.Err() == nil {
			k.c.Log.Error("a server certificate could not be renewed; trying again", "name", s.Name, "ends", s.Files.Chain()[0].NotAfter, "error", err)
		}
	}
}

// reload takes over the files of s.
func (k *Keeper) reload(at time.Time, s Server, force bool) {
	changed, err := s.Files.Reload(at, force)
	leaf := s.Files.Chain()[0]
	switch {
	case err != nil:
		k.c.Log.Error("the files of a server certificate are refused; the one before stays in use", "name", s.Name, "file", s.Files.File(),
			"in_use", fleet.SerialOf(leaf.SerialNumber), "ends", leaf.NotAfter, "error", err)
	case changed:
		k.c.Log.Info("server certificate taken over from its files", "name", s.Name, "serial", fleet.SerialOf(leaf.SerialNumber), "ends", leaf.NotAfter)
	}
}

// Reload takes over all files now, whether they changed or not.
func (k *Keeper) Reload(at time.Time) {
	k.work.Lock()
	defer k.work.Unlock()
	for _, s := range k.c.Servers {
		if s.Files != nil {
			k.reload(at, s, true)
		}
	}
}

func (k *Keeper) mayTry(at time.Time, name string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !at.Before(k.renewal[name].next)
}

// Renew renews a certificate now, due or not. It returns NotFound if there is none of that name, and Conflict if it came
// from another CA or its files are not to be trusted.
func (k *Keeper) Renew(ctx context.Context, at time.Time, name, by string) (State, error) {
	i := slices.IndexFunc(k.c.Servers, func(s Server) bool { return s.Name == name })
	if i < 0 {
		return State{}, fleet.Errorf(fleet.NotFound, "there is no server certificate %q", name)
	}
	s := k.c.Servers[i]
	if s.Files == nil {
		return State{}, fleet.Coded(fleet.Conflict, "not_here", "the files of the server certificate %s are not on this machine", name)
	}
	if err := k.renewNow(ctx, at, s, by); err != nil {
		return State{}, err
	}
	k.awaitDoors(ctx, s)
	return k.state(time.Now(), s), nil
}

// awaitDoors looks until every door of s that answers serves what its files hold, for as long as somebody may wait for an
// answer: RabbitMQ looks at its files every two seconds (brokerconf.ErlangArgs).
func (k *Keeper) awaitDoors(ctx context.Context, s Server) {
	const pause, patience = 250 * time.Millisecond, 10 * time.Second
	for began := time.Now(); ; {
		k.proveServer(ctx, time.Now(), s)
		if ctx.Err() != nil || !k.stale(s) || time.Since(began) > patience {
			return
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// stale reports whether a door of s serves another certificate than the files hold.
func (k *Keeper) stale(s Server) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(s.Doors, func(d Door) bool { return !k.doors[s.Name+"/"+d.Name].since.IsZero() })
}

func (k *Keeper) renewNow(ctx context.Context, at time.Time, s Server, by string) error {
	k.work.Lock()
	defer k.work.Unlock()
	k.reload(at, s, false)
	if err := s.Files.Refused(); err != nil {
		return fleet.Wrap(fleet.Conflict, err, "the files of the server certificate %s are refused; correct them first: %s", s.Name, err)
	}
	if !k.c.Issuer.Issued(s.Files.Chain()) {
		return fleet.Coded(fleet.Conflict, "foreign_issuer", "the server certificate %s came from another CA: renew it there, and put the new files in place", s.Name)
	}
	_, err := k.renew(ctx, at, s, by)
	return err
}

// renew makes a new certificate for the names of the present one. It lives in memory until it is on record, and replaces the
// files after that: a crash in between leaves a line about a certificate that nobody has.
func (k *Keeper) renew(ctx context.Context, at time.Time, s Server, by string) (serial fleet.Serial, err error) {
	defer func() { k.note(at, s.Name, err) }()
	old := s.Files.Chain()[0]
	serial, chain, key, err := k.c.Issuer.New(at, namesOf(old))
	if err != nil {
		return "", err
	}
	was := fleet.SerialOf(old.SerialNumber)
	err = k.c.Record(ctx, access.Entry{At: at, Who: by, What: "server-certificate.renew", On: s.Name, Details: fmt.Sprintf("serial %s replaces %s", serial, was)})
	if err != nil {
		return "", err
	}
	if err := s.Files.Replace(at, string(serial), chain, key); err != nil {
		return "", err
	}
	leaf := s.Files.Chain()[0]
	k.c.Log.Info("server certificate renewed", "name", s.Name, "serial", serial, "was", was, "ends", leaf.NotAfter, "by", by)
	return serial, nil
}

// note keeps how an attempt went, and when the next may come.
func (k *Keeper) note(at time.Time, name string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil {
		delete(k.renewal, name)
		return
	}
	a := k.renewal[name]
	a.pause = min(max(2*a.pause, every), maxPause)
	a.err, a.next = err, at.Add(a.pause)
	k.renewal[name] = a
}

// namesOf returns the names of a certificate, the common name first: it is the first of the renewed one, too.
func namesOf(leaf *x509.Certificate) []string {
	names := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if i := slices.Index(names, leaf.Subject.CommonName); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, leaf.Subject.CommonName)
	}
	return names
}

// Prove looks at every door what it serves.
func (k *Keeper) Prove(ctx context.Context, at time.Time) {
	for _, s := range k.c.Servers {
		k.proveServer(ctx, at, s)
	}
}

func (k *Keeper) proveServer(ctx context.Context, at time.Time, s Server) {
	stale := false
	for _, d := range s.Doors {
		within, cancel := context.WithTimeout(ctx, doorTime)
		chain, err := k.c.Served(within, d.Address)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err == nil && len(chain) == 0 {
			err = errors.New("it serves no certificate")
		}
		var leaf *x509.Certificate
		if err == nil {
			leaf = chain[0]
		}
		stale = k.saw(at, s, d, leaf, err) || stale
	}
	if stale && k.c.Issuer.Issued(s.Files.Chain()) { // Erlang's cache believes only times that are later than its last look
		if err := s.Files.Touch(); err != nil {
			k.c.Log.Warn("the times of a server certificate's files cannot be set", "name", s.Name, "error", err)
		}
	}
}

// saw notes what a door served, and reports whether it is another certificate than the files hold.
func (k *Keeper) saw(at time.Time, s Server, d Door, leaf *x509.Certificate, err error) (stale bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key := s.Name + "/" + d.Name
	now := k.doors[key]
	now.at, now.err = at, err
	defer func() { k.doors[key] = now }()
	if err != nil {
		return false // the broker is away: what it served last stays known
	}
	now.leaf = leaf
	if s.Files == nil || leaf.Equal(s.Files.Chain()[0]) {
		if now.said || !now.since.IsZero() {
			k.c.Log.Info("the broker serves the certificate of its files", "name", s.Name, "door", d.Name, "serial", fleet.SerialOf(leaf.SerialNumber))
		}
		now.since, now.said = time.Time{}, false
		return false
	}
	if now.since.IsZero() {
		now.since = at
	}
	if !now.said && at.Sub(now.since) >= proofTime {
		now.said = true
		k.c.Log.Error("the broker serves another certificate than its files hold", "name", s.Name, "door", d.Name, "address", d.Address,
			"served", fleet.SerialOf(leaf.SerialNumber), "file", fleet.SerialOf(s.Files.Chain()[0].SerialNumber), "since", now.since, "fix", fixStale)
	}
	return true
}

const fixStale = "run rabbitmqctl eval 'ssl:clear_pem_cache().' on the broker, or restart it; and see that it starts with -ssl ssl_pem_cache_clean 2000 (docs/operations.md)"

// unproven reports whether a door does not serve what it should, and may yet come to.
func (k *Keeper) unproven(at time.Time) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range k.doors {
		if !d.since.IsZero() && at.Sub(d.since) < proofTime {
			return true
		}
	}
	return false
}

// Health returns what is wrong at that time: files that are refused, renewals that fail, doors that serve another certificate
// than they should for too long.
func (k *Keeper) Health(at time.Time) error {
	var errs []error
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.c.Servers {
		if s.Files != nil {
			if err := s.Files.Refused(); err != nil {
				errs = append(errs, fmt.Errorf("%s: the files are refused: %w", s.Name, err))
			}
		}
		if a, ok := k.renewal[s.Name]; ok {
			errs = append(errs, fmt.Errorf("%s: cannot be renewed: %w", s.Name, a.err))
		}
		for _, d := range s.Doors {
			if seen := k.doors[s.Name+"/"+d.Name]; !seen.since.IsZero() && at.Sub(seen.since) >= proofTime {
				errs = append(errs, fmt.Errorf("%s: the broker serves another certificate at %s (%s) than its files hold: %s", s.Name, d.Name, d.Address, fixStale))
			}
		}
	}
	return errors.Join(errs...)
}

// State is how a certificate is.
type State struct {
	Name     string
	File     string // of the certificate; empty: not on this machine
	Serial   fleet.Serial
	Names    []string
	Issuer   string // common name
	Ours     bool   // muster issued it, and renews it
	Validity Validity
	RenewsAt time.Time // zero: not by muster
	Refused  string    // why the files are not what is in use; empty: they are
	Failed   string    // why the last renewal failed; empty: it did not
	Doors    []DoorState
}

// Validity is from when until when a certificate holds.
type Validity struct{ NotBefore, NotAfter time.Time }

// DoorState is what was seen at a door.
type DoorState struct {
	Door
	Serial   fleet.Serial // empty: nothing was seen yet
	Validity Validity
	Proven   bool      // it serves what the files hold
	SeenAt   time.Time // of the last handshake
	Error    string    // of the last handshake
}

// List returns how every certificate is, in the order of the configuration.
func (k *Keeper) List(at time.Time) []State {
	out := make([]State, len(k.c.Servers))
	for i, s := range k.c.Servers {
		out[i] = k.state(at, s)
	}
	return out
}

func (k *Keeper) state(at time.Time, s Server) State {
	st := State{Name: s.Name}
	var leaf *x509.Certificate
	if s.Files != nil {
		chain := s.Files.Chain()
		leaf = chain[0]
		st.File, st.Serial, st.Names, st.Issuer = s.Files.File(), fleet.SerialOf(leaf.SerialNumber), namesOf(leaf), leaf.Issuer.CommonName
		st.Validity, st.Ours = validityOf(leaf), k.c.Issuer.Issued(chain)
		if st.Ours && k.gains(leaf) {
			st.RenewsAt = RenewsAt(leaf)
		}
		if err := s.Files.Refused(); err != nil {
			st.Refused = err.Error()
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if a, ok := k.renewal[s.Name]; ok {
		st.Failed = a.err.Error()
	}
	for _, d := range s.Doors {
		seen := k.doors[s.Name+"/"+d.Name]
		ds := DoorState{Door: d, SeenAt: seen.at}
		if seen.err != nil {
			ds.Error = seen.err.Error()
		}
		if seen.leaf != nil {
			ds.Serial, ds.Validity = fleet.SerialOf(seen.leaf.SerialNumber), validityOf(seen.leaf)
			ds.Proven = leaf != nil && seen.err == nil && seen.leaf.Equal(leaf)
		}
		st.Doors = append(st.Doors, ds)
	}
	return st
}

func validityOf(c *x509.Certificate) Validity { return Validity{c.NotBefore, c.NotAfter} }

// Expiring returns the certificates for the alarm table: those in use, and those seen at the broker's doors.
func (k *Keeper) Expiring(at time.Time) (out []expiry.Item) {
	for _, st := range k.List(at) {
		fix := fmt.Sprintf("muster server-certs renew %s", st.Name)
		switch {
		case !st.Ours:
			fix = "get a new one from the CA that issued it and put it in place of " + st.File
		case st.RenewsAt.IsZero():
			fix = "it ends with the server CA: replace that first"
		}
		if st.File != "" {
			out = append(out, expiry.Item{
				Name: st.Name, Kind: "server", NotBefore: st.Validity.NotBefore, NotAfter: st.Validity.NotAfter, Renews: st.RenewsAt, Fix: fix, Stops: true,
			})
		}
		for _, d := range st.Doors {
			if d.Serial == "" {
				continue
			}
			item := expiry.Item{
				Name: st.Name + "-" + d.Name, Kind: "served", NotBefore: d.Validity.NotBefore, NotAfter: d.Validity.NotAfter, Stops: true,
				Fix: fmt.Sprintf("look at the certificate that the broker serves at %s", d.Address),
			}
			if d.Proven {
				item.Renews, item.Fix = st.RenewsAt, fix
			}
			out = append(out, item)
		}
	}
	return out
}
