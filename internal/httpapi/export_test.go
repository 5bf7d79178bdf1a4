package httpapi

import "time"

// Operation shows a row of the table to tests.
type Operation struct {
	ID, Method, Path, Role string
	Query                  []string
	JSON, Image, NoBody    bool
}

// Operations returns the table.
func Operations() []Operation {
	var out []Operation
	for _, op := range operations {
		out = append(out, Operation{
			ID: op.id, Method: op.method, Path: op.path, Role: string(op.role), Query: op.query,
			JSON: op.body == jsonBody || op.body == maybeJSON || op.body == bulkBody, Image: op.body == image, NoBody: op.body == noBody,
		})
	}
	return out
}

// Routes returns what the router holds.
func (s *Server) Routes() map[string]bool {
	out := map[string]bool{}
	for _, r := range s.echo.Routes() {
		out[r.Method+" "+r.Path] = true
	}
	return out
}

// SetNow gives the server another clock.
func (s *Server) SetNow(now func() time.Time) { s.now = now }

// NewWithout builds a server whose table has an operation without a role.
func NewWithout(c Config) error {
	ops := append([]operation{}, operations...)
	ops[3].role = ""
	_, err := newServer(c, ops)
	return err
}

// MaxStreams is how many event streams are served at once.
const MaxStreams = maxStreams
