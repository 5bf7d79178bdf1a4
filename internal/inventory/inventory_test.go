package inventory_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
	"muster/internal/inventory"
	"muster/internal/store/bolt"
	"muster/internal/store/storetest"
	"muster/internal/target"
	"muster/internal/wire"
)

var at = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func open(t *testing.T) (*inventory.Inventory, *bolt.DB) {
	db := storetest.Open(t)
	return inventory.New(inventory.Config{
		Update: func(ctx context.Context, f func(inventory.Tx) error) error {
			return db.Update(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
		View: func(ctx context.Context, f func(inventory.Tx) error) error {
			return db.View(ctx, func(tx *bolt.Tx) error { return f(tx) })
		},
	}), db
}

func add(t *testing.T, inv *inventory.Inventory, ids ...fleet.DeviceID) {
	t.Helper()
	for _, id := range ids {
		if _, err := inv.Add(t.Context(), at, []inventory.Spec{{ID: id, Product: "lamp"}}, false, "op"); err != nil {
			t.Fatal(err)
		}
	}
}

func in(t *testing.T, db *bolt.DB, f func(*bolt.Tx) error) {
	t.Helper()
	if err := db.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func TestAddingTwiceIsOneDeviceAndAnotherDescriptionAConflict(t *testing.T) {
	inv, _ := open(t)
	spec := inventory.Spec{ID: "d1", Product: "lamp", Labels: map[string]string{"site": "hull"}}
	for range 2 {
		ds, err := inv.Add(t.Context(), at, []inventory.Spec{spec}, false, "op")
		if err != nil || len(ds) != 1 || ds[0].Device.Rev != 1 {
			t.Fatalf("%+v, %v", ds, err)
		}
	}
	spec.Labels = map[string]string{"site": "york"}
	_, err := inv.Add(t.Context(), at, []inventory.Spec{{ID: "d2", Product: "lamp"}, spec}, false, "op")
	if !fleet.Is(err, fleet.Conflict) {
		t.Errorf("got %v", err)
	}
	if _, err := inv.Get(t.Context(), "d2"); !fleet.Is(err, fleet.NotFound) {
		t.Errorf("half of a refused request was stored: %v", err)
	}
}

func TestDescriptionsAreHeldToTheirLimits(t *testing.T) {
	inv, _ := open(t)
	many := map[string]string{}
	for i := range inventory.MaxLabels + 1 {
		many[fmt.Sprint("k", i)] = "v"
	}
	for name, spec := range map[string]inventory.Spec{
		"no id":            {Product: "lamp"},
		"upper case":       {ID: "D1", Product: "lamp"},
		"no product":       {ID: "d1"},
		"newline":          {ID: "d1", Product: "lamp", Hardware: "a\nb"},
		"escape in label":  {ID: "d1", Product: "lamp", Labels: map[string]string{"a": "\x1b[31m"}},
		"label key":        {ID: "d1", Product: "lamp", Labels: map[string]string{"A": "x"}},
		"empty label key":  {ID: "d1", Product: "lamp", Labels: map[string]string{"": "x"}},
		"long label value": {ID: "d1", Product: "lamp", Labels: map[string]string{"a": strings.Repeat("x", inventory.MaxLabelValue+1)}},
		"too many labels":  {ID: "d1", Product: "lamp", Labels: many},
	} {
		if _, err := inv.Add(t.Context(), at, []inventory.Spec{spec}, false, "op"); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := inv.Add(t.Context(), at, make([]inventory.Spec, inventory.MaxBulk+1), false, "op"); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("too many at once: %v", err)
	}
}

func TestAnUpdateKeepsWhatItDoesNotNameAndKnowsItsRevision(t *testing.T) {
	inv, _ := open(t)
	add(t, inv, "d1")
	rev, x, y := uint64(1), "x", "y"
	if _, err := inv.Update(t.Context(), at, "d1", inventory.Change{Rev: &rev, Labels: map[string]*string{"a": &x, "b": &y}}, "op"); err != nil {
		t.Fatal(err)
	}
	if _, err := inv.Update(t.Context(), at, "d1", inventory.Change{Rev: &rev, Hardware: &x}, "op"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("an old revision: %v", err)
	}
	d, err := inv.Update(t.Context(), at, "d1", inventory.Change{Labels: map[string]*string{"a": nil}}, "op")
	if err != nil || len(d.Labels) != 1 || d.Labels["b"] != "y" || d.Product != "lamp" {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestListPagesThroughWhatTheFilterChooses(t *testing.T) {
	inv, db := open(t)
	for i := range 600 {
		add(t, inv, fleet.DeviceID(fmt.Sprintf("d%03d", i)))
	}
	in(t, db, func(tx *bolt.Tx) error {
		for i := 0; i < 600; i += 3 {
			id := fleet.DeviceID(fmt.Sprintf("d%03d", i))
			if err := inv.Connected(tx, inventory.Session{Device: id, At: at, Connection: "c"}); err != nil {
				return err
			}
		}
		return nil
	})
	online := true
	var got []fleet.DeviceID
	page := fleet.Page{Limit: 70}
	for {
		rows, more, err := inv.List(t.Context(), inventory.Filter{Online: &online}, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			got = append(got, r.Device.ID)
		}
		if !more {
			break
		}
		page.After = string(rows[len(rows)-1].Device.ID)
	}
	if len(got) != 200 || got[0] != "d000" || got[199] != "d597" {
		t.Errorf("%d devices: %v", len(got), got)
	}
}

func TestStateMergesAsRFC7396Says(t *testing.T) {
	inv, db := open(t)
	add(t, inv, "d1")
	for _, doc := range []string{`{"a":1,"b":{"x":1,"y":2}}`, `{"b":{"y":null,"z":9007199254740993},"c":[1,{"n":null}]}`, `{"a":null}`} {
		in(t, db, func(tx *bolt.Tx) error { return inv.State(tx, at, "d1", []byte(doc)) })
	}
	r, err := inv.Get(t.Context(), "d1")
	want := `{"b":{"x":1,"z":9007199254740993},"c":[1,{"n":null}]}`
	if err != nil || string(r.Status.State) != want || !json.Valid(r.Status.State) {
		t.Errorf("%s, %v", r.Status.State, err)
	}
	big := `{"big":"` + strings.Repeat("x", inventory.MaxState) + `"}`
	err = db.Update(t.Context(), func(tx *bolt.Tx) error { return inv.State(tx, at, "d1", []byte(big)) })
	if !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a state that grows without end: %v", err)
	}
}

// Events of the broker may come late, twice, out of order or not at all.
func TestPresence(t *testing.T) {
	inv, db := open(t)
	add(t, inv, "d1")
	up := func(name string, when int) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			return inv.Connected(tx, inventory.Session{Device: "d1", Vhost: wire.VhostDevices, Serial: "a1", Connection: name, At: at.Add(time.Duration(when) * time.Second)})
		}
	}
	down := func(name string, when int) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			return inv.Disconnected(tx, inventory.Session{Device: "d1", Connection: name, At: at.Add(time.Duration(when) * time.Second)})
		}
	}
	list := func(when int, names ...string) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			var live []inventory.Session
			for i, n := range names {
				live = append(live, inventory.Session{Device: "d1", Connection: n, At: at.Add(time.Duration(i) * time.Second)})
			}
			_, err := inv.Reconcile(tx, at.Add(time.Duration(when)*time.Second), live, 10*time.Second)
			return err
		}
	}
	for _, step := range []struct {
		what   string
		do     func(*bolt.Tx) error
		online bool
		name   string
	}{
		{"connects", up("c1", 1), true, "c1"},
		{"connects, told twice", up("c1", 1), true, "c1"},
		{"takes over", up("c2", 2), true, "c2"},
		{"the old session's end comes after", down("c1", 2), true, "c2"},
		{"the old session's begin comes late", up("c1", 1), true, "c2"},
		{"too young to be missing from the list", list(5), true, "c2"},
		{"missing from the list", list(30), false, "c2"},
		{"in the list, its event was lost", list(31, "c1", "c2", "c3"), true, "c3"},
		{"ends", down("c3", 40), false, "c3"},
		{"ends, told twice", down("c3", 40), false, "c3"},
		{"still in a list that is not settled", list(45, "c1", "c2"), false, "c3"},
		{"an older session outlived it", list(60, "c1", "c2"), true, "c2"},
		{"that ends, too", down("c2", 61), false, "c2"},
	} {
		in(t, db, step.do)
		r, err := inv.Get(t.Context(), "d1")
		if err != nil || r.Status.Online != step.online || r.Status.Connection != step.name {
			t.Errorf("%s: online %v by %s, %v", step.what, r.Status.Online, r.Status.Connection, err)
		}
	}
	in(t, db, func(tx *bolt.Tx) error {
		return inv.Connected(tx, inventory.Session{Device: "ghost", Connection: "c", At: at})
	})
}

