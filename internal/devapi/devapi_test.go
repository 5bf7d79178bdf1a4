package devapi

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/internal/wire"
)

// authority is a CA with one intermediate.
type authority struct {
	root, inter       *x509.Certificate
	rootKey, interKey *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{rootKey: ecKey(t), interKey: ecKey(t)}
	ca := func(name string, serial int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	a.root = create(t, ca("root", 1), nil, a.rootKey, a.rootKey)
	a.inter = create(t, ca("intermediate", 2), a.root, a.interKey, a.rootKey)
	return a
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// create signs template for key by parentKey; a nil parent means self-signed.
func create(t testing.TB, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.root)
	return p
}

// device returns a certificate as muster issues it, changed by change, which may be nil.
func (a *authority) device(t testing.TB, id fleet.DeviceID, serial int64, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	uri, err := url.Parse(wire.CertUser(id, fleet.SerialOf(big.NewInt(serial))))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: string(id)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{string(id)}, URIs: []*url.URL{uri}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(c)
	}
	key := ecKey(t)
	leaf := create(t, c, a.inter, key, a.interKey)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, a.inter.Raw}, PrivateKey: key, Leaf: leaf}
}

func (a *authority) server(t testing.TB) *tls.Certificate {
	t.Helper()
	c := a.device(t, "unused", 3, func(c *x509.Certificate) {
		c.DNSNames, c.URIs, c.IPAddresses = []string{"localhost"}, nil, []net.IP{net.IPv4(127, 0, 0, 1)}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
	return &c
}

// backend is everything devapi asks: what is stored, who may come in, who may have what.
type backend struct {
	mu        sync.Mutex
	images    map[fleet.Hash][]byte
	grants    map[fleet.DeviceID]firmware.Release
	serials   map[fleet.DeviceID]fleet.Serial
	password  map[fleet.DeviceID]fleet.Hash
	opened    int
	served    []Served
	perSecond int64  // the rollout's byte budget
	onRead    func() // called at each read of an image file, if not nil
}

func (b *backend) Granted(_ context.Context, d fleet.DeviceID, name string) (ota.Grant, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rel, ok := b.grants[d]
	if !ok || !rel.Names(name) {
		return ota.Grant{}, fleet.Errorf(fleet.NotFound, "there is no such image for this device")
	}
	return ota.Grant{Release: rel, Rollout: "r", BytesPerSecond: b.perSecond}, nil
}

func (b *backend) Admit(d fleet.DeviceID, s fleet.Serial, _ time.Time) (bool, string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.serials[d] != s {
		return false, "certificate-unknown"
	}
	return true, ""
}

func (b *backend) AdmitPassword(d fleet.DeviceID, sum fleet.Hash) (bool, string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.password[d] == "" || b.password[d] != sum {
		return false, "password-wrong"
	}
	return true, ""
}

type file struct {
	*bytes.Reader
	b *backend
}

func (f file) Read(p []byte) (int, error) {
	if f.b.onRead != nil {
		f.b.onRead()
	}
	return f.Reader.Read(p)
}

func (f file) Close() error { return nil }

func (b *backend) Open(h fleet.Hash) (io.ReadSeekCloser, int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opened++
	img, ok := b.images[h]
	if !ok {
		return nil, 0, fleet.Errorf(fleet.NotFound, "no image")
	}
	return file{bytes.NewReader(img), b}, int64(len(img)), nil
}

// release stores image and returns a release of it.
func (b *backend) release(v firmware.Version, image []byte) firmware.Release {
	h := fleet.HashOf(sha256.Sum256(image))
	sum := md5.Sum(image)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.images[h] = image
	return firmware.Release{Manifest: firmware.Manifest{Product: "lamp", Version: v, Size: int64(len(image)), SHA256: h, ImageHash: h}, MD5: hex.EncodeToString(sum[:])}
}

func (b *backend) grant(d fleet.DeviceID, rel firmware.Release) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.grants[d] = rel
}

// downloads waits until n requests for images have been counted, which happens after the client has its last byte.
func (w *world) downloads(n int) []Served {
	w.t.Helper()
	eventually(w.t, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.served) >= n
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.served)
}

