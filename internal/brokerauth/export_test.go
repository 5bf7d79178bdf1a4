package brokerauth

import (
	"time"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// Note lets tests refuse without a question.
func (x *Index) Note(id fleet.DeviceID, reason admission.Reason, at time.Time) {
	x.note(id, reason, at)
}
