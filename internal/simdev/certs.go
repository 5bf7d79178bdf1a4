package simdev

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"strings"
	"time"
	"unicode"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// certOrder handles a message on dn/cert.
func (s *session) certOrder(ctx context.Context, o wire.CertOrder) error {
	switch o.Op {
	case wire.CertRenew:
		s.d.emit(RenewAsked, "%s", s.l.serial)
		if err := s.askForCertificate(ctx); err != nil {
			return err
		}
		s.askAgainAfter(o.Retry)
		return nil
	case wire.CertPart:
		whole, done, err := s.slices.Add(o)
		if err != nil {
			return s.drop("dn/cert: %v", err)
		}
		if !done {
			return nil
		}
		return s.take(ctx, whole)
	case wire.CertPush:
		return s.take(ctx, o)
	case wire.CertNo:
		return s.toldNo(o)
	}
	return nil
}

// toldNo waits as long as muster said. On the fallback a refusal without a time ends the session.
func (s *session) toldNo(o wire.CertOrder) error {
	s.d.emit(Waiting, "%s, again in %d s", o.Why, o.Retry)
	s.askAgainAfter(o.Retry)
	if o.Retry == 0 && s.w.fallback {
		return errLost{"muster refuses: " + o.Why}
	}
	return nil
}

// askAgainAfter has the request sent again after so many seconds; 0 is never.
func (s *session) askAgainAfter(seconds int) {
	if s.askAgain != nil {
		s.askAgain.Stop()
		s.askAgain = nil
	}
	if seconds > 0 {
		s.askAgain = time.NewTimer(time.Duration(seconds) * time.Second)
	}
}

// askForCertificate sends a request. Over mutual TLS it is for a new key in the spare slot. On the fallback it is for the
// newest key that muster knows already, because that one is certified without an operator; for a new one only if all are
// lost.
func (s *session) askForCertificate(ctx context.Context) error {
	key, err := s.keyToCertify()
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: string(s.d.id)}}, key)
	if err != nil {
		return err
	}
	if err := s.say(ctx, wire.UpTopic(s.d.id, wire.UpCert), wire.Encode(wire.CertReport{CSR: csr})); err != nil {
		return err
	}
	what := "for a new key"
	if holdsKey(s.d.ids, key) {
		what = "for a known key"
	}
	s.d.emit(Requested, "%s", what)
	return nil
}

func (s *session) keyToCertify() (*ecdsa.PrivateKey, error) {
	if !s.w.fallback || len(s.d.ids) == 0 {
		return s.d.mem.pendingKey(s.d.ids)
	}
	var newest identity
	for _, id := range s.d.ids {
		if newest.leaf == nil || id.leaf.NotBefore.After(newest.leaf.NotBefore) {
			newest = id
		}
	}
	return newest.key, nil
}

// take stores a certificate that came, says so, and ends the session to connect with it.
func (s *session) take(ctx context.Context, o wire.CertOrder) error {
	if at, id, have := s.have(o); have {
		return s.takeAgain(ctx, o, at, id)
	}
	id, err := s.judge(o)
	if err != nil {
		s.d.emit(CertRejected, "%s: %v", o.Serial, err)
		return s.sayCert(ctx, wire.CertReport{Error: cut(err.Error())})
	}
	if err := s.keepPassword(o); err != nil {
		return err
	}
	inUse := s.w.side
	if s.w.fallback {
		inUse = ""
	}
	at := spare(s.d.ids, inUse, id.key)
	key, err := x509.MarshalPKCS8PrivateKey(id.key)
	if err != nil {
		return err
	}
	if err := save(s.d.mem.r, recCert+string(at), certSlot{key, o.Chain}); err != nil {
		return err
	}
	s.d.ids[at] = id
	s.d.count(func(c *Counts) { c.CertsStored++ })
	s.d.emit(CertStored, "%s", o.Serial)
	// From here on the key is in a slot. If the power goes first, pendingKey sees that it is, and makes a new one.
	if err := s.d.mem.r.flash.Remove(recPending); err != nil {
		return err
	}
	return s.use(ctx, at, o.Serial)
}

// have returns the slot that holds the certificate already, if one does.
func (s *session) have(o wire.CertOrder) (side, identity, bool) {
	for at, id := range s.d.ids {
		if bytes.Equal(id.chain[0], o.Chain[0]) {
			return at, id, true
		}
	}
	return "", identity{}, false
}