// eventually fails the test if ok does not come true within a few seconds.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatal("waited for too long")
		}
	}
}

// world is both listeners on real sockets.
type world struct {
	*backend
	t        testing.TB
	ca       *authority
	api      *API
	devices  string // address
	recovery string
	image    []byte
	rel      firmware.Release
	cert     tls.Certificate // of d1, who is granted rel
}

const secret = "correct-horse"

func start(t testing.TB, change func(*Config)) *world {
	t.Helper()
	b := &backend{
		images: map[fleet.Hash][]byte{}, grants: map[fleet.DeviceID]firmware.Release{}, serials: map[fleet.DeviceID]fleet.Serial{},
		password: map[fleet.DeviceID]fleet.Hash{},
	}
	w := &world{backend: b, t: t, ca: newAuthority(t), image: randomImage(300_000)}
	w.rel = b.release("1.0.0", w.image)
	w.cert = w.admit("d1", 0xa1)
	b.grant("d1", w.rel)
	b.password["d1"] = fleet.HashOf(sha256.Sum256([]byte(secret)))
	c := Config{
		Grants: b, Images: b, Admission: b, TrustBundle: func() []byte { return []byte("the bundle\n") }, Log: slog.New(slog.DiscardHandler),
		Served: func(s Served) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.served = append(b.served, s)
		},
	}
	if change != nil {
		change(&c)
	}
	w.api = New(c)
	cert := w.ca.server(t)
	get := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }
	w.devices = w.listen(w.api.Devices(MutualTLS(get, w.ca.pool)))
	w.recovery = w.listen(w.api.Recovery(PasswordTLS(get)))
	return w
}

// randomImage returns size bytes that no compression shortens, the same each time.
func randomImage(size int) []byte {
	b := make([]byte, size)
	_, _ = mathrand.NewChaCha8([32]byte{1}).Read(b) // never fails
	return b
}

func (w *world) listen(s *Server) string {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			w.t.Errorf("shutdown: %v", err)
		}
		if err := <-done; err != nil {
			w.t.Errorf("serve: %v", err)
		}
	})
	return l.Addr().String()
}

// admit makes a certificate for d that is let in.
func (w *world) admit(d fleet.DeviceID, serial int64) tls.Certificate {
	w.t.Helper()
	c := w.ca.device(w.t, d, serial, nil)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serials[d] = fleet.SerialOf(c.Leaf.SerialNumber)
	return c
}

