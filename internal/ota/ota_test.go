package ota_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"muster/internal/access"
	"muster/internal/blob"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/wire"
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// world is a catalog on a real store and real files.
type world struct {
	t     *testing.T
	db    *bolt.DB
	blobs *blob.Store
	cat   *ota.Catalog
	priv  *ecdsa.PrivateKey // signs for product lamp
	key   firmware.Key
}

func open(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, db: storetest.Open(t)}
	var err error
	if w.blobs, err = blob.New(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.blobs.Close() })
	w.cat = ota.New(ota.Config{
		Update: func(ctx context.Context, f func(ota.Tx) error) error {
			return w.db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(ota.Tx) error) error {
			return w.db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Images: w.blobs, MaxImage: 1 << 20,
	})
	var text []byte
	w.priv, text = newKey(t)
	if w.key, err = w.cat.AddKey(t.Context(), start, text, "lamp", "ann"); err != nil {
		t.Fatal(err)
	}
	return w
}

func newKey(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return priv, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func manifest(version firmware.Version, image []byte) firmware.Manifest {
	h := fleet.HashOf(sha256.Sum256(image))
	return firmware.Manifest{Product: "lamp", Version: version, Size: int64(len(image)), SHA256: h, ImageHash: h}
}

func (w *world) sign(m firmware.Manifest) string {
	w.t.Helper()
	jws, err := firmware.Sign(m, w.priv)
	if err != nil {
		w.t.Fatal(err)
	}
	return jws
}

func (w *world) publish(m firmware.Manifest, image []byte) (firmware.Release, error) {
	return w.cat.Publish(w.t.Context(), start, ota.Upload{JWS: w.sign(m), Image: bytes.NewReader(image), By: "ann"})
}

func (w *world) update(f func(tx *bolt.Tx) error) {
	w.t.Helper()
	if err := w.db.Update(context.Background(), f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) audit() (out []string) {
	w.t.Helper()
	err := w.db.View(context.Background(), func(tx *bolt.Tx) error {
		all, err := tx.AuditEntries(0, 100)
		for _, e := range all {
			out = append(out, e.Who+" "+e.What+" "+e.On)
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// grant rolls the release out to device, which is granted it.
func (w *world) grant(id fleet.RolloutID, device fleet.DeviceID, rel firmware.Release) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		if err := tx.PutDevice(fleet.Device{ID: device, Product: rel.Product}); err != nil {
			return err
		}
		r, err := rollout.New(rollout.Spec{
			ID: id, Release: rollout.Release{Product: rel.Product, Version: string(rel.Version), Image: rel.ImageHash}, By: "ann",
		}, start)
		if err != nil {
			return err
		}
		return w.step(tx, r, nil,
			rollout.Added{At: start, Targets: []rollout.Target{{Device: device}}}, rollout.Started{At: start, Who: "ann"}, rollout.Asked{At: start, Device: device})
	})
}

// step drives r through the events, with jobs as the rows before the first, and stores what comes of it.
func (w *world) step(tx *bolt.Tx, r rollout.Rollout, jobs []rollout.Job, events ...rollout.Event) error {
	for _, ev := range events {
		next, changed, _, err := rollout.Step(r, jobs, ev)
		if err != nil {
			return err
		}
		r = next
		if err := tx.PutRollout(r); err != nil {
			return err
		}
		for _, j := range changed {
			if err := tx.PutJob(j); err != nil {
				return err
			}
			jobs = []rollout.Job{j}
		}
	}
	return nil
}

// happens drives a stored rollout on.
func (w *world) happens(id fleet.RolloutID, device fleet.DeviceID, ev rollout.Event) {
	w.t.Helper()
	w.update(func(tx *bolt.Tx) error {
		r, err := tx.Rollout(id)
		if err != nil {
			return err
		}
		j, _, err := tx.Job(id, device)
		if err != nil {
			return err
		}
		return w.step(tx, r, []rollout.Job{j}, ev)
	})
}

func codeOf(err error) string {
	if e, ok := errors.AsType[*fleet.Error](err); ok {
		return string(e.Kind) + " " + e.Code
	}
	return fmt.Sprint(err)
}

func TestPublish(t *testing.T) {
	w := open(t)
	image := []byte("image 1.0.0")
	rel, err := w.publish(manifest("1.0.0", image), image)
	if err != nil {
		t.Fatal(err)
	}
	sum := md5.Sum(image)
	if rel.MD5 != hex.EncodeToString(sum[:]) || rel.KeyID != w.key.ID || rel.UploadedBy != "ann" || !rel.UploadedAt.Equal(start) {
		t.Errorf("release %+v", rel)
	}
	again, err := w.cat.Publish(t.Context(), start.Add(time.Hour), ota.Upload{JWS: w.sign(manifest("1.0.0", image)), Image: bytes.NewReader(image), By: "bob"})
	if err != nil || again != rel {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if err := w.blobs.Verify(t.Context(), rel.SHA256); err != nil {
		t.Error(err)
	}
	got, err := w.cat.Release(t.Context(), "lamp", "1.0.0")
	if err != nil || got != rel {
		t.Errorf("stored: %+v, %v", got, err)
	}
	if got, want := fmt.Sprint(w.audit()), fmt.Sprintf("[ann key.add %s ann firmware.publish lamp 1.0.0]", w.key.ID); got != want {
		t.Errorf("audit %s, want %s", got, want)
	}
}

// The file of a release that was lost comes back when the release is published again.
func TestPublishHeals(t *testing.T) {
	w := open(t)
	image := []byte("image")
	rel, err := w.publish(manifest("1.0.0", image), image)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.blobs.Remove(rel.SHA256); err != nil {
		t.Fatal(err)
	}
	if _, err := w.publish(manifest("1.0.0", image), image); err != nil {
		t.Fatal(err)
	}
	if err := w.blobs.Verify(t.Context(), rel.SHA256); err != nil {
		t.Error(err)
	}
}

func TestPublishRefuses(t *testing.T) {
	w := open(t)
	image := []byte("image of 1.0.0")
	m := manifest("1.0.0", image)
	m.SecureVersion = 2
	if _, err := w.publish(m, image); err != nil {
		t.Fatal(err)
	}
	stranger, _ := newKey(t)
	next := func(change func(*firmware.Manifest)) string {
		m := manifest("1.1.0", image)
		m.SecureVersion = 2
		if change != nil {
			change(&m)
		}
		return w.sign(m)
	}
	unsigned, err := firmware.Sign(manifest("1.1.0", image), stranger)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		jws   string
		image io.Reader
		want  string
	}{
		"key nobody registered":   {unsigned, unread{t}, "unprocessable key_unknown"},
		"not a manifest":          {"x", unread{t}, "unprocessable manifest_malformed"},
		"another product":         {next(func(m *firmware.Manifest) { m.Product = "lock" }), unread{t}, "unprocessable key_product"},
		"version exists":          {next(func(m *firmware.Manifest) { m.Version = "1.0.0"; m.Chip = "esp32" }), unread{t}, "conflict release_exists"},
		"lower secure version":    {next(func(m *firmware.Manifest) { m.SecureVersion = 1 }), unread{t}, "conflict secure_version_lower"},
		"over the server's limit": {next(func(m *firmware.Manifest) { m.Size = 1<<20 + 1 }), unread{t}, "too-large "},
		"image longer":            {next(nil), io.MultiReader(bytes.NewReader(image), strings.NewReader("x")), "unprocessable image_mismatch"},
		"image endless":           {next(nil), iotest.DataErrReader(io.LimitReader(zeros{}, 1<<30)), "unprocessable image_mismatch"},
		"image shorter":           {next(nil), bytes.NewReader(image[1:]), "unprocessable image_mismatch"},
		"image empty":             {next(nil), strings.NewReader(""), "unprocessable image_mismatch"},
		"another image":           {next(nil), strings.NewReader(strings.Repeat("x", len(image))), "unprocessable image_mismatch"},
		"upload breaks off":       {next(nil), io.MultiReader(bytes.NewReader(image[1:]), iotest.ErrReader(io.ErrUnexpectedEOF)), "invalid "},
	} {
		if _, err := w.cat.Publish(t.Context(), start, ota.Upload{JWS: c.jws, Image: c.image, By: "ann"}); codeOf(err) != c.want {
			t.Errorf("%s: %s, want %s: %v", name, codeOf(err), c.want, err)
		}
	}
	all, err := w.cat.Releases(t.Context(), "")
	if err != nil || len(all) != 1 {
		t.Errorf("%d releases, %v", len(all), err)
	}
	files, err := w.blobs.List()
	if err != nil || len(files) != 1 {
		t.Errorf("%d images, %v", len(files), err)
	}
	if _, err := w.cat.Publish(t.Context(), start, ota.Upload{JWS: next(nil), Image: bytes.NewReader(image), By: "ann"}); err != nil {
		t.Errorf("the right one is refused too: %v", err)
	}
}

// unread fails the test if the upload is read: what can be refused before must be.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.t.Error("the upload was read")
	return 0, io.EOF
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// A key that is revoked while the image is on its way does not publish it.
func TestRevokedDuringUpload(t *testing.T) {
	w := open(t)
	image := []byte("image")
	revoke := readerFunc(func(b []byte) (int, error) {
		if _, err := w.cat.RevokeKey(t.Context(), start, w.key.ID, "bob"); err != nil {
			t.Error(err)
		}
		return copy(b, image), io.EOF
	})
	_, err := w.cat.Publish(t.Context(), start, ota.Upload{JWS: w.sign(manifest("1.0.0", image)), Image: revoke, By: "ann"})
	if codeOf(err) != "unprocessable key_revoked" {
		t.Error(err)
	}
	if n, err := w.cat.Prune(t.Context()); err != nil || n != 1 {
		t.Errorf("pruned %d, %v", n, err)
	}
	if files, err := w.blobs.List(); err != nil || len(files) != 0 {
		t.Errorf("left %v, %v", files, err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// Prune keeps what releases name.
func TestPrune(t *testing.T) {
	w := open(t)
	image := []byte("image")
	rel, err := w.publish(manifest("1.0.0", image), image)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.blobs.Put(t.Context(), strings.NewReader("nobody's"), 100); err != nil {
		t.Fatal(err)
	}
	if n, err := w.cat.Prune(t.Context()); err != nil || n != 1 {
		t.Errorf("pruned %d, %v", n, err)
	}
	if err := w.blobs.Verify(t.Context(), rel.SHA256); err != nil {
		t.Error(err)
	}
}

// Of many who publish one version at once, all who bring the same image get the same release; the others a Conflict.
func TestPublishConcurrently(t *testing.T) {
	w := open(t)
	var jws [2]string
	var images [2][]byte
	for i := range 2 {
		images[i] = fmt.Appendf(nil, "image %d", i)
		jws[i] = w.sign(manifest("1.0.0", images[i]))
	}
	var mu sync.Mutex
	published := map[fleet.Hash]int{}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			rel, err := w.cat.Publish(context.Background(), start, ota.Upload{JWS: jws[i%2], Image: bytes.NewReader(images[i%2]), By: "ann"})
			if err != nil {
				if codeOf(err) != "conflict release_exists" {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			published[rel.SHA256]++
		})
	}
	wg.Wait()
	if len(published) != 1 {
		t.Errorf("published %v", published)
	}
	for h, n := range published {
		if n != 8 {
			t.Errorf("%d of 8 who brought %s got it", n, h)
		}
	}
}

func TestKeys(t *testing.T) {
	w := open(t)
	_, text := newKey(t)
	k, err := w.cat.AddKey(t.Context(), start, text, "", "ann")
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.cat.AddKey(t.Context(), start.Add(time.Hour), text, "", "bob")
	if err != nil || again.AddedBy != "ann" || !again.AddedAt.Equal(start) {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if _, err := w.cat.AddKey(t.Context(), start, text, "lock", "ann"); codeOf(err) != "conflict key_exists" {
		t.Error(err)
	}
	if _, err := w.cat.AddKey(t.Context(), start, []byte("x"), "", "ann"); !fleet.Is(err, fleet.Invalid) {
		t.Error(err)
	}
	for range 2 {
		got, err := w.cat.RevokeKey(t.Context(), start, k.ID, "bob")
		if err != nil || !got.Revoked || got.RevokedBy != "bob" || !got.RevokedAt.Equal(start) {
			t.Errorf("revoked: %+v, %v", got, err)
		}
	}
	if _, err := w.cat.AddKey(t.Context(), start, text, "", "ann"); codeOf(err) != "conflict key_revoked" {
		t.Errorf("a revoked key came back: %v", err)
	}
	if _, err := w.cat.RevokeKey(t.Context(), start, "nobody", "bob"); !fleet.Is(err, fleet.NotFound) {
		t.Error(err)
	}
	all, err := w.cat.Keys(t.Context())
	if err != nil || len(all) != 2 {
		t.Errorf("%d keys, %v", len(all), err)
	}
	revocations := 0
	for _, line := range w.audit() {
		if strings.Contains(line, "key.revoke") {
			revocations++
		}
	}
	if revocations != 1 {
		t.Errorf("audited %d revocations", revocations)
	}
}

func TestReleasesNewestFirst(t *testing.T) {
	w := open(t)
	for _, v := range []firmware.Version{"1.2.0", "1.10.0", "1.9.0", "1.10.0-rc.1"} {
		if _, err := w.publish(manifest(v, []byte(v)), []byte(v)); err != nil {
			t.Fatal(err)
		}
	}
	all, err := w.cat.Releases(t.Context(), "lamp")
	var got []string
	for _, r := range all {
		got = append(got, string(r.Version))
	}
	if err != nil || strings.Join(got, " ") != "1.10.0 1.10.0-rc.1 1.9.0 1.2.0" {
		t.Errorf("%q, %v", got, err)
	}
	if none, err := w.cat.Releases(t.Context(), "lock"); err != nil || len(none) != 0 {
		t.Errorf("%v, %v", none, err)
	}
}

func TestGranted(t *testing.T) {
	w := open(t)
	one, two := []byte("image one"), []byte("image two")
	rel, err := w.publish(manifest("1.1.0", one), one)
	if err != nil {
		t.Fatal(err)
	}
	other, err := w.publish(manifest("1.2.0", two), two)
	if err != nil {
		t.Fatal(err)
	}
	w.grant("r", "d1", rel)
	w.update(func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d2", Product: "lamp"}) })

	granted := func(d fleet.DeviceID, name string) error {
		t.Helper()
		got, err := w.cat.Granted(t.Context(), d, name)
		if err == nil && got.Release != rel {
			t.Errorf("granted %+v", got)
		}
		return err
	}
	for range 2 { // asking does not use it up
		for _, name := range []string{string(rel.SHA256[:16]), string(rel.SHA256)} {
			if err := granted("d1", name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	var said string
	for name, c := range map[string]struct {
		d    fleet.DeviceID
		name string
	}{
		"another image":    {"d1", string(other.SHA256[:16])},
		"no image":         {"d1", strings.Repeat("0", 16)},
		"short":            {"d1", string(rel.SHA256[:15])},
		"empty":            {"d1", ""},
		"17 digits":        {"d1", string(rel.SHA256[:17])},
		"no job":           {"d2", string(rel.SHA256[:16])},
		"no such device":   {"d3", string(rel.SHA256[:16])},
		"not a device id ": {"../d1", string(rel.SHA256[:16])},
	} {
		err := granted(c.d, c.name)
		if !fleet.Is(err, fleet.NotFound) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if said == "" {
			said = err.Error()
		}
		if err.Error() != said {
			t.Errorf("%s: %q tells it from %q", name, err, said)
		}
	}

	w.happens("r", "d1", rollout.Reported{At: start.Add(time.Second), Device: "d1", Report: rollout.ReportInstalled})
	if err := granted("d1", string(rel.SHA256)); err != nil {
		t.Errorf("installed, and may still look again: %v", err)
	}
	w.update(func(tx *bolt.Tx) error {
		d, err := tx.Device("d1")
		if err != nil {
			return err
		}
		d.Disabled = true
		return tx.PutDevice(d)
	})
	if err := granted("d1", string(rel.SHA256)); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("disabled: %v", err)
	}
	w.update(func(tx *bolt.Tx) error {
		d, err := tx.Device("d1")
		if err != nil {
			return err
		}
		d.Disabled = false
		return tx.PutDevice(d)
	})
	w.happens("r", "d1", rollout.AbortedBy{At: start.Add(time.Minute), Who: "ann"})
	if err := granted("d1", string(rel.SHA256)); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("aborted: %v", err)
	}
}

func TestOffer(t *testing.T) {
	w := open(t)
	image := []byte("image")
	m := manifest("1.1.0", image)
	m.MinVersion, m.SecureVersion = "1.0.0", 1
	rel, err := w.publish(m, image)
	if err != nil {
		t.Fatal(err)
	}
	w.grant("r", "d1", rel)
	w.update(func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: "d2", Product: "lamp"}) })
	offer := func(d fleet.DeviceID, s fleet.Status) (payload []byte, ok bool, err error) {
		t.Helper()
		if e := w.db.View(t.Context(), func(tx *bolt.Tx) error {
			payload, ok, err = w.cat.Offer(tx, d, s)
			return nil
		}); e != nil {
			t.Fatal(e)
		}
		return
	}
	runs := fleet.Status{Device: "d1", Version: "1.0.0", SecureVersion: 1}
	payload, ok, err := offer("d1", runs)
	if err != nil || !ok {
		t.Fatalf("%v, %v", ok, err)
	}
	got, err := wire.DecodeOffer(payload)
	if err != nil || got.Job != "r" || got.Version != "1.1.0" || got.Size != int64(len(image)) || hex.EncodeToString(got.SHA256) != string(rel.SHA256) || got.Path != rel.Path() {
		t.Errorf("offer %+v, %v", got, err)
	}
	if _, ok, err := offer("d2", runs); ok || err != nil {
		t.Errorf("no job: %v, %v", ok, err)
	}
	with := func(f func(*fleet.Status)) fleet.Status { s := runs; f(&s); return s }
	for name, c := range map[string]struct {
		s    fleet.Status
		code string
	}{
		"buffer too small":      {with(func(s *fleet.Status) { s.Buffer = 128 }), "unprocessable buffer_too_small"},
		"secure version raised": {with(func(s *fleet.Status) { s.SecureVersion = 2 }), "unprocessable secure-version-too-low"},
		"version too old":       {with(func(s *fleet.Status) { s.Version = "0.9.0" }), "unprocessable below-min-version"},
	} {
		if _, ok, err := offer("d1", c.s); ok || codeOf(err) != c.code {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	if _, ok, err := offer("d1", with(func(s *fleet.Status) { s.Version = "2.0.0" })); !ok || err != nil {
		t.Errorf("going back is the rollout's to decide: %v, %v", ok, err)
	}
	w.happens("r", "d1", rollout.Reported{At: start.Add(time.Second), Device: "d1", Report: rollout.ReportDownloading})
	if _, ok, err := offer("d1", runs); !ok || err != nil {
		t.Errorf("while it downloads: %v, %v", ok, err)
	}
	w.happens("r", "d1", rollout.Reported{At: start.Add(2 * time.Second), Device: "d1", Report: rollout.ReportInstalled})
	if _, ok, err := offer("d1", runs); ok || err != nil {
		t.Errorf("installed: %v, %v", ok, err)
	}
}

// An offer for ids of ordinary length fits the smallest client.
func TestOfferFitsQuietBudget(t *testing.T) {
	w := open(t)
	image := bytes.Repeat([]byte("x"), 1<<20)
	rel, err := w.publish(manifest("100.200.300", image), image)
	if err != nil {
		t.Fatal(err)
	}
	w.grant(fleet.RolloutID(strings.Repeat("r", 24)), "d1", rel)
	err = w.db.View(t.Context(), func(tx *bolt.Tx) error {
		payload, ok, err := w.cat.Offer(tx, "d1", fleet.Status{Device: "d1"})
		if err == nil && (!ok || len(payload) > wire.QuietBudget) {
			t.Errorf("%v, %d bytes", ok, len(payload))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// A store that fails is not mistaken for a key that is unknown or a grant that is missing.
func TestStoreFailure(t *testing.T) {
	broken := fleet.Errorf(fleet.Unavailable, "the disk went away")
	tx := brokenTx{err: broken}
	c := ota.New(ota.Config{
		Update: func(_ context.Context, f func(ota.Tx) error) error { return f(tx) },
		View:   func(_ context.Context, f func(ota.Tx) error) error { return f(tx) },
	})
	priv, _ := newKey(t)
	jws, err := firmware.Sign(manifest("1.0.0", []byte("x")), priv)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Publish(t.Context(), start, ota.Upload{JWS: jws, Image: unread{t}, By: "ann"}); !errors.Is(err, broken) {
		t.Errorf("publish: %v", err)
	}
	if _, err := c.Granted(t.Context(), "d1", strings.Repeat("0", 16)); !errors.Is(err, broken) {
		t.Errorf("granted: %v", err)
	}
}

// brokenTx fails in every method that the test reaches; the others panic on the nil Tx.
type brokenTx struct {
	ota.Tx
	err error
}

func (b brokenTx) Key(string) (firmware.Key, error)               { return firmware.Key{}, b.err }
func (b brokenTx) Device(id fleet.DeviceID) (fleet.Device, error) { return fleet.Device{ID: id}, nil }
func (b brokenTx) Status(fleet.DeviceID) (fleet.Status, error)    { return fleet.Status{}, b.err }
func (b brokenTx) ActiveJob(fleet.DeviceID) (rollout.Job, bool, error) {
	return rollout.Job{}, false, b.err
}
func (b brokenTx) Audit(access.Entry) error { return b.err }
