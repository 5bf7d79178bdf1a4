package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"muster/api"
)

// view shows a rollout: frames on a terminal, lines in a pipe.
type view struct {
	u     *ui
	every time.Duration
	r     api.Rollout
	some  bool // r is set
	lines []api.Decision
	lost  error
	skew  time.Duration // what the server's clock is ahead of ours
	begin time.Time     // by the server's clock, when watching began
	pace  pace

	drawn []int     // columns of the lines of the last frame
	said  string    // last line about progress, in a pipe
	at    time.Time // when it was said
}

// keepLines is how many decisions a frame may show.
const keepLines = 6

func newView(u *ui, every time.Duration) *view { return &view{u: u, every: every} }

// now is the server's time, as far as it is known.
func (v *view) now() time.Time { return v.u.now().Add(v.skew) }

// take takes what happened and shows it. over says that the rollout has come to its end.
func (v *view) take(u news) (over bool) {
	if !u.date.IsZero() {
		v.skew = u.date.Sub(v.u.now())
	}
	if v.begin.IsZero() {
		v.begin = v.now().Truncate(time.Second) // the server's time comes in whole seconds
	}
	v.lost = u.lost
	switch {
	case u.rollout != nil:
		v.r, v.some = *u.rollout, true
		v.pace.take(v.u.now(), v.r)
	case u.decision != nil:
		v.lines = append(v.lines, *u.decision)
		if n := len(v.lines); n > keepLines {
			v.lines = slices.Delete(v.lines, 0, n-keepLines)
		}
		if !v.u.tty && !v.u.json && !u.decision.At.Before(v.begin) {
			v.u.printf("%s %s\n", u.decision.At.UTC().Format(time.RFC3339), clean(v.r.ID+" "+u.decision.Code+": "+sentence(*u.decision)))
		}
	}
	over, _ = verdict(v.r)
	v.show(over)
	return over && v.some
}

// told reports whether the decision by which the rollout ended is known.
func (v *view) told() bool {
	return len(v.lines) > 0 && v.lines[len(v.lines)-1].To == string(v.r.State)
}

// sentence is what a decision says, and who made it, if that is not in it.
func sentence(d api.Decision) string {
	if d.Who != "" && !strings.Contains(d.Text, d.Who) {
		return d.Text + " (" + d.Who + ")"
	}
	return d.Text
}

// show shows what is known. In a pipe, a line about progress waits for its time, unless it is urgent.
func (v *view) show(urgent bool) {
	switch {
	case v.u.json:
	case v.u.tty:
		v.draw()
	case v.lost != nil:
		v.say("waiting for musterd: " + clean(v.lost.Error()))
	case v.some && (urgent || v.u.now().Sub(v.at) >= v.every):
		v.say(summary(v.r))
	}
}

// redraw is called from time to time: times go on, and the terminal may have another size.
func (v *view) redraw() {
	if v.lost == nil {
		v.show(false)
	}
}

// say prints a line if it tells something new.
func (v *view) say(line string) {
	if line != v.said {
		v.u.printf("%s %s\n", v.now().UTC().Format(time.RFC3339), line)
		v.said, v.at = line, v.u.now()
	}
}

// last shows the end, with --output json the rollout itself, and returns how it went.
func (v *view) last() error {
	if !v.some {
		return fmt.Errorf("musterd told nothing of the rollout")
	}
	v.lost = nil
	v.show(true)
	if err := v.u.show(v.r, func() {}); err != nil {
		return err
	}
	_, err := verdict(v.r)
	return err
}

// Control sequences (ECMA-48; DEC private modes 25 and 2026). A terminal that does not know synchronized output passes
// over it.
const (
	hideCursor = "\x1b[?25l"
	showCursor = "\x1b[?25h"
	beginFrame = "\x1b[?2026h"
	endFrame   = "\x1b[?2026l"
	clearRight = "\x1b[K"
	clearBelow = "\x1b[J"
)

// draw replaces the last frame. It goes out in one piece, and overwrites instead of clearing first, so nothing flickers. When
// the terminal has become narrower, the lines of the last frame take more rows than they did.
func (v *view) draw() {
	width, height := v.u.size()
	lines := v.frame(width, height)
	var b strings.Builder
	b.WriteString(beginFrame)
	if v.drawn == nil {
		b.WriteString(hideCursor)
	}
	if rows := rowsOf(v.drawn, width); rows > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\r", rows)
	}
	v.drawn = v.drawn[:0]
	for _, l := range lines {
		b.WriteString(l + clearRight + "\n")
		v.drawn = append(v.drawn, columns(l))
	}
	b.WriteString(clearBelow + endFrame)
	v.u.printf("%s", b.String())
}

// close gives the cursor back.
func (v *view) close() {
	if v.drawn != nil {
		v.u.printf("%s", showCursor)
	}
}

// rowsOf is how many rows lines of these widths take on a terminal of that width.
func rowsOf(widths []int, width int) int {
	rows := 0
	for _, w := range widths {
		rows += max(1, (w+width-1)/width)
	}
	return rows
}

