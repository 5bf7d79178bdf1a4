package pki

import (
	"bytes"
	"crypto"
	"crypto/dsa" //lint:ignore SA1019 such a key must be refused
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"muster/internal/fleet"
)

func ecKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func request(t testing.TB, k crypto.Signer, tpl x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &tpl, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func named(cn string) x509.CertificateRequest {
	return x509.CertificateRequest{Subject: pkix.Name{CommonName: cn}}
}

func extension(t testing.TB, oid asn1.ObjectIdentifier, v any) x509.CertificateRequest {
	t.Helper()
	der, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Value: der}}}
}

// wantCode fails unless err is a fleet.Error of that kind and code whose message holds nothing of the input.
func wantCode(t *testing.T, err error, kind fleet.Kind, code string) {
	t.Helper()
	e, ok := errors.AsType[*fleet.Error](err)
	if !ok || e.Kind != kind || e.Code != code {
		t.Fatalf("got %v, want %s %s", err, kind, code)
	}
}

func toPEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func TestGoodRequests(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p256 := ecKey(t, elliptic.P256())
	for name, c := range map[string]struct {
		key crypto.Signer
		tpl x509.CertificateRequest
		p   KeyPolicy
	}{
		"P-256":               {p256, named("pump-7"), KeyPolicy{}},
		"P-384":               {ecKey(t, elliptic.P384()), named("pump-7"), KeyPolicy{}},
		"RSA where allowed":   {rsaKey, named("pump-7"), KeyPolicy{RSA: true}},
		"no subject":          {p256, x509.CertificateRequest{}, KeyPolicy{}},
		"names of others":     {p256, x509.CertificateRequest{DNSNames: []string{"*.example.com", "pump-8"}, EmailAddresses: []string{"a@b.c"}}, KeyPolicy{}},
		"clientAuth":          {p256, extension(t, oidExtKeyUsage, []asn1.ObjectIdentifier{oidClientAuth}), KeyPolicy{}},
		"explicitly not a CA": {p256, extension(t, oidBasicConstraints, struct{}{}), KeyPolicy{}},
	} {
		t.Run(name, func(t *testing.T) {
			der := request(t, c.key, c.tpl)
			got, err := ParseCSR(der, c.p)
			if err != nil {
				t.Fatal(err)
			}
			spki, err := x509.MarshalPKIXPublicKey(c.key.Public())
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.PublicKey, spki) || got.KeyHash != KeyHash(spki) {
				t.Error("another key than the request's")
			}
			if err := got.ForDevice("pump-7"); err != nil {
				t.Error(err)
			}
			for _, kind := range []string{"CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"} {
				text := append(append([]byte("\r\n"), toPEM(kind, der)...), " \n\n"...)
				if again, err := ParseCSRPEM(text, c.p); err != nil || again.KeyHash != got.KeyHash {
					t.Errorf("as PEM %s: %v", kind, err)
				}
			}
		})
	}
}

// challengePassword and other attributes are ignored (faults.md §7.1 row 16).
func TestChallengePasswordIsIgnored(t *testing.T) {
	der := withAttribute(t, ecKey(t, elliptic.P256()))
	if _, err := ParseCSR(der, KeyPolicy{}); err != nil {
		t.Fatal(err)
	}
}

