package cli_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/cli"
	"muster/internal/fleet"
	"muster/internal/store/bolt"
	"muster/internal/uplink"
)

func has(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q is missing in\n%s", w, text)
		}
	}
}

func TestDevices(t *testing.T) {
	t.Parallel() // to disable a device takes some seconds: its connections are looked at again
	d := sit(t, nil)
	has(t, d.run("device", "add", "s1", "--product", "sensor", "--hardware", "rev-b", "--label", "site=berlin"), "added s1")
	d.run("device", "add", "s1", "--product", "sensor", "--hardware", "rev-b", "--label", "site=berlin") // again
	d.fails(5, "exists already", "device", "add", "s1", "--product", "lamp")
	d.fails(2, "device id", "device", "add", "S1", "--product", "lamp")
	d.fails(2, "--product", "device", "add", "s2")
	csv := "\ufeffid,product,hardware,label:site\ns2,sensor,,\"ham,burg\"\ns3,lamp,rev-c,\n"
	has(t, d.run("device", "add", "--from", d.file("fleet.csv", csv)), "added 2, unchanged 0")
	d.in = csv
	has(t, d.run("device", "add", "--from", "-"), "added 0, unchanged 2")
	for _, bad := range []string{"", "id\nx\n", "id,product,color\nx,y,z\n", "id,id,product\nx,x,y\n", "id,product\n", "id,product\nx\n", "id,product\n\"x,y\n"} {
		d.in = bad
		d.fails(2, "CSV", "device", "add", "--from", "-")
	}
	out := d.run("device", "list")
	has(t, out, "ID  PRODUCT  STATE           VERSION  SEEN  LABELS", "s1  sensor   no certificate  -        -     site=berlin", "site=ham,burg")
	if ds := decode[[]api.Device](d, "device", "list", "--product", "sensor", "--limit", "1"); len(ds) != 1 || ds[0].ID != "s1" {
		t.Errorf("%+v", ds)
	}
	if ds := decode[[]api.Device](d, "device", "list", "--online"); ds == nil || len(ds) != 0 {
		t.Errorf("an empty list is %v", ds)
	}
	has(t, d.run("device", "labels", "s1", "site=hamburg", "spare=yes"), "site=hamburg\nspare=yes\n")
	has(t, d.run("device", "labels", "s1", "spare-"), "site=hamburg\n")
	d.fails(2, "key=value", "device", "labels", "s1", "spare")
	has(t, d.run("device", "disable", "s1", "s2"), "disabled s1\n", "disabled s2\n", "found gone after", "first refused     nobody tried")
	has(t, d.run("device", "show", "s1"), "state", "disabled", "site=hamburg")
	has(t, d.run("device", "enable", "s1"), "enabled s1")
	d.run("device", "add", "s9", "--product", "sensor")
	d.fails(2, "--yes", "device", "remove", "s9")
	has(t, d.run("device", "remove", "s9", "--yes"), "removed s9\n", "found gone after")
	d.fails(3, "s9", "device", "remove", "s9", "--yes")
	d.fails(3, "", "device", "show", "s9")
	d.fails(3, "", "device", "show", "none")
	if pw := strings.TrimSpace(d.run("device", "password", "s1")); len(pw) < 43 {
		t.Errorf("password %q", pw)
	}
	if pw := strings.TrimSpace(d.run("device", "enrol-password", "s1", "--for", "2h")); len(pw) != 43 {
		t.Errorf("enrolment password %q", pw)
	}
	file := filepath.Join(t.TempDir(), "passwords.csv")
	d.fails(4, "s2: device s2 is disabled", "device", "enrol-password", "s2", "--out", file)
	d.run("device", "enable", "s2")
	has(t, d.run("device", "enrol-password", "s1", "s2", "--out", file), "wrote 2 to ")
	if text := read(t, file); !strings.HasPrefix(text, "device,password,until\ns1,") || strings.Count(text, "\n") != 3 {
		t.Errorf("%q", text)
	}
	d.fails(1, "exists already", "device", "enrol-password", "s1", "--out", file)
	d.fails(3, "none", "device", "enrol-password", "none")
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// Labels, groups and expressions: of devices by name, by expression, and by file.
func TestTargetsLabelsAndGroups(t *testing.T) {
	d := sit(t, nil)
	d.in = "id,product,groups,label:site\ns1,sensor,early; lab,york\ns2,sensor,,york\ns3,lamp,,\n"
	has(t, d.run("device", "add", "--from", "-"), "added 3, unchanged 0")
	has(t, d.run("target", `labels.site == "york"`, "--product", "sensor"), "2 of 3 devices, 0 connected\n  s1\n  s2\n")
	d.fails(2, "no field; there are", "target", `lables.site == "york"`)
	has(t, d.run("device", "group", "add", "field", "s2", "s3"), "changed 2 of 2 devices")
	has(t, d.run("device", "group", "remove", "field", "--where", `product == "lamp"`, "--dry-run"), "would change 1 of 1 devices\n  s3\n")
	has(t, d.run("device", "group", "remove", "field", "--where", `product == "lamp"`), "changed 1 of 1 devices")
	has(t, d.run("device", "label", "--where", `"early" in groups`, "ring=1", "site-"), "changed 1 of 1 devices")
	has(t, d.run("device", "show", "s1"), "ring=1", "groups", "early, lab")
	if ds := decode[[]api.Device](d, "device", "list", "--group", "field"); len(ds) != 1 || ds[0].ID != "s2" {
		t.Errorf("%+v", ds)
	}
	if ds := decode[[]api.Device](d, "device", "list", "--where", `has(labels.ring)`); len(ds) != 1 || ds[0].ID != "s1" {
		t.Errorf("%+v", ds)
	}
	changed := "id,product,groups,label:site\ns1,sensor,,hull\ns2,sensor,field,york\n"
	d.in = changed
	d.fails(5, "device 1 of 2", "device", "add", "--from", "-")
	d.in = changed
	has(t, d.run("device", "add", "--from", "-", "--update"), "added 0, updated 1, unchanged 1")
	d.fails(2, "name the devices", "device", "label", "a=b")
	d.fails(2, "say what to change", "device", "label", "s1")
	d.fails(2, "--from", "device", "add", "s9", "--product", "lamp", "--update")
}

// checkKit checks that a folder holds credentials that fit one another, and returns the leaf.
func (d *desk) checkKit(dir, id string) *x509.Certificate {
	d.t.Helper()
	for name, mode := range map[string]os.FileMode{"": 0o700, "key.pem": 0o600, "cert.pem": 0o644, "trust.pem": 0o644, "trust-key.pem": 0o644, "fallback-password": 0o600, "endpoints.json": 0o644} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			d.t.Fatal(err)
		}
		if fi.Mode().Perm() != mode {
			d.t.Errorf("%s has mode %o, want %o", filepath.Join(dir, name), fi.Mode().Perm(), mode)
		}
	}
	if es, _ := os.ReadDir(dir); len(es) != 6 {
		d.t.Errorf("%d files in %s", len(es), dir)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		d.t.Fatal(err)
	}
	if len(pair.Certificate) != 2 || pair.Leaf.Subject.CommonName != id {
		d.t.Errorf("%d certificates, for %s", len(pair.Certificate), pair.Leaf.Subject.CommonName)
	}
	block, _ := pem.Decode([]byte(read(d.t, filepath.Join(dir, "key.pem"))))
	if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err != nil || key.(*ecdsa.PrivateKey).Curve.Params().BitSize != 256 {
		d.t.Errorf("the key: %v", err)
	}
	if read(d.t, filepath.Join(dir, "trust.pem")) != string(d.Trust) {
		d.t.Error("another trust bundle")
	}
	want := fmt.Sprintf("{\n  \"device\": %q,\n  \"mqtt\": \"broker.example.com:8883\",\n  \"fallback_mqtt\": \"broker.example.com:8884\",\n  \"https\": \"muster.example.com:8443\",\n  \"recovery_https\": \"muster.example.com:8444\"\n}\n", id)
	if got := read(d.t, filepath.Join(dir, "endpoints.json")); got != want {
		d.t.Errorf("endpoints %s", got)
	}
	pw := read(d.t, filepath.Join(dir, "fallback-password"))
	var dev fleet.Device
	if err := d.DB.View(context.Background(), func(tx *bolt.Tx) (err error) { dev, err = tx.Device(fleet.DeviceID(id)); return err }); err != nil {
		d.t.Fatal(err)
	}
	if len(dev.Passwords) != 1 || len(pw) < 43 || strings.TrimSpace(pw) != pw {
		d.t.Errorf("password %q, %d in force", pw, len(dev.Passwords))
	}
	return pair.Leaf
}