// columns counts what a line shows: colour takes no place. Every character is one column, which holds for what we write.
func columns(line string) int {
	n, escape := 0, false
	for _, r := range line {
		switch {
		case r == '\x1b':
			escape = true
		case escape:
			escape = r != 'm'
		default:
			n++
		}
	}
	return n
}

// fit cuts a line to width columns, with its colours ended.
func fit(line string, width int) string {
	if columns(line) <= width {
		return line
	}
	var b strings.Builder
	n, escape, coloured := 0, false, false
	for _, r := range line {
		if !escape && r != '\x1b' {
			if n == width-1 {
				break
			}
			n++
		} else if r == '\x1b' {
			escape, coloured = true, true
		} else if r == 'm' {
			escape = false
		}
		b.WriteRune(r)
	}
	b.WriteString("…")
	if coloured {
		b.WriteString(reset)
	}
	return b.String()
}

// frame is what a terminal of this size shows: a head, a bar for each stage, what devices do, rates, what is waited for,
// and the last decisions as far as there is room.
func (v *view) frame(width, height int) []string {
	var lines []string
	if v.some {
		lines = v.body(width)
	}
	if v.lost != nil { // below the head, where the smallest terminal shows it
		lines = slices.Insert(lines, min(1, len(lines)), "  "+v.u.paint("waiting for musterd: "+clean(v.lost.Error()), yellow))
	}
	room := height - 1 - len(lines)
	if v.some && room > 2 && len(v.lines) > 0 {
		lines = append(lines, "")
		for _, d := range v.lines[max(0, len(v.lines)-(room-1)):] {
			lines = append(lines, "  "+v.u.paint(d.At.UTC().Format("15:04:05"), dim)+"  "+clean(sentence(d)))
		}
	}
	lines = lines[:min(len(lines), max(height-1, 1))]
	for i := range lines {
		lines[i] = fit(lines[i], width)
	}
	return lines
}

func (v *view) body(width int) []string {
	u, r := v.u, v.r
	lines := []string{v.head()}
	names := len("all")
	for _, s := range r.Stages {
		names = max(names, utf8.RuneCountInString(clean(stageName(s))))
	}
	names = min(names, 24)
	digits := 2*len(fmt.Sprint(r.Targets)) + 1
	bars := max(10, min(50, width-names-digits-22))
	before := 0
	for _, s := range r.Stages {
		own := max(s.Quota-before, s.Started)
		before = max(before, s.Quota)
		st := stageState(r, s)
		lines = append(lines, v.row(stageName(s), names, stageBar(u, s.Counts["succeeded"], s.InFlight, s.Failures, own, bars),
			fmt.Sprintf("%d/%d", s.Counts["succeeded"], own), digits, u.paint(st.text, st.shade)))
	}
	if len(r.Stages) > 1 {
		share := ""
		if r.Targets > 0 {
			share = fmt.Sprintf("%d%%", 100*r.Counts["succeeded"]/r.Targets)
		}
		lines = append(lines, v.row("all", names, stageBar(u, r.Counts["succeeded"], r.InFlight, failed(r.Counts), r.Targets, bars),
			fmt.Sprintf("%d/%d", r.Counts["succeeded"], r.Targets), digits, share))
	}
	lines = append(lines, "")
	lines = append(lines, v.facts()...)
	return lines
}

func (v *view) row(name string, names int, bar, count string, digits int, state string) string {
	name = fit(clean(name), names)
	return fmt.Sprintf("  %s%s  %s  %*s  %s", name, strings.Repeat(" ", max(0, names-utf8.RuneCountInString(name))), bar, digits, count, state)
}

func (v *view) head() string {
	r := v.r
	when := ""
	switch {
	case !r.EndedAt.IsZero() && !r.StartedAt.IsZero():
		when = "took " + about(r.EndedAt.Sub(r.StartedAt))
	case !r.StartedAt.IsZero():
		when = "since " + about(max(v.now().Sub(r.StartedAt), 0))
	}
	return strings.TrimRight(fmt.Sprintf("%s  %s %s  %s  %s", v.u.paint(r.ID, bold), clean(r.Product), clean(r.Version),
		v.u.paint(string(r.State), stateShade(string(r.State))), when), " ")
}

// facts are the lines below the bars; those that have nothing to say are left out.
func (v *view) facts() (lines []string) {
	r := v.r
	say := func(name, value string, c shade) {
		if value != "" {
			lines = append(lines, fmt.Sprintf("  %s  %s", v.u.paint(fmt.Sprintf("%-10s", name), dim), v.u.paint(value, c)))
		}
	}
	flight := fmt.Sprintf("%d of at most %d", r.InFlight, r.Plan.MaxInFlight)
	if r.InFlight > 0 {
		flight += ": " + tally(r.Counts, "offered", "accepted", "downloading", "downloaded", "installed", "rebooting", "verifying")
	}
	if over, _ := verdict(r); !over {
		say("in flight", flight, plain)
	}
	if n := failed(r.Counts); n > 0 {
		limit := ""
		if r.Plan.MaxFailures != nil {
			limit = fmt.Sprintf(" (%d count, %d tolerated)", r.Failures, *r.Plan.MaxFailures)
		}
		say("failed", fmt.Sprintf("%d: %s%s", n, tally(r.Counts, "failed", "rejected", "rolled-back", "timed-out", "went-dark"), limit), red)
	}
	say("others", tally(r.Counts, "pending", "waiting", "cancelled", "skipped"), plain)
	say("rate", v.pace.text(r, v.u.now(), v.now()), plain)
	say("waits", clean(waiting(r, v.now())), yellow)
	if r.State != api.RolloutStateRunning && r.State != api.RolloutStateDraft {
		say("why", clean(r.Reason), stateShade(string(r.State)))
	}
	if r.UndoneBy != "" {
		say("undone by", clean(r.UndoneBy), plain)
	}
	return lines
}

