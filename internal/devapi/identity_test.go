package devapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

// Who is not a device with a good certificate does not get past the handshake; in TLS 1.3 it learns so at its first read.
func TestCertificatesRefusedInHandshake(t *testing.T) {
	w := start(t, nil)
	foreign := newAuthority(t)
	uri := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	device := func(change func(*x509.Certificate)) []tls.Certificate {
		return []tls.Certificate{w.ca.device(t, "d1", 0xa1, change)}
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	lone := device(nil)[0]
	lone.Certificate = lone.Certificate[:1]
	stolen := w.cert
	stolen.PrivateKey = ecKey(t)

	for name, certs := range map[string][]tls.Certificate{
		"no certificate":         nil,
		"foreign CA":             {foreign.device(t, "d1", 0xa1, nil)},
		"intermediate missing":   {lone},
		"another's key":          {stolen},
		"expired":                device(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		"not valid yet":          device(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
		"for servers":            device(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }),
		"no URI":                 device(func(c *x509.Certificate) { c.URIs = nil }),
		"two URIs":               device(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs...) }),
		"a URI of something":     device(func(c *x509.Certificate) { c.URIs = uri("https://example.test/d1") }),
		"another's serial":       device(func(c *x509.Certificate) { c.URIs = uri("urn:muster:device:d1:a2") }),
		"another device's URI":   device(func(c *x509.Certificate) { c.URIs = uri("urn:muster:device:d2:a1") }),
		"no DNS name":            device(func(c *x509.Certificate) { c.DNSNames = nil }),
		"another's DNS name":     device(func(c *x509.Certificate) { c.DNSNames = []string{"d2"} }),
		"two DNS names":          device(func(c *x509.Certificate) { c.DNSNames = []string{"d1", "d2"} }),
		"a key of P-521":         {w.ca.deviceWith(t, p521)},
		"a CA":                   device(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }),
		"the server's own":       {*w.ca.server(t)},
		"not a device id in URI": device(func(c *x509.Certificate) { c.URIs = uri("urn:muster:device:D1:a1") }),
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			c := w.client(certs...)
			c.Transport.(*http.Transport).TLSClientConfig.MaxVersion = version
			res, err := c.Get(w.path())
			if err == nil {
				res.Body.Close()
				t.Errorf("%s: %s", name, res.Status)
			}
		}
	}
	if res, _ := w.do(w.client(w.cert), "GET", w.path()); res.StatusCode != 200 {
		t.Errorf("a good certificate: %s", res.Status)
	}
}

// Whatever key muster certifies gets in.
func TestEveryKindOfKeyGetsIn(t *testing.T) {
	w := start(t, nil)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": ecKey(t), "P-384": p384, "RSA-2048": rsa2048} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			c := w.client(w.ca.deviceWith(t, key))
			c.Transport.(*http.Transport).TLSClientConfig.MaxVersion = version
			if res, body := w.do(c, "GET", w.path()); res.StatusCode != 200 {
				t.Errorf("%s, TLS %x: %s %s", name, version, res.Status, body)
			}
		}
	}
}

// deviceWith is the certificate of device d1 for a key.
func (a *authority) deviceWith(t testing.TB, key crypto.Signer) tls.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, a.device(t, "d1", 0xa1, nil).Leaf, a.inter, key.Public(), a.interKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, a.inter.Raw}, PrivateKey: key}
}

func TestOldTLS(t *testing.T) {
	w := start(t, nil)
	c := w.client(w.cert)
	conf := c.Transport.(*http.Transport).TLSClientConfig
	conf.MinVersion, conf.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if res, err := c.Get(w.path()); err == nil {
		res.Body.Close()
		t.Error("TLS 1.1 was accepted")
	}
	conf.MinVersion, conf.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 // what every ESP32 speaks
	conf.CurvePreferences = []tls.CurveID{tls.CurveP256}
	if res, _ := w.do(c, "GET", w.path()); res.StatusCode != 200 {
		t.Error(res.Status)
	}
}

