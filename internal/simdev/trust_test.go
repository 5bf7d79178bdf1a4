package simdev_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"muster/internal/pki"
	"muster/internal/simdev"
	"muster/internal/wire"
)

// trusted is a device whose trust bundles are signed by key.
func (w *world) trusted(key *ecdsa.PrivateKey, flash simdev.Flash) (*simdev.Device, func()) {
	w.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		w.t.Fatal(err)
	}
	d, stop := w.device(func(c *simdev.Config) { c.Credentials.TrustKey, c.Flash = der, flash })
	w.eventually(5*time.Second, "an answered hello", func() bool { return w.saw(simdev.Answered, "") > 0 })
	return d, stop
}

// offerBundle has the server give out a bundle, and tells the device of a version.
func (w *world) offerBundle(key *ecdsa.PrivateKey, version, told int64, roots ...[]byte) {
	w.t.Helper()
	text, err := pki.SignBundle(pki.Bundle{Version: version, Time: time.Now().Unix(), Roots: roots}, key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.set(func() {
		w.serve = func(rw http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != wire.PathTrust {
				return false
			}
			_, _ = io.WriteString(rw, text)
			return true
		}
	})
	w.tell(wire.DownCmd, wire.Encode(wire.Cmd{Op: wire.CmdTrust, Bundle: told}))
}

func ecKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestATrustBundleIsStoredSaidAndKept(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		key, flash := ecKey(t), &simdev.MemFlash{}
		_, stop := w.trusted(key, flash)
		w.offerBundle(key, 3, 3, w.ca.root.Raw, newCA(t).root.Raw)
		w.eventually(10*time.Second, "a bundle", func() bool { return w.saw(simdev.TrustStored, "version 3") == 1 })
		last := func() int64 { return get(w, func() int64 { return w.hellos[len(w.hellos)-1].Bundle }) }
		w.eventually(5*time.Second, "a hello that says so", func() bool { return last() == 3 })
		stop()
		w.trusted(key, flash) // after a power cycle
		w.eventually(10*time.Second, "a hello of the next boot", func() bool { return last() == 3 && w.saw(simdev.Booted, "") == 2 })
	})
}

func TestTrustBundlesThatADeviceDoesNotTake(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		key := ecKey(t)
		d, _ := w.trusted(key, nil)
		w.offerBundle(key, 3, 3, w.ca.root.Raw)
		w.eventually(10*time.Second, "a bundle", func() bool { return w.saw(simdev.TrustStored, "") == 1 })
		refused := 0
		for _, offer := range []func(){
			func() { w.offerBundle(key, 2, 9, w.ca.root.Raw) },      // an older one, told as a newer one
			func() { w.offerBundle(key, 3, 9, newCA(t).root.Raw) },  // another one of the same version
			func() { w.offerBundle(ecKey(t), 9, 9, w.ca.root.Raw) }, // another key's
		} {
			offer()
			refused++
			w.eventually(10*time.Second, "a refusal", func() bool { return w.saw(simdev.TrustRefused, "") == refused })
		}
		w.offerBundle(key, 1, 1, w.ca.root.Raw) // what it is told of is old: it does not even ask
		synctest.Wait()
		if w.saw(simdev.TrustStored, "") != 1 || w.saw(simdev.TrustRefused, "") != refused || !d.Snapshot().Connected {
			t.Error("the device took, or asked for, what it must not")
		}
	})
}

// The power goes at every write, before, in the middle of and after it: the device always trusts one of the two, whole, and
// takes the new one in the end.
func TestPowerCutInEveryWriteOfATrustBundle(t *testing.T) {
	atEveryWrite(t, func(t *testing.T, w *world, cut simdev.Cut) bool {
		key := ecKey(t)
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		d, _ := w.device(func(c *simdev.Config) { c.Credentials.TrustKey, c.Faults.PowerCut = der, cut })
		w.eventually(time.Minute, "an answered hello", func() bool { return w.saw(simdev.Answered, "") >= 1 && d.Snapshot().Connected })
		w.offerBundle(key, 2, 2, w.ca.root.Raw)
		w.eventually(3*time.Minute, "a hello with the bundle", func() bool {
			if !d.Snapshot().Connected {
				return false
			}
			said := get(w, func() int64 { return w.hellos[len(w.hellos)-1].Bundle })
			if said < 2 { // as muster does at each hello
				w.tell(wire.DownCmd, wire.Encode(wire.Cmd{Op: wire.CmdTrust, Bundle: 2}))
			}
			return said == 2
		})
		if w.saw(simdev.FallbackTaken, "") != 0 {
			t.Error("went to the fallback")
		}
		return d.Counts().PowerCuts == 1
	})
}
