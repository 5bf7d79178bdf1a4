package target

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"muster/internal/firmware"
)

// fields are the variables of an expression: what is known of a device.
var fields = []struct {
	name string
	typ  *cel.Type
	what string
}{
	{"id", cel.StringType, "device id"},
	{"product", cel.StringType, "product line"},
	{"hardware", cel.StringType, "board revision: what the device said, else what was registered"},
	{"labels", cel.MapType(cel.StringType, cel.StringType), "labels that operators gave it"},
	{"groups", cel.ListType(cel.StringType), "groups that operators put it into"},
	{"version", cel.StringType, "firmware version in its last hello"},
	{"image", cel.StringType, "hash of the running image, 64 hex digits"},
	{"chip", cel.StringType, "chip in its last hello, like esp32s3"},
	{"chip_revision", cel.IntType, "silicon revision × 100; 0 if unknown"},
	{"secure_version", cel.IntType, "anti-rollback counter"},
	{"boot", cel.StringType, "why it started last"},
	{"online", cel.BoolType, "has a session with its certificate"},
	{"disabled", cel.BoolType, "an operator disabled it"},
	{"last_seen", cel.TimestampType, "last message or connection; 1970 if never"},
	{"created", cel.TimestampType, "when it was registered"},
	{"now", cel.TimestampType, "the time of asking"},
	{"state", cel.DynType, "its merged state document; numbers are doubles"},
}

// Fields returns the names that an expression may use, with what they mean, in the order in which they are shown.
func Fields() (names, meanings []string) {
	for _, f := range fields {
		names, meanings = append(names, f.name), append(meanings, f.what)
	}
	return names, meanings
}

// The two functions beside CEL's own, over the order of versions (semver.org 2.0.0 §11). A version without an order is
// neither below nor at another one.
const (
	fnLess    = "version_less"     // version_less("1.4.0", version)
	fnAtLeast = "version_at_least" // version_at_least(version, "1.4.0")
)

// maxCost bounds one evaluation, in cel's units: about as many steps.
const maxCost = 100_000

func compare(a, b ref.Val, judge func(int) bool) ref.Val {
	x, ok1 := a.Value().(string)
	y, ok2 := b.Value().(string)
	if !ok1 || !ok2 {
		return types.False
	}
	v, err1 := firmware.ParseVersion(x)
	w, err2 := firmware.ParseVersion(y)
	return types.Bool(err1 == nil && err2 == nil && judge(v.Compare(w)))
}

func newEnv() (*cel.Env, error) {
	opts := []cel.EnvOption{
		cel.CrossTypeNumericComparisons(true), // state.heap < 1000, though JSON has only doubles
		cel.Function(fnLess, cel.Overload(fnLess+"_string_string", []*cel.Type{cel.StringType, cel.StringType}, cel.BoolType,
			cel.BinaryBinding(func(a, b ref.Val) ref.Val { return compare(a, b, func(n int) bool { return n < 0 }) }))),
		cel.Function(fnAtLeast, cel.Overload(fnAtLeast+"_string_string", []*cel.Type{cel.StringType, cel.StringType}, cel.BoolType,
			cel.BinaryBinding(func(a, b ref.Val) ref.Val { return compare(a, b, func(n int) bool { return n >= 0 }) }))),
	}
	for _, f := range fields {
		opts = append(opts, cel.Variable(f.name, f.typ))
	}
	return cel.NewEnv(opts...)
}

// shared is the environment, built once: it is immutable, and costs a millisecond.
var shared atomic.Pointer[cel.Env]

func env() (*cel.Env, error) {
	if e := shared.Load(); e != nil {
		return e, nil
	}
	e, err := newEnv()
	if err == nil {
		shared.Store(e)
	}
	return e, err
}

// explain turns the compiler's words into one sentence with its place.
func explain(iss *cel.Issues) string {
	errs := iss.Errors()
	if len(errs) == 0 {
		return "it does not compile"
	}
	first := errs[0]
	text := first.Message
	if name, ok := strings.CutPrefix(text, "undeclared reference to '"); ok {
		name, _, _ = strings.Cut(name, "'")
		names, _ := Fields()
		slices.Sort(names)
		text = fmt.Sprintf("%.40q is no field; there are %s", name, strings.Join(names, ", "))
	}
	// A parser's list of all that it would have taken helps nobody.
	text, _, _ = strings.Cut(text, " expecting {")
	if len(text) > 400 {
		text = text[:400] + "…"
	}
	return fmt.Sprintf("line %d, column %d: %s", first.Location.Line(), first.Location.Column()+1, text)
}
