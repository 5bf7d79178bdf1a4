package config_test

import (
	"strings"
	"testing"

	"muster/configs"
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

// The file that init writes keeps every comment and means what it should.
func TestTheRenderedFileKeepsTheCommentsAndTakesTheValues(t *testing.T) {
	c, err := config.Load("", nil, []string{"listen.ops=127.0.0.1:7", "certificates.lifetime=100h", "broker.probe=false", "tls.broker_auth=true", "broker.auth_url=https://h:1", "data_dir=/x", "broker.server_name=h"})
	if err != nil {
		t.Fatal(err)
	}
	text := c.Render(configs.Musterd)
	again, err := config.Load(write(t, text), nil, nil)
	if err != nil || again != c {
		t.Errorf("%v\n%s", err, text)
	}
	if strings.Count(text, "#") != strings.Count(configs.Musterd, "#") {
		t.Error("comments were lost")
	}
	d := config.Default()
	if d.Render(configs.Musterd) != configs.Musterd {
		t.Error("the defaults change the example")
	}
}