// withAttribute returns a request with a challengePassword, which crypto/x509 cannot write.
func withAttribute(t *testing.T, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	type attribute struct {
		Type   asn1.ObjectIdentifier
		Values []string `asn1:"set"`
	}
	tbs, err := asn1.Marshal(struct {
		Version    int
		Subject    pkix.RDNSequence
		PublicKey  asn1.RawValue
		Attributes []attribute `asn1:"tag:0,set"`
	}{0, pkix.RDNSequence{}, asn1.RawValue{FullBytes: spki}, []attribute{{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, []string{"secret"}}}})
	if err != nil {
		t.Fatal(err)
	}
	h := crypto.SHA256.New()
	h.Write(tbs)
	sig, err := k.Sign(rand.Reader, h.Sum(nil), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		TBS asn1.RawValue
		Alg pkix.AlgorithmIdentifier
		Sig asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestBadFrames(t *testing.T) {
	k := ecKey(t, elliptic.P256())
	der := request(t, k, named("pump-7"))
	text := toPEM("CERTIFICATE REQUEST", der)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Replace(text, []byte("\n"), []byte("\n!"), 1)
	for name, c := range map[string]struct {
		in   []byte
		kind fleet.Kind
		code string
	}{
		"too long":               {bytes.Repeat([]byte("A"), MaxCSR+1), fleet.TooLarge, CodeTooLarge},
		"empty":                  {nil, fleet.Invalid, CodeMalformed},
		"null":                   {[]byte("null"), fleet.Invalid, CodeMalformed},
		"garbage in front":       {append([]byte("hello\n"), text...), fleet.Invalid, CodeMalformed},
		"garbage behind":         {append(bytes.Clone(text), "hello"...), fleet.Invalid, CodeMalformed},
		"two blocks":             {append(bytes.Clone(text), text...), fleet.Invalid, CodeMalformed},
		"a damaged block first":  {append(damaged, text...), fleet.Invalid, CodeMalformed},
		"damaged":                {damaged, fleet.Invalid, CodeMalformed},
		"headers":                {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: der}), fleet.Invalid, CodeMalformed},
		"certificate":            {toPEM("CERTIFICATE", der), fleet.Invalid, CodeMalformed},
		"not DER":                {toPEM("CERTIFICATE REQUEST", []byte("hello")), fleet.Invalid, CodeMalformed},
		"trailing bytes":         {toPEM("CERTIFICATE REQUEST", append(bytes.Clone(der), 0)), fleet.Invalid, CodeMalformed},
		"cut short":              {toPEM("CERTIFICATE REQUEST", der[:len(der)-1]), fleet.Invalid, CodeMalformed},
		"private key, PKCS #8":   {toPEM("PRIVATE KEY", pkcs8), fleet.Invalid, CodePrivateKey},
		"private key, SEC 1":     {toPEM("EC PRIVATE KEY", sec1), fleet.Invalid, CodePrivateKey},
		"private key, encrypted": {toPEM("ENCRYPTED PRIVATE KEY", []byte("x")), fleet.Invalid, CodePrivateKey},
		"private key behind":     {append(bytes.Clone(text), toPEM("PRIVATE KEY", pkcs8)...), fleet.Invalid, CodePrivateKey},
		"private key, misnamed":  {toPEM("CERTIFICATE REQUEST", pkcs8), fleet.Invalid, CodePrivateKey},
		"SEC 1 key, misnamed":    {toPEM("CERTIFICATE REQUEST", sec1), fleet.Invalid, CodePrivateKey},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSRPEM(c.in, KeyPolicy{})
			wantCode(t, err, c.kind, c.code)
			if mid := len(c.in) / 2; mid > 40 && strings.Contains(err.Error(), string(c.in[mid:mid+12])) {
				t.Error("the error echoes the input")
			}
		})
	}
	if _, err := ParseCSR(make([]byte, MaxCSR+1), KeyPolicy{}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("too long as DER: %v", err)
	}
}

func TestBadSignatures(t *testing.T) {
	k := ecKey(t, elliptic.P256())
	der := request(t, k, named("pump-7"))
	other := request(t, ecKey(t, elliptic.P256()), named("pump-7"))
	flipped := bytes.Clone(der)
	flipped[len(flipped)-1] ^= 1
	// The same length of key and signature, so the frames match: another key's signature.
	mixed := bytes.Clone(der)
	for i := 1; i <= 8 && len(other) >= i; i++ {
		mixed[len(mixed)-i] = other[len(other)-i]
	}
	for name, in := range map[string][]byte{"flipped": flipped, "another key's": mixed} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSR(in, KeyPolicy{})
			wantCode(t, err, fleet.Invalid, CodeSignature)
		})
	}
	// SHA-1: the algorithm is replaced in a sound request (ecdsa-with-SHA1 is 1.2.840.10045.4.1).
	sha256, sha1 := []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1}
	var req struct {
		TBS asn1.RawValue
		Alg asn1.RawValue
		Sig asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &req); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(req.Alg.FullBytes, sha256) {
		t.Fatal("the request is not signed as this test supposes")
	}
	req.Alg = asn1.RawValue{FullBytes: append([]byte{0x30, 9, 6, 7}, sha1...)}
	weak, err := asn1.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	_, err = ParseCSR(weak, KeyPolicy{})
	wantCode(t, err, fleet.Invalid, CodeSignature)
}

