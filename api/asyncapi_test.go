package api_test

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"muster/internal/wire"
)

// doc is asyncapi.yaml as plain JSON values.
func doc(t *testing.T) map[string]any {
	t.Helper()
	b, err := os.ReadFile("asyncapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var y any
	if err := yaml.Unmarshal(b, &y); err != nil {
		t.Fatal(err)
	}
	j, err := json.Marshal(y)
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(j))
	if err != nil {
		t.Fatal(err)
	}
	return v.(map[string]any)
}

// at follows names from v; a $ref on the way is resolved within root.
func at(t *testing.T, root map[string]any, v any, path ...string) any {
	t.Helper()
	for _, p := range append([]string{""}, path...) {
		if p != "" {
			m, ok := v.(map[string]any)
			if !ok || m[p] == nil {
				t.Fatalf("asyncapi.yaml has no %s at %q", strings.Join(path, "/"), p)
			}
			v = m[p]
		}
		for {
			m, ok := v.(map[string]any)
			ref, is := m["$ref"].(string)
			if !ok || !is {
				break
			}
			v = at(t, root, root, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		}
	}
	return v
}

func compile(t *testing.T, root map[string]any, schema string) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft7) // AsyncAPI 3.0: its Schema Object is a superset of draft 7
	if err := c.AddResource("asyncapi.json", root); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("asyncapi.json#/components/schemas/" + schema)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// decoders is what of internal/wire reads each message of components/messages, and the schema that describes it.
var decoders = map[string]struct {
	schema string
	typ    reflect.Type // nil for a document without fixed members
	decode func([]byte) error
}{
	"hello":      {"Hello", reflect.TypeFor[wire.Hello](), ignore(wire.DecodeHello)},
	"state":      {"State", nil, func(b []byte) error { _, err := wire.DecodeState(b); return err }},
	"ota":        {"OTAReport", reflect.TypeFor[wire.OTAReport](), ignore(wire.DecodeOTA)},
	"cert":       {"CertReport", reflect.TypeFor[wire.CertReport](), ignore(wire.DecodeCert)},
	"offer":      {"OTAOffer", reflect.TypeFor[wire.OTAOffer](), ignore(wire.DecodeOffer)},
	"cert-order": {"CertOrder", reflect.TypeFor[wire.CertOrder](), ignore(wire.DecodeCertOrder)},
	"cmd":        {"Cmd", reflect.TypeFor[wire.Cmd](), ignore(wire.DecodeCmd)},
}

func ignore[T any](f func([]byte) (T, error)) func([]byte) error {
	return func(b []byte) error { _, err := f(b); return err }
}

func TestChannelsAreTheTopicsOfTheCode(t *testing.T) {
	root := doc(t)
	want := map[string]string{ // address → action of the device
		wire.TelemetryTopic("{device}", "{channel}"): "send",
	}
	for _, c := range constants(t, "Up") {
		want[wire.UpTopic("{device}", wire.Up(c))] = "send"
	}
	for _, c := range constants(t, "Down") {
		want[wire.DownTopic("{device}", wire.Down(c))] = "receive"
	}
	got := map[string]string{}
	for name := range at(t, root, root, "operations").(map[string]any) {
		op := at(t, root, root, "operations", name)
		got[at(t, root, op, "channel", "address").(string)] = at(t, root, op, "action").(string)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("asyncapi.yaml has %v\nthe code has %v", got, want)
	}
	if n := len(at(t, root, root, "channels").(map[string]any)); n != len(want) {
		t.Errorf("%d channels for %d topics", n, len(want))
	}
	servers := at(t, root, root, "servers").(map[string]any)
	if servers[wire.VhostDevices] == nil || servers[wire.VhostFallback] == nil || len(servers) != 2 {
		t.Errorf("servers are not the vhosts of the code")
	}
}

func TestLimitsAreThoseOfTheCode(t *testing.T) {
	root := doc(t)
	want := map[string]int{
		"max-payload": wire.MaxPayload, "max-text": wire.MaxText, "max-depth": wire.MaxDepth, "max-csr": wire.MaxCSR,
		"quiet-budget": wire.QuietBudget, "max-topic": wire.MaxTopicLen, "max-slices": wire.MaxSlices, "max-spread": wire.MaxSpread,
	}
	got := at(t, root, root, "x-muster-limits").(map[string]any)
	for name, n := range want {
		if s, _ := got[name].(json.Number); s.String() != strconv.Itoa(n) {
			t.Errorf("%s is %v, in the code %d", name, got[name], n)
		}
	}
	if len(got) != len(want) {
		t.Errorf("limits without a constant: %v", got)
	}
}

func TestMembersAreThoseOfTheCode(t *testing.T) {
	root := doc(t)
	for name, d := range decoders {
		if d.typ == nil {
			continue
		}
		got, required := members(t, root, at(t, root, root, "components", "schemas", d.schema).(map[string]any))
		want, always := fields(d.typ)
		if !slices.Equal(got, want) {
			t.Errorf("%s: asyncapi.yaml has the members %v, the code %v", name, got, want)
		}
		for _, r := range always {
			if !slices.Contains(required, r) {
				t.Errorf("%s: the code always writes %s, asyncapi.yaml does not require it", name, r)
			}
		}
	}
}

