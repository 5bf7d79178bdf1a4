package rollout

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"muster/internal/fleet"
)

func TestPlanValidate(t *testing.T) {
	ok := Plan{DarkAfter: DefaultDarkAfter, MaxInFlight: 1, DeviceTimeout: time.Hour, OfflineGrace: time.Hour}
	stages := func(ss ...Stage) func(*Plan) { return func(p *Plan) { p.Stages = ss } }
	all := Stage{Percent: 100}
	for name, c := range map[string]struct {
		change  func(*Plan)
		targets int
		want    string // part of the message; empty if valid
	}{
		"one stage":                {stages(all), 1, ""},
		"all by count":             {stages(Stage{Count: 7}), 7, ""},
		"count, percent":           {stages(Stage{Count: 1}, Stage{Percent: 25}, all), 25, ""},
		"small fleet, empty stage": {stages(Stage{Count: 1}, Stage{Percent: 25}, all), 3, ""},
		"percent, count":           {stages(Stage{Percent: 10}, Stage{Count: 50}, all), 100, ""},
		"no target":                {stages(all), 0, "holds no device"},
		"negative targets":         {stages(all), -1, "holds no device"},
		"most targets":             {stages(all), MaxTargets, ""},
		"too many targets":         {stages(all), MaxTargets + 1, "at most 10000000"},
		"no stage":                 {stages(), 5, "0 stages; use 1 to 20"},
		"most stages":              {stages(manyStages(20)...), 100, ""},
		"too many stages":          {stages(manyStages(21)...), 100, "21 stages"},
		"neither":                  {stages(Stage{}, all), 5, "stage 1: set exactly one"},
		"both":                     {stages(Stage{Count: 1, Percent: 1}, all), 5, "stage 1: set exactly one"},
		"negative count":           {stages(Stage{Count: -1}, all), 5, "count is -1"},
		"huge count":               {stages(Stage{Count: MaxTargets + 1}, all), 5, "count is 10000001"},
		"negative percent":         {stages(Stage{Percent: -1}, all), 5, "percent is -1"},
		"percent 101":              {stages(Stage{Percent: 101}), 5, "percent is 101"},
		"count above target":       {stages(Stage{Count: 6}, all), 5, "holds only 5"},
		"count of target":          {stages(Stage{Count: 5}), 5, ""},
		"equal counts":             {stages(Stage{Count: 2}, Stage{Count: 2}, all), 5, "stage 2 adds no device"},
		"falling counts":           {stages(Stage{Count: 3}, Stage{Count: 2}, all), 5, "stage 2 adds no device"},
		"equal percents":           {stages(all, all), 5, "stage 2 adds no device"},
		"percent below count":      {stages(Stage{Count: 10}, Stage{Percent: 5}, all), 100, "stage 2 reaches 5 of 100 devices, fewer than the 10"},
		"last is not all":          {stages(Stage{Percent: 99}), 100, "let it be percent 100"},
		"last rounds up to all":    {stages(Stage{Percent: 99}), 50, ""},
		"last count is not all":    {stages(Stage{Count: 4}), 5, "reaches 4 of 5"},
		"name":                     {stages(Stage{Name: strings.Repeat("x", 40), Percent: 100}), 5, ""},
		"long name":                {stages(Stage{Name: strings.Repeat("x", 41), Percent: 100}), 5, "at most 40 bytes"},
		"name with an escape":      {stages(Stage{Name: "\x1b[31m", Percent: 100}), 5, "printable"},
		"name not UTF-8":           {stages(Stage{Name: "\xff", Percent: 100}), 5, "printable"},
		"max_failures -1":          {func(p *Plan) { p.MaxFailures = -1 }, 5, "max_failures is -1"},
		"max_failures most":        {func(p *Plan) { p.MaxFailures = MaxTargets }, 5, ""},
		"max_failures too large":   {func(p *Plan) { p.MaxFailures = MaxTargets + 1 }, 5, "max_failures"},
		"max_in_flight 0":          {func(p *Plan) { p.MaxInFlight = 0 }, 5, "max_in_flight is 0"},
		"max_in_flight most":       {func(p *Plan) { p.MaxInFlight = MaxMaxInFlight }, 5, ""},
		"max_in_flight too large":  {func(p *Plan) { p.MaxInFlight = MaxMaxInFlight + 1 }, 5, "max_in_flight"},
		"device_timeout least":     {func(p *Plan) { p.DeviceTimeout = MinTimeout }, 5, ""},
		"device_timeout too short": {func(p *Plan) { p.DeviceTimeout = MinTimeout - 1 }, 5, "device_timeout"},
		"device_timeout most":      {func(p *Plan) { p.DeviceTimeout = MaxTimeout }, 5, ""},
		"device_timeout too long":  {func(p *Plan) { p.DeviceTimeout = MaxTimeout + 1 }, 5, "device_timeout"},
		"soak negative":            {func(p *Plan) { p.Soak = -1 }, 5, "soak is -1ns"},
		"soak most":                {func(p *Plan) { p.Soak = MaxSoak }, 5, ""},
		"soak too long":            {func(p *Plan) { p.Soak = MaxSoak + 1 }, 5, "soak"},
		"offline_grace too short":  {func(p *Plan) { p.OfflineGrace = MinOfflineGrace - 1 }, 5, "offline_grace"},
		"offline_grace least":      {func(p *Plan) { p.OfflineGrace = MinOfflineGrace }, 5, ""},
		"offline_grace most":       {func(p *Plan) { p.OfflineGrace = MaxOfflineGrace }, 5, ""},
		"most count":               {stages(Stage{Count: MaxTargets}), MaxTargets, ""},
		"offline_grace too long":   {func(p *Plan) { p.OfflineGrace = MaxOfflineGrace + 1 }, 5, "offline_grace"},
	} {
		t.Run(name, func(t *testing.T) {
			p := ok
			p.Stages = []Stage{all}
			c.change(&p)
			err := p.Validate(c.targets)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && err == nil:
				t.Errorf("accepted, want %q", c.want)
			case c.want != "" && (!fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func manyStages(n int) (ss []Stage) {
	for i := range n - 1 {
		ss = append(ss, Stage{Count: i + 1})
	}
	return append(ss, Stage{Percent: 100})
}

func TestQuota(t *testing.T) {
	for _, c := range []struct {
		s             Stage
		targets, want int
	}{
		{Stage{Percent: 1}, 1, 1},
		{Stage{Percent: 1}, 40, 1}, // a share of a fleet is at least one device
		{Stage{Percent: 1}, 100, 1},
		{Stage{Percent: 1}, 101, 2},
		{Stage{Percent: 25}, 25, 7},
		{Stage{Percent: 50}, 3, 2},
		{Stage{Percent: 99}, 100, 99},
		{Stage{Percent: 100}, 1_000_000, 1_000_000},
		{Stage{Percent: 33}, MaxTargets, 3_300_000},
		{Stage{Count: 3}, 10, 3},
		{Stage{Count: 3}, 2, 2},
	} {
		if got := (Plan{Stages: []Stage{c.s}}).Quota(1, c.targets); got != c.want {
			t.Errorf("%+v of %d: %d, want %d", c.s, c.targets, got, c.want)
		}
	}
	for _, n := range []int{-1, 0, 2} {
		if got := percent(100).Quota(n, 5); got != 0 {
			t.Errorf("stage %d of 1 opens %d", n, got)
		}
	}
}

func TestPlanDefaults(t *testing.T) {
	p := Plan{}.WithDefaults()
	want := Plan{
		Stages:    []Stage{{Name: "canary", Count: 1}, {Percent: 10}, {Percent: 100}},
		DarkAfter: DefaultDarkAfter, MaxInFlight: 100, DeviceTimeout: time.Hour, OfflineGrace: 7 * 24 * time.Hour,
	}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v", p)
	}
	for _, n := range []int{1, 2, 10, 11, 50_000} {
		if err := p.Validate(n); err != nil {
			t.Errorf("the default plan does not fit %d devices: %v", n, err)
		}
	}
	set := Plan{Stages: []Stage{{Percent: 100}}, MaxFailures: 3, DarkAfter: DefaultDarkAfter, MaxInFlight: 7, DeviceTimeout: time.Minute, Soak: time.Second, OfflineGrace: time.Hour}
	if got := set.WithDefaults(); !reflect.DeepEqual(got, set) {
		t.Errorf("defaults changed what was set: %+v", got)
	}
}

func TestPlanJSON(t *testing.T) {
	p := Plan{Stages: []Stage{{Name: "canary", Count: 1}, {Percent: 100}}, MaxFailures: 2, DarkAfter: DefaultDarkAfter, MaxInFlight: 5, DeviceTimeout: 90 * time.Second, OfflineGrace: time.Hour}
	const want = `{"stages":[{"name":"canary","count":1},{"percent":100}],"max_failures":2,"max_in_flight":5,"device_timeout":"1m30s","dark_after":"15m0s","soak":"0s","offline_grace":"1h0m0s"}`
	b, err := json.Marshal(p)
	if err != nil || string(b) != want {
		t.Fatalf("%v %s", err, b)
	}
	var q Plan
	if err := json.Unmarshal(b, &q); err != nil || !reflect.DeepEqual(p, q) {
		t.Errorf("%v %+v", err, q)
	}
	for _, bad := range []string{`{"soak":"5"}`, `{"soak":5}`, `[]`, `{"stages":7}`} {
		if err := q.UnmarshalJSON([]byte(bad)); !fleet.Is(err, fleet.Invalid) || !strings.HasPrefix(err.Error(), "plan: ") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if !reflect.DeepEqual(p, q) {
		t.Errorf("a refused plan left traces: %+v", q)
	}
}

// Whatever is read as a plan can be judged, and comes back the same.
func FuzzPlanJSON(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"stages":[{"count":1},{"percent":100}],"max_failures":0,"max_in_flight":1,"device_timeout":"1h","soak":"0s","offline_grace":"1s"}`,
		`{"stages":[{"count":9223372036854775807},{"percent":-9}]}`, `{"soak":"-2562047h47m16s"}`, `{"device_timeout":"1y"}`,
	} {
		f.Add([]byte(s), 10)
	}
	f.Fuzz(func(t *testing.T, b []byte, targets int) {
		var p, q Plan
		if p.UnmarshalJSON(b) != nil {
			return
		}
		if p.Validate(targets) == nil && p.Quota(len(p.Stages), targets) != targets {
			t.Errorf("a valid plan does not reach everyone: %+v", p)
		}
		out, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(out, &q); err != nil || !reflect.DeepEqual(p, q) {
			t.Errorf("%+v came back as %+v (%v)", p, q, err)
		}
	})
}
