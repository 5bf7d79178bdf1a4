package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"muster/api"
	"muster/internal/client"
)

// newRollout holds the flags of create and plan.
type newRollout struct {
	cmd     *cobra.Command
	file    string
	in      api.NewRollout
	stages  []string
	limits  []string
	labels  []string
	window  string
	site    string
	startAt string
	max     int
	pace    int
}

const rolloutHelp = `Everything about a rollout can stand in a file, --plan, in JSON or YAML: docs/rollouts.md explains each field. Flags
are for the common ones, and win over the file.

Stages are cumulative: --stage 1 --stage 25% --stage 100% offers the release to one device, then to a quarter of the target,
then to all. A stage may have a name, a share of devices that must succeed, and may wait for an operator at its end:
--stage canary=5,min=80,hold

--max-failures is the number of failures that is tolerated, whatever they are; one more stops the rollout. --limit is a finer
stop rule, [KIND[+KIND]…=](COUNT | PERCENT%/SAMPLE[@CONFIDENCE])[:REACTION]:
  --limit went-dark=1:rollback   the second device that goes dark brings the rollback
  --limit 5%/20@95:pause         pause when the failure rate is above 5 % at 95 % confidence, once 20 devices have a verdict
With --limit and without --max-failures, only the limits judge. Reactions: pause, halt, abort, rollback.

--window "CRON/LENGTH[/ZONE]" is when devices are offered the release: "0 2 * * */4h/Europe/Berlin" is from 2 to 6 at night.`

// flags adds the flags of a new rollout to c.
func (n *newRollout) flags(c *cobra.Command) {
	n.cmd = c
	f, p := c.Flags(), &n.in.Plan
	f.StringVar(&n.in.Product, "product", "", "product line")
	f.StringVar(&n.in.Version, "version", "", "version of the release")
	f.BoolVar(&n.in.Certificates.Renew, "certificates", false, "instead of a release: devices renew their certificate")
	f.StringVar(&n.in.Certificates.Lifetime, "lifetime", "", "with --certificates: of the new ones, and of all others once it is completed (default: as the policy says)")
	f.BoolVar(&n.in.Certificates.Force, "force", false, "with --lifetime: even if it locks out more devices than the settings allow")
	f.StringVar(&n.in.Target.Where, "where", "", `only devices that match this expression, like 'labels["site"] == "berlin"'`)
	f.StringArrayVar(&n.labels, "label", nil, "only devices with this label, key=value; may be repeated")
	f.StringArrayVar(&n.labels, "select", nil, "the same as --label")
	_ = f.MarkHidden("select")
	f.StringSliceVar(&n.in.Target.Devices, "device", nil, "only these devices")
	f.BoolVar(&n.in.Target.Static, "static", false, "devices that come to match while it runs do not join")
	f.StringVar(&n.file, "plan", "", "file with the plan, JSON or YAML, or - for standard input")
	f.StringArrayVar(&n.stages, "stage", nil, "[NAME=]N[%][,min=PERCENT][,hold]: devices, or percent of the target, each more than the one before; may be repeated (default 1, 10%, 100%)")
	f.IntVar(&n.max, "max-failures", 0, "failures that are tolerated")
	f.StringVar((*string)(&p.FailThen), "fail-then", "", "what one more failure brings: pause, halt (the default), abort, rollback")
	f.StringArrayVar(&n.limits, "limit", nil, "a finer stop rule, see above; may be repeated")
	f.IntVar(&p.MaxInFlight, "max-in-flight", 0, "devices that may update at once (default 100)")
	f.StringVar(&p.DeviceTimeout, "timeout", "", "from the offer to a session with the new image, for each device (default 1h)")
	f.StringVar(&p.VerifyFor, "verify-for", "", "how long a device must stay healthy before it counts as a success (default 5m)")
	f.StringVar(&p.Soak, "soak", "", "how long a stage that is done is watched (default 0s)")
	f.StringVar(&p.OfflineGrace, "offline-grace", "", "how long the last stage waits for devices that are offline (default 168h)")
	f.IntVar(&p.Retries, "retries", 0, "further attempts of a device that failed or timed out")
	f.IntVar(&n.pace, "per-minute", 0, "offers in a minute (default: no limit)")
	f.Int64Var(&p.BytesPerSecond, "bytes-per-second", 0, "for all downloads together (default: no limit)")
	f.StringVar(&n.site, "site", "", "LABEL=N or LABEL=N%: devices that share this label's value and may update at once")
	f.StringVar(&n.startAt, "start-at", "", "not before this time, like 2030-01-31T22:00:00Z")
	f.StringVar(&n.window, "window", "", `when devices are offered the release, "CRON/LENGTH[/ZONE]"`)
	f.BoolVar(&p.Approval, "approval", false, "somebody else must approve it before it can be started")
	f.StringVar(&p.Rollback.Version, "rollback-to", "", "the release to which a rollback takes devices back")
	f.BoolVar(&p.Rollback.PreviousSlot, "rollback-previous", false, "a rollback boots the image in a device's other slot, without a download")
	f.BoolVar(&p.AllowDowngrade, "allow-downgrade", false, "devices that run a newer version are targets too")
	_ = c.MarkFlagRequired("product")
	c.MarkFlagsOneRequired("version", "certificates")
	c.MarkFlagsMutuallyExclusive("version", "certificates")
	c.MarkFlagsMutuallyExclusive("rollback-to", "rollback-previous")
}

