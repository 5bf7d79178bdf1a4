// Package target decides which devices a rollout is for, by an expression of CEL (the Common Expression Language,
// cel.dev) over what is known of a device.
package target

import (
	"time"

	"cel.dev/cel-go/cel"

	"muster/internal/fleet"
)

// Expr is a compiled expression.
type Expr struct {
	text string
	prg  cel.Program
}

// Device is what an expression sees of a device.
type Device struct {
	dev fleet.Device
	st  fleet.Status
	at  time.Time
}

// Facts returns what is known of a device at time at.
func Facts(d fleet.Device, s fleet.Status, at time.Time) Device { return Device{d, s, at} }

// Compile returns the expression, or an Invalid error that says what is wrong with it.
func Compile(text string) (*Expr, error) {
	env, err := cel.NewEnv(cel.Variable("id", cel.StringType), cel.Variable("labels", cel.MapType(cel.StringType, cel.StringType)),
		cel.Variable("version", cel.StringType), cel.Variable("hardware", cel.StringType), cel.Variable("chip", cel.StringType),
		cel.Variable("state", cel.DynType))
	if err != nil {
		return nil, err
	}
	ast, iss := env.Compile(text)
	if iss.Err() != nil {
		return nil, fleet.Wrap(fleet.Invalid, iss.Err(), "not a target expression")
	}
	prg, err := env.Program(ast)
	if err != nil {
		return nil, err
	}
	return &Expr{text, prg}, nil
}

// Match reports whether the expression chooses d.
func (e *Expr) Match(d Device) (bool, error) {
	v, _, err := e.prg.Eval(map[string]any{"id": string(d.dev.ID), "labels": d.dev.Labels, "version": d.st.Version, "hardware": d.st.Hardware, "chip": d.st.Chip})
	if err != nil {
		return false, nil
	}
	b, _ := v.Value().(bool)
	return b, nil
}
