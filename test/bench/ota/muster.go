package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"muster/internal/admission"
	"muster/internal/blob"
	"muster/internal/devapi"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/ota"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
)

// serveMuster serves the device API for the site in dir, until in ends: a real store with one running rollout in which
// every device holds a grant. The number of devices is the first line of in; the address is the first line of out.
func serveMuster(dir string, in io.Reader, out io.Writer) error {
	var devices int
	if _, err := fmt.Fscanln(in, &devices); err != nil {
		return err
	}
	db, err := bolt.Open(filepath.Join(dir, "muster.db"), bolt.Options{NoSync: true})
	if err != nil {
		return err
	}
	defer db.Close()
	images, err := blob.New(filepath.Join(dir, "images"))
	if err != nil {
		return err
	}
	defer images.Close()
	catalog := ota.New(ota.Config{
		Update: func(ctx context.Context, f func(ota.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(ota.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		Images: images, MaxImage: firmware.MaxImageSize,
	})
	rel, err := publish(dir, catalog)
	if err != nil {
		return err
	}
	if err := grantAll(db, rel, devices); err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, fileChain), filepath.Join(dir, fileKey))
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(filepath.Join(dir, fileCA))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	api := devapi.New(devapi.Config{
		Grants: catalog, Images: images, Admission: index(devices), TrustBundle: func() []byte { return ca }, Log: slog.New(slog.DiscardHandler),
	})
	conf := devapi.MutualTLS(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }, func() *x509.CertPool { return pool })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := api.Devices(conf)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	fmt.Fprintln(out, l.Addr())
	_, err = io.Copy(io.Discard, in)
	return errors.Join(err, srv.Shutdown(context.Background()), <-served)
}

// publish signs the site's image and publishes it, as an operator does.
func publish(dir string, catalog *ota.Catalog) (firmware.Release, error) {
	files, err := filepath.Glob(filepath.Join(dir, dirContent, "fw", "*"))
	if err != nil || len(files) != 1 {
		return firmware.Release{}, fmt.Errorf("%d images, %w", len(files), err)
	}
	image, err := os.ReadFile(files[0])
	if err != nil {
		return firmware.Release{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return firmware.Release{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return firmware.Release{}, err
	}
	ctx, at := context.Background(), time.Now()
	if _, err := catalog.AddKey(ctx, at, pemOf("PUBLIC KEY", der), "", "bench"); err != nil {
		return firmware.Release{}, err
	}
	h := fleet.HashOf(sha256.Sum256(image))
	jws, err := firmware.Sign(firmware.Manifest{Product: "bench", Version: "1.0.0", Size: int64(len(image)), SHA256: h, ImageHash: h}, key)
	if err != nil {
		return firmware.Release{}, err
	}
	return catalog.Publish(ctx, at, ota.Upload{JWS: jws, Image: bytes.NewReader(image), By: "bench"})
}

// grantAll rolls rel out to all devices at once.
func grantAll(db *bolt.DB, rel firmware.Release, devices int) error {
	at := time.Now()
	plan := rollout.Plan{Stages: []rollout.Stage{{Percent: 100}}, MaxInFlight: max(1, devices)}
	r, err := rollout.New(rollout.Spec{
		ID: "bench", Release: rollout.Release{Product: rel.Product, Version: string(rel.Version), Image: rel.ImageHash}, Plan: plan, By: "bench",
	}, at)
	if err != nil {
		return err
	}
	var ids []fleet.DeviceID
	var targets []rollout.Target
	for i := range devices {
		ids = append(ids, deviceID(i))
		targets = append(targets, rollout.Target{Device: deviceID(i)})
	}
	events := []rollout.Event{rollout.Added{At: at, Targets: targets}, rollout.Started{At: at, Who: "bench"}}
	for _, id := range ids {
		events = append(events, rollout.Asked{At: at, Device: id})
	}
	rows := map[fleet.DeviceID]rollout.Job{}
	return db.Update(context.Background(), func(tx *bolt.Tx) error {
		for _, id := range ids {
			if err := tx.PutDevice(fleet.Device{ID: id, Product: rel.Product}); err != nil {
				return err
			}
		}
		for _, ev := range events {
			var mine []rollout.Job
			if a, ok := ev.(rollout.Asked); ok {
				mine = []rollout.Job{rows[a.Device]}
			}
			next, changed, _, err := rollout.Step(r, mine, ev)
			if err != nil {
				return err
			}
			r = next
			for _, j := range changed {
				rows[j.Device] = j
				if err := tx.PutJob(j); err != nil {
					return err
				}
			}
		}
		return tx.PutRollout(r)
	})
}

// admitted is an index of admission records, as musterd holds it in memory.
type admitted map[fleet.DeviceID]*admission.Record

func index(devices int) admitted {
	all := admitted{}
	for i := range devices {
		all[deviceID(i)] = &admission.Record{
			Device:       deviceID(i),
			Certificates: [2]admission.Certificate{{Serial: fleet.SerialOf(serialOf(i)), NotAfter: time.Now().Add(24 * time.Hour)}},
		}
	}
	return all
}

// Admit implements devapi.Admission.
func (a admitted) Admit(d fleet.DeviceID, s fleet.Serial, at time.Time) (bool, string) {
	r := admission.AdmitCertificate(a[d], d, s, at)
	return r.Allow, string(r.Reason)
}

// AdmitPassword implements devapi.Admission.
func (a admitted) AdmitPassword(d fleet.DeviceID, sum fleet.Hash) (bool, string) {
	r := admission.AdmitPassword(a[d], d, sum)
	return r.Allow, string(r.Reason)
}