// members returns the names of an object schema, or of all its alternatives, and those that each requires.
func members(t *testing.T, root, schema map[string]any) (names, required []string) {
	t.Helper()
	alternatives, is := schema["oneOf"].([]any)
	if !is {
		alternatives = []any{schema}
	}
	for i, a := range alternatives {
		o := at(t, root, a).(map[string]any)
		if o["additionalProperties"] != false {
			t.Errorf("a schema of a message lets unknown members in: %v", o)
		}
		for n := range o["properties"].(map[string]any) {
			names = append(names, n)
		}
		var req []string
		list, _ := o["required"].([]any)
		for _, r := range list {
			req = append(req, r.(string))
		}
		if i == 0 {
			required = req
		}
		required = slices.DeleteFunc(required, func(r string) bool { return !slices.Contains(req, r) })
	}
	slices.Sort(names)
	return slices.Compact(names), required
}

// fields returns the JSON names of a message struct, sorted, and those that are always written.
func fields(typ reflect.Type) (names, always []string) {
	for i := range typ.NumField() {
		name, options, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		names = append(names, name)
		if !strings.Contains(options, "omit") {
			always = append(always, name)
		}
	}
	slices.Sort(names)
	return names, always
}

func TestEnumsAreTheConstantsOfTheCode(t *testing.T) {
	root := doc(t)
	for _, typ := range []string{"OTAStep", "CertOp", "CmdOp"} {
		var got []string
		for _, v := range at(t, root, root, "components", "schemas", typ, "enum").([]any) {
			got = append(got, v.(string))
		}
		slices.Sort(got)
		if want := constants(t, typ); !slices.Equal(got, want) {
			t.Errorf("%s: asyncapi.yaml has %v, the code %v", typ, got, want)
		}
	}
	var ops []string
	for _, a := range at(t, root, root, "components", "schemas", "CertOrder", "oneOf").([]any) {
		ops = append(ops, at(t, root, a, "properties", "op", "const").(string))
	}
	slices.Sort(ops)
	if want := constants(t, "CertOp"); !slices.Equal(ops, want) {
		t.Errorf("CertOrder has the alternatives %v, the code %v", ops, want)
	}
}

// constants returns the values of the string constants of a type of internal/wire, sorted.
func constants(t *testing.T, typ string) []string {
	t.Helper()
	names, err := filepath.Glob("../internal/wire/*.go")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, n := range names {
		f, err := parser.ParseFile(token.NewFileSet(), n, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			if id, ok := spec.Type.(*ast.Ident); !ok || id.Name != typ {
				return true
			}
			for _, v := range spec.Values {
				if lit, ok := v.(*ast.BasicLit); ok {
					s, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					out = append(out, s)
				}
			}
			return true
		})
	}
	if len(out) == 0 {
		t.Fatalf("internal/wire has no constants of type %s", typ)
	}
	slices.Sort(out)
	return out
}

func TestExamplesAreGoodMessages(t *testing.T) {
	root := doc(t)
	messages := at(t, root, root, "components", "messages").(map[string]any)
	if len(messages) != len(decoders)+1 { // telemetry has no codec
		t.Errorf("%d messages, %d codecs", len(messages), len(decoders))
	}
	for name, d := range decoders {
		m := at(t, root, root, "components", "messages", name)
		if ref := m.(map[string]any)["payload"].(map[string]any)["$ref"]; ref != "#/components/schemas/"+d.schema {
			t.Errorf("%s: payload is %v", name, ref)
		}
		s := compile(t, root, d.schema)
		for _, e := range at(t, root, m, "examples").([]any) {
			payload := e.(map[string]any)["payload"]
			if err := s.Validate(payload); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			b, err := json.Marshal(payload)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.decode(b); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// Every sample is judged by the schema as it is by the code; where the schema cannot say it, the sample says so.
func TestSchemasAgreeWithTheSamples(t *testing.T) {
	root := doc(t)
	files, err := filepath.Glob("samples/*.json")
	if err != nil || len(files) != len(decoders) {
		t.Fatalf("%d files of samples for %d messages: %v", len(files), len(decoders), err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var f struct {
			Message, Topic string
			Cases          []struct {
				Name, Payload, Refused string
				BeyondSchema           bool `json:"beyond_schema"`
			}
		}
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatal(err)
		}
		d := decoders[f.Message]
		s := compile(t, root, d.schema)
		for _, c := range f.Cases {
			t.Run(f.Message+"/"+c.Name, func(t *testing.T) {
				if err := d.decode([]byte(c.Payload)); (err == nil) != (c.Refused == "") {
					t.Errorf("the code says %v, the sample %q", err, c.Refused)
				}
				v, err := jsonschema.UnmarshalJSON(strings.NewReader(c.Payload))
				if err == nil {
					err = s.Validate(v)
				}
				refused := err != nil || !strictJSON(c.Payload)
				if refused != (c.Refused != "" && !c.BeyondSchema) {
					t.Errorf("the schema says %v", err)
				}
			})
		}
	}
}

// strictJSON reports whether s obeys what asyncapi.yaml says of all payloads: no member twice, valid UTF-8. The state's
// codec asks nothing more of a document.
func strictJSON(s string) bool {
	_, err := wire.DecodeState([]byte(`{"x":` + s + `}`))
	return err == nil || !strings.Contains(err.Error(), "not the JSON")
}
