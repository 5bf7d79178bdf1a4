package cli

import (
	"testing"
	"time"

	"muster/api"
)

func TestRotationOutput(t *testing.T) {
	gen := func(n int64) *int64 { return &n }
	good := api.Proof{Door: "broker-mqtt", Client: gen(1), Ok: true, Words: "broker-mqtt: client of generation 1, roots of generation 1: good"}
	bad := api.Proof{Door: "devices", Client: gen(0), Words: "devices: client of generation 0, roots of generation 1: refused: remote error: tls: bad certificate"}
	r := api.Rotation{
		ID: 1, Kind: api.RotationKindRoot, State: api.RotationStateActive, Next: "retiring", Bundle: 2, Lacking: api.DeviceCount{Count: 1, Devices: []string{"sensor-2"}},
		Blockers: []string{"2 devices connect with certificates of the old device CA: sensor-2, x. They get new ones when they renew: muster certs renew --issuer ab12", "devices: client of generation 0, roots of generation 1: refused: remote error: tls: bad certificate"},
		Proofs:   []api.Proof{good, bad},
		Steps: []api.RotationStep{
			{State: "prepared", At: now.Add(-50 * time.Hour), By: "anna"}, {State: "distributed", At: now.Add(-49 * time.Hour), By: "anna", After: []api.Proof{good, good}},
			{State: "active", At: now.Add(-time.Hour), By: "ben", Why: "x lies in the workshop", Forced: []string{"1 devices have not taken trust bundle 2: x"}, Before: []api.Proof{good}, After: []api.Proof{good, bad}},
		},
	}
	for _, tty := range []bool{false, true} {
		name := map[bool]string{false: "rotation-pipe", true: "rotation-terminal"}[tty]
		golden(t, name, tty, func(u *ui) { (&app{ui: u}).printRotation(r) })
	}
}
