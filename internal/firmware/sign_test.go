package firmware

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"pgregory.net/rapid"

	"muster/internal/fleet"
)

var update = flag.Bool("update", false, "rewrite testdata; understand first why it changed: signed releases in the field must stay readable")

func hashOf(s string) fleet.Hash { return fleet.HashOf(sha256.Sum256([]byte(s))) }

func sample() Manifest {
	return Manifest{Product: "sensor", Version: "1.1.0", Size: 1 << 20, SHA256: hashOf("file"), ImageHash: hashOf("image"), Chip: "esp32", SecureVersion: 1, MinVersion: "1.0.0"}
}

func newKey(t testing.TB, product fleet.ProductID) (*ecdsa.PrivateKey, Key) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	k, err := NewKey(der, product)
	if err != nil {
		t.Fatal(err)
	}
	return priv, k
}

func keyring(keys ...Key) func(string) (Key, bool) {
	return func(kid string) (Key, bool) {
		for _, k := range keys {
			if k.ID == kid {
				return k, true
			}
		}
		return Key{}, false
	}
}

// handMade returns a JWS with exactly this header and payload, signed without any JOSE library (RFC 7515 §5.1, RFC 7518 §3.4).
func handMade(t testing.TB, priv *ecdsa.PrivateKey, head, payload string) string {
	t.Helper()
	b64 := base64.RawURLEncoding.EncodeToString
	input := b64([]byte(head)) + "." + b64([]byte(payload))
	sum := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, priv, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + b64(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}

func headOf(k Key) string { return fmt.Sprintf(`{"alg":"ES256","kid":%q,"typ":%q}`, k.ID, Typ) }

func payloadOf(t testing.TB, m Manifest) string {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func codeOf(err error) string {
	e, ok := err.(*fleet.Error)
	if !ok {
		return fmt.Sprint(err)
	}
	return e.Code
}

func TestSignVerify(t *testing.T) {
	priv, key := newKey(t, "sensor")
	jws, err := Sign(sample(), priv)
	if err != nil {
		t.Fatal(err)
	}
	v, err := Verify(jws, keyring(key))
	if err != nil {
		t.Fatal(err)
	}
	if v.Manifest() != sample() || v.KeyID() != key.ID || v.JWS() != jws {
		t.Errorf("verified %+v by %s", v.Manifest(), v.KeyID())
	}
	if m, kid, err := Inspect(jws); err != nil || m != sample() || kid != key.ID {
		t.Errorf("Inspect: %+v, %s, %v", m, kid, err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	rel, err := v.Release("d41d8cd98f00b204e9800998ecf8427e", "ann", at)
	if err != nil || rel.Manifest != sample() || rel.JWS != jws || rel.KeyID != key.ID || rel.UploadedBy != "ann" || !rel.UploadedAt.Equal(at) {
		t.Errorf("release %+v, %v", rel, err)
	}
	if _, err := (Verified{}).Release("", "", at); !fleet.Is(err, fleet.Internal) {
		t.Errorf("a release of nothing verified: %v", err)
	}
	every, err := NewKey(key.PublicKey, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(jws, keyring(every)); err != nil {
		t.Errorf("a key of every product: %v", err)
	}
}

// A manifest signed by other means than Sign is as good: the format is the standard's, not a library's.
func TestVerifyHandMade(t *testing.T) {
	priv, key := newKey(t, "sensor")
	v, err := Verify(handMade(t, priv, headOf(key), payloadOf(t, sample())), keyring(key))
	if err != nil || v.Manifest() != sample() {
		t.Errorf("%+v, %v", v.Manifest(), err)
	}
}

func TestVerifyRefuses(t *testing.T) {
	priv, key := newKey(t, "sensor")
	other, otherKey := newKey(t, "sensor")
	foreign, foreignKey := newKey(t, "lamp")
	gone, goneKey := newKey(t, "sensor")
	goneKey.Revoked = true
	_, mislabelled := newKey(t, "sensor")
	mislabelled.ID = "mislabelled"
	payload := payloadOf(t, sample())
	good, err := Sign(sample(), priv)
	if err != nil {
		t.Fatal(err)
	}
	part := strings.Split(good, ".")
	b64 := base64.RawURLEncoding.EncodeToString
	head := func(s string) string { return handMade(t, priv, s, payload) }
	pubPEM := string(key.PEM())

	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	joseSigned := func(alg jose.SignatureAlgorithm, k any) string {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: k, KeyID: key.ID}}, (&jose.SignerOptions{}).WithType(Typ))
		if err != nil {
			t.Fatal(err)
		}
		o, err := s.Sign([]byte(payload))
		if err != nil {
			t.Fatal(err)
		}
		c, err := o.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	parsed, err := jose.ParseSignedCompact(good, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	derSig, err := priv.Sign(rand.Reader, func() []byte { s := sha256.Sum256([]byte(part[0] + "." + part[1])); return s[:] }(), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	otherManifest := sample()
	otherManifest.Version = "9.9.9"

	for name, c := range map[string]struct{ jws, code string }{
		"empty":                     {"", "manifest_malformed"},
		"one part":                  {"abc", "manifest_malformed"},
		"four parts":                {good + ".x", "manifest_malformed"},
		"detached payload":          {part[0] + ".." + part[2], "manifest_malformed"},
		"no signature":              {part[0] + "." + part[1] + ".", "manifest_malformed"},
		"JSON serialisation":        {parsed.FullSerialize(), "manifest_malformed"},
		"padding":                   {good + "==", "manifest_malformed"},
		"line break":                {part[0] + ".\n" + part[1] + "." + part[2], "manifest_malformed"},
		"too long":                  {good + strings.Repeat("A", MaxJWS), "manifest_malformed"},
		"alg none":                  {b64([]byte(`{"alg":"none","kid":"`+key.ID+`","typ":"`+Typ+`"}`)) + "." + part[1] + "." + part[2], "manifest_malformed"},
		"alg HS256, key as secret":  {joseSigned(jose.HS256, []byte(pubPEM)), "manifest_malformed"},
		"alg RS256":                 {joseSigned(jose.RS256, rs), "manifest_malformed"},
		"alg in lower case":         {head(`{"alg":"es256","kid":"` + key.ID + `","typ":"` + Typ + `"}`), "manifest_malformed"},
		"crit":                      {head(`{"alg":"ES256","kid":"` + key.ID + `","typ":"` + Typ + `","crit":["x"],"x":1}`), "manifest_malformed"},
		"b64 false":                 {head(`{"alg":"ES256","kid":"` + key.ID + `","typ":"` + Typ + `","b64":false,"crit":["b64"]}`), "manifest_malformed"},
		"jwk in the header":         {head(`{"alg":"ES256","kid":"` + key.ID + `","typ":"` + Typ + `","jwk":{}}`), "manifest_malformed"},
		"header twice alg":          {head(`{"alg":"ES256","alg":"none","kid":"` + key.ID + `","typ":"` + Typ + `"}`), "manifest_malformed"},
		"no typ":                    {head(`{"alg":"ES256","kid":"` + key.ID + `"}`), "manifest_malformed"},
		"typ of something else":     {head(`{"alg":"ES256","kid":"` + key.ID + `","typ":"JWT"}`), "manifest_malformed"},
		"header not an object":      {head(`[]`), "manifest_malformed"},
		"no kid":                    {head(`{"alg":"ES256","typ":"` + Typ + `"}`), "key_unknown"},
		"unknown kid":               {head(`{"alg":"ES256","kid":"nobody","typ":"` + Typ + `"}`), "key_unknown"},
		"revoked key":               {handMade(t, gone, headOf(goneKey), payload), "key_revoked"},
		"another registered key":    {handMade(t, other, headOf(key), payload), "signature_invalid"},
		"flipped payload":           {part[0] + "." + b64([]byte(payloadOf(t, otherManifest))) + "." + part[2], "signature_invalid"},
		"signature of zeros":        {part[0] + "." + part[1] + "." + b64(make([]byte, 64)), "signature_invalid"},
		"signature cut":             {part[0] + "." + part[1] + "." + part[2][:80], "signature_invalid"},
		"signature in DER":          {part[0] + "." + part[1] + "." + b64(derSig), "signature_invalid"},
		"key of another product":    {handMade(t, foreign, headOf(foreignKey), payload), "key_product"},
		"key stored under wrong id": {handMade(t, priv, `{"alg":"ES256","kid":"mislabelled","typ":"`+Typ+`"}`, payload), ""},
		"payload not JSON":          {handMade(t, priv, headOf(key), "x"), "manifest_invalid"},
		"payload null":              {handMade(t, priv, headOf(key), "null"), "manifest_invalid"},
		"payload with more":         {handMade(t, priv, headOf(key), strings.Replace(payload, "{", `{"url":"x",`, 1)), "manifest_invalid"},
		"payload with a name twice": {handMade(t, priv, headOf(key), strings.Replace(payload, "{", `{"product":"lamp",`, 1)), "manifest_invalid"},
		"payload in another case":   {handMade(t, priv, headOf(key), strings.Replace(payload, `"product"`, `"Product"`, 1)), "manifest_invalid"},
		"payload and more":          {handMade(t, priv, headOf(key), payload+"{}"), "manifest_invalid"},
		"size negative":             {handMade(t, priv, headOf(key), strings.Replace(payload, `"size":1048576`, `"size":-1`, 1)), "manifest_invalid"},
		"size beyond int64":         {handMade(t, priv, headOf(key), strings.Replace(payload, `"size":1048576`, `"size":1e30`, 1)), "manifest_invalid"},
	} {
		v, err := Verify(c.jws, keyring(key, otherKey, foreignKey, goneKey, mislabelled))
		if err == nil {
			t.Errorf("%s: accepted %+v", name, v.Manifest())
			continue
		}
		if codeOf(err) != c.code || v != (Verified{}) {
			t.Errorf("%s: code %q, want %q: %v", name, codeOf(err), c.code, err)
		}
	}
}

// The mirrored signature (r, n-s) is valid by the algorithm's nature; it must still be about the same manifest.
func TestMirroredSignature(t *testing.T) {
	priv, key := newKey(t, "")
	jws, err := Sign(sample(), priv)
	if err != nil {
		t.Fatal(err)
	}
	part := strings.Split(jws, ".")
	sig, err := base64.RawURLEncoding.DecodeString(part[2])
	if err != nil {
		t.Fatal(err)
	}
	s := new(big.Int).SetBytes(sig[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
	v, err := Verify(part[0]+"."+part[1]+"."+base64.RawURLEncoding.EncodeToString(sig), keyring(key))
	if err != nil || v.Manifest() != sample() {
		t.Errorf("%+v, %v", v.Manifest(), err)
	}
}

func TestManifestValidate(t *testing.T) {
	for name, change := range map[string]func(*Manifest){
		"product":              func(m *Manifest) { m.Product = "A/b" },
		"no product":           func(m *Manifest) { m.Product = "" },
		"version":              func(m *Manifest) { m.Version = "v1" },
		"no size":              func(m *Manifest) { m.Size = 0 },
		"size":                 func(m *Manifest) { m.Size = MaxImageSize + 1 },
		"sha256 in upper case": func(m *Manifest) { m.SHA256 = fleet.Hash(strings.ToUpper(string(m.SHA256))) },
		"image hash":           func(m *Manifest) { m.ImageHash = "00" },
		"chip":                 func(m *Manifest) { m.Chip = "ESP32-S3" },
		"chip long":            func(m *Manifest) { m.Chip = strings.Repeat("x", MaxChipLen+1) },
		"min version":          func(m *Manifest) { m.MinVersion = "x" },
		"min version above":    func(m *Manifest) { m.MinVersion = "1.1.1" },
		"min version equal":    func(m *Manifest) { m.MinVersion = m.Version },
	} {
		m := sample()
		change(&m)
		if err := m.Validate(); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: %v", name, err)
		}
		priv, _ := newKey(t, "")
		if _, err := Sign(m, priv); !fleet.Is(err, fleet.Unprocessable) {
			t.Errorf("%s: signed: %v", name, err)
		}
	}
	if err := sample().Validate(); err != nil {
		t.Error(err)
	}
}

func TestSignRefusesOtherKeys(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(sample(), p384); !fleet.Is(err, fleet.Unprocessable) {
		t.Error(err)
	}
}

func TestParseKey(t *testing.T) {
	priv, key := newKey(t, "sensor")
	pkcs8, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der384, err := x509.MarshalPKIXPublicKey(p384.Public())
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	got, err := ParseKey(key.PEM(), "sensor")
	if err != nil || got.ID != key.ID || got.Product != "sensor" || string(got.PublicKey) != string(key.PublicKey) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, c := range map[string]struct {
		text string
		kind fleet.Kind
	}{
		"empty":          {"", fleet.Invalid},
		"not PEM":        {"hello", fleet.Invalid},
		"private key":    {block("PRIVATE KEY", pkcs8), fleet.Invalid},
		"EC private key": {block("EC PRIVATE KEY", pkcs8), fleet.Invalid},
		"certificate":    {block("CERTIFICATE", pkcs8), fleet.Invalid},
		"not DER":        {block("PUBLIC KEY", []byte("x")), fleet.Invalid},
		"two blocks":     {string(key.PEM()) + string(key.PEM()), fleet.Invalid},
		"P-384":          {block("PUBLIC KEY", der384), fleet.Unprocessable},
		"long":           {string(key.PEM()) + strings.Repeat("\n", MaxKeyPEM), fleet.TooLarge},
	} {
		if _, err := ParseKey([]byte(c.text), ""); !fleet.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseKey(key.PEM(), "No Such"); !fleet.Is(err, fleet.Invalid) {
		t.Error(err)
	}
}

// KeyID against RFC 7638 §3 written out: SHA-256 of the required members in lexical order, no spaces.
func TestKeyID(t *testing.T) {
	priv, key := newKey(t, "")
	point, err := priv.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	sum := sha256.Sum256(fmt.Appendf(nil, `{"crv":"P-256","kty":"EC","x":%q,"y":%q}`, b64(point[1:33]), b64(point[33:])))
	if want := b64(sum[:]); key.ID != want {
		t.Errorf("KeyID %s, want %s", key.ID, want)
	}
}

// Releases that were signed once must stay readable by every later muster.
func TestGolden(t *testing.T) {
	const pub, signed = "testdata/release.pub.pem", "testdata/release.jws"
	if *update {
		priv, key := newKey(t, "")
		jws, err := Sign(sample(), priv)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		for name, b := range map[string][]byte{pub: key.PEM(), signed: []byte(jws)} {
			if err := os.WriteFile(name, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	text, err := os.ReadFile(pub)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := os.ReadFile(signed)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ParseKey(text, "sensor")
	if err != nil {
		t.Fatal(err)
	}
	v, err := Verify(string(jws), keyring(key))
	if err != nil || v.Manifest() != sample() {
		t.Errorf("%+v, %v", v.Manifest(), err)
	}
}

// One flipped bit anywhere is refused.
func TestVerifyFlippedBit(t *testing.T) {
	priv, key := newKey(t, "")
	jws, err := Sign(sample(), priv)
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		b := []byte(jws)
		i := rapid.IntRange(0, len(b)-1).Draw(t, "byte")
		b[i] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if v, err := Verify(string(b), keyring(key)); err == nil {
			t.Fatalf("accepted %+v", v.Manifest())
		}
	})
}

// What is accepted says the same when signed again.
func FuzzVerify(f *testing.F) {
	priv, key := newKey(f, "")
	f.Add(headOf(key), payloadOf(f, sample()))
	f.Add(headOf(key), `{}`)
	f.Add(`{"alg":"none"}`, payloadOf(f, sample()))
	f.Add(strings.Replace(headOf(key), "}", `,"crit":[]}`, 1), `null`)
	f.Fuzz(func(t *testing.T, head, payload string) {
		v, err := Verify(handMade(t, priv, head, payload), keyring(key))
		if err != nil {
			if k := fleet.KindOf(err); k != fleet.Unprocessable && k != fleet.TooLarge {
				t.Fatalf("kind %s: %v", k, err)
			}
			return
		}
		again, err := Sign(v.Manifest(), priv)
		if err != nil {
			t.Fatal(err)
		}
		w, err := Verify(again, keyring(key))
		if err != nil || w.Manifest() != v.Manifest() {
			t.Fatalf("%+v became %+v: %v", v.Manifest(), w.Manifest(), err)
		}
	})
}

func FuzzVerifyRaw(f *testing.F) {
	priv, key := newKey(f, "")
	jws, err := Sign(sample(), priv)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(jws)
	f.Add("..")
	f.Add("e30.e30.e30")
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := Verify(s, keyring(key)); err == nil && v.Manifest() != sample() {
			t.Fatalf("accepted %+v", v.Manifest())
		}
	})
}

func FuzzParseKey(f *testing.F) {
	_, key := newKey(f, "")
	f.Add(key.PEM())
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := ParseKey(b, "")
		if err != nil {
			return
		}
		again, err := ParseKey(k.PEM(), "")
		if err != nil || again.ID != k.ID {
			t.Fatalf("%s became %s: %v", k.ID, again.ID, err)
		}
	})
}

func TestPath(t *testing.T) {
	m := sample()
	if got, want := m.Path(), "/fw/"+string(m.SHA256[:16]); got != want {
		t.Errorf("Path %s, want %s", got, want)
	}
	for s, want := range map[string]bool{string(m.SHA256): true, string(m.SHA256[:16]): true, string(m.SHA256[:15]): false, "": false, string(m.SHA256[:17]): false, "0000000000000000": false} {
		if m.Names(s) != want {
			t.Errorf("Names(%q) = %v", s, !want)
		}
	}
}