func TestCredentials(t *testing.T) {
	d := sit(t, nil)
	d.Devices(t, 5, time.Now())
	dir := filepath.Join(d.dir, "one")
	d.run("device", "credentials", "d000", "--out", dir)
	leaf := d.checkKit(dir, "d000")
	d.fails(1, "--force", "device", "credentials", "d000", "--out", dir)
	if again := d.checkKit(dir, "d000"); !again.Equal(leaf) {
		t.Error("it was replaced without --force")
	}
	d.run("device", "credentials", "d000", "--out", dir, "--force", "--lifetime", "24h")
	if again := d.checkKit(dir, "d000"); again.Equal(leaf) || again.NotAfter.After(time.Now().Add(25*time.Hour)) {
		t.Error("it was not replaced with --force, or lives too long")
	}
	all := filepath.Join(d.dir, "all")
	has(t, d.run("device", "credentials", "d001", "d002", "--out", all), "wrote 2, kept 0, failed 0")
	has(t, d.run("device", "credentials", "--all", "--product", "lamp", "--out", all), "wrote 3, kept 2, failed 0")
	for i := range 5 {
		id := fmt.Sprintf("d%03d", i)
		d.checkKit(filepath.Join(all, id), id)
	}
	s := d.try("device", "credentials", "d001", "none", "../../etc", "--out", all)
	if s.code != 1 || !strings.Contains(s.err, "none: ") || !strings.Contains(s.err, "../../etc: device id") || !strings.Contains(s.out, "wrote 0, kept 1, failed 2") {
		t.Errorf("%+v", s)
	}
	if _, err := os.Stat(filepath.Join(d.dir, "etc")); err == nil {
		t.Error("it left its folder")
	}
	d.fails(2, "--all", "device", "credentials", "--out", all)
	d.fails(2, "out", "device", "credentials", "d000")
}

