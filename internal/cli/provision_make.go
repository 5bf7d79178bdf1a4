package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/go-json-experiment/json"
	"golang.org/x/sync/errgroup"

	"muster/api"
	"muster/internal/client"
	"muster/internal/escrow"
	"muster/internal/fleet"
	"muster/internal/provision"
)

// Names in the folder of a production line. Device ids do not begin with a dot.
const (
	escrowDir   = "escrow"
	stationLog  = "station.log"
	commonDir   = ".common"  // files that are the same for many devices; the devices' folders have links to them
	makingDir   = ".partial" // of devices that are not complete
	secretsFile = "secrets.json"
	imagesDir   = "images"
	lockFile    = ".lock"
)

// provisionAtOnce is how many devices are made at a time: one waits for musterd while another is encrypted.
const provisionAtOnce = 8

// errTaken says that a device has an identity whose key is elsewhere.
var errTaken = errors.New("it has a certificate already, of a key that is not here: another station made it, or its folder is gone. With --again it gets a second one")

// run makes all devices of the line.
func (l *line) run(ctx context.Context) error {
	for _, dir := range []string{l.dir, filepath.Join(l.dir, makingDir), filepath.Join(l.dir, commonDir), filepath.Join(l.dir, escrowDir)} {
		if filepath.Base(dir) == escrowDir && len(l.escrow) == 0 {
			continue
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	unlock, err := lockDir(filepath.Join(l.dir, lockFile))
	if err != nil {
		return err
	}
	defer unlock()
	if err := l.sweepSettled(); err != nil {
		return err
	}
	if err := l.register(ctx); err != nil {
		return err
	}
	return l.makeAll(ctx)
}

// sweepSettled removes what was left of devices whose folder is complete: the run was cut off between the two.
func (l *line) sweepSettled() error {
	for _, u := range l.devices {
		if making := l.making(u.ID); exists(l.folder(u.ID)) && exists(making) {
			if err := os.RemoveAll(making); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *line) folder(id string) string { return filepath.Join(l.dir, id) }
func (l *line) making(id string) string { return filepath.Join(l.dir, makingDir, id) }

// register tells musterd about the devices that are not complete; those that it knows stay as they are.
func (l *line) register(ctx context.Context) error {
	var missing []api.NewDevice
	for _, u := range l.devices {
		if !exists(l.folder(u.ID)) {
			missing = append(missing, u.NewDevice)
		}
	}
	for batch := range slices.Chunk(missing, importBatch) {
		if _, err := client.Read[api.DeviceImportReport](l.a.client.ImportDevices(ctx, api.DeviceImport{Devices: batch})); err != nil {
			return err
		}
	}
	return nil
}

// lineSum is how a run went.
type lineSum struct {
	Made   int `json:"made"`
	Kept   int `json:"kept"`
	Failed int `json:"failed"`
}

// makeAll makes the devices, a few at a time. One that fails does not keep the others from theirs.
func (l *line) makeAll(ctx context.Context) error {
	var mu sync.Mutex
	var sum lineSum
	failures := make([]error, len(l.devices))
	m := l.a.ui.meter("provisioning", int64(len(l.devices)), func(n int64) string { return fmt.Sprint(n) })
	var g errgroup.Group
	g.SetLimit(provisionAtOnce)
	for i, u := range l.devices {
		g.Go(func() error {
			err := ctx.Err()
			if err == nil {
				err = l.make(ctx, u)
			}
			if err != nil && !errors.Is(err, errKept) && ctx.Err() == nil {
				err = errors.Join(err, l.log(u, "provision", "failed", ""))
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				sum.Made++
			case errors.Is(err, errKept):
				sum.Kept++
			default:
				sum.Failed++
				failures[i] = err
			}
			m.set(int64(sum.Made + sum.Kept + sum.Failed))
			return nil
		})
	}
	_ = g.Wait() // each failure is in failures
	m.end()
	if err := ctx.Err(); err != nil {
		return err
	}
	for i, err := range failures {
		if err != nil && len(l.devices) > 1 {
			l.a.ui.note("%s: %s", l.devices[i].ID, clean(err.Error()))
		}
	}
	if err := l.a.ui.show(sum, func() { l.a.ui.printf("made %d, kept %d, failed %d\n", sum.Made, sum.Kept, sum.Failed) }); err != nil {
		return err
	}
	switch {
	case sum.Failed == 1 && len(l.devices) == 1:
		return failures[0]
	case sum.Failed > 0:
		return fmt.Errorf("%d of %d devices were not made; run again to go on", sum.Failed, len(l.devices))
	}
	return nil
}

// make makes the folder of one device. Interrupted at any point, it can be called again: its keys are on disk before anything
// is done with them, so that the same certificate comes back, and the folder takes its place when all of it is there.
func (l *line) make(ctx context.Context, u unit) error {
	if exists(l.folder(u.ID)) {
		return errKept
	}
	s, fresh, err := l.secrets(ctx, u)
	if err != nil {
		return err
	}
	id, serial, err := l.identity(ctx, u, s)
	if err != nil {
		return err
	}
	entries, err := l.entries(u, id)
	if err != nil {
		return err
	}
	d := provision.Device{ID: fleet.DeviceID(u.ID), MAC: u.mac, Entries: entries}
	if err := l.keep(u, d, s, fresh); err != nil {
		return err
	}
	files, err := l.plan.Make(d, s.Secrets)
	if err != nil {
		return err
	}
	if err := l.write(u.ID, files); err != nil {
		return err
	}
	return l.log(u, "provision", "ok", serial)
}

// deviceSecrets is secrets.json: all that is made here for a device. It is there from before the first use until the device's
// folder is complete.
type deviceSecrets struct {
	provision.Secrets
	Key []byte `json:",omitempty"` // PKCS #8
}

// String keeps the keys out of any print.
func (deviceSecrets) String() string { return "secrets of a device" }

// GoString keeps the keys out of %#v.
func (s deviceSecrets) GoString() string { return s.String() }

// secrets returns the keys of an interrupted run, or new ones that are safe on disk. fresh says that they are new.
func (l *line) secrets(ctx context.Context, u unit) (s deviceSecrets, fresh bool, err error) {
	path := filepath.Join(l.making(u.ID), secretsFile)
	raw, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		fresh = true
		if err := l.unclaimed(ctx, u); err != nil {
			return s, false, err
		}
	case err != nil:
		return s, false, err
	case json.Unmarshal(raw, &s) != nil:
		return s, false, fmt.Errorf("%s cannot be read: remove the folder that it is in, and run again with --again", path)
	}
	changed, err := l.complete(&s)
	if err != nil || !changed {
		return s, fresh, err
	}
	if raw, err = json.Marshal(s); err != nil {
		return s, false, err
	}
	if err := os.MkdirAll(l.making(u.ID), 0o700); err != nil {
		return s, false, err
	}
	return s, fresh, errors.Join(replaceFile(path, raw, 0o600), syncDir(filepath.Join(l.dir, makingDir)))
}

// complete makes the keys that are missing: all of them at first, and later those that other flags ask for.
func (l *line) complete(s *deviceSecrets) (changed bool, err error) {
	more, err := l.plan.NewSecrets(rand.Reader)
	if err != nil {
		return false, err
	}
	for _, k := range []struct{ have, want *[]byte }{{&s.Flash, &more.Flash}, {&s.NVS, &more.NVS}, {&s.HMAC, &more.HMAC}} {
		if len(*k.have) != len(*k.want) {
			*k.have, changed = *k.want, true
		}
	}
	if l.f.csr || s.Key != nil {
		return changed, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return false, err
	}
	s.Key, err = x509.MarshalPKCS8PrivateKey(key)
	return true, err
}

// unclaimed refuses a device that has an identity already.
func (l *line) unclaimed(ctx context.Context, u unit) error {
	if l.f.again {
		return nil
	}
	d, err := client.Read[api.Device](l.a.client.GetDevice(ctx, u.ID))
	if err == nil && (d.Current != "" || d.Next != "") {
		err = errTaken
	}
	return err
}

// identity gets what musterd gives: the certificate of the device's key, and its passwords. Asked again, it gets the same
// certificate, and new passwords; nobody has the old ones, because the folder that held them was never completed.
func (l *line) identity(ctx context.Context, u unit, s deviceSecrets) (id provision.Identity, serial string, err error) {
	c := l.a.client
	id = provision.Identity{
		MQTT: l.endpoints.MQTT, FallbackMQTT: l.endpoints.FallbackMQTT, HTTPS: l.endpoints.HTTPS, RecoveryHTTPS: l.endpoints.RecoveryHTTPS,
		Roots: l.trust.PEM, TrustKey: l.trust.KeyPEM, Bundle: l.bundle, ReleaseKeys: l.relKeys,
	}
	if l.f.csr {
		once, err := client.Read[api.EnrolmentPassword](c.NewEnrolmentPassword(ctx, u.ID, api.EnrolmentPasswordRequest{For: l.f.enrolFor}))
		if err != nil {
			return id, "", err
		}
		id.EnrolPassword = once.Password
	} else {
		parsed, err := x509.ParsePKCS8PrivateKey(s.Key)
		key, ok := parsed.(*ecdsa.PrivateKey)
		if err != nil || !ok {
			return id, "", fmt.Errorf("the key in %s was not made here", l.making(u.ID))
		}
		csr, err := makeCSR(u.ID, key)
		if err != nil {
			return id, "", err
		}
		cert, err := client.Read[api.Certificate](c.IssueCertificate(ctx, u.ID, api.CertificateRequest{CSR: csr, Lifetime: l.f.lifetime}))
		if err != nil {
			return id, "", err
		}
		id.Chain, serial = cert.Chain, cert.Serial
		id.Key = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.Key}))
	}
	pw, err := client.Read[api.FallbackPassword](c.NewFallbackPassword(ctx, u.ID))
	id.Password = pw.Password
	return id, serial, err
}

// keep seals what the operator must keep, before a board can have it. A record of keys that were used before is never
// overwritten: a device that was given another identity may still come back with the first.
func (l *line) keep(u unit, d provision.Device, s deviceSecrets, fresh bool) error {
	if len(l.escrow) == 0 {
		return nil
	}
	path := filepath.Join(l.dir, escrowDir, u.ID+escrow.Extension)
	if fresh && exists(path) {
		if err := os.Rename(path, unusedName(l.dir, u.ID)); err != nil {
			return err
		}
	}
	return replaceFileBy(path, 0o600, func(f *os.File) error {
		return escrow.Seal(f, l.escrow, l.plan.Record(d, u.Product, s.Secrets, l.a.env.Now().UTC()))
	})
}

// unusedName returns a name for an older record of a device.
func unusedName(dir, id string) string {
	for n := 1; ; n++ {
		if path := filepath.Join(dir, escrowDir, fmt.Sprintf("%s.%d%s", id, n, escrow.Extension)); !exists(path) {
			return path
		}
	}
}
