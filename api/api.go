// Package api holds muster's REST contract (openapi.yaml) and what is generated from it: the types that cross the wire
// and a plain client. internal/httpapi serves it, internal/client makes it pleasant to use.
package api

import _ "embed"

//go:generate go tool oapi-codegen -config oapi-codegen.yaml openapi.yaml

// Spec is openapi.yaml, as served at /api/v1/openapi.yaml.
//
//go:embed openapi.yaml
var Spec []byte

// Base is the path under which every operation of Spec is served.
const Base = "/api/v1"