// takeAgain handles a certificate that came before: messages come at least once.
func (s *session) takeAgain(ctx context.Context, o wire.CertOrder, at side, id identity) error {
	if !s.w.fallback && (at == s.w.side || id.leaf.NotBefore.Before(s.d.ids[s.w.side].leaf.NotBefore)) { // in use, or older
		return s.sayCert(ctx, wire.CertReport{Have: id.serial})
	}
	if err := s.keepPassword(o); err != nil {
		return err
	}
	if since, is := s.d.useless[id.serial]; is && time.Since(since) < s.d.c.Timing.NewCertPause {
		// On the fallback it stays: what is wrong is not the certificate, and perhaps a good image is on its way. At the front
		// it goes by itself when the pause is over: a session may last for months, and nobody pushes in the middle of one.
		if !s.w.fallback {
			s.tryStored(at, id.serial, s.d.c.Timing.NewCertPause-time.Since(since))
		}
		return s.sayCert(ctx, wire.CertReport{Error: "stored before, but the broker does not accept it"})
	}
	return s.use(ctx, at, id.serial)
}

// tryStored has the session end for a certificate that is stored, after wait.
func (s *session) tryStored(at side, serial fleet.Serial, wait time.Duration) {
	if s.pause != nil {
		s.pause.Stop()
	}
	s.pause, s.paused = time.NewTimer(wait), func(ctx context.Context) error { return s.use(ctx, at, serial) }
}

// use says that the certificate is stored and ends the session: the next one uses it. A download on the fallback is brought
// to its end before: the image may be what the front needs.
func (s *session) use(ctx context.Context, at side, serial fleet.Serial) error {
	if err := s.d.mem.use.write(useRecord{at, false}); err != nil {
		return err
	}
	s.d.doors.stored(at)
	s.stored = true
	if err := s.sayCert(ctx, wire.CertReport{Have: serial}); err != nil {
		return err
	}
	s.leave = errLost{"reconnects with certificate " + string(serial)}
	if s.w.fallback && s.update.cancel != nil {
		return nil
	}
	return s.leave
}

func (s *session) sayCert(ctx context.Context, r wire.CertReport) error {
	return s.say(ctx, wire.UpTopic(s.d.id, wire.UpCert), wire.Encode(r))
}

// keepPassword stores the new password before the certificate that it came with: if the power goes between the two, both
// passwords still work.
func (s *session) keepPassword(o wire.CertOrder) error {
	if !s.w.fallback || o.Password == "" {
		return nil
	}
	if err := s.d.mem.addPassword(o.Password, s.w.side); err != nil {
		return err
	}
	pws, err := s.d.mem.passwords()
	if err != nil {
		return err
	}
	s.d.doors.passwords, s.d.doors.password = sidesOf(pws), 0
	return nil
}

// judge checks a certificate before it takes a place in a slot: that it fits a key of this device, says who it is, and
// was signed by whom the device trusts. Its dates are muster's business: the device's clock may be wrong.
func (s *session) judge(o wire.CertOrder) (identity, error) {
	leaf, err := x509.ParseCertificate(o.Chain[0])
	if err != nil {
		return identity{}, fleet.Errorf(fleet.Invalid, "not a certificate")
	}
	key, err := s.d.mem.keyFor(leaf, s.d.ids)
	if err != nil {
		return identity{}, err
	}
	switch {
	case key == nil:
		return identity{}, fleet.Errorf(fleet.Invalid, "does not fit a key of this device")
	case fleet.SerialOf(leaf.SerialNumber) != o.Serial || !slices.Contains(leaf.DNSNames, string(s.d.id)) || len(leaf.URIs) != 1 || leaf.URIs[0].String() != wire.CertUser(s.d.id, o.Serial):
		return identity{}, fleet.Errorf(fleet.Invalid, "is not made out to this device, or with another serial than the message says")
	}
	between := x509.NewCertPool()
	for _, der := range o.Chain[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return identity{}, fleet.Errorf(fleet.Invalid, "chain holds something that is no certificate")
		}
		between.AddCert(c)
	}
	at, _ := s.d.now()
	if at.Before(leaf.NotBefore) {
		at = leaf.NotBefore
	}
	if at.After(leaf.NotAfter) {
		at = leaf.NotAfter
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: s.d.trust, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return identity{}, fleet.Errorf(fleet.Invalid, "is not signed by whom this device trusts")
	}
	return identity{key, leaf, o.Chain, o.Serial}, nil
}

// cut shortens a text to what a message may hold, and leaves out what cannot be printed.
func cut(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
	return strings.ToValidUTF8(s[:min(len(s), wire.MaxText)], "")
}
