package app

import (
	"testing"

	"muster/internal/downlink"
)

// TestEveryKindIsComposed: an entry that nobody composes is given up, and its device never hears of it.
func TestEveryKindIsComposed(t *testing.T) {
	have := new(App).composers()
	for _, k := range []downlink.Kind{downlink.Hello, downlink.OTA, downlink.Renew, downlink.Cert, downlink.No, downlink.Cmd} {
		if have[k] == nil {
			t.Errorf("nobody composes %q", k)
		}
	}
}