// A chain longer than leaf, intermediate, root is refused.
func TestLongChain(t *testing.T) {
	w := start(t, nil)
	sub := &authority{root: w.ca.root, rootKey: w.ca.rootKey, interKey: ecKey(t)}
	sub.inter = create(t, &x509.Certificate{
		SerialNumber: big.NewInt(9), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, w.ca.inter, sub.interKey, w.ca.interKey)
	cert := sub.device(t, "d1", 0xa1, nil)
	cert.Certificate = append(cert.Certificate, w.ca.inter.Raw)
	if res, err := w.client(cert).Get(w.path()); err == nil {
		res.Body.Close()
		t.Error("accepted")
	}
}

// A certificate that is superseded or revoked stops working within a connection.
func TestNotAdmitted(t *testing.T) {
	w := start(t, nil)
	c := w.client(w.cert)
	if res, _ := w.do(c, "GET", w.path()); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	w.mu.Lock()
	w.serials["d1"] = "a9"
	w.mu.Unlock()
	for _, url := range []string{w.path(), "https://" + w.devices + "/trust-bundle", "https://" + w.devices + "/fw/0000000000000000"} {
		if res, body := w.do(c, "GET", url); res.StatusCode != 403 || !strings.Contains(string(body), "certificate-unknown") {
			t.Errorf("%s: %s, %s", url, res.Status, body)
		}
	}
}

// A device CA that is added or retired counts from the next handshake on.
func TestRootsAreReadAtEachHandshake(t *testing.T) {
	a, b := newAuthority(t), newAuthority(t)
	pool := a.pool()
	conf := MutualTLS(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.server(t), nil }, func() *x509.CertPool { return pool })
	for _, want := range []*authority{a, b} {
		pool = want.pool()
		c, err := conf.GetConfigForClient(&tls.ClientHelloInfo{})
		if err != nil || !c.ClientCAs.Equal(pool) || c.ClientAuth != tls.RequireAndVerifyClientCert {
			t.Errorf("%+v, %v", c, err)
		}
	}
	pool = nil
	if _, err := conf.GetConfigForClient(&tls.ClientHelloInfo{}); err == nil {
		t.Error("without a CA the system's would count")
	}
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func TestRecovery(t *testing.T) {
	w := start(t, nil)
	url := "https://" + w.recovery + w.rel.Path()
	c := w.client() // no certificate
	res, body := w.do(c, "GET", url, "Authorization", basic("d1", secret), "Range", "bytes=5-9")
	if res.StatusCode != 206 || string(body) != string(w.image[5:10]) {
		t.Errorf("%s, %d bytes", res.Status, len(body))
	}
	if got := w.downloads(1); !got[0].Recovery || got[0].Device != "d1" {
		t.Errorf("served %+v", got)
	}
	// A certificate, even one that does not work any more, is not asked for and disturbs nothing.
	if res, _ := w.do(w.client(newAuthority(t).device(t, "d1", 1, nil)), "GET", url, "Authorization", basic("d1", secret)); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	if res, _ := w.do(c, "GET", "https://"+w.recovery+"/trust-bundle", "Authorization", basic("d1", secret)); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	if res, _ := w.do(c, "GET", "https://"+w.recovery+"/fw/0000000000000000", "Authorization", basic("d1", secret)); res.StatusCode != 404 {
		t.Error(res.Status)
	}
}

func TestRecoveryRefuses(t *testing.T) {
	w := start(t, func(c *Config) {})
	w.api.failures = newLimiter(0, 1000)
	c := w.client(w.cert)
	for name, auth := range map[string]string{
		"nothing":             "",
		"wrong password":      basic("d1", "wrong"),
		"empty password":      basic("d1", ""),
		"the hash itself":     basic("d1", string(w.password["d1"])),
		"another device":      basic("d2", secret),
		"not a device id":     basic("D1", secret),
		"vhost and device":    basic("devices:d1", secret),
		"URI of certificate":  basic("urn:muster:device:d1:a1", secret),
		"long password":       basic("d1", strings.Repeat("x", 5000)),
		"another scheme":      "Bearer " + secret,
		"not base64":          "Basic !!!",
		"no colon":            "Basic " + base64.StdEncoding.EncodeToString([]byte("d1")),
		"password and a byte": basic("d1", secret+"\x00"),
	} {
		header := []string{"Authorization", auth}
		if auth == "" {
			header = nil
		}
		res, body := w.do(c, "GET", "https://"+w.recovery+w.rel.Path(), header...)
		if res.StatusCode != 401 || !strings.HasPrefix(res.Header.Get("WWW-Authenticate"), "Basic realm=") || strings.Contains(string(body), secret) {
			t.Errorf("%s: %s, %s", name, res.Status, body)
		}
	}
}

// An address that fails too often hears 429, but a device with the right password comes in from the same address.
func TestFailuresDoNotLockOut(t *testing.T) {
	w := start(t, nil)
	c := w.client()
	url := "https://" + w.recovery + w.rel.Path()
	limited := 0
	for range failuresBurst + 5 {
		res, _ := w.do(c, "GET", url, "Authorization", basic("d1", "wrong"))
		switch {
		case res.StatusCode == 429 && res.Header.Get("Retry-After") != "":
			limited++
		case res.StatusCode != 401:
			t.Fatal(res.Status)
		}
	}
	if limited == 0 {
		t.Error("never limited")
	}
	if res, _ := w.do(c, "GET", url, "Authorization", basic("d1", secret)); res.StatusCode != 200 {
		t.Errorf("the right password: %s", res.Status)
	}
}

// A device that asks too much is slowed down, by its own budget alone.
func TestRequestsPerDevice(t *testing.T) {
	w := start(t, nil)
	w.api.requests = newLimiter(0, 3)
	w.mu.Lock()
	w.password["d2"] = w.password["d1"]
	w.mu.Unlock()
	c := w.client()
	var got []int
	for range 5 {
		res, _ := w.do(c, "GET", "https://"+w.recovery+"/trust-bundle", "Authorization", basic("d1", secret))
		got = append(got, res.StatusCode)
	}
	if got[0] != 200 || got[2] != 200 || got[3] != 429 || got[4] != 429 {
		t.Errorf("%v", got)
	}
	if res, _ := w.do(w.client(w.cert), "GET", w.path()); res.StatusCode != 429 {
		t.Errorf("by the other door: %s", res.Status)
	}
	if res, _ := w.do(c, "GET", "https://"+w.recovery+"/trust-bundle", "Authorization", basic("d2", secret)); res.StatusCode != 200 {
		t.Errorf("another device: %s", res.Status)
	}
}

// A device may have a few requests under way, not more; the next one is let in when one has ended.
func TestConcurrencyPerDevice(t *testing.T) {
	w := start(t, func(c *Config) { c.CacheBytes = 1000 })
	entered, gate := make(chan struct{}, 100), make(chan struct{})
	w.onRead = func() { entered <- struct{}{}; <-gate }
	c := w.client(w.cert)
	done := make(chan int, perDevice)
	for range perDevice {
		go func() {
			res, err := c.Get(w.path())
			if err != nil {
				t.Error(err)
				done <- 0
				return
			}
			defer res.Body.Close()
			if _, err := io.Copy(io.Discard, res.Body); err != nil {
				t.Error(err)
			}
			done <- res.StatusCode
		}()
	}
	for range perDevice {
		<-entered
	}
	res, _ := w.do(c, "GET", w.path())
	if res.StatusCode != 429 || res.Header.Get("Retry-After") == "" {
		t.Errorf("one more: %s", res.Status)
	}
	other := w.client(w.admit("d2", 0xa2))
	if res, _ := w.do(other, "GET", "https://"+w.devices+"/trust-bundle"); res.StatusCode != 200 {
		t.Errorf("another device: %s", res.Status)
	}
	close(gate)
	for range perDevice {
		if s := <-done; s != 200 {
			t.Error(s)
		}
	}
	eventually(t, func() bool {
		res, _ := w.do(c, "HEAD", w.path())
		return res.StatusCode == 200
	})
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:1234": "192.0.2.1", "[::ffff:192.0.2.1]:5": "192.0.2.1", "[2001:db8:1:2:3:4:5:6]:7": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:1": "fe80::/64", "pipe": "pipe",
	} {
		if got := address(in); got != want {
			t.Errorf("address(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestIdentify(t *testing.T) {
	ca := newAuthority(t)
	cert := ca.device(t, "d1", 0xa1, nil)
	chain := []*x509.Certificate{cert.Leaf, ca.inter, ca.root}
	s := tls.ConnectionState{PeerCertificates: chain[:2], VerifiedChains: [][]*x509.Certificate{chain}}
	d, serial, err := identify(s)
	if err != nil || d != "d1" || serial != "a1" {
		t.Errorf("%s, %s, %v", d, serial, err)
	}
	for name, s := range map[string]tls.ConnectionState{
		"nothing":      {},
		"not verified": {PeerCertificates: chain[:2]},
		"long chain":   {PeerCertificates: chain[:2], VerifiedChains: [][]*x509.Certificate{append(chain, ca.root)}},
	} {
		if _, _, err := identify(s); !fleet.Is(err, fleet.Unauthorized) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, ok := cert.PrivateKey.(*ecdsa.PrivateKey); !ok {
		t.Error("the test's key is not what it says")
	}
}