// cutter refuses the nth call that matters, once, as if the line had been cut.
type cutter struct {
	next http.Handler
	n    atomic.Int64 // calls that are still let through; negative: all
}

func (c *cutter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c.n.Add(-1) == -1 {
		panic(http.ErrAbortHandler)
	}
	c.next.ServeHTTP(w, r)
}

func TestCredentialsGoOnWhereTheyWereInterrupted(t *testing.T) {
	cut := &cutter{}
	cut.n.Store(-100)
	d := sit(t, func(h http.Handler) http.Handler { cut.next = h; return cut })
	d.Devices(t, 5, time.Now())
	for after := range 4 { // trust, endpoints, certificate, password
		id := fmt.Sprintf("d%03d", after)
		dir := filepath.Join(d.dir, id)
		cut.n.Store(int64(after))
		if s := d.try("device", "credentials", id, "--out", dir); s.code != 6 {
			t.Fatalf("cut at call %d: exit %d %s", after, s.code, s.err)
		}
		cut.n.Store(-100)
		if _, err := os.Stat(filepath.Join(dir, "key.pem")); err == nil {
			t.Errorf("cut at call %d: there is a key in place without the rest", after)
		}
		d.run("device", "credentials", id, "--out", dir)
		d.checkKit(dir, id)
		var certs int
		if err := d.DB.View(t.Context(), func(tx *bolt.Tx) error {
			cs, err := tx.CertificatesOf(fleet.DeviceID(id))
			certs = len(cs)
			return err
		}); err != nil || certs != 1 {
			t.Errorf("cut at call %d: %d certificates were issued, %v", after, certs, err)
		}
	}
	// Ended while the files were being moved.
	dir := filepath.Join(d.dir, "d004")
	d.run("device", "credentials", "d004", "--out", dir)
	partial := filepath.Join(dir, ".partial")
	if err := errors.Join(os.Mkdir(partial, 0o700), os.Rename(filepath.Join(dir, "cert.pem"), filepath.Join(partial, "cert.pem"))); err != nil {
		t.Fatal(err)
	}
	d.run("device", "credentials", "d004", "--out", dir)
	d.checkKit(dir, "d004")
}

func TestEnroll(t *testing.T) {
	d := sit(t, nil)
	d.Devices(t, 2, time.Now())
	dir := filepath.Join(d.dir, "k")
	d.run("device", "enroll", "d000", "--out", dir)
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")); err != nil {
		t.Error(err)
	}
	key, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(nil, &x509.CertificateRequest{}, key.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	if out := d.run("device", "enroll", "d000", "--csr", d.file("csr.pem", csr)); out != read(t, filepath.Join(dir, "cert.pem")) {
		t.Error("the same key got another certificate")
	}
	d.in = "not a request"
	d.fails(2, "CERTIFICATE REQUEST", "device", "enroll", "d000", "--csr", "-")
	d.in = csr
	d.fails(5, "", "device", "enroll", "d001", "--csr", "-") // another device's key
	d.fails(2, "csr", "device", "enroll", "d001")
}