// read puts file and flags together.
func (n *newRollout) read(a *app) (in api.NewRollout, err error) {
	in = n.in
	if !in.Certificates.Renew && (in.Certificates.Lifetime != "" || in.Certificates.Force) {
		return in, usagef("--lifetime and --force go with --certificates")
	}
	if in.Target.Labels, err = parseLabels(n.labels); err != nil {
		return in, err
	}
	flags := in.Plan
	if n.file != "" {
		if in.Plan, err = a.readPlan(n.file); err != nil {
			return in, err
		}
		n.over(&in.Plan, flags)
	}
	return in, n.spell(&in.Plan)
}

// over copies the flags that were given over what the file says.
func (n *newRollout) over(p *api.Plan, flags api.Plan) {
	for name, set := range map[string]func(){
		"fail-then":         func() { p.FailThen = flags.FailThen },
		"max-in-flight":     func() { p.MaxInFlight = flags.MaxInFlight },
		"timeout":           func() { p.DeviceTimeout = flags.DeviceTimeout },
		"verify-for":        func() { p.VerifyFor = flags.VerifyFor },
		"soak":              func() { p.Soak = flags.Soak },
		"offline-grace":     func() { p.OfflineGrace = flags.OfflineGrace },
		"retries":           func() { p.Retries = flags.Retries },
		"bytes-per-second":  func() { p.BytesPerSecond = flags.BytesPerSecond },
		"approval":          func() { p.Approval = flags.Approval },
		"rollback-to":       func() { p.Rollback.Version, p.Rollback.PreviousSlot = flags.Rollback.Version, false },
		"rollback-previous": func() { p.Rollback.Version, p.Rollback.PreviousSlot = "", flags.Rollback.PreviousSlot },
		"allow-downgrade":   func() { p.AllowDowngrade = flags.AllowDowngrade },
	} {
		if n.cmd.Flags().Changed(name) {
			set()
		}
	}
}

// spell reads the flags that have a form of their own.
func (n *newRollout) spell(p *api.Plan) error {
	if n.cmd.Flags().Changed("max-failures") {
		p.MaxFailures = &n.max
	}
	if n.cmd.Flags().Changed("per-minute") {
		p.Pace.PerMinute = n.pace
	}
	if len(n.stages) > 0 {
		p.Stages = nil
	}
	for _, t := range n.stages {
		st, err := parseStage(t)
		if err != nil {
			return err
		}
		p.Stages = append(p.Stages, st)
	}
	if len(n.limits) > 0 {
		p.Limits = nil
	}
	for _, t := range n.limits {
		l, err := parseLimit(t)
		if err != nil {
			return err
		}
		p.Limits = append(p.Limits, l)
	}
	if n.window != "" {
		w := windowForm.FindStringSubmatch(n.window)
		if w == nil {
			return usagef(`--window has the form "CRON/LENGTH[/ZONE]", like "0 2 * * */4h/Europe/Berlin"`)
		}
		p.Window.Cron, p.Window.Length, p.Window.Zone = w[1], w[2], w[3]
	}
	if n.site != "" {
		label, most, ok := strings.Cut(n.site, "=")
		count, percent, good := amount(most)
		if !ok || label == "" || !good {
			return usagef("--site has the form LABEL=N or LABEL=N%%, like site=10%%")
		}
		p.Sites = api.SiteBudget{Label: label, Count: count, Percent: percent}
	}
	if n.startAt != "" {
		at, err := time.Parse(time.RFC3339, n.startAt)
		if err != nil {
			return usagef("--start-at is a time like 2030-01-31T22:00:00Z or 2030-01-31T22:00:00+01:00")
		}
		p.StartAt = at.UTC()
	}
	return nil
}

