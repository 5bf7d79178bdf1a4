package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) rolloutWatch() *cobra.Command {
	var every time.Duration
	c := &cobra.Command{
		Use: "watch ID", Short: "follow a rollout until it ends", Args: cobra.ExactArgs(1),
		Long: `Follows a rollout until it is completed, halted or aborted: bars that are redrawn on a terminal, a line for each change in a
pipe. The exit code tells how it went: 0 completed, 7 halted or aborted. Leaving with ctrl-c does not touch the rollout.`,
	}
	c.Flags().DurationVar(&every, "every", time.Second, "how often to look")
	return a.online(c, func(ctx context.Context, args []string) error {
		if every < 10*time.Millisecond {
			return usagef("--every is at least 10ms")
		}
		return a.watch(ctx, args[0], every)
	})
}

// maxMisses is how many looks in a row may fail before watching is given up: musterd may be restarting.
const maxMisses = 30

func (a *app) watch(ctx context.Context, id string, every time.Duration) error {
	v := &watchView{u: a.ui}
	misses := 0
	for {
		r, err := client.Read[api.Rollout](a.client.GetRollout(ctx, id))
		switch {
		case err == nil:
			misses = 0
			v.show(r)
			if done, err := verdict(r); done {
				return v.last(r, err)
			}
		case !passing(err) || misses == maxMisses:
			return err
		default:
			misses++
			v.lost(err)
		}
		t := time.NewTimer(every)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// passing reports whether an error may be over soon.
func passing(err error) bool {
	if _, ok := errors.AsType[*client.Unreachable](err); ok {
		return true
	}
	e, ok := errors.AsType[*client.Error](err)
	return ok && (e.Status == 503 || e.Status == 429)
}

// verdict says whether a rollout is over, and how.
func verdict(r api.Rollout) (done bool, err error) {
	switch r.State {
	case api.RolloutStateCompleted:
		return true, nil
	case api.RolloutStateHalted, api.RolloutStateAborted:
		return true, &outcome{fmt.Sprintf("rollout %s is %s: %s", r.ID, r.State, first(r.Reason, "no reason was given"))}
	}
	return false, nil
}

// watchView draws a rollout again and again.
type watchView struct {
	u     *ui
	lines int    // drawn, on a terminal
	said  string // last line, in a pipe
}

func (v *watchView) show(r api.Rollout) {
	if v.u.json {
		return // the end is shown
	}
	if v.u.tty {
		v.draw(drawing(v.u, r))
		return
	}
	v.say(summary(r))
}

// say prints a line if it tells something new.
func (v *watchView) say(line string) {
	if line != v.said {
		v.u.printf("%s %s\n", v.u.now().UTC().Format(time.RFC3339), line)
		v.said = line
	}
}

func (v *watchView) lost(err error) {
	if v.u.json {
		return
	}
	if v.u.tty {
		v.draw([]string{v.u.paint("waiting for musterd: "+clean(err.Error()), yellow)})
		return
	}
	v.say("waiting for musterd: " + clean(err.Error()))
}

// draw replaces what was drawn before.
func (v *watchView) draw(lines []string) {
	var b strings.Builder
	if v.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", v.lines)
	}
	for _, l := range lines {
		b.WriteString("\r\x1b[2K" + l + "\n")
	}
	b.WriteString("\x1b[J")
	v.lines = len(lines)
	v.u.printf("%s", b.String())
}

// last shows the end: with --output json the rollout itself.
func (v *watchView) last(r api.Rollout, err error) error {
	if showErr := v.u.show(r, func() {}); showErr != nil {
		return showErr
	}
	return err
}

// summary is one line for a pipe. It holds only what counts, so that it changes when something happened.
func summary(r api.Rollout) string {
	return fmt.Sprintf("%s %s stage %d/%d succeeded %d/%d in-flight %d pending %d failed %d",
		r.ID, r.State, r.Stage, len(r.Stages), r.Counts["succeeded"], r.Targets, r.InFlight, r.Counts["pending"], failed(r.Counts))
}

// drawing is what a terminal shows: a head, a bar for each stage, and what devices are doing.
func drawing(u *ui, r api.Rollout) []string {
	state := string(r.State)
	lines := []string{fmt.Sprintf("%s  %s %s  %s", u.paint(r.ID, bold), clean(r.Product), clean(r.Version), u.paint(state, stateShade(state)))}
	width := 0
	for _, s := range r.Stages {
		width = max(width, utf8.RuneCountInString(stageName(s)))
	}
	bars := max(10, min(40, u.width-width-40))
	before := 0
	for _, s := range r.Stages {
		own := max(s.Quota-before, s.Started)
		before = max(before, s.Quota)
		st := stageState(r, s)
		name := clean(stageName(s))
		lines = append(lines, fmt.Sprintf("  %s%s %s %s %s", name, strings.Repeat(" ", width-min(width, utf8.RuneCountInString(name))),
			stageBar(u, s, own, bars), fmt.Sprintf("%d/%d", s.Counts["succeeded"], own), u.paint(st.text, st.shade)))
	}
	line := fmt.Sprintf("  %d in flight, %d to come, %d succeeded", r.InFlight, r.Counts["pending"], r.Counts["succeeded"])
	if n := failed(r.Counts); n > 0 {
		line += u.paint(fmt.Sprintf(", %d failed", n), red)
	}
	lines = append(lines, line)
	if r.Reason != "" {
		lines = append(lines, "  "+clean(r.Reason))
	}
	return lines
}

// stageBar shows what succeeded, what is under way and what failed, in that order.
func stageBar(u *ui, s api.RolloutStage, own, width int) string {
	if own == 0 {
		return strings.Repeat("░", width)
	}
	part := func(n int) int { return n * width / own }
	good := part(s.Counts["succeeded"])
	busy := min(part(s.InFlight), width-good)
	bad := min(part(s.Failures), width-good-busy)
	if s.Failures > 0 && bad == 0 && good+busy < width {
		bad = 1 // one failure must be seen in the widest fleet
	}
	return u.paint(strings.Repeat("█", good), green) + u.paint(strings.Repeat("▒", busy), yellow) + u.paint(strings.Repeat("█", bad), red) +
		strings.Repeat("░", width-good-busy-bad)
}
