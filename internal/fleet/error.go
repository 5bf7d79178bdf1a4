package fleet

import (
	"errors"
	"fmt"
)

// Kind says what a caller can do about an error. Each kind has one HTTP status (internal/httpapi).
type Kind string

const (
	Invalid       Kind = "invalid"       // the request is wrong; repeating it is pointless (400)
	Unauthorized  Kind = "unauthorized"  // who is asking is not known (401)
	Forbidden     Kind = "forbidden"     // known, and may not (403)
	NotFound      Kind = "not-found"     // no such thing (404)
	Conflict      Kind = "conflict"      // the thing is in another state than the request supposes (409)
	TooLarge      Kind = "too-large"     // over a limit that the message names (413)
	Unprocessable Kind = "unprocessable" // well formed, but what it holds is not acceptable (422)
	TooMany       Kind = "too-many"      // over a rate; try later (429)
	Unavailable   Kind = "unavailable"   // a part that muster needs does not answer; try later (503)
	Full          Kind = "full"          // no room to store it (507)
	Internal      Kind = "internal"      // a fault of muster; the message stays inside (500)
)

// Error is the one error type that crosses package boundaries. Msg is safe to show to whoever asked: it never holds a
// secret or raw input. Err, which may be nil, is for the log alone. Code, where set, is a stable word for programs.
type Error struct {
	Kind Kind
	Code string
	Msg  string
	Err  error
}

func (e *Error) Error() string {
	if e.Err != nil {
		return e.Msg + ": " + e.Err.Error()
	}
	return e.Msg
}

func (e *Error) Unwrap() error { return e.Err }

// Errorf returns an Error whose message is safe to show. It does not wrap: use Wrap for a cause.
func Errorf(k Kind, format string, a ...any) error {
	return &Error{Kind: k, Msg: fmt.Sprintf(format, a...)}
}

// Coded is Errorf with a stable code for programs.
func Coded(k Kind, code, format string, a ...any) error {
	return &Error{Kind: k, Code: code, Msg: fmt.Sprintf(format, a...)}
}

// Wrap returns an Error with err as the cause that only the log shows.
func Wrap(k Kind, err error, format string, a ...any) error {
	return &Error{Kind: k, Msg: fmt.Sprintf(format, a...), Err: err}
}

// KindOf returns the kind of the first Error in err's chain, Internal if there is none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// Is reports whether err is of kind k.
func Is(err error, k Kind) bool { return err != nil && KindOf(err) == k }
