package rollout

import (
	"fmt"
	"strings"
)

// Diagram returns the lives of a rollout and of a device in it as two Mermaid state diagrams, drawn from the same tables
// that Step obeys. docs/rollouts.md holds them.
func Diagram() (rollouts, jobs string) {
	return mermaid(states, State.Next, State.Final), mermaid(jobStates, JobState.Next, JobState.Finished)
}

// mermaid draws one table. Ways on from an end are corrections, and dotted ends would say too little, so they are drawn as
// any other.
func mermaid[S ~string](all []S, next func(S) []S, end func(S) bool) string {
	var b strings.Builder
	name := func(s S) string { return strings.ReplaceAll(string(s), "-", "_") }
	b.WriteString("stateDiagram-v2\n")
	for _, s := range all {
		if strings.Contains(string(s), "-") {
			fmt.Fprintf(&b, "    state \"%s\" as %s\n", s, name(s))
		}
	}
	fmt.Fprintf(&b, "    [*] --> %s\n", name(all[0]))
	for _, s := range all {
		for _, n := range next(s) {
			fmt.Fprintf(&b, "    %s --> %s\n", name(s), name(n))
		}
		if end(s) {
			fmt.Fprintf(&b, "    %s --> [*]\n", name(s))
		}
	}
	return b.String()
}
