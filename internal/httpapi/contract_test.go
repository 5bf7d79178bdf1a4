package httpapi_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"muster/api"
	"muster/internal/access"
	"muster/internal/dispatch"
	"muster/internal/enroll"
	"muster/internal/httpapi"
	"muster/internal/inventory"
	"muster/internal/ota"
	"muster/internal/recovery"
)

var pathParam = regexp.MustCompile(`\{([a-z]+)\}`)

func TestTheTableIsTheContract(t *testing.T) {
	doc, err := openapi3.NewLoader().LoadFromData(api.Spec)
	if err != nil {
		t.Fatal(err)
	}
	routes := open(t).srv.Routes()
	table := map[string]httpapi.Operation{}
	for _, op := range httpapi.Operations() {
		table[op.Method+" "+op.Path] = op
	}
	n := 0
	for path, item := range doc.Paths.Map() {
		for method, spec := range item.Operations() {
			n++
			at := method + " " + pathParam.ReplaceAllString(path, ":$1")
			op, ok := table[at]
			if !ok || !routes[method+" "+api.Base+pathParam.ReplaceAllString(path, ":$1")] {
				t.Errorf("%s is in the contract and not served", at)
				continue
			}
			if op.ID != spec.OperationID {
				t.Errorf("%s is %s in the contract and %s in the table", at, spec.OperationID, op.ID)
			}
			if role := spec.Extensions["x-muster-role"]; role != op.Role {
				t.Errorf("%s: the contract takes role %v, the table %s", op.ID, role, op.Role)
			}
			var query []string
			for _, p := range slices.Concat(item.Parameters, spec.Parameters) {
				if p.Value.In == "query" {
					query = append(query, p.Value.Name)
				}
			}
			slices.Sort(query)
			if have := slices.Sorted(slices.Values(op.Query)); !slices.Equal(have, query) {
				t.Errorf("%s: the contract has the query parameters %v, the table %v", op.ID, query, have)
			}
			body := spec.RequestBody
			if (body == nil) != op.NoBody || body != nil && (body.Value.Content["application/json"] != nil) != op.JSON {
				t.Errorf("%s: contract and table do not agree on the body", op.ID)
			}
		}
	}
	if n != len(table) {
		t.Errorf("%d operations in the contract, %d in the table", n, len(table))
	}
	for r := range routes {
		if _, path, _ := strings.Cut(r, " "); path == "/livez" || path == "/readyz" || path == "/metrics" {
			delete(routes, r)
		}
	}
	if len(routes) != n {
		t.Errorf("%d routes for %d operations", len(routes), n)
	}
}

func TestAnOperationWithoutARoleDoesNotStartTheServer(t *testing.T) {
	if err := httpapi.NewWithout(open(t).Config); err == nil {
		t.Error("it started")
	}
	c := open(t).Config
	c.Recovery = nil
	if _, err := httpapi.New(c); err == nil {
		t.Error("it started without a port")
	}
}

// The use cases that exist are the ports.
var (
	_ httpapi.Devices      = (*inventory.Inventory)(nil)
	_ httpapi.Doors        = (*enroll.Enroller)(nil)
	_ httpapi.Certificates = (*enroll.Enroller)(nil)
	_ httpapi.Recovery     = (*recovery.Recovery)(nil)
	_ httpapi.Firmware     = (*ota.Catalog)(nil)
	_ httpapi.Rollouts     = (*dispatch.Dispatcher)(nil)
	_ httpapi.Operators    = (*access.Access)(nil)
)