func TestCerts(t *testing.T) {
	t.Parallel() // a revocation looks again after some seconds
	d := sit(t, nil)
	d.Devices(t, 2, time.Now())
	d.run("device", "credentials", "--all", "--out", d.dir)
	cs := decode[[]api.Certificate](d, "certs", "list", "d000")
	if len(cs) != 1 {
		t.Fatalf("%+v", cs)
	}
	has(t, d.run("certs", "list", "d000"), "SERIAL", cs[0].Serial+"  d000    issued")
	has(t, d.run("certs", "list", "--within", "2400h"), "d000", "d001")
	has(t, d.run("certs", "show", cs[0].Serial), "serial", cs[0].Serial, "operator")
	if out := d.run("certs", "show", "--pem", cs[0].Serial); out != read(t, filepath.Join(d.dir, "d000", "cert.pem")) {
		t.Errorf("%s", out)
	}
	has(t, d.run("certs", "status"), "ENDS WITHIN", "90 days      2")
	has(t, d.run("certs", "renew", "--all", "--dry-run"), "would ask")
	has(t, d.run("certs", "renew", "--device", "d000"), "asked")
	d.fails(2, "within", "certs", "renew", "--all", "--within", "1h")
	has(t, d.run("certs", "status"), "asked and waited for 1")
	has(t, d.run("certs", "renew", "--device", "d001", "--over", "24h"), "1 devices have a moment of their own")
	has(t, d.run("certs", "forecast"), "2 devices: 0 renew, 0 at risk, 2 locking out", "d000", "it has never connected")
	has(t, d.run("certs", "policy", "show"), "lifetime", "2160h0m0s", "the settings")
	has(t, d.run("certs", "policy", "set", "--lifetime", "720h", "--dry-run"), "720h0m0s", "0 of 2 devices")
	has(t, d.run("certs", "policy", "set", "--lifetime", "720h"), "720h0m0s")
	has(t, d.run("certs", "policy", "show"), "720h0m0s", "settings say", "lifetime 2160h0m0s")
	d.fails(2, "lifetime", "certs", "policy", "set", "--lifetime", "-1h")
	d.fails(2, "lifetime", "certs", "policy", "set")
	d.fails(2, "reason", "certs", "revoke", cs[0].Serial, "--reason", "because")
	d.fails(2, "serial", "certs", "revoke")
	d.fails(2, "--drill", "certs", "revoke", "--issuer", "00ff")
	d.fails(2, "--drill", "certs", "revoke", "--issuer", "00ff", "--yes", cs[0].Serial)
	d.fails(2, "--issuer", "certs", "revoke", "--yes", cs[0].Serial)
	d.fails(3, "00ff", "certs", "revoke", "--issuer", "00ff", "--drill")
	has(t, d.run("certs", "revoke", "--device", "d000", "--reason", "key-compromise"), "revoked "+cs[0].Serial+" of d000", "refused after")
	has(t, d.run("certs", "list", "d000"), "revoked")
	d.fails(3, "", "certs", "show", "abc")
}

// cron and systemd act on the exit code alone.
func TestCertsRenewEndsWithACodeForCron(t *testing.T) {
	t.Parallel() // to disable a device takes some seconds: its connections are looked at again
	d := sit(t, nil)
	d.Devices(t, 3, time.Now())
	d.run("device", "credentials", "--all", "--out", d.dir)
	has(t, d.run("certs", "renew"), "due 0, asked 0") // 0: nothing is due
	if got := d.try("certs", "renew", "--all", "--limit", "1"); got.code != 1 || !strings.Contains(got.err, "the limit left some out") {
		t.Errorf("with some left out: %d, %s", got.code, got.err)
	}
	d.run("certs", "renew", "--all") // 0: everybody was asked
	if got := d.try("certs", "renew", "--all", "--wait", "--timeout", "50ms", "--poll", "10ms"); got.code != 1 || !strings.Contains(got.out, "3 have not renewed in time") {
		t.Errorf("waited in vain: %d, %s", got.code, got.out)
	}
	d.run("device", "disable", "d002")
	if got := d.try("certs", "renew", "--device", "d002"); got.code != 1 || !strings.Contains(got.out, "disabled") {
		t.Errorf("one that cannot: %d, %s", got.code, got.out)
	}
	d.fails(2, "", "certs", "renew", "--device", "nobody") // elsewhere 3
	d.fails(2, "", "certs", "renew", "--wait", "--dry-run")
	d.fails(2, "", "certs", "renew", "--url", "https://127.0.0.1:1") // elsewhere 6
}

// release signs and uploads an image of product lamp with the commands that an operator would use.
func (d *desk) release(version string) {
	d.t.Helper()
	key := filepath.Join(d.dir, "release.key")
	if _, err := os.Stat(key); err != nil {
		d.run("firmware", "keygen", "--out", key)
		d.run("firmware", "keys", "add", key+".pub.pem", "--product", "lamp")
	}
	image := d.file("fw-"+version+".bin", strings.Repeat(version, 40_000))
	d.run("firmware", "sign", image, "--key", key, "--product", "lamp", "--version", version)
	d.run("firmware", "upload", image)
}

