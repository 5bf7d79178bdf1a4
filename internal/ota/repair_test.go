package ota_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/rollout"
	"muster/internal/store/bolt"
	"muster/internal/wire"
)

// clinic is a world with a device that runs a bad image on the fallback, and a good release for it.
type clinic struct {
	*world
	good, bad firmware.Release
}

const ill = fleet.DeviceID("d1")

func openClinic(t *testing.T) *clinic {
	t.Helper()
	c := &clinic{world: open(t)}
	for v, into := range map[firmware.Version]*firmware.Release{"1.0.0": &c.good, "2.0.0": &c.bad} {
		image := []byte("image " + string(v))
		var err error
		if *into, err = c.publish(manifest(v, image), image); err != nil {
			t.Fatal(err)
		}
	}
	c.update(func(tx *bolt.Tx) error { return tx.PutDevice(fleet.Device{ID: ill, Product: "lamp"}) })
	c.says(wire.VhostFallback, c.bad.ImageHash)
	return c
}

// says lets the device say hello.
func (c *clinic) says(vhost string, image fleet.Hash) {
	c.t.Helper()
	c.update(func(tx *bolt.Tx) error {
		s := fleet.Status{Device: ill, Vhost: vhost, Image: image, Online: true, HelloAt: start, Version: "2.0.0"}
		if err := tx.PutStatus(s); err != nil {
			return err
		}
		return c.cat.Hello(tx, start, vhost, ill)
	})
}

// rung takes what is in the outbox: the jobs of the offers.
func (c *clinic) rung() (out []string) {
	c.t.Helper()
	c.update(func(tx *bolt.Tx) error {
		entries, err := tx.Outbox(100)
		var seqs []uint64
		for _, e := range entries {
			if e.Vhost != wire.VhostFallback {
				c.t.Errorf("rung in vhost %s", e.Vhost)
			}
			out = append(out, e.Ref)
			seqs = append(seqs, e.Seq)
		}
		return errors.Join(err, tx.DropOutbox(seqs))
	})
	return out
}

