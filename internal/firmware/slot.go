package firmware

import (
	"time"

	"muster/internal/fleet"
)

// OTASlot is how large the OTA slots of a product's devices are: what its partition table says, which no update changes.
type OTASlot struct {
	Product fleet.ProductID `json:"product"`
	Bytes   int64           `json:"bytes"` // of the smallest
	SetAt   time.Time       `json:"set_at"`
	SetBy   string          `json:"set_by"`
}
