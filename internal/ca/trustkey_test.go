package ca

import (
	"os"
	"path/filepath"
	"testing"

	"muster/internal/fleet"
)

func TestTheTrustKeyIsMadeOnceAndMayBeKeptElsewhere(t *testing.T) {
	dir, pass := t.TempDir(), []byte("correct horse battery")
	pub, signer, err := TrustKey(dir, pass)
	if err != nil || signer == nil || !pub.Equal(signer.Public()) {
		t.Fatal(err)
	}
	again, signer, err := TrustKey(dir, pass)
	if err != nil || signer == nil || !pub.Equal(again) {
		t.Fatalf("at the next start it is another one: %v", err)
	}
	if info, err := os.Stat(filepath.Join(dir, "trust.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Error("others may read the key")
	}
	if _, _, err := TrustKey(dir, []byte("wrong horse battery")); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("with a wrong passphrase: %v", err)
	}
	// A crash between the two files: the key that is there is kept.
	if err := os.Remove(filepath.Join(dir, "trust.pub.pem")); err != nil {
		t.Fatal(err)
	}
	if again, _, err = TrustKey(dir, pass); err != nil || !pub.Equal(again) {
		t.Errorf("after a crash it is another one: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "trust.key")); err != nil {
		t.Fatal(err)
	}
	if again, signer, err = TrustKey(dir, pass); err != nil || signer != nil || !pub.Equal(again) {
		t.Errorf("with the key elsewhere: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "trust.pub.pem"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := TrustKey(dir, pass); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a damaged public key: %v", err)
	}
}