func TestGroupsAndLabelsOfManyAtOnce(t *testing.T) {
	inv, _ := open(t)
	var specs []inventory.Spec
	for i := range 5 {
		specs = append(specs, inventory.Spec{ID: fleet.DeviceID(fmt.Sprint("d", i)), Product: "lamp", Labels: map[string]string{"n": fmt.Sprint(i)}, Groups: []string{"b", "a", "a"}})
	}
	if _, err := inv.Add(t.Context(), at, specs, false, "op"); err != nil {
		t.Fatal(err)
	}
	if r, err := inv.Get(t.Context(), "d0"); err != nil || fmt.Sprint(r.Device.Groups) != "[a b]" {
		t.Fatalf("%v, %v", r.Device.Groups, err)
	}
	where, err := target.Compile(`labels.n in ["1", "2"] || id == "d4"`)
	if err != nil {
		t.Fatal(err)
	}
	change := inventory.Change{Labels: map[string]*string{"site": new("york"), "n": nil}, Join: []string{"early"}, Leave: []string{"a"}}
	dry := inventory.Bulk{Where: where, Change: change, DryRun: true}
	for _, b := range []inventory.Bulk{dry, {Where: where, Change: change}} {
		rep, err := inv.UpdateMany(t.Context(), at, b, "op")
		if err != nil || rep.Count != 3 || rep.Changed != 3 || fmt.Sprint(rep.Sample) != "[d1 d2 d4]" {
			t.Errorf("%+v, %v", rep, err)
		}
	}
	early := inventory.Filter{Group: "early"}
	if p, err := inv.Preview(t.Context(), early); err != nil || p.Count != 3 || p.Scanned != 5 {
		t.Errorf("%+v, %v", p, err)
	}
	if r, err := inv.Get(t.Context(), "d1"); err != nil || fmt.Sprint(r.Device.Groups, r.Device.Labels) != "[b early] map[site:york]" {
		t.Errorf("%v %v, %v", r.Device.Groups, r.Device.Labels, err)
	}
	rep, err := inv.UpdateMany(t.Context(), at, inventory.Bulk{Devices: []fleet.DeviceID{"d1", "d0"}, Change: inventory.Change{Join: []string{"early"}}}, "op")
	if err != nil || rep.Count != 2 || rep.Changed != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
	for name, b := range map[string]inventory.Bulk{
		"nobody":      {Change: change},
		"both":        {Where: where, Devices: []fleet.DeviceID{"d1"}},
		"nothing":     {Where: where},
		"a stranger":  {Devices: []fleet.DeviceID{"ghost"}, Change: change},
		"a bad group": {Where: where, Change: inventory.Change{Join: []string{"Not OK"}}},
	} {
		if _, err := inv.UpdateMany(t.Context(), at, b, "op"); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	// A file may be added again with other words, if that is what is meant.
	specs[0].Labels, specs[0].Groups = map[string]string{"n": "9"}, nil
	if _, err := inv.Add(t.Context(), at, specs[:1], false, "op"); !fleet.Is(err, fleet.Conflict) {
		t.Errorf("without update: %v", err)
	}
	ds, err := inv.Add(t.Context(), at, specs[:1], true, "op")
	if err != nil || !ds[0].Changed || ds[0].Created || ds[0].Device.Labels["n"] != "9" {
		t.Errorf("%+v, %v", ds, err)
	}
	if d := ds[0].Device; fmt.Sprint(d.Groups) != "[a b early]" { // what a line does not name stays
		t.Errorf("groups %v", d.Groups)
	}
	specs[0].Labels, specs[0].Groups = nil, []string{"late"}
	if ds, err = inv.Add(t.Context(), at, specs[:1], true, "op"); err != nil || fmt.Sprint(ds[0].Device.Groups, ds[0].Device.Labels) != "[late] map[n:9]" {
		t.Errorf("%+v, %v", ds, err)
	}
}
