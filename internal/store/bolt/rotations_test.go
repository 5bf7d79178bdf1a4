package bolt_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"muster/internal/pki"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
)

func TestRotations(t *testing.T) {
	db := storetest.Open(t)
	at := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	put := func(list ...pki.Rotation) {
		t.Helper()
		if err := db.Update(t.Context(), func(tx *bolt.Tx) error {
			for _, r := range list {
				if err := tx.PutRotation(r); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	found := func() string {
		t.Helper()
		list, err := db.Check(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var words []string
		for _, f := range list {
			words = append(words, string(f))
		}
		return strings.Join(words, "\n")
	}
	in := func(id, from int64, s pki.RotationState) pki.Rotation {
		return pki.Rotation{ID: id, From: from, Kind: pki.RotateDeviceCA, State: s, Steps: []pki.RotationStep{{State: s, At: at, By: "ops"}}}
	}
	good := []pki.Rotation{in(1, 0, pki.RotationRemoved), in(2, 1, pki.RotationCancelled), in(3, 1, pki.RotationActive)}
	put(good...)
	if f := found(); f != "" {
		t.Error(f)
	}
	var list []pki.Rotation
	if err := db.View(t.Context(), func(tx *bolt.Tx) (err error) { list, err = tx.Rotations(); return err }); err != nil || len(list) != 3 {
		t.Fatal(list, err)
	}
	if signs, trusted := pki.Standing(list); signs != 3 || !slices.Equal(trusted, []int64{3, 1}) {
		t.Errorf("%d signs, %v are trusted", signs, trusted)
	}
	for _, c := range []struct {
		r    pki.Rotation
		want string
	}{
		{in(2, 1, pki.RotationDistributed), "before rotation 2 came to its end"},
		{in(3, 2, pki.RotationActive), "but generation 1 signed"},
		{pki.Rotation{ID: 3, From: 1, Kind: pki.RotateDeviceCA, State: pki.RotationActive, Steps: in(3, 1, pki.RotationPrepared).Steps}, "last step"},
		{pki.Rotation{ID: 3, From: 1, Kind: "spoons", State: pki.RotationActive, Steps: in(3, 1, pki.RotationActive).Steps}, "kind"},
		{pki.Rotation{ID: 3, From: 1, Kind: pki.RotateRoot, State: pki.RotationActive, Bundle: 7, Steps: in(3, 1, pki.RotationActive).Steps}, "never published"},
	} {
		put(c.r)
		if f := found(); !strings.Contains(f, c.want) {
			t.Errorf("%q, want %q in it", f, c.want)
		}
		put(good...) // what storetest checks at the end
	}
}
