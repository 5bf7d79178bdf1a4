package devapi

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
)

// polls answers with a grant for what a device may have.
type polls struct {
	*backend
	unfit []string
}

func (p *polls) Poll(ctx context.Context, d fleet.DeviceID, _ Running) (ota.Grant, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rel, ok := p.grants[d]
	return ota.Grant{Release: rel}, ok, nil
}
func (p *polls) Fetching(context.Context, fleet.DeviceID, ota.Grant, bool) error { return nil }
func (p *polls) Unfit(_ context.Context, _ fleet.DeviceID, _ ota.Grant, why string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unfit = append(p.unfit, why)
	return nil
}

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/esp32fota", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fotaWorld has d1 at the golden image, with its signature for esp32FOTA.
func fotaWorld(t *testing.T) (*world, *polls) {
	t.Helper()
	p := &polls{}
	w := start(t, func(c *Config) {
		p.backend = c.Grants.(*backend)
		c.Poller = p
	})
	w.rel = w.release("1.1.0", golden(t, "firmware.bin"))
	w.rel.FOTA.Base64 = base64.StdEncoding.EncodeToString(golden(t, "firmware.sign"))
	w.grant("d1", w.rel)
	return w, p
}

// entry asks for the manifest as esp32FOTA does.
func (w *world) entry(query string) (e struct{ Type, Version, URL string }) {
	w.t.Helper()
	res, b := w.do(w.client(w.cert), "GET", "https://"+w.devices+"/fota.json?type=lamp"+query)
	if res.StatusCode != http.StatusOK || len(b) > 1024 {
		w.t.Fatalf("%s: %d bytes: %s", res.Status, len(b), b)
	}
	if err := json.Unmarshal(b, &e); err != nil {
		w.t.Fatal(err)
	}
	return e
}

// installs plays esp32FOTA: it takes the first length bytes for the signature of what follows, and verifies it by the key that
// the sketch holds (validate_sig of esp32FOTA 0.3).
func installs(t *testing.T, body []byte, length int) ([]byte, error) {
	t.Helper()
	block, _ := pem.Decode(golden(t, "key.pub.pem"))
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(body[length:])
	return body[length:], rsa.VerifyPKCS1v15(key.(*rsa.PublicKey), crypto.SHA256, sum[:], body[:length])
}

func TestESP32FOTASignature(t *testing.T) {
	w, p := fotaWorld(t)
	want := golden(t, "firmware.img")
	e := w.entry("")
	if e.Version != "1.1.0" || !strings.HasSuffix(e.URL, "/fota/"+string(w.rel.SHA256[:16])) {
		t.Fatalf("%+v", e)
	}
	c := w.client(w.cert)
	res, body := w.do(c, "GET", e.URL, "Accept-Encoding", "identity;q=1,chunked;q=0.1,*;q=0")
	if res.StatusCode != 200 || res.ContentLength != int64(len(want)) || !bytes.Equal(body, want) || len(res.TransferEncoding) != 0 || res.Header.Get("x-MD5") != "" {
		t.Fatalf("%s, %d bytes, %v", res.Status, len(body), res.Header)
	}
	if image, err := installs(t, body, 512); err != nil || !bytes.Equal(image, golden(t, "firmware.bin")) {
		t.Errorf("the client refuses it: %v", err)
	}
	tag := res.Header.Get("ETag")
	res, body = w.do(c, "GET", "https://"+w.devices+w.rel.Path())
	if !bytes.Equal(body, golden(t, "firmware.bin")) || res.Header.Get("ETag") == tag || tag == "" {
		t.Errorf("others do not get the image as it is: %d bytes, ETag %s", len(body), res.Header.Get("ETag"))
	}
	if e := w.entry("&sig=512"); !strings.Contains(e.URL, "/fota/") {
		t.Errorf("%+v", e)
	}
	if e := w.entry("&sig=0"); !strings.HasSuffix(e.URL, w.rel.Path()) || e.Version != "1.1.0" {
		t.Errorf("a sketch that checks nothing: %+v", e)
	}
	if e := w.entry("&sig=256"); e.Version != "0.0.0" || len(p.unfit) != 1 || !strings.Contains(p.unfit[0], "256") {
		t.Errorf("another length: %+v, %q", e, p.unfit)
	}
	if res, _ := w.do(c, "GET", "https://"+w.devices+"/fota.json?type=x&sig=12"); res.StatusCode != 400 {
		t.Errorf("a length that no key has: %s", res.Status)
	}
	other := w.client(w.admit("d2", 0xa2))
	if res, _ := w.do(other, "GET", e.URL); res.StatusCode != 404 {
		t.Errorf("without a grant: %s", res.Status)
	}

	w.rel.FOTA = firmware.FOTASignature{}
	w.grant("d1", w.rel)
	if res, _ := w.do(c, "GET", e.URL); res.StatusCode != 404 {
		t.Errorf("without a signature: %s", res.Status)
	}
	if e := w.entry(""); !strings.HasSuffix(e.URL, w.rel.Path()) {
		t.Errorf("without a signature: %+v", e)
	}
	if e := w.entry("&sig=512"); e.Version != "0.0.0" || len(p.unfit) != 2 || !strings.Contains(p.unfit[1], "has none") {
		t.Errorf("a sketch that checks, and no signature: %+v, %q", e, p.unfit)
	}
}