// windowForm takes the shortest cron expression of five fields that a duration follows: fields hold slashes too.
var windowForm = regexp.MustCompile(`^\s*((?:\S+\s+){4}\S+?)/((?:[0-9]+[hms])+)(?:/(\S+))?\s*$`)

// amount reads "3" as a number and "10%" as a share.
func amount(t string) (count, percent int, ok bool) {
	digits, share := strings.CutSuffix(t, "%")
	n, err := strconv.Atoi(digits)
	switch {
	case err != nil || n < 1 || share && n > 100:
		return 0, 0, false
	case share:
		return 0, n, true
	}
	return n, 0, true
}

// parseStage reads [NAME=]N[%][,min=PERCENT][,hold].
func parseStage(t string) (st api.Stage, err error) {
	wrong := usagef("--stage is a number of devices, like 1, or a share, like 25%%; in full [NAME=]N[%%][,min=PERCENT][,hold]")
	parts := strings.Split(t, ",")
	size := parts[0]
	if name, rest, named := strings.Cut(size, "="); named {
		st.Name, size = name, rest
	}
	ok := false
	if st.Count, st.Percent, ok = amount(size); !ok {
		return st, wrong
	}
	for _, p := range parts[1:] {
		least, is := strings.CutPrefix(p, "min=")
		switch {
		case p == "hold":
			st.Hold = true
		case is:
			n, err := strconv.Atoi(strings.TrimSuffix(least, "%"))
			if err != nil || n < 0 || n > 100 {
				return st, wrong
			}
			st.MinSuccess = n
		default:
			return st, wrong
		}
	}
	return st, nil
}

var limitForm = regexp.MustCompile(`^(?:([a-z+-]+)=)?(?:([0-9]{1,8})|([0-9]{1,2})%/([0-9]{1,8})(?:@([0-9]{1,2}))?)(?::([a-z]+))?$`)

// parseLimit reads [KIND[+KIND]=](COUNT | PERCENT%/SAMPLE[@CONFIDENCE])[:REACTION].
func parseLimit(t string) (l api.Limit, err error) {
	m := limitForm.FindStringSubmatch(t)
	if m == nil {
		return l, usagef("--limit has the form [KIND[+KIND]=](COUNT | PERCENT%%/SAMPLE[@CONFIDENCE])[:REACTION], like 5%%/20@95:pause or went-dark=1:rollback")
	}
	if m[1] != "" {
		for k := range strings.SplitSeq(m[1], "+") {
			l.Kinds = append(l.Kinds, api.FailureKind(k))
		}
	}
	number := func(s string) int { n, _ := strconv.Atoi(s); return n } // digits by the form; empty is 0
	l.Count, l.Percent, l.MinSample, l.Confidence = number(m[2]), number(m[3]), number(m[4]), number(m[5])
	l.Then = api.Reaction(m[6])
	return l, nil
}

const maxPlanFile = 64 << 10 // bytes; musterd takes no more

// readPlan reads a plan in JSON or YAML, of which JSON is a part.
func (a *app) readPlan(path string) (p api.Plan, err error) {
	var raw []byte
	if path == "-" {
		raw, err = io.ReadAll(io.LimitReader(a.env.Stdin, maxPlanFile))
	} else {
		raw, err = os.ReadFile(path)
	}
	if err != nil {
		return p, err
	}
	if len(raw) >= maxPlanFile {
		return p, usagef("--plan: %s is too large to be a plan", clean(path))
	}
	var doc map[string]any
	if err := yaml.Unmarshal(raw, &doc); err != nil {
		return p, usagef("--plan: %s is neither JSON nor YAML: %v", clean(path), err)
	}
	if raw, err = json.Marshal(doc); err != nil {
		return p, usagef("--plan: %s is not a plan: %v", clean(path), err)
	}
	if err := json.Unmarshal(raw, &p, json.RejectUnknownMembers(true)); err != nil {
		return p, usagef("--plan: %s is not a plan: %v", clean(path), planFault(err))
	}
	return p, nil
}