func TestBadKeys(t *testing.T) {
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256 := ecKey(t, elliptic.P256())
	for name, c := range map[string]struct {
		key crypto.Signer
		p   KeyPolicy
	}{
		"P-224":          {ecKey(t, elliptic.P224()), KeyPolicy{}},
		"P-521":          {ecKey(t, elliptic.P521()), KeyPolicy{RSA: true}},
		"Ed25519":        {ed, KeyPolicy{RSA: true}},
		"RSA by default": {rsa2048, KeyPolicy{}},
		"blocked":        {p256, KeyPolicy{Blocked: func(h fleet.Hash) bool { return h == KeyHash(spkiOf(t, p256.Public())) }}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSR(request(t, c.key, named("pump-7")), c.p)
			wantCode(t, err, fleet.Unprocessable, CodeKey)
		})
	}
	// DSA keys cannot be written by crypto/x509 any more, but they can be read.
	err = KeyPolicy{RSA: true}.check(&dsa.PublicKey{}, nil)
	wantCode(t, err, fleet.Unprocessable, CodeKey)
}

func spkiOf(t testing.TB, pub any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestBadRSA(t *testing.T) {
	sound, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p := KeyPolicy{RSA: true}
	if err := p.check(&sound.PublicKey, nil); err != nil {
		t.Fatalf("a sound key: %v", err)
	}
	// Primes next to one another: Fermat's method finds them at once.
	half, err := rand.Prime(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	half.SetBit(half, 1022, 1)
	for !half.ProbablyPrime(20) {
		half.Add(half, big.NewInt(2))
	}
	next := new(big.Int).Add(half, big.NewInt(2))
	for !next.ProbablyPrime(20) {
		next.Add(next, big.NewInt(2))
	}
	fermat := new(big.Int).Mul(half, next)
	// n = 65537^k mod M has the ROCA fingerprint, whatever its factors.
	m := big.NewInt(1)
	for _, q := range smallPrimes {
		if q <= 167 {
			m.Mul(m, big.NewInt(q))
		}
	}
	roca := new(big.Int).Exp(big.NewInt(65537), big.NewInt(1234567), m)
	base := roca
	if base.Bit(0) == 0 {
		base.Add(base, m) // odd, with the same residues
	}
	top := new(big.Int).Lsh(big.NewInt(1), uint(2047-m.BitLen()))
	for n := int64(1); ; n++ {
		k := new(big.Int).Add(top, big.NewInt(n))
		roca = new(big.Int).Add(base, k.Mul(k, new(big.Int).Mul(m, big.NewInt(2))))
		if roca.BitLen() == 2048 && !hasSmallFactor(roca) {
			break
		}
		if n > 10_000 {
			t.Fatal("no number with the fingerprint was found")
		}
	}
	if isROCA(sound.N) {
		t.Error("a sound key has the fingerprint")
	}
	huge := new(big.Int).Lsh(big.NewInt(1), 8191)
	for name, k := range map[string]*rsa.PublicKey{
		"tiny":         {N: big.NewInt(15), E: 65537},
		"1024 bits":    {N: new(big.Int).Rsh(sound.N, 1024), E: 65537},
		"8192 bits":    {N: huge, E: 65537},
		"exponent 3":   {N: sound.N, E: 3},
		"even":         {N: new(big.Int).Sub(sound.N, big.NewInt(1)), E: 65537},
		"small factor": {N: new(big.Int).Mul(big.NewInt(743), new(big.Int).SetBit(new(big.Int).Rsh(sound.N, 9), 0, 1)), E: 65537},
		"close primes": {N: fermat, E: 65537},
		"ROCA":         {N: roca, E: 65537},
	} {
		t.Run(name, func(t *testing.T) {
			wantCode(t, p.check(k, nil), fleet.Unprocessable, CodeKey)
		})
	}
	if !isFermatWeak(fermat) || isFermatWeak(sound.N) || isFermatWeak(roca) {
		t.Error("Fermat's method is wrong about one of them")
	}
}

func TestBadSubjects(t *testing.T) {
	k := ecKey(t, elliptic.P256())
	cn := func(names ...string) x509.CertificateRequest {
		var s pkix.Name
		for _, n := range names {
			s.ExtraNames = append(s.ExtraNames, pkix.AttributeTypeAndValue{Type: oidCommonName, Value: n})
		}
		return x509.CertificateRequest{Subject: s}
	}
	for name, tpl := range map[string]x509.CertificateRequest{
		"two names":     cn("dev1", "admin"),
		"the same name": cn("dev1", "dev1"),
		"NUL":           cn("dev1\x00"),
		"newline":       cn("dev1\n"),
		"injected":      cn("dev1,CN=admin"),
		"long":          cn(strings.Repeat("a", 65)),
		"empty":         cn(""),
		"unicode":       cn("dév1"),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSR(request(t, k, tpl), KeyPolicy{})
			wantCode(t, err, fleet.Unprocessable, CodeSubject)
		})
	}
	for _, name := range []string{"pump-8", "PUMP-7", "pump_7"} {
		c, err := ParseCSR(request(t, k, named(name)), KeyPolicy{})
		if err != nil {
			t.Fatal(err)
		}
		wantCode(t, c.ForDevice("pump-7"), fleet.Forbidden, CodeIdentity)
	}
}