func TestFirmware(t *testing.T) {
	d := sit(t, nil)
	d.release("1.1.0")
	image := filepath.Join(d.dir, "fw-1.1.0.bin")
	has(t, d.run("firmware", "upload", image), "was published before")
	has(t, d.run("firmware", "inspect", image+".jws", "--key", filepath.Join(d.dir, "release.key.pub.pem")), "good", "1.1.0")
	has(t, d.run("firmware", "inspect", image+".jws"), "not verified")
	has(t, d.run("firmware", "list"), "PRODUCT", "lamp     1.1.0    195.3 KiB", "t-admin")
	has(t, d.run("firmware", "show", "lamp", "1.1.0"), "200000 bytes", "sha256")
	keys := decode[[]api.SigningKey](d, "firmware", "keys", "list")
	has(t, d.run("firmware", "keys", "list"), keys[0].ID, "lamp", "active")
	other := d.file("other.bin", "another image")
	d.fails(2, "not the one that was signed", "firmware", "upload", other, "--manifest", image+".jws")
	d.fails(1, "no such file", "firmware", "upload", other)
	d.fails(3, "", "firmware", "show", "lamp", "9.9.9")
	d.fails(5, "", "firmware", "keygen", "--out", filepath.Join(d.dir, "release.key"))
	has(t, d.run("firmware", "keys", "revoke", keys[0].ID), "revoked key")
	d.fails(2, "", "firmware", "upload", image)
	d.in = "correct horse\n"
	enc := filepath.Join(d.dir, "enc.key")
	d.run("firmware", "keygen", "--out", enc, "--passphrase-file", "-")
	d.fails(2, "passphrase", "firmware", "sign", other, "--key", enc, "--product", "lamp", "--version", "1.2.0")
	d.run("firmware", "sign", other, "--key", enc, "--product", "lamp", "--version", "1.2.0", "--passphrase-file", d.file("pass", "correct horse\n"))
}

func TestRollouts(t *testing.T) {
	d := sit(t, nil)
	d.Devices(t, 8, time.Now())
	d.release("1.1.0")
	has(t, d.run("rollout", "create", "r1", "--product", "lamp", "--version", "1.1.0", "--stage", "1", "--stage", "25%", "--stage", "100%",
		"--max-failures", "2", "--max-in-flight", "5", "--timeout", "10m", "--soak", "30m"), "created r1: lamp 1.1.0 to 8 devices in 3 stages, draft")
	r := decode[api.Rollout](d, "rollout", "show", "r1")
	if r.Plan.DeviceTimeout != "10m0s" || r.Plan.MaxInFlight != 5 || r.Stages[1].Quota != 2 || r.Failures != 0 || *r.Plan.MaxFailures != 2 {
		t.Errorf("%+v", r)
	}
	has(t, d.run("rollout", "show", "r1"), "STAGE    UP TO", "2: 25%   2", "0, 2 tolerated", "to come")
	d.fails(5, "", "rollout", "pause", "r1")
	has(t, d.run("rollout", "start", "r1"), "r1 is running")
	has(t, d.run("rollout", "pause", "r1"), "r1 is paused")
	has(t, d.run("rollout", "list", "--state", "paused"), "r1  lamp     1.1.0    paused  1/3    0/8   0")
	d.run("rollout", "resume", "r1")
	if js := decode[[]api.Job](d, "rollout", "devices", "r1", "--state", "pending"); len(js) != 8 {
		t.Errorf("%d pending", len(js))
	}
	d.run("rollout", "abort", "r1")
	has(t, d.run("rollout", "history", "r1"), "WHEN", "started", "t-admin", "aborted")
	d.fails(7, "aborted", "rollout", "watch", "r1", "--every", "10ms")

	made := decode[api.Rollout](d, "rollout", "create", "--product", "lamp", "--version", "1.1.0", "--device", "d001", "--start")
	if made.ID == "" || made.Targets != 1 || made.State != "running" {
		t.Errorf("%+v", made)
	}
	for _, stage := range []string{"0", "x", "101%", "-1", "%"} {
		d.fails(2, "--stage", "rollout", "create", "--product", "lamp", "--version", "1.1.0", "--stage", stage)
	}
	d.fails(2, "no device", "rollout", "create", "--product", "lamp", "--version", "1.1.0", "--select", "site=none")
	d.fails(3, "", "rollout", "create", "--product", "lamp", "--version", "9.9.9")
	d.fails(3, "", "rollout", "watch", "none")
}

// breakable is a musterd whose streams can be refused and cut.
type breakable struct {
	http.Handler
	refuse atomic.Bool
	cut    atomic.Int64 // streams that are still to be cut after their first events
	opened atomic.Int64
}

func (b *breakable) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasSuffix(r.URL.Path, "/events") {
		b.Handler.ServeHTTP(w, r)
		return
	}
	b.opened.Add(1)
	switch {
	case b.refuse.Load():
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(503)
		_, _ = io.WriteString(w, `{"type":"urn:muster:problem:too_many_streams","title":"Service Unavailable","status":503,"code":"too_many_streams"}`)
	case b.cut.Add(-1) >= 0:
		ctx, cancel := context.WithTimeout(r.Context(), 300*time.Millisecond)
		defer cancel()
		b.Handler.ServeHTTP(w, r.WithContext(ctx))
	default:
		b.Handler.ServeHTTP(w, r)
	}
}

