package httpapi

import (
	"encoding/pem"
	"strings"
	"time"

	"muster/api"
	"muster/internal/enroll"
	"muster/internal/fleet"
	"muster/internal/pki"
)

// maxWithin bounds how far ahead certificates are looked for.
const maxWithin = 50 * 365 * 24 * time.Hour

func (s *Server) listDeviceCertificates(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	cs, err := s.c.Certificates.CertificatesOf(c.ctx, id)
	if err != nil {
		return answer{}, err
	}
	return ok(listCertificates(cs, len(cs)))
}

func (s *Server) listCertificates(c *call) (answer, error) {
	limit, err := c.limit()
	if err != nil {
		return answer{}, err
	}
	within := 30 * 24 * time.Hour
	if c.query.Has("within") {
		if within, err = duration("within", c.query.Get("within"), 0, maxWithin); err != nil {
			return answer{}, err
		}
	}
	cs, err := s.c.Certificates.CertificatesEnding(c.ctx, c.at.Add(within), limit+1)
	if err != nil {
		return answer{}, err
	}
	return ok(listCertificates(cs, limit))
}

func listCertificates(cs []pki.Certificate, limit int) api.CertificateList {
	out := api.CertificateList{Items: []api.Certificate{}, More: len(cs) > limit}
	for _, c := range cs[:min(limit, len(cs))] {
		shown := showCertificate(c)
		shown.Chain = ""
		out.Items = append(out.Items, shown)
	}
	return out
}

func (s *Server) getCertificate(c *call) (answer, error) {
	serial, err := c.serial()
	if err != nil {
		return answer{}, err
	}
	cert, err := s.c.Certificates.Certificate(c.ctx, serial)
	if err != nil {
		return answer{}, err
	}
	return ok(showCertificate(cert))
}

func (s *Server) issueCertificate(c *call) (answer, error) {
	id, err := c.device()
	if err != nil {
		return answer{}, err
	}
	var in api.CertificateRequest
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	der, err := pki.UnwrapCSR([]byte(in.CSR))
	if err != nil {
		return answer{}, err
	}
	o := enroll.IssueOptions{By: c.who.Name}
	if in.Lifetime != "" {
		if o.Lifetime, err = duration("lifetime", in.Lifetime, time.Second, maxWithin); err != nil {
			return answer{}, err
		}
	}
	cert, err := s.c.Certificates.Issue(c.ctx, c.at, id, der, o)
	if err != nil {
		return answer{}, err
	}
	return created(showCertificate(cert))
}

func (s *Server) revokeCertificate(c *call) (answer, error) {
	serial, err := c.serial()
	if err != nil {
		return answer{}, err
	}
	var in api.NewRevocation
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	reason, known := reasons[in.Reason]
	if !known {
		return answer{}, fleet.Coded(fleet.Invalid, "reason_invalid", "reason: use unspecified, key-compromise, affiliation-changed, superseded, cessation-of-operation or privilege-withdrawn")
	}
	r, err := s.c.Certificates.Revoke(c.ctx, c.at, serial, reason, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	ev := r.Evidence
	return ok(api.RevocationReport{
		Certificate: showCertificate(r.Certificate), Connections: ev.Live, Clean: ev.Clean, Detail: ev.Detail,
		StoredAfter: took(ev.Stored), ClosedAfter: took(ev.Closed), VerifiedAfter: took(ev.Verified), StoredAt: ev.StoredAt, ClosedAt: ev.ClosedAt, EndedAt: ev.EndedAt,
		RefusedAt: ev.Refused.At, RefusedWhy: ev.Refused.Why, LastLook: ev.LastLook,
	})
}

// took shows how long a step took, empty if it was not done.
func took(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return max(d.Round(100*time.Microsecond), 100*time.Microsecond).String()
}

// reasons are the codes of RFC 5280 §5.3.1 that an operator may give. The others say what is not so here: a CA's key,
// a hold that can be lifted, a delta CRL.
var reasons = map[api.RevocationReason]int{
	"":                       0,
	"unspecified":            0,
	"key-compromise":         1,
	"affiliation-changed":    3,
	"superseded":             4,
	"cessation-of-operation": 5,
	"privilege-withdrawn":    9,
}

func reasonName(code int) api.RevocationReason {
	for name, c := range reasons {
		if c == code && name != "" {
			return name
		}
	}
	return "unspecified"
}

func showCertificate(c pki.Certificate) api.Certificate {
	var chain strings.Builder
	for _, der := range c.Chain {
		chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	out := api.Certificate{
		Serial: string(c.Serial), Device: string(c.Device), State: api.CertificateState(c.State), Via: string(c.Via),
		KeySHA256: string(c.KeyHash), Chain: chain.String(), NotBefore: c.NotBefore, NotAfter: c.NotAfter, IntendedAt: c.IntendedAt,
		IssuedAt: c.IssuedAt, ActiveAt: c.ActiveAt, SupersededAt: c.SupersededAt, RevokedAt: c.RevokedAt, By: c.By,
	}
	if c.State.Live() {
		w := c.Window()
		out.Renewal = api.RenewalWindow{Start: w.Start, End: w.End, At: pki.RenewAt(c, c.Device)}
	}
	if c.State == pki.Revoked {
		out.Reason = reasonName(c.Reason)
	}
	return out
}