func TestBadExtensions(t *testing.T) {
	k := ecKey(t, elliptic.P256())
	use := func(n ...int) asn1.ObjectIdentifier {
		return append(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3}, n...)
	}
	for name, tpl := range map[string]x509.CertificateRequest{
		"CA": extension(t, oidBasicConstraints, struct{ CA bool }{true}),
		"CA with a length": extension(t, oidBasicConstraints, struct {
			CA  bool
			Len int
		}{true, 0}),
		"serverAuth":  extension(t, oidExtKeyUsage, []asn1.ObjectIdentifier{oidClientAuth, use(1)}),
		"OCSPSigning": extension(t, oidExtKeyUsage, []asn1.ObjectIdentifier{use(9)}),
		"any use":     extension(t, oidExtKeyUsage, []asn1.ObjectIdentifier{{2, 5, 29, 37, 0}}),
		"keyCertSign": extension(t, oidKeyUsage, asn1.BitString{Bytes: []byte{0x04}, BitLength: 6}),
		"cRLSign":     extension(t, oidKeyUsage, asn1.BitString{Bytes: []byte{0x02}, BitLength: 7}),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSR(request(t, k, tpl), KeyPolicy{})
			wantCode(t, err, fleet.Unprocessable, CodeExtension)
		})
	}
	damaged := func(oid asn1.ObjectIdentifier) x509.CertificateRequest {
		return x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Value: []byte{1}}}}
	}
	many := x509.CertificateRequest{}
	for i := range maxExtensions + 1 {
		many.ExtraExtensions = append(many.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, i}, Value: []byte{5, 0}})
	}
	for name, tpl := range map[string]x509.CertificateRequest{
		"damaged constraints": damaged(oidBasicConstraints), "damaged usage": damaged(oidKeyUsage), "damaged uses": damaged(oidExtKeyUsage), "too many": many,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSR(request(t, k, tpl), KeyPolicy{})
			wantCode(t, err, fleet.Invalid, CodeMalformed)
		})
	}
}

// Whatever comes in: no panic, a coded error or a key that is allowed, and never the subject of somebody else.
func FuzzParseCSR(f *testing.F) {
	k := ecKey(f, elliptic.P256())
	for _, tpl := range []x509.CertificateRequest{named("pump-7"), {}, {DNSNames: []string{"x"}}, extension(f, oidBasicConstraints, struct{ CA bool }{true})} {
		der := request(f, k, tpl)
		f.Add(der)
		f.Add(toPEM("CERTIFICATE REQUEST", der))
	}
	f.Add([]byte(nil))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		for name, parse := range map[string]func([]byte, KeyPolicy) (CSR, error){"DER": ParseCSR, "PEM": ParseCSRPEM} {
			c, err := parse(in, KeyPolicy{RSA: true})
			if err != nil {
				e, ok := errors.AsType[*fleet.Error](err)
				if !ok || e.Code == "" {
					t.Fatalf("%s: an error without a code: %v", name, err)
				}
				continue
			}
			if err := (KeyPolicy{RSA: true}).CheckKey(c.PublicKey); err != nil {
				t.Fatalf("%s: let a key through: %v", name, err)
			}
			if c.KeyHash != KeyHash(c.PublicKey) || c.name != "" && !plainName(c.name) {
				t.Fatalf("%s: %+v", name, c)
			}
		}
	})
}

func ExampleCSR_ForDevice() {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "pump-8"}}, k)
	c, _ := ParseCSR(der, KeyPolicy{})
	fmt.Println(c.ForDevice("pump-7"))
	// Output: the request's common name is not the device id: use CN=pump-7, or none
}