// watched starts a rollout of four devices and watches it; do is called when the view shows it.
func watched(t *testing.T, tty int, change func(*breakable), do func(*desk)) said {
	t.Helper()
	b := &breakable{}
	d := sit(t, func(h http.Handler) http.Handler { b.Handler = h; return b })
	if change != nil {
		change(b)
	}
	d.Devices(t, 4, time.Now())
	d.release("1.1.0")
	d.run("rollout", "create", "r1", "--product", "lamp", "--version", "1.1.0", "--verify-for", "0s", "--start")
	d.tty = tty
	shown := make(chan struct{})
	out := &noticing{words: "r1", seen: shown}
	done := make(chan said, 1)
	go func() {
		var errs bytes.Buffer
		code := cli.Run(d.ctx, cli.Env{
			Args: []string{"rollout", "watch", "r1", "--every", "10ms"}, Stdin: strings.NewReader(""), Stdout: out, Stderr: &errs,
			Getenv: func(k string) string { return d.env[k] }, Terminal: tty,
		})
		done <- said{code, out.String(), errs.String()}
	}()
	select {
	case <-shown:
	case s := <-done:
		return s
	case <-time.After(20 * time.Second):
		t.Fatal("the watch shows nothing")
	}
	do(d)
	select {
	case s := <-done:
		return s
	case <-time.After(20 * time.Second):
		t.Fatalf("the watch does not end: %s", out.String())
	}
	return said{}
}

// noticing is a writer that tells when some words were written.
type noticing struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	words string
	seen  chan struct{}
}

func (n *noticing) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.buf.Write(p)
	if n.seen != nil && strings.Contains(n.buf.String(), n.words) {
		close(n.seen)
		n.seen = nil
	}
	return len(p), nil
}

func (n *noticing) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.buf.String()
}

func abortIt(t *testing.T) func(*desk) {
	return func(d *desk) {
		if _, err := d.Rollouts.AbortFor(context.Background(), time.Now(), "r1", "bad news", "bob"); err != nil {
			t.Error(err)
		}
	}
}

func TestWatchFollowsToTheEnd(t *testing.T) {
	for name, change := range map[string]func(*breakable){
		"by events":          nil,
		"by looking":         func(b *breakable) { b.refuse.Store(true) },
		"by cut-off streams": func(b *breakable) { b.cut.Store(2) },
	} {
		s := watched(t, 0, change, abortIt(t))
		if s.code != 7 || strings.Contains(s.out, "\x1b") || !strings.HasSuffix(s.err, "bad news\n") {
			t.Errorf("%s: exit %d\n%s%s", name, s.code, s.out, s.err)
		}
		has(t, s.out, "r1 running stage 1/3 succeeded 0/4 in-flight 0 pending 4 failed 0", "r1 aborted: aborted by bob: bad news", "r1 aborted stage")
		if n := strings.Count(s.out, "bad news"); n != 1 {
			t.Errorf("%s: the decision is told %d times\n%s", name, n, s.out)
		}
	}
}

func TestWatchOnATerminal(t *testing.T) {
	s := watched(t, 80, nil, abortIt(t))
	if s.code != 7 || strings.Count(s.out, "\x1b[?25l") != 1 || !strings.HasSuffix(s.out, "\x1b[?25h") || strings.Contains(s.out, "\x1b[3") {
		t.Errorf("exit %d\n%q%s", s.code, s.out, s.err)
	}
	has(t, s.out, "░", "bad news", "1: 1 canary")

	// Leaving does not touch the rollout, and gives the cursor back.
	var left *desk
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d := sit(t, nil)
	left = d
	d.Devices(t, 4, time.Now())
	d.release("1.1.0")
	d.run("rollout", "create", "r2", "--product", "lamp", "--version", "1.1.0", "--start")
	time.AfterFunc(100*time.Millisecond, cancel)
	d.ctx, d.tty = ctx, 80
	if s := d.try("rollout", "watch", "r2"); s.code != 130 || strings.Count(s.out, "\x1b[?25l") != strings.Count(s.out, "\x1b[?25h") {
		t.Errorf("exit %d\n%q%s", s.code, s.out, s.err)
	}
	left.ctx, left.tty = t.Context(), 0
	if r := decode[api.Rollout](left, "rollout", "show", "r2"); r.State != "running" {
		t.Errorf("leaving the watch made it %s", r.State)
	}
}

