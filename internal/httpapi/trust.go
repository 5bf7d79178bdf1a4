package httpapi

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/pki"
)

func publicPEM(key *ecdsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fleet.Wrap(fleet.Internal, err, "the trust key cannot be shown")
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

func (s *Server) getTrustBundle(c *call) (answer, error) {
	b, err := s.c.TrustBundles.Current(c.ctx)
	if err != nil {
		return answer{}, err
	}
	return ok(showBundle(b))
}

func showBundle(b pki.Published) api.TrustBundle {
	return api.TrustBundle{Version: b.Version, Signed: b.JWS, RootsPEM: certsPEM(b.Roots), CrossPEM: certsPEM(b.Cross), PublishedAt: b.At, By: b.By}
}

func certsPEM(ders [][]byte) string {
	var out strings.Builder
	for _, der := range ders {
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return out.String()
}

func (s *Server) publishTrustBundle(c *call) (answer, error) {
	var in api.NewTrustBundle
	if err := c.decode(&in); err != nil {
		return answer{}, err
	}
	if (in.Signed != "") == (in.RootsPEM != "") || in.Signed != "" && in.CrossPEM != "" {
		return answer{}, fleet.Coded(fleet.Invalid, "bundle_invalid", "send either roots_pem, with cross_pem if there are any, or signed")
	}
	if in.Signed != "" {
		b, err := s.c.TrustBundles.Publish(c.ctx, c.at, strings.TrimSpace(in.Signed), in.Force, c.who.Name)
		if err != nil {
			return answer{}, err
		}
		return created(showBundle(b))
	}
	roots, err := readCerts("roots_pem", in.RootsPEM)
	if err != nil {
		return answer{}, err
	}
	cross, err := readCerts("cross_pem", in.CrossPEM)
	if err != nil {
		return answer{}, err
	}
	b, err := s.c.TrustBundles.Make(c.ctx, c.at, roots, cross, in.Force, c.who.Name)
	if err != nil {
		return answer{}, err
	}
	return created(showBundle(b))
}

// readCerts reads the certificates of a member, at most as many as a bundle holds.
func readCerts(name, text string) (out []*x509.Certificate, err error) {
	rest := []byte(text)
	for len(strings.TrimSpace(string(rest))) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" || len(out) == pki.MaxBundleCerts {
			return nil, fleet.Coded(fleet.Invalid, "bundle_invalid", "%s: send at most %d PEM blocks of type CERTIFICATE, and nothing else", name, pki.MaxBundleCerts)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fleet.Coded(fleet.Invalid, "bundle_invalid", "%s: certificate %d cannot be read", name, len(out)+1)
		}
		out = append(out, c)
	}
	return out, nil
}

func (s *Server) listTrustDevices(c *call) (answer, error) {
	limit, err := c.limit()
	if err != nil {
		return answer{}, err
	}
	spread, err := s.c.TrustBundles.Spread(c.ctx, limit)
	if err != nil {
		return answer{}, err
	}
	out := api.TrustSpread{
		Version: spread.Version, Devices: spread.Devices, Acked: spread.Acked, More: spread.More,
		Versions: []api.TrustVersion{}, Stragglers: []api.TrustStraggler{},
	}
	for v, n := range spread.Versions {
		out.Versions = append(out.Versions, api.TrustVersion{Version: v, Devices: n})
	}
	slices.SortFunc(out.Versions, func(a, b api.TrustVersion) int { return cmp.Compare(a.Version, b.Version) })
	for _, d := range spread.Stragglers {
		out.Stragglers = append(out.Stragglers, api.TrustStraggler{Device: string(d.Device), Version: d.Version, LastSeen: d.LastSeen, Online: d.Online})
	}
	return ok(out)
}