// offered returns the version that the device is offered, empty if none, and whether it may download the good image.
func (c *clinic) offered() (version string, granted bool) {
	c.t.Helper()
	err := c.db.View(c.t.Context(), func(tx *bolt.Tx) error {
		s, err := tx.Status(ill)
		if err != nil {
			return err
		}
		payload, ok, err := c.cat.Offer(tx, ill, s)
		if err != nil || !ok {
			return err
		}
		o, err := wire.DecodeOffer(payload)
		version = o.Version
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	_, err = c.cat.Granted(c.t.Context(), ill, string(c.good.SHA256))
	if err != nil && !fleet.Is(err, fleet.NotFound) {
		c.t.Fatal(err)
	}
	return version, err == nil
}

func (c *clinic) wantOffered(when, version string) {
	c.t.Helper()
	if v, granted := c.offered(); v != version || granted != (version == "1.0.0") {
		c.t.Errorf("%s: offered %q, may download: %v; want %q", when, v, granted, version)
	}
}

func TestAnOrderedReleaseGoesOverTheFallback(t *testing.T) {
	c := openClinic(t)
	c.wantOffered("before the order", "")
	r, err := c.cat.Repair(t.Context(), start, ill, "1.0.0", "ann")
	if err != nil {
		t.Fatal(err)
	}
	c.wantOffered("ordered", "1.0.0")
	if jobs := c.rung(); !slices.Equal(jobs, []string{string(r.Job)}) {
		t.Errorf("a device that is online is told at once; rung %q", jobs)
	}
	again, err := c.cat.Repair(t.Context(), start.Add(time.Minute), ill, "1.0.0", "bob")
	if err != nil || again != r {
		t.Errorf("the same order again: %+v, %v", again, err)
	}
	c.says(wire.VhostFallback, c.bad.ImageHash)
	if jobs := c.rung(); !slices.Equal(jobs, []string{string(r.Job)}) {
		t.Errorf("a hello on the fallback rings %q", jobs)
	}
	if list, err := c.cat.Repairs(t.Context()); err != nil || len(list) != 1 || list[0].Offers != 1 || list[0].By != "ann" {
		t.Errorf("%+v, %v", list, err)
	}
	c.says(wire.VhostFallback, c.good.ImageHash)
	c.wantOffered("it runs it, and the front is missing", "")
	c.says(wire.VhostDevices, c.good.ImageHash)
	if list, err := c.cat.Repairs(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("not over at the front: %+v, %v", list, err)
	}
	c.says(wire.VhostFallback, c.bad.ImageHash)
	c.wantOffered("a later fall", "")
	if audit := c.audit(); !slices.Contains(audit, "ann recovery.firmware d1") || !slices.Contains(audit, "device:d1 recovery.firmware-over d1") {
		t.Errorf("audit: %q", audit)
	}
}

func TestNothingGoesOverTheFallbackThatShouldNot(t *testing.T) {
	for name, change := range map[string]func(*clinic, *fleet.Device, *fleet.Status){
		"at the front":     func(_ *clinic, _ *fleet.Device, s *fleet.Status) { s.Vhost = wire.VhostDevices },
		"never seen":       func(_ *clinic, _ *fleet.Device, s *fleet.Status) { s.Vhost = "" },
		"disabled":         func(_ *clinic, d *fleet.Device, _ *fleet.Status) { d.Disabled = true },
		"revoked":          func(_ *clinic, d *fleet.Device, _ *fleet.Status) { d.RecoveryOff = "revoked" },
		"runs it already":  func(c *clinic, _ *fleet.Device, s *fleet.Status) { s.Image = c.good.ImageHash },
		"after its cancel": func(*clinic, *fleet.Device, *fleet.Status) {},
	} {
		t.Run(name, func(t *testing.T) {
			c := openClinic(t)
			if _, err := c.cat.Repair(t.Context(), start, ill, "1.0.0", "ann"); err != nil {
				t.Fatal(err)
			}
			if name == "after its cancel" {
				if err := c.cat.CancelRepair(t.Context(), start, ill, "ann"); err != nil {
					t.Fatal(err)
				}
				if err := c.cat.CancelRepair(t.Context(), start, ill, "ann"); !fleet.Is(err, fleet.NotFound) {
					t.Errorf("cancelled twice: %v", err)
				}
			}
			c.update(func(tx *bolt.Tx) error {
				d, err := tx.Device(ill)
				if err != nil {
					return err
				}
				s, err := tx.Status(ill)
				if err != nil {
					return err
				}
				change(c, &d, &s)
				return errors.Join(tx.PutDevice(d), tx.PutStatus(s))
			})
			c.wantOffered(name, "")
			if name == "after its cancel" {
				return
			}
			if _, err := c.cat.Repair(t.Context(), start, ill, "1.0.0", "ann"); !fleet.Is(err, fleet.Conflict) {
				t.Errorf("ordered: %v", err)
			}
		})
	}
	c := openClinic(t)
	for what, err := range map[string]error{
		"device":  second(c.cat.Repair(t.Context(), start, "nobody", "1.0.0", "ann")),
		"release": second(c.cat.Repair(t.Context(), start, ill, "9.9.9", "ann")),
	} {
		if !fleet.Is(err, fleet.NotFound) {
			t.Errorf("unknown %s: %v", what, err)
		}
	}
	c.update(func(tx *bolt.Tx) error {
		s, err := tx.Status(ill)
		s.SecureVersion = 7
		return errors.Join(err, tx.PutStatus(s))
	})
	if err := second(c.cat.Repair(t.Context(), start, ill, "1.0.0", "ann")); !fleet.Is(err, fleet.Unprocessable) {
		t.Errorf("secure version too low: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// A rollout that is taken back grants to devices at the front. What cannot come there gets the same release at the side.
func TestARolloutThatIsTakenBackReachesTheFallback(t *testing.T) {
	c := openClinic(t)
	c.update(func(tx *bolt.Tx) error {
		r, err := rollout.New(rollout.Spec{
			ID: "bad", Release: rollout.Release{Product: "lamp", Version: "2.0.0", Image: c.bad.ImageHash}, By: "ann",
			Plan: rollout.Plan{Rollback: rollout.RollbackPlan{Version: "1.0.0"}},
		}, start)
		if err != nil {
			return err
		}
		return c.step(tx, r, nil, rollout.Added{At: start, Targets: []rollout.Target{{Device: ill}}}, rollout.Started{At: start, Who: "ann"}, rollout.Asked{At: start, Device: ill})
	})
	c.happens("bad", ill, rollout.Reported{At: start.Add(time.Second), Device: ill, Report: rollout.ReportInstalled})
	c.says(wire.VhostFallback, c.bad.ImageHash)
	c.wantOffered("while the rollout runs", "")
	c.happens("bad", ill, rollout.RollbackBy{At: start.Add(2 * time.Second), Who: "ann"})
	c.rung()
	c.says(wire.VhostFallback, c.bad.ImageHash)
	c.wantOffered("taken back", "1.0.0")
	if jobs := c.rung(); len(jobs) != 1 || jobs[0] == "bad" {
		t.Errorf("rung %q", jobs)
	}
	c.says(wire.VhostFallback, fleet.Hash("00"+c.bad.ImageHash[2:]))
	c.wantOffered("it runs something else", "")
	c.says(wire.VhostDevices, c.bad.ImageHash)
	c.wantOffered("at the front it is the rollout's turn", "")
}