// tally lists the states that some devices are in.
func tally(c api.Counts, states ...string) string {
	var out []string
	for _, s := range states {
		if n := c[s]; n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, s))
		}
	}
	return strings.Join(out, ", ")
}

// stageBar shows what succeeded, what is under way and what failed, in that order.
func stageBar(u *ui, succeeded, inFlight, failures, own, width int) string {
	if own == 0 {
		return strings.Repeat("░", width)
	}
	part := func(n int) int { return n * width / own }
	good := min(part(succeeded), width)
	busy := min(part(inFlight), width-good)
	bad := min(part(failures), width-good-busy)
	if failures > 0 && bad == 0 && good+busy < width {
		bad = 1 // one failure must be seen in the widest fleet
	}
	return u.paint(strings.Repeat("█", good), green) + u.paint(strings.Repeat("▒", busy), yellow) + u.paint(strings.Repeat("▚", bad), red) +
		strings.Repeat("░", width-good-busy-bad)
}

// summary is one line for a pipe. It holds only what counts, so that it changes when something happened.
func summary(r api.Rollout) string {
	line := fmt.Sprintf("%s %s stage %d/%d succeeded %d/%d in-flight %d pending %d failed %d",
		r.ID, r.State, r.Stage, len(r.Stages), r.Counts["succeeded"], r.Targets, r.InFlight, r.Counts["pending"]+r.Counts["waiting"], failed(r.Counts))
	if n := r.Counts["skipped"] + r.Counts["cancelled"]; n > 0 {
		line += fmt.Sprintf(" left-out %d", n)
	}
	return line
}

// pace is how fast a rollout goes, by the counts that the server told and when they came.
type pace struct{ marks []mark }

type mark struct {
	at               time.Time
	offered, success int
}

// paceWindow is what rates are taken over; below paceLeast they say nothing.
const (
	paceWindow = 2 * time.Minute
	paceLeast  = 10 * time.Second
)

func (p *pace) take(at time.Time, r api.Rollout) {
	m := mark{at: at, success: r.Counts["succeeded"]}
	for _, s := range r.Stages {
		m.offered += s.Started
	}
	p.marks = append(p.marks, m)
	for len(p.marks) > 2 && at.Sub(p.marks[1].at) > paceWindow {
		p.marks = p.marks[1:]
	}
	if len(p.marks) > 1000 { // many changes a second: every other one is enough
		half := p.marks[:0]
		for i, m := range p.marks {
			if i%2 == 0 || i == len(p.marks)-1 {
				half = append(half, m)
			}
		}
		p.marks = half
	}
}

// rates returns offers and successes per minute: of the last minutes, or since the start if watching has just begun. at is our
// time, server the server's.
func (p *pace) rates(r api.Rollout, at, server time.Time) (offers, successes float64, ok bool) {
	if len(p.marks) == 0 || r.StartedAt.IsZero() {
		return 0, 0, false
	}
	last, from := p.marks[len(p.marks)-1], p.marks[0]
	for _, m := range p.marks {
		if at.Sub(m.at) >= paceWindow {
			from = m
		}
	}
	minutes := at.Sub(from.at).Minutes()
	if at.Sub(p.marks[0].at) < paceLeast {
		from, minutes = mark{}, server.Sub(r.StartedAt).Minutes()
	}
	if minutes < paceLeast.Minutes() {
		return 0, 0, false
	}
	return float64(last.offered-from.offered) / minutes, float64(last.success-from.success) / minutes, true
}

// text says how fast it goes, and how long the rest takes at that rate; what stages soak comes on top.
func (p *pace) text(r api.Rollout, at, server time.Time) string {
	offers, successes, ok := p.rates(r, at, server)
	if !ok || r.State != api.RolloutStateRunning {
		return ""
	}
	line := fmt.Sprintf("%s/min offered, %s/min succeeded", rate(offers), rate(successes))
	left := r.Counts["pending"] + r.Counts["waiting"] + r.InFlight
	done := r.Stage > 0 && r.Stage <= len(r.Stages) && !r.Stages[r.Stage-1].DoneAt.IsZero()
	if left > 0 && successes > 0 && !done { // a stage that soaks or waits has no rate
		line += ", about " + about(time.Duration(float64(left)/successes*float64(time.Minute))) + " left"
	}
	return line
}

func rate(f float64) string {
	if f >= 10 || f == 0 {
		return fmt.Sprintf("%.0f", f)
	}
	return cmp.Or(strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0"), "0")
}