// client returns a client with these certificates; it is closed with the test.
func (w *world) client(certs ...tls.Certificate) *http.Client {
	tr := &http.Transport{
		TLSClientConfig:    &tls.Config{RootCAs: w.ca.pool(), Certificates: certs},
		DisableCompression: true,
	}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// do sends one request and reads the whole answer. header holds names and values in turn.
func (w *world) do(c *http.Client, method, url string, header ...string) (*http.Response, []byte) {
	w.t.Helper()
	r, err := http.NewRequest(method, url, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header[header[i]] = []string{header[i+1]}
	}
	res, err := c.Do(r)
	if err != nil {
		w.t.Fatalf("%s %s: %v", method, url, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatalf("%s %s: %v", method, url, err)
	}
	return res, body
}

func (w *world) path() string { return "https://" + w.devices + w.rel.Path() }

func TestDownload(t *testing.T) {
	w := start(t, nil)
	c := w.client(w.cert)
	for _, url := range []string{w.path(), "https://" + w.devices + "/fw/" + string(w.rel.SHA256)} {
		res, body := w.do(c, "GET", url)
		if res.StatusCode != 200 || !bytes.Equal(body, w.image) {
			t.Fatalf("%s, %d bytes", res.Status, len(body))
		}
		sum := md5.Sum(w.image)
		for name, want := range map[string]string{
			"Content-Length": "300000", "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": `"sha256-` + string(w.rel.SHA256) + `"`,
			"X-Md5": hex.EncodeToString(sum[:]), "Cache-Control": "private, max-age=31536000, immutable, no-transform", "Content-Encoding": "",
		} {
			if got := res.Header.Get(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		if len(res.TransferEncoding) != 0 || res.ProtoMajor != 1 {
			t.Errorf("%s, transfer encoding %v", res.Proto, res.TransferEncoding)
		}
	}
	got := w.downloads(2)
	if got[0].Device != "d1" || got[0].Bytes != 300_000 || !got[0].Complete || got[0].Status != 200 || got[0].Version != "1.0.0" || got[0].Recovery || got[0].Took <= 0 {
		t.Errorf("served %+v", got)
	}
	if w.opened != 1 {
		t.Errorf("the file was opened %d times", w.opened)
	}
}

// An image that does not fit the cache is served from its file, in the same way.
func TestDownloadFromFile(t *testing.T) {
	w := start(t, func(c *Config) { c.CacheBytes = 1000 })
	c := w.client(w.cert)
	res, body := w.do(c, "GET", w.path())
	if res.StatusCode != 200 || !bytes.Equal(body, w.image) {
		t.Errorf("%s, %d bytes", res.Status, len(body))
	}
	res, body = w.do(c, "GET", w.path(), "Range", "bytes=100-199")
	if res.StatusCode != 206 || !bytes.Equal(body, w.image[100:200]) {
		t.Errorf("%s, %d bytes", res.Status, len(body))
	}
	if w.opened != 2 {
		t.Errorf("the file was opened %d times", w.opened)
	}
}

func TestRanges(t *testing.T) {
	w := start(t, nil)
	c := w.client(w.cert)
	size := len(w.image)
	tag := `"sha256-` + string(w.rel.SHA256) + `"`
	for _, r := range []struct {
		name, spec string
		more       []string
		status     int
		from, to   int // of the body, [from, to)
	}{
		{"whole, as resuming clients ask", "bytes=0-", nil, 206, 0, size},
		{"rest", "bytes=65536-", nil, 206, 65536, size},
		{"one byte", "bytes=0-0", nil, 206, 0, 1},
		{"chunk", "bytes=65536-131071", nil, 206, 65536, 131072},
		{"one past the end is clamped", "bytes=0-300000", nil, 206, 0, size},
		{"far past the end is clamped", "bytes=299999-9000000000", nil, 206, 299999, size},
		{"last bytes", "bytes=-5", nil, 206, size - 5, size},
		{"more last bytes than there are", "bytes=-400000", nil, 206, 0, size},
		{"starts at the end", "bytes=300000-", nil, 416, 0, 0},
		{"starts past the end", "bytes=300001-", nil, 416, 0, 0},
		{"last no bytes", "bytes=-0", nil, 416, 0, 0},
		{"last no bytes, long", "bytes=-000", nil, 416, 0, 0},
		{"last no bytes, spaced", "bytes= - 0", nil, 416, 0, 0},
		{"backwards", "bytes=5-2", nil, 416, 0, 0},
		{"not numbers", "bytes=a-b", nil, 416, 0, 0},
		{"empty", "bytes=-", nil, 416, 0, 0},
		{"another unit", "lines=1-2", nil, 416, 0, 0},
		{"beyond int64", "bytes=99999999999999999999-", nil, 416, 0, 0},
		{"negative", "bytes=--1", nil, 416, 0, 0},
		{"two", "bytes=0-1,5-6", nil, 200, 0, size},
		{"many", "bytes=" + strings.TrimSuffix(strings.Repeat("0-,", 500), ","), nil, 200, 0, size},
		{"if it is still this", "bytes=10-19", []string{"If-Range", tag}, 206, 10, 20},
		{"if it is still another", "bytes=10-19", []string{"If-Range", `"sha256-0"`}, 200, 0, size},
		{"if it was not changed since", "bytes=10-19", []string{"If-Range", "Mon, 02 Jan 2026 15:04:05 GMT"}, 200, 0, size},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			res, body := w.do(c, method, w.path(), append([]string{"Range", r.spec}, r.more...)...)
			if res.StatusCode != r.status {
				t.Errorf("%s %s: %s", method, r.name, res.Status)
				continue
			}
			if r.status == 416 {
				if got := res.Header.Get("Content-Range"); got != "bytes */300000" && r.spec != "bytes=5-2" && !strings.HasPrefix(r.spec, "bytes=a") && got != "" {
					t.Errorf("%s %s: Content-Range %q", method, r.name, got)
				}
				continue
			}
			if got, want := res.Header.Get("Content-Length"), itoa(int64(r.to-r.from)); got != want {
				t.Errorf("%s %s: Content-Length %s, want %s", method, r.name, got, want)
			}
			if method == "GET" && !bytes.Equal(body, w.image[r.from:r.to]) {
				t.Errorf("%s: another body, %d bytes", r.name, len(body))
			}
			if r.status == 206 {
				if got, want := res.Header.Get("Content-Range"), "bytes "+itoa(int64(r.from))+"-"+itoa(int64(r.to-1))+"/300000"; got != want {
					t.Errorf("%s %s: Content-Range %q, want %q", method, r.name, got, want)
				}
			}
		}
	}
	for _, spec := range []string{"bytes=300000-", "bytes=-0"} {
		res, _ := w.do(c, "GET", w.path(), "Range", spec)
		if got := res.Header.Get("Content-Range"); got != "bytes */300000" {
			t.Errorf("%s: Content-Range %q", spec, got)
		}
	}
}

func TestNothingNew(t *testing.T) {
	w := start(t, nil)
	c := w.client(w.cert)
	tag := `"sha256-` + string(w.rel.SHA256) + `"`
	if res, body := w.do(c, "GET", w.path(), "If-None-Match", tag); res.StatusCode != 304 || len(body) != 0 || res.Header.Get("ETag") != tag {
		t.Errorf("%s, %d bytes", res.Status, len(body))
	}
	if res, _ := w.do(c, "GET", w.path(), "If-None-Match", `"other"`); res.StatusCode != 200 {
		t.Error(res.Status)
	}
}

func TestNoGrant(t *testing.T) {
	w := start(t, nil)
	other := w.release("2.0.0", []byte("another image"))
	stranger := w.client(w.admit("d2", 0xa2))
	mine := w.client(w.cert)
	var bodies []string
	for name, r := range map[string]struct {
		c   *http.Client
		url string
	}{
		"no grant":        {stranger, w.path()},
		"another's image": {mine, "https://" + w.devices + other.Path()},
		"no image":        {mine, "https://" + w.devices + "/fw/0000000000000000"},
		"upper case":      {mine, "https://" + w.devices + "/fw/" + strings.ToUpper(string(w.rel.SHA256))},
		"traversal":       {mine, "https://" + w.devices + "/fw/..%2f..%2fetc%2fpasswd"},
		"zero byte":       {mine, "https://" + w.devices + "/fw/a%00b"},
		"not UTF-8":       {mine, "https://" + w.devices + "/fw/%ff"},
		"long":            {mine, "https://" + w.devices + "/fw/" + strings.Repeat("a", 4000)},
	} {
		res, body := w.do(r.c, "GET", r.url)
		if res.StatusCode != 404 || res.Header.Get("Content-Type") != "application/problem+json" || res.Header.Get("Content-Length") != itoa(int64(len(body))) {
			t.Errorf("%s: %s, %s", name, res.Status, body)
		}
		bodies = append(bodies, string(body))
	}
	for _, b := range bodies {
		if b != bodies[0] {
			t.Errorf("%q tells it from %q", b, bodies[0])
		}
	}
	for _, url := range []string{"/", "/fw", "/fw/", "/fw/a/b", "/metrics", "/api/v1/devices"} {
		if res, _ := w.do(mine, "GET", "https://"+w.devices+url); res.StatusCode != 404 {
			t.Errorf("%s: %s", url, res.Status)
		}
	}
	if got := w.downloads(0); len(got) != 0 {
		t.Errorf("served %+v", got)
	}
}

func TestMethods(t *testing.T) {
	w := start(t, nil)
	c := w.client(w.cert)
	for _, m := range []string{"POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "BREW"} {
		res, body := w.do(c, m, w.path(), "X-Http-Method-Override", "GET")
		if res.StatusCode != 405 || !strings.Contains(res.Header.Get("Allow"), "GET") || !strings.Contains(res.Header.Get("Allow"), "HEAD") || len(body) > 200 {
			t.Errorf("%s: %s, allow %q, %s", m, res.Status, res.Header.Get("Allow"), body)
		}
	}
	res, body := w.do(c, "HEAD", w.path())
	if res.StatusCode != 200 || len(body) != 0 || res.Header.Get("Content-Length") != "300000" {
		t.Errorf("HEAD: %s, %d bytes, length %s", res.Status, len(body), res.Header.Get("Content-Length"))
	}
	if got := w.downloads(1); got[0].Bytes != 0 || !got[0].Complete {
		t.Errorf("served %+v", got)
	}
}

func TestTrustBundle(t *testing.T) {
	w := start(t, nil)
	res, body := w.do(w.client(w.cert), "GET", "https://"+w.devices+"/trust-bundle")
	if res.StatusCode != 200 || string(body) != "the bundle\n" || res.Header.Get("Content-Type") != "application/pem-certificate-chain" {
		t.Errorf("%s, %q", res.Status, body)
	}
	res, _ = w.do(w.client(w.cert), "GET", "https://"+w.devices+"/trust-bundle", "If-None-Match", res.Header.Get("ETag"))
	if res.StatusCode != 304 {
		t.Error(res.Status)
	}
}

// A damaged or missing file is muster's fault, is said as a bare 500, and reaches nobody.
func TestDamagedImage(t *testing.T) {
	w := start(t, nil)
	bad := w.release("3.0.0", []byte("as it was"))
	w.mu.Lock()
	w.images[bad.SHA256] = []byte("as it wAs")
	w.mu.Unlock()
	w.grant("d1", bad)
	c := w.client(w.cert)
	check := func(what string) {
		t.Helper()
		res, body := w.do(c, "GET", "https://"+w.devices+bad.Path())
		if res.StatusCode != 500 || strings.Contains(string(body), "disk") || strings.Contains(string(body), "3.0.0") {
			t.Errorf("%s: %s, %s", what, res.Status, body)
		}
	}
	check("damaged")
	w.mu.Lock()
	w.images[bad.SHA256] = []byte("shorter")
	w.mu.Unlock()
	check("cut")
	w.mu.Lock()
	delete(w.images, bad.SHA256)
	w.mu.Unlock()
	check("missing")
	w.mu.Lock()
	w.images[bad.SHA256] = []byte("as it was")
	w.mu.Unlock()
	if res, body := w.do(c, "GET", "https://"+w.devices+bad.Path()); res.StatusCode != 200 || string(body) != "as it was" {
		t.Errorf("healed: %s", res.Status)
	}
}

func TestPanicIsAnswered(t *testing.T) {
	w := start(t, func(c *Config) { c.TrustBundle = func() []byte { panic("a fault of the program") } })
	c := w.client(w.cert)
	res, body := w.do(c, "GET", "https://"+w.devices+"/trust-bundle")
	if res.StatusCode != 500 || strings.Contains(string(body), "fault") {
		t.Errorf("%s, %s", res.Status, body)
	}
	if res, _ := w.do(c, "GET", w.path()); res.StatusCode != 200 {
		t.Errorf("afterwards: %s", res.Status)
	}
}

// Many devices at once, each gets all of its image; the file is read once.
func TestManyDevices(t *testing.T) {
	w := start(t, nil)
	var wg sync.WaitGroup
	for i := range 24 {
		d := fleet.DeviceID("many-" + itoa(int64(i)))
		c := w.client(w.admit(d, int64(0x100+i)))
		w.grant(d, w.rel)
		wg.Go(func() {
			for from := 0; from < len(w.image); from += 100_000 {
				res, err := get(c, w.path(), "bytes="+itoa(int64(from))+"-"+itoa(int64(from+99_999)))
				if err != nil || !bytes.Equal(res, w.image[from:min(len(w.image), from+100_000)]) {
					t.Errorf("%s at %d: %d bytes, %v", d, from, len(res), err)
				}
			}
		})
	}
	wg.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.opened != 1 {
		t.Errorf("the file was opened %d times", w.opened)
	}
}

func get(c *http.Client, url, span string) ([]byte, error) {
	r, err := http.NewRequest("GET", url, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Range", span)
	res, err := c.Do(r)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	return io.ReadAll(res.Body)
}
