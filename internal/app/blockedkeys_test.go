package app

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"muster/internal/fleet"
)

func TestTheBlocklistFollowsItsFile(t *testing.T) {
	a, b := fleet.Hash(strings.Repeat("ab", 32)), fleet.Hash(strings.Repeat("cd", 32))
	list := blocklist{path: filepath.Join(t.TempDir(), "blocked")}
	write := func(text string) {
		t.Helper()
		next := list.path + ".new" // as an operator's tool should: whole or not at all
		if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, list.path); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := list.load(); err == nil {
		t.Error("a file that is not there is no error")
	}
	write(string(a) + "\n")
	if n, fresh, err := list.load(); n != 1 || !fresh || err != nil || !list.blocked(a) || list.blocked(b) {
		t.Error(n, fresh, err)
	}
	if _, fresh, err := list.load(); fresh || err != nil {
		t.Error("read again for nothing", err)
	}
	write(string(b) + "\nnonsense\n")
	if _, _, err := list.load(); err == nil || !strings.Contains(err.Error(), "line 2") || !list.blocked(a) {
		t.Errorf("a damaged list: %v", err)
	}
	write(string(b) + "\n")
	if _, fresh, err := list.load(); !fresh || err != nil || list.blocked(a) || !list.blocked(b) {
		t.Error("not read again", err)
	}
	none := blocklist{}
	if _, fresh, err := none.load(); fresh || err != nil || none.blocked(a) {
		t.Error("a list without a file")
	}
}
