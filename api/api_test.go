package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/speakeasy-api/openapi/openapi"

	"muster/api"
)

func load(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(api.Spec)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func TestTheContractIsValidOpenAPI31(t *testing.T) {
	if err := load(t).Validate(context.Background(), openapi3.EnableExamplesValidation()); err != nil {
		t.Errorf("kin-openapi: %v", err)
	}
	doc, findings, err := openapi.Unmarshal(t.Context(), bytes.NewReader(api.Spec))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		t.Errorf("speakeasy: %v", f)
	}
	if v := doc.GetOpenAPI(); !strings.HasPrefix(v, "3.1.") {
		t.Errorf("version %s", v)
	}
}

func TestExamplesAreOfTheirSchema(t *testing.T) {
	n := 0
	for name, ref := range load(t).Components.Schemas {
		for _, ex := range ref.Value.Examples {
			n++
			raw, err := json.Marshal(ex)
			if err != nil {
				t.Fatal(err)
			}
			var v any
			if err := json.Unmarshal(raw, &v); err != nil {
				t.Fatal(err)
			}
			if err := load(t).ValidateSchemaJSON(ref.Value, v, openapi3.EnableFormatValidation()); err != nil {
				t.Errorf("%s: example %s: %v", name, raw, err)
			}
		}
	}
	if n < 15 {
		t.Errorf("only %d examples were looked at", n)
	}
}

func TestEveryOperationNamesARoleAndAnswersProblems(t *testing.T) {
	for path, item := range load(t).Paths.Map() {
		for method, op := range item.Operations() {
			if role, _ := op.Extensions["x-muster-role"].(string); role == "" {
				t.Errorf("%s %s has no x-muster-role", method, path)
			}
			def := op.Responses.Default()
			if def == nil || def.Value.Content.Get("application/problem+json") == nil {
				t.Errorf("%s %s does not say what its errors are", method, path)
			}
		}
	}
}

// What is generated is in the repository; it must be what the contract gives.
func TestGeneratedCodeIsFresh(t *testing.T) {
	out := filepath.Join(t.TempDir(), "api.gen.go")
	config, err := os.ReadFile("oapi-codegen.yaml")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "oapi-codegen.yaml")
	config = bytes.Replace(config, []byte("output: api.gen.go"), []byte("output: "+out), 1)
	if err := os.WriteFile(elsewhere, config, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "tool", "oapi-codegen", "-config", elsewhere, "openapi.yaml")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, msg)
	}
	want, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	have, err := os.ReadFile("api.gen.go")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, have) {
		t.Error("api.gen.go is not what openapi.yaml gives: run go generate ./api")
	}
}
