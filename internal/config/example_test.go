package config_test

import (
	"testing"

	"muster/internal/config"
)

// configs/musterd.yaml shows every setting with its default, or it misleads.
func TestTheCommentedExampleIsTheDefault(t *testing.T) {
	c, err := config.Load("../../configs/musterd.yaml", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c != config.Default() {
		t.Errorf("the example differs from the defaults:\n%+v\n%+v", c, config.Default())
	}
	if missing := config.KeysMissingIn("../../configs/musterd.yaml"); len(missing) > 0 {
		t.Errorf("the example does not show %v", missing)
	}
}
