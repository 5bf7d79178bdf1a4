package tlsfiles_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/tlsfiles"
)

var now = time.Now()

// made is a self-signed certificate with its key.
type made struct {
	serial     string
	cert, key  []byte
	from, till time.Time
}

func make1(t testing.TB, serial int64, from, till time.Time) made {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: from, NotAfter: till, DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return made{
		string(fleet.SerialOf(big.NewInt(serial))), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), from, till,
	}
}

func fresh(t testing.TB, serial int64) made {
	return make1(t, serial, now.Add(-time.Hour), now.Add(time.Hour))
}

// plain writes a pair as init does: key and certificate in folders of their own.
func plain(t testing.TB, m made) tlsfiles.Pair {
	t.Helper()
	dir := t.TempDir()
	p := tlsfiles.Pair{Cert: filepath.Join(dir, "server.crt"), Key: filepath.Join(dir, "private", "server.key")}
	if err := os.Mkdir(filepath.Join(dir, "private"), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, p.Cert, m.cert, 0o644)
	put(t, p.Key, m.key, 0o640)
	return p
}

func put(t testing.TB, path string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func serialOf(t testing.TB, p tlsfiles.Pair) string {
	t.Helper()
	c, _, err := p.Load()
	if err != nil {
		t.Fatal(err)
	}
	return string(fleet.SerialOf(c.Leaf.SerialNumber))
}

func TestAReplacedPairIsTheNewOneWithTheRightsOfTheOld(t *testing.T) {
	p := plain(t, fresh(t, 1))
	for serial := int64(2); serial < 6; serial++ {
		m := fresh(t, serial)
		if err := p.Replace(m.serial, m.cert, m.key); err != nil {
			t.Fatal(err)
		}
		if got := serialOf(t, p); got != m.serial {
			t.Fatalf("serial %s, want %s", got, m.serial)
		}
	}
	for path, want := range map[string]os.FileMode{p.Cert: 0o644, p.Key: 0o640} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want || time.Since(info.ModTime()) > time.Minute {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(filepath.Dir(p.Cert), "server.d"))
	if err != nil || len(entries) != 3 { // this one, the one before, current
		t.Errorf("%v, %v", entries, err)
	}
}

// A crash after any step leaves the old pair or the new one, and the next renewal works.
func TestACrashAfterAnyStepLeavesAPairThatServes(t *testing.T) {
	crash := errors.New("crash")
	for _, replacedBefore := range []bool{false, true} {
		total := 1 << 10
		for stop := 0; stop < total; stop++ {
			p := plain(t, fresh(t, 1))
			old := "1"
			if replacedBefore {
				m := fresh(t, 2)
				if err := p.Replace(m.serial, m.cert, m.key); err != nil {
					t.Fatal(err)
				}
				old = "2"
			}
			next := fresh(t, 3)
			var steps []string
			err := p.ReplaceUntil(next.serial, next.cert, next.key, func(step string) error {
				steps = append(steps, step)
				if got := serialOf(t, p); got != old && got != next.serial {
					t.Fatalf("after %q: serial %s", step, got)
				}
				if len(steps) == stop+1 {
					return crash
				}
				return nil
			})
			if err == nil {
				total = len(steps)
				if stop != total {
					t.Fatalf("stopped at %d, and there are %d steps", stop, total)
				}
			} else if !errors.Is(err, crash) {
				t.Fatal(err)
			}
			after := fresh(t, 4)
			for range 2 { // and the same again: a retry after a crash just before the answer
				if err := p.Replace(after.serial, after.cert, after.key); err != nil {
					t.Fatalf("after a crash behind %q: %v", steps[len(steps)-1], err)
				}
				if got := serialOf(t, p); got != after.serial {
					t.Fatalf("after a crash behind %q: serial %s", steps[len(steps)-1], got)
				}
			}
		}
		if total < 6 {
			t.Errorf("only %d steps", total)
		}
	}
}

// A reader that takes certificate and key one after the other finds a pair, however often they are replaced meanwhile.
func TestReadersNeverFindAMismatch(t *testing.T) {
	p := plain(t, fresh(t, 1))
	pairs := make([]made, 20)
	for i := range pairs {
		pairs[i] = fresh(t, int64(i+2))
	}
	done := make(chan error, 1)
	go func() {
		for _, m := range pairs {
			if err := p.Replace(m.serial, m.cert, m.key); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	reads := 0
	for {
		if _, _, err := p.Load(); err != nil {
			t.Fatalf("read %d: %v", reads, err)
		}
		reads++
		select {
		case err := <-done:
			if err != nil || reads < 2 {
				t.Fatal(reads, err)
			}
			return
		default:
		}
	}
}

func TestABadNewFileIsRefusedAndTheOldOneStays(t *testing.T) {
	first, second := fresh(t, 1), fresh(t, 2)
	for name, spoil := range map[string]func(tlsfiles.Pair){
		"another's key": func(p tlsfiles.Pair) { put(t, p.Key, second.key, 0o600) },
		"no PEM":        func(p tlsfiles.Pair) { put(t, p.Cert, []byte("hello"), 0o644) },
		"empty":         func(p tlsfiles.Pair) { put(t, p.Cert, nil, 0o644) },
		"huge":          func(p tlsfiles.Pair) { put(t, p.Cert, make([]byte, 2<<20), 0o644) },
		"a folder":      func(p tlsfiles.Pair) { _ = os.Remove(p.Cert); _ = os.Mkdir(p.Cert, 0o700) },
		"gone":          func(p tlsfiles.Pair) { _ = os.Remove(p.Key) },
		"ended": func(p tlsfiles.Pair) {
			m := make1(t, 9, now.Add(-2*time.Hour), now.Add(-time.Hour))
			put(t, p.Cert, m.cert, 0o644)
			put(t, p.Key, m.key, 0o600)
		},
		"not yet begun": func(p tlsfiles.Pair) {
			m := make1(t, 9, now.Add(time.Hour), now.Add(2*time.Hour))
			put(t, p.Cert, m.cert, 0o644)
			put(t, p.Key, m.key, 0o600)
		},
		"a dangling link": func(p tlsfiles.Pair) { _ = os.Remove(p.Cert); _ = os.Symlink("nowhere", p.Cert) },
	} {
		p := plain(t, first)
		s, err := tlsfiles.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		spoil(p)
		if changed, err := s.Reload(now, false); changed || err == nil || s.Refused() == nil {
			t.Errorf("%s: changed %v, error %v, refused %v", name, changed, err, s.Refused())
		}
		if changed, err := s.Reload(now, false); changed || err != nil {
			t.Errorf("%s: said twice: %v", name, err)
		}
		if _, err := s.Reload(now, true); err == nil {
			t.Errorf("%s: asked for it, nothing was said", name)
		}
		if got := s.Chain()[0].SerialNumber.Int64(); got != 1 {
			t.Errorf("%s: serves %d", name, got)
		}
		_ = os.RemoveAll(p.Cert)
		put(t, p.Cert, second.cert, 0o644)
		put(t, p.Key, second.key, 0o600)
		if changed, err := s.Reload(now, false); !changed || err != nil || s.Refused() != nil || s.Chain()[0].SerialNumber.Int64() != 2 {
			t.Errorf("%s: corrected, and yet %v, %v, %v", name, changed, err, s.Refused())
		}
	}
}

// A certificate changes under a listener: new handshakes get it, and connections that stand go on.
func TestAListenerServesTheNewCertificateAndKeepsItsConnections(t *testing.T) {
	s, err := tlsfiles.Open(plain(t, fresh(t, 1)))
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: s.Get, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // an echo
				defer c.Close()
				b := make([]byte, 16)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	dial := func() *tls.Conn {
		t.Helper()
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true}) // self-signed
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	old := dial()
	m := fresh(t, 2)
	if err := s.Replace(now, m.serial, m.cert, m.key); err != nil {
		t.Fatal(err)
	}
	if got := dial().ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != 2 {
		t.Errorf("a new connection sees serial %d", got)
	}
	fmt.Fprint(old, "still here")
	b := make([]byte, 16)
	if n, err := old.Read(b); err != nil || string(b[:n]) != "still here" {
		t.Errorf("the connection that stood: %q, %v", b[:n], err)
	}
}

func TestReplaceRefusesWhatIsNoPair(t *testing.T) {
	a, b := fresh(t, 1), fresh(t, 2)
	p := plain(t, a)
	if err := p.Replace("2", b.cert, a.key); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("another's key: %v", err)
	}
	if err := p.Replace("../2", b.cert, b.key); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a path for a name: %v", err)
	}
	if got := serialOf(t, p); got != "1" {
		t.Errorf("serial %s", got)
	}
}

func TestRootsFollowTheirFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trust.pem")
	a, b := fresh(t, 1), fresh(t, 2)
	put(t, path, a.cert, 0o644)
	r, err := tlsfiles.OpenRoots(path)
	if err != nil {
		t.Fatal(err)
	}
	put(t, path, append(a.cert, b.cert...), 0o644)
	if changed, err := r.Reload(false); !changed || err != nil || len(r.Certificates()) != 2 {
		t.Errorf("%v, %v, %d certificates", changed, err, len(r.Certificates()))
	}
	put(t, path, []byte("nothing"), 0o644)
	if changed, err := r.Reload(false); changed || err == nil || len(r.Certificates()) != 2 {
		t.Errorf("a file without certificates: %v, %v, %d", changed, err, len(r.Certificates()))
	}
	if _, err := r.Reload(false); err != nil {
		t.Errorf("said twice: %v", err)
	}
	_ = os.Remove(path)
	if _, err := r.Reload(false); err == nil || len(r.Certificates()) != 2 {
		t.Errorf("gone: %v", err)
	}
	if _, err := r.Reload(false); err != nil {
		t.Errorf("said twice: %v", err)
	}
}