// Ranges are over signature and image as one file, wherever they begin and end; from memory and from a file.
func TestESP32FOTARanges(t *testing.T) {
	w, _ := fotaWorld(t)
	want := golden(t, "firmware.img")
	url := "https://" + w.devices + "/fota/" + string(w.rel.SHA256)
	c := w.client(w.cert)
	for _, r := range []struct{ from, to int }{{0, 0}, {0, 511}, {511, 512}, {512, 512}, {100, 2000}, {512, len(want) - 1}, {len(want) - 1, len(want) - 1}} {
		res, body := w.do(c, "GET", url, "Range", fmt.Sprintf("bytes=%d-%d", r.from, r.to))
		if res.StatusCode != 206 || !bytes.Equal(body, want[r.from:r.to+1]) || res.Header.Get("Content-Range") != fmt.Sprintf("bytes %d-%d/%d", r.from, r.to, len(want)) {
			t.Errorf("%v: %s, %d bytes, %s", r, res.Status, len(body), res.Header.Get("Content-Range"))
		}
	}
	for _, from := range []int{0, 16, 511, 512, 2399} {
		if res, body := w.do(c, "GET", url, "Range", fmt.Sprintf("bytes=%d-", from)); res.StatusCode != 206 || !bytes.Equal(body, want[from:]) {
			t.Errorf("from %d on: %s, %d bytes", from, res.Status, len(body))
		}
	}
	if res, body := w.do(c, "GET", url, "Range", "bytes=-600"); res.StatusCode != 206 || !bytes.Equal(body, want[len(want)-600:]) {
		t.Errorf("the last 600: %s, %d bytes", res.Status, len(body))
	}
	if res, _ := w.do(c, "GET", url, "Range", fmt.Sprintf("bytes=%d-", len(want))); res.StatusCode != 416 {
		t.Errorf("behind the end: %s", res.Status)
	}
	if res, _ := w.do(c, "HEAD", url); res.StatusCode != 200 || res.ContentLength != int64(len(want)) {
		t.Errorf("HEAD: %s, %d", res.Status, res.ContentLength)
	}
	w.api.cache = newCache(1) // nothing fits: from the file
	if res, body := w.do(c, "GET", url); res.StatusCode != 200 || !bytes.Equal(body, want) {
		t.Errorf("from a file: %s, %d bytes", res.Status, len(body))
	}
}

func TestPrefixedReadsLikeOneFile(t *testing.T) {
	prefix, image := []byte("signature"), []byte("the image itself")
	all := append(bytes.Clone(prefix), image...)
	p := &prefixed{prefix: prefix, image: bytes.NewReader(image), size: int64(len(image))}
	if err := iotest.TestReader(p, all); err != nil {
		t.Error(err)
	}
	if _, err := p.Seek(-1, io.SeekStart); err == nil {
		t.Error("before the beginning")
	}
}
