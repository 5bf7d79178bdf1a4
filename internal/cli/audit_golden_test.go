package cli

import (
	"strings"
	"testing"

	"muster/internal/audit"
)

func TestAuditVerdict(t *testing.T) {
	v := audit.Verdict{
		Origin: strings.Repeat("0f", 16), First: 1, Last: 1234, Hash: strings.Repeat("ab", 32), Checkpoints: 12, SignedTo: 1230, SignedAt: now, UnsignedAt: now.AddDate(0, 0, 1),
		Keys: []string{"UeO2v1dJ0yL1kq5cRrMdmMhWXVqsOTzvD2Wj8PjSMu8"},
	}
	golden(t, "audit-verify", false, func(u *ui) { (&app{ui: u}).printVerdict(v) })
	v.Pinned, v.WitnessedTo, v.Adopted, v.ChainedAt, v.SignedTo = true, 1000, 40, now.AddDate(-1, 0, 0), v.Last
	golden(t, "audit-verify-kept", false, func(u *ui) { (&app{ui: u}).printVerdict(v) })
}