func TestPlansOnTheCommandLine(t *testing.T) {
	d := sit(t, nil)
	d.Devices(t, 4, time.Now())
	d.release("1.1.0")
	for i := range 4 {
		d.run("device", "labels", fmt.Sprintf("d%03d", i), "site=berlin")
	}
	file := d.file("careful.yaml", "stages:\n  - {name: ring, count: 1, hold: true}\n  - percent: 100\nlimits:\n  - {percent: 5, min_sample: 20, then: pause}\nsoak: 2h\nstart_at: 2031-01-01T00:00:00Z\n")
	has(t, d.run("rollout", "plan", "r1", "--product", "lamp", "--version", "1.1.0", "--plan", file), "1: 1 ring", "2: 100%", "more than 5 % failures of at least 20 devices: pause", "takes about")
	if list := d.run("rollout", "list"); strings.Contains(list, "r1") {
		t.Errorf("the dry run made a rollout: %s", list)
	}
	r := decode[api.Rollout](d, "rollout", "create", "r1", "--product", "lamp", "--version", "1.1.0", "--plan", file, "--soak", "1h", "--verify-for", "0s",
		"--per-minute", "10", "--window", "0 2 * * */4h/Europe/Berlin", "--site", "site=10%", "--retries", "2", "--rollback-previous", "--approval", "--where", `id != "x"`, "--label", "site=berlin", "--static")
	p := r.Plan
	if p.Soak != "1h0m0s" || p.VerifyFor != "0s" || p.Pace.PerMinute != 10 || p.Window.Zone != "Europe/Berlin" || p.Sites.Percent != 10 || p.Retries != 2 || !p.Rollback.PreviousSlot ||
		!p.Approval || p.MaxFailures != nil || len(p.Limits) != 1 || !p.Stages[0].Hold || p.StartAt.Year() != 2031 || r.Dynamic || r.Where == "" {
		t.Errorf("%+v", r)
	}
	d.fails(4, "", "rollout", "approve", "r1") // by whom it was created
	has(t, d.run("rollout", "list", "--state", "draft"), "r1")
	has(t, d.run("rollout", "show", "r1"), "for somebody else", "0 2 * * * for 4h0m0s, Europe/Berlin")
	d.in = `{"stages":[{"percent":100}],"max_failures":3}`
	if r := decode[api.Rollout](d, "rollout", "create", "r2", "--product", "lamp", "--version", "1.1.0", "--plan", "-", "--start"); *r.Plan.MaxFailures != 3 {
		t.Errorf("%+v", r.Plan)
	}
	d.fails(5, "rolled back only", "rollout", "rollback", "r1")
	d.fails(5, "", "rollout", "advance", "r2")
	has(t, d.run("rollout", "retry", "r2", "--kind", "failed"), "no device failed")
	d.run("rollout", "abort", "r2", "--why", "enough")
	has(t, d.run("rollout", "history", "r2"), "enough")
	d.fails(2, "no device failed", "rollout", "retry", "r2", "--as", "r3")

	for name, args := range map[string][]string{
		"plan":       {"--plan", d.file("bad.yaml", "stagess: []")},
		"neither":    {"--plan", d.file("worse.yaml", "{{{")},
		"--limit":    {"--limit", "5%"},
		"--window":   {"--window", "nightly"},
		"--site":     {"--site", "berlin"},
		"--start-at": {"--start-at", "tomorrow"},
		"--stage":    {"--stage", "1,keep"},
		"key=value":  {"--label", "site"},
		"cron":       {"--window", "0 99 * * */4h"},
	} {
		d.fails(2, name, append([]string{"rollout", "plan", "--product", "lamp", "--version", "1.1.0"}, args...)...)
	}
}

func TestDeviceWhy(t *testing.T) {
	d := sit(t, nil)
	d.Devices(t, 1, time.Now())
	s := d.try("device", "why", "d000")
	if s.code != 1 || s.err != "" || !strings.Contains(s.out, "neither a certificate nor a fallback password") {
		t.Errorf("%+v", s)
	}
	s = d.try("device", "why", "d000", "-o", "json")
	if s.code != 1 || s.err != "" || !strings.Contains(s.out, `"blocked": true`) {
		t.Errorf("%+v", s)
	}
	d.fails(3, "", "device", "why", "none")
	has(t, d.run("device", "pardon", "d000"), "pardoned d000")
}

func TestOperators(t *testing.T) {
	d := sit(t, nil)
	s := d.try("token", "create", "ci", "--role", "viewer", "--expires-in", "24h")
	secret := strings.TrimSpace(s.out)
	if s.code != 0 || !strings.HasPrefix(secret, "mst_") || !strings.Contains(s.err, "only time") {
		t.Fatalf("%+v", s)
	}
	path := filepath.Join(d.dir, "ci.token")
	if out := d.run("token", "create", "ci2", "--role", "operator", "--out", path); strings.Contains(out, "mst_") {
		t.Error("the secret was printed all the same")
	}
	d.fails(2, "exists", "token", "create", "ci3", "--role", "operator", "--out", path)
	d.fails(5, "exists", "token", "create", "ci", "--role", "viewer")
	d.fails(2, "role", "token", "create", "x", "--role", "root")
	has(t, d.run("token", "list"), "ci          viewer    23h", "t-admin", "for ever")

	d.env["MUSTER_TOKEN"] = secret
	d.fails(4, "role", "device", "add", "x", "--product", "p")
	d.env["MUSTER_TOKEN"] = d.Tokens[access.Admin]
	has(t, d.run("audit"), "token.create", "refused.createDevice", "ci")
	if es := decode[[]api.AuditEntry](d, "audit", "--limit", "2"); len(es) != 2 || es[0].Who != "ci" {
		t.Errorf("%+v", es)
	}
	d.run("token", "delete", "ci")
	d.env["MUSTER_TOKEN"] = secret
	d.fails(4, "token", "device", "list")
	delete(d.env, "MUSTER_TOKEN")
	d.fails(4, "which token", "device", "list")
	d.env["MUSTER_TOKEN_FILE"] = path
	d.run("device", "list")
	has(t, d.run("version"), "musterd", "0.1.0")
}

