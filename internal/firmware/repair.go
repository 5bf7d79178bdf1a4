package firmware

import (
	"time"

	"muster/internal/fleet"
)

// Repair is an operator's order that a device which is on the fallback gets a release there, because the image that it runs
// cannot do mutual TLS (DESIGN §9). It is over when the device is back at the front, whatever it runs then.
type Repair struct {
	Device  fleet.DeviceID  `json:"device"`
	Product fleet.ProductID `json:"product"`
	Version Version         `json:"version"`
	Job     fleet.RolloutID `json:"job"` // of the offer; no rollout has this id
	At      time.Time       `json:"at"`
	By      string          `json:"by"`
	Offered time.Time       `json:"offered,omitzero"` // last
	Offers  int             `json:"offers,omitempty"` // hellos on the fallback that were answered with it
}