// planFault names the place that is wrong in a plan.
func planFault(err error) string {
	text := err.Error()
	if at, ok := strings.CutPrefix(text, "json: "); ok {
		text = at
	}
	return text
}

func (a *app) rolloutPlan() *cobra.Command {
	var n newRollout
	c := &cobra.Command{
		Use: "plan [ID] --product NAME --version X.Y.Z", Short: "say what a rollout would do, before anything starts", Args: cobra.MaximumNArgs(1),
		Long: "Says what a rollout with these flags would do if it were started now: stages with the devices in each, how long it takes and\n" +
			"what it loads, what would stop it. Nothing is stored. Which devices come first depends on the id.\n\n" + rolloutHelp,
		Example: "  muster rollout plan spring --product sensor --version 1.1.0 --plan careful.yaml",
	}
	n.flags(c)
	return a.online(c, func(ctx context.Context, args []string) error {
		in, err := n.read(a)
		if err != nil {
			return err
		}
		if len(args) == 1 {
			in.ID = args[0]
		}
		p, err := client.Read[api.RolloutPreview](a.client.PlanRollout(ctx, in))
		if err != nil {
			return err
		}
		return a.ui.show(p, func() { a.printPreview(p, in.ID != "") })
	})
}

func (a *app) printPreview(p api.RolloutPreview, named bool) {
	u := a.ui
	where := p.Where
	if where == "" && p.Dynamic {
		where = "every device of " + p.Product
	}
	joins := ""
	if p.Dynamic {
		joins = "devices that come to match while it runs"
	}
	u.facts("release", p.Product+" "+p.Version, "target", where, "joining", joins, "devices", fmt.Sprintf("%d, %d of them online now", p.Targets, p.Online),
		"downloads", size(p.Bytes), "takes about", roughly(p.Duration))
	if len(p.Stages) > 0 {
		u.printf("\n")
		t := u.table("STAGE", "UP TO", "ADDS", "TAKES", "FIRST DEVICES")
		for _, s := range p.Stages {
			first := strings.Join(s.Sample[:min(len(s.Sample), 3)], " ")
			if s.Devices > 3 {
				first += " …"
			}
			if !named && s.Devices > 0 {
				first = "depends on the id"
			}
			t.row(stageTitle(s.Number, s.Name, s.Count, s.Percent), s.Quota, s.Devices, roughly(s.Duration), first)
		}
		t.print()
	}
	a.printCounts("first take a floor", "floor", p.Floors)
	a.printCounts("would be skipped now", "", p.Skips)
	a.printList("stops at", p.Stops, plain)
	a.printList("warnings", p.Warnings, yellow)
	if p.Problem != "" {
		u.printf("\n%s %s\n", u.paint("would be refused:", red), clean(p.Problem))
	}
}

func (a *app) printCounts(title, what string, counts map[string]int) {
	if len(counts) == 0 {
		return
	}
	a.ui.printf("\n%s\n", a.ui.paint(title, bold))
	digits := len(fmt.Sprint(slices.Max(slices.Collect(maps.Values(counts)))))
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		a.ui.printf("  %*d  %s\n", digits, counts[k], clean(strings.TrimSpace(what+" "+k)))
	}
}

func (a *app) printList(title string, lines []string, c shade) {
	if len(lines) == 0 {
		return
	}
	a.ui.printf("\n%s\n", a.ui.paint(title, bold))
	for _, l := range lines {
		a.ui.printf("  %s\n", a.ui.paint(clean(l), c))
	}
}

// roughly shortens a duration of the server: two units are enough for an estimate.
func roughly(text string) string {
	d, err := time.ParseDuration(text)
	if err != nil {
		return text
	}
	return about(d)
}

// about is a duration in its two largest units.
func about(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Round(time.Second).Seconds()))
	case d < time.Hour:
		d = d.Round(time.Second)
		return join(int(d.Minutes()), "m", int(d.Seconds())%60, "s")
	case d < 24*time.Hour:
		d = d.Round(time.Minute)
		return join(int(d.Hours()), "h", int(d.Minutes())%60, "m")
	}
	d = d.Round(time.Hour)
	return join(int(d.Hours())/24, "d", int(d.Hours())%24, "h")
}

func join(n int, unit string, m int, small string) string {
	if m == 0 {
		return fmt.Sprint(n, unit)
	}
	return fmt.Sprint(n, unit, m, small)
}
