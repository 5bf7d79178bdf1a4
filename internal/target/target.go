// Package target decides which devices a rollout, a label or a list is for, by an expression of CEL (the Common Expression
// Language, cel.dev) over what is known of a device. It does no I/O.
//
// A device for which the expression has no value, because it reads a label or a member of the state that the device lacks,
// does not match. So labels.site != "berlin" does not choose devices without a site; !("site" in labels) does.
package target

import (
	"encoding/json"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/interpreter"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// MaxLength is the longest expression, in bytes.
const MaxLength = 2048

// Expr is a compiled expression. It may be used by many goroutines at once.
type Expr struct {
	text string
	prg  cel.Program
}

// Compile returns the expression, or an Invalid error with code target_invalid that says where and what is wrong.
func Compile(text string) (*Expr, error) {
	if len(text) > MaxLength {
		return nil, invalid("a target expression has at most %d bytes", MaxLength)
	}
	if strings.TrimSpace(text) == "" {
		return nil, invalid("the expression is empty; write one like labels.site == \"berlin\"")
	}
	e, err := env()
	if err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "target expressions cannot be compiled")
	}
	ast, iss := e.Compile(text)
	if iss != nil && iss.Err() != nil {
		return nil, invalid("%s", explain(iss))
	}
	if !ast.OutputType().IsExactType(cel.BoolType) && !ast.OutputType().IsExactType(cel.DynType) {
		return nil, invalid("the expression gives a %s; it must be true or false for a device, like labels.site == \"berlin\"", ast.OutputType())
	}
	prg, err := e.Program(ast, cel.CostLimit(maxCost), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the expression cannot be used: a constant in it is not valid")
	}
	return &Expr{text: text, prg: prg}, nil
}

func invalid(format string, a ...any) error {
	return fleet.Coded(fleet.Invalid, "target_invalid", format, a...)
}

// String returns the expression as it was written.
func (e *Expr) String() string { return e.text }

// Match reports whether the expression chooses d. Without a value for d, or above the cost limit, it does not; the error
// says why, for those who want to know.
func (e *Expr) Match(d Device) (bool, error) {
	v, _, err := e.prg.Eval(&d)
	if err != nil {
		return false, err
	}
	if v.Type() != types.BoolType {
		return false, invalid("the expression gives a %s for this device, neither true nor false", v.Type().TypeName())
	}
	return v == types.True, nil
}

// Device is what an expression sees of a device. Each field is looked up only if the expression names it.
type Device struct {
	dev fleet.Device
	st  fleet.Status
	at  time.Time
}

// Facts returns what is known of a device at time at.
func Facts(d fleet.Device, s fleet.Status, at time.Time) Device { return Device{d, s, at} }

// ResolveName implements interpreter.Activation.
func (d *Device) ResolveName(name string) (any, bool) {
	switch name {
	case "id":
		return string(d.dev.ID), true
	case "product":
		return string(d.dev.Product), true
	case "hardware":
		if d.st.Hardware != "" {
			return d.st.Hardware, true
		}
		return d.dev.Hardware, true
	case "labels":
		if d.dev.Labels == nil {
			return map[string]string{}, true
		}
		return d.dev.Labels, true
	case "groups":
		return d.dev.Groups, true
	case "version":
		return d.st.Version, true
	case "image":
		return string(d.st.Image), true
	case "chip":
		return d.st.Chip, true
	case "chip_revision":
		return d.st.ChipRevision, true
	case "secure_version":
		return int64(d.st.SecureVersion), true
	case "boot":
		return d.st.Boot, true
	case "online":
		return d.st.Online && d.st.Vhost == wire.VhostDevices, true
	case "disabled":
		return d.dev.Disabled, true
	case "last_seen":
		return stamp(d.st.LastSeen), true
	case "created":
		return stamp(d.dev.CreatedAt), true
	case "now":
		return stamp(d.at), true
	case "state":
		var state map[string]any
		if len(d.st.State) == 0 || json.Unmarshal(d.st.State, &state) != nil || state == nil {
			state = map[string]any{}
		}
		return state, true
	}
	return nil, false
}

// stamp is a time that CEL takes: it has none before the year 1.
func stamp(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(0, 0).UTC()
	}
	return t.UTC()
}

// Parent implements interpreter.Activation.
func (d *Device) Parent() interpreter.Activation { return nil }