func TestLogin(t *testing.T) {
	d := sit(t, nil)
	url, ca := d.env["MUSTER_URL"], d.env["MUSTER_CA"]
	for _, k := range []string{"MUSTER_URL", "MUSTER_CA", "MUSTER_TOKEN"} {
		delete(d.env, k)
	}
	d.fails(4, "where musterd is", "device", "list")
	d.in = "mst_" + strings.Repeat("A", 43)
	d.fails(4, "", "login", "--url", url, "--ca", ca)
	d.in = "hunter2"
	d.fails(2, "mst_", "login", "--url", url, "--ca", ca)
	d.in = d.Tokens[access.Operator]
	d.fails(2, "https", "login", "--url", strings.Replace(url, "https", "http", 1))
	d.in = d.Tokens[access.Operator] + "\n"
	has(t, d.run("login", "--url", url, "--ca", ca), "as t-operator (operator)")
	d.run("device", "list")
	out := d.run("config")
	has(t, out, url, "set, not shown")
	path := filepath.Join(d.dir, ".config", "muster", "config.yaml")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 || strings.Contains(out, "mst_") {
		t.Errorf("%v %v", fi, err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	d.fails(1, "read by others", "device", "list")
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	d.file(".config/muster/config.yaml", "url: x\ncolour: red\n")
	d.fails(1, "colour", "device", "list")
}

func TestWhatDevicesSayIsNotObeyed(t *testing.T) {
	const evil = "\x1b[2J\u009b31m\u202egnp.exe\x07\nroot# =cmd|'/c calc'"
	d := sit(t, nil)
	err := d.DB.Update(t.Context(), func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: "x", Product: "p", Hardware: evil}); err != nil {
			return err
		}
		if err := tx.PutStatus(fleet.Status{Device: "x", Version: evil, Boot: evil, State: []byte(`{"a":"\u001b[2J` + "\u202e" + `"}`)}); err != nil {
			return err
		}
		return tx.Quarantine(uplink.Quarantined{At: time.Now(), Vhost: "devices", Key: evil, Body: []byte(evil), Size: 9, Reason: "json", Details: evil})
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"device", "list"}, {"device", "show", "x"}, {"quarantine", "list"}, {"quarantine", "show", "1"}} {
		for _, output := range []string{"table", "json"} {
			out := d.run(append(args, "--output", output)...)
			if i := strings.IndexAny(out, "\x1b\u009b\u202e\x07\r"); i >= 0 {
				t.Errorf("%v %s: %q", args, output, out[i:min(len(out), i+20)])
			}
			if output == "table" && strings.Contains(out, "\nroot#") {
				t.Errorf("%v: a line of its own: %q", args, out)
			}
		}
	}
	if ds := decode[[]api.Device](d, "device", "list"); ds[0].Hardware != evil {
		t.Errorf("JSON changed the text: %q", ds[0].Hardware)
	}
	has(t, d.run("quarantine", "drop", "1"), "dropped 1")
	d.fails(3, "", "quarantine", "show", "1")
	d.fails(2, "number", "quarantine", "show", "x")
}

func TestWrongUsageIsTold(t *testing.T) {
	d := sit(t, nil)
	for _, args := range [][]string{{"device", "lst"}, {"frobnicate"}, {"device", "list", "--colour"}, {"device", "show"}, {"device", "list", "-o", "xml"}, {"certs", "list", "--limit", "x"}} {
		d.fails(2, "hint: see muster", args...)
	}
	for _, args := range [][]string{{}, {"--help"}, {"device"}, {"rollout", "create", "--help"}, {"completion", "bash"}} {
		d.run(args...)
	}
	has(t, d.run("--help"), "Exit codes:", "halted, aborted or rolled back")
	d.env["MUSTER_URL"] = "https://127.0.0.1:1"
	d.fails(6, "cannot be reached", "device", "list")
}

func TestColourOnlyOnATerminalThatWantsIt(t *testing.T) {
	d := sit(t, nil)
	d.Devices(t, 1, time.Now())
	delete(d.env, "NO_COLOR")
	if out := d.run("device", "list"); strings.Contains(out, "\x1b") {
		t.Errorf("in a pipe: %q", out)
	}
	d.tty = 100
	if out := d.run("device", "list"); !strings.Contains(out, "\x1b[1m") {
		t.Errorf("on a terminal: %q", out)
	}
	d.env["NO_COLOR"] = "1"
	if out := d.run("device", "list"); strings.Contains(out, "\x1b") {
		t.Errorf("with NO_COLOR: %q", out)
	}
}
