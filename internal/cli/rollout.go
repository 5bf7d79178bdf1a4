package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) rolloutCmd() *cobra.Command {
	return group("rollout", "how a release spreads",
		a.rolloutPlan(), a.rolloutCreate(), a.rolloutList(), a.rolloutShow(), a.rolloutWatch(), a.rolloutDevices(), a.rolloutHistory(),
		a.rolloutDo("approve", "agree to a draft that somebody else created"),
		a.rolloutDo("start", "start a draft"),
		a.rolloutDo("pause", "offer nothing more; devices that are updating may finish"),
		a.rolloutDo("resume", "go on with a rollout that is paused or halted"),
		a.rolloutDo("advance", "open the next stage now: the open one is done, and soaks or is held"),
		a.rolloutRetry(), a.rolloutAbort(),
		a.rolloutDo("rollback", "end a rollout and take its devices back, as its plan says"))
}

func (a *app) rolloutCreate() *cobra.Command {
	var n newRollout
	var start bool
	c := &cobra.Command{
		Use: "create [ID] --product NAME --version X.Y.Z", Short: "create a rollout as a draft", Args: cobra.MaximumNArgs(1),
		Long: "Creates a rollout. It offers nothing until it is started; muster rollout plan says what it would do.\n\n" + rolloutHelp,
		Example: `  muster rollout create spring --product sensor --version 1.1.0 --stage 1 --stage 25% --stage 100% --max-failures 2 --soak 30m --start
  muster rollout create spring --product sensor --version 1.1.0 --where 'labels["site"] == "berlin"' --plan careful.yaml`,
	}
	n.flags(c)
	c.Flags().BoolVar(&start, "start", false, "start it at once")
	return a.online(c, func(ctx context.Context, args []string) error {
		in, err := n.read(a)
		if err != nil {
			return err
		}
		if len(args) == 1 {
			in.ID = args[0]
		} else {
			in.ID = newRolloutID()
		}
		r, err := client.Read[api.Rollout](a.client.CreateRollout(ctx, in))
		if err != nil {
			return err
		}
		if start {
			if r, err = client.Read[api.Rollout](a.client.StartRollout(ctx, r.ID)); err != nil {
				return err
			}
		}
		return a.ui.show(r, func() {
			a.ui.printf("created %s: %s %s to %s in %s, %s\n", r.ID, clean(r.Product), clean(r.Version), many(r.Targets, "device"), many(len(r.Stages), "stage"), r.State)
			switch {
			case start:
			case r.Filling:
				a.ui.note("its target is still being filled; then start it with muster rollout start %s", r.ID)
			case r.Plan.Approval:
				a.ui.note("somebody else approves it with muster rollout approve %s; then start it", r.ID)
			default:
				a.ui.note("start it with muster rollout start %s", r.ID)
			}
		})
	})
}

func many(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	if strings.HasSuffix(what, "s") {
		what += "e"
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// newRolloutID makes an id here, not at the server, so that a request that is repeated does not make a second rollout.
func newRolloutID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return "r" + hex.EncodeToString(b[:])
}

func (a *app) rolloutDo(verb, short string) *cobra.Command {
	c := &cobra.Command{Use: verb + " ID", Short: short, Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		do := map[string]func(context.Context, string, ...api.RequestEditorFn) (*http.Response, error){
			"approve": a.client.ApproveRollout, "start": a.client.StartRollout, "pause": a.client.PauseRollout, "resume": a.client.ResumeRollout,
			"advance": a.client.AdvanceRollout, "rollback": a.client.RollbackRollout,
		}[verb]
		r, err := client.Read[api.Rollout](do(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() { a.printNow(r) })
	})
}

// printNow says how a rollout stands after something was done to it.
func (a *app) printNow(r api.Rollout) {
	switch {
	case r.State == api.RolloutStateDraft && r.Approved.By != "":
		a.ui.printf("%s is approved by %s\n", r.ID, clean(r.Approved.By))
	case r.State == api.RolloutStateScheduled:
		a.ui.printf("%s is scheduled: it begins at %s\n", r.ID, text(r.Plan.StartAt))
	case r.State == api.RolloutStateRollingBack:
		a.ui.printf("%s is rolling-back: %s takes its devices back\n", r.ID, r.UndoneBy)
		a.ui.note("follow it with muster rollout watch %s", r.UndoneBy)
	case r.State == api.RolloutStateRunning:
		a.ui.printf("%s is running, stage %d of %d\n", r.ID, r.Stage, len(r.Stages))
	default:
		a.ui.printf("%s is %s\n", r.ID, r.State)
	}
}

func (a *app) rolloutAbort() *cobra.Command {
	var in api.RolloutAbort
	c := &cobra.Command{Use: "abort ID", Short: "end a rollout for good", Args: cobra.ExactArgs(1)}
	c.Flags().StringVar(&in.Why, "why", "", "for its history")
	return a.online(c, func(ctx context.Context, args []string) error {
		r, err := client.Read[api.Rollout](a.client.AbortRollout(ctx, args[0], in))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() { a.printNow(r) })
	})
}

func (a *app) rolloutRetry() *cobra.Command {
	var in api.RolloutRetry
	c := &cobra.Command{
		Use: "retry ID", Short: "try the devices that failed again", Args: cobra.ExactArgs(1),
		Long: `Gives the devices that failed another attempt. In a rollout that is over nothing is tried again: with --as, a new rollout is
created for its failed devices, with the same plan in two stages: one device, then all.`,
		Example: "  muster rollout retry spring --kind timed-out\n  muster rollout retry spring --as spring-b --start",
	}
	f := c.Flags()
	f.StringVar((*string)(&in.Kind), "kind", "", "only those that failed in this way: failed, rejected, rolled-back, timed-out, went-dark")
	f.StringVar(&in.As, "as", "", "id of a new rollout, if this one is over")
	f.BoolVar(&in.Start, "start", false, "start the new rollout at once")
	return a.online(c, func(ctx context.Context, args []string) error {
		out, err := client.Read[api.RolloutRetried](a.client.RetryRollout(ctx, args[0], in))
		if err != nil {
			return err
		}
		return a.ui.show(out, func() {
			switch {
			case in.As != "":
				a.ui.printf("created %s for %s that failed in %s, %s\n", out.Rollout.ID, many(out.Devices, "device"), clean(args[0]), out.Rollout.State)
			case out.Devices == 0:
				a.ui.printf("no device failed like this in %s\n", out.Rollout.ID)
			default:
				a.ui.printf("%s in %s tried again\n", many(out.Devices, "device"), out.Rollout.ID)
			}
		})
	})
}

func (a *app) rolloutList() *cobra.Command {
	p := api.ListRolloutsParams{Limit: 500}
	var state string
	c := &cobra.Command{Use: "list", Short: "list rollouts, newest first", Args: cobra.NoArgs}
	c.Flags().StringVar(&p.Product, "product", "", "only of this product")
	c.Flags().StringVar(&state, "state", "", "only in this state")
	return a.online(c, func(ctx context.Context, _ []string) error {
		p.State = api.RolloutState(state)
		rs, err := take(0, func(cursor string) ([]api.Rollout, string, error) {
			p.Cursor = cursor
			l, err := client.Read[api.RolloutList](a.client.ListRollouts(ctx, &p))
			return l.Items, l.NextCursor, err
		})
		if err != nil {
			return err
		}
		return a.ui.show(rs, func() {
			if len(rs) == 0 {
				a.ui.note("no rollouts")
				return
			}
			t := a.ui.table("ID", "PRODUCT", "VERSION", "STATE", "STAGE", "DONE", "FAILED", "CREATED", "BY")
			for _, r := range rs {
				t.row(r.ID, r.Product, r.Version, cell{string(r.State), stateShade(string(r.State))}, fmt.Sprintf("%d/%d", r.Stage, len(r.Stages)),
					fmt.Sprintf("%d/%d", r.Counts["succeeded"], r.Targets), failed(r.Counts), a.ui.ago(r.CreatedAt), r.CreatedBy)
			}
			t.print()
		})
	})
}

// failed is how many devices failed, in whatever way.
func failed(c api.Counts) int {
	return c["failed"] + c["rejected"] + c["rolled-back"] + c["timed-out"] + c["went-dark"]
}

func (a *app) rolloutShow() *cobra.Command {
	c := &cobra.Command{Use: "show ID", Short: "show a rollout and how far each stage is", Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		r, err := client.Read[api.Rollout](a.client.GetRollout(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			a.printRollout(r)
			a.ui.printf("\n")
			a.printStages(r)
		})
	})
}

// printRollout prints the head of a rollout: what it is, how it stands, and of its policy what is not the default.
func (a *app) printRollout(r api.Rollout) {
	p := r.Plan
	tolerated := "no limit of its own"
	if p.MaxFailures != nil {
		tolerated = fmt.Sprintf("%d tolerated, then %s", *p.MaxFailures, first(string(p.FailThen), "halt"))
	}
	target := r.Where
	if target == "" && r.Dynamic {
		target = "every device of " + r.Product
	} else if target == "" {
		target = "a list of devices"
	}
	if r.Dynamic {
		target += " (others may join)"
	}
	var floors, limits []string
	for _, f := range r.Floors {
		floors = append(floors, f.Version)
	}
	for _, l := range p.Limits {
		limits = append(limits, limitText(l))
	}
	approval := ""
	switch {
	case r.Approved.By != "":
		approval = "by " + r.Approved.By + " at " + text(r.Approved.At)
	case p.Approval:
		approval = "waited for"
	}
	health := ""
	if r.Health.Watched > 0 {
		health = fmt.Sprintf("%d of %d devices behaved badly", r.Health.Bad, r.Health.Watched)
	}
	retries := ""
	if p.Retries > 0 {
		retries = fmt.Sprintf("%d, from %s on", p.Retries, p.RetryBackoff)
	}
	a.ui.facts("rollout", r.ID, "release", strings.TrimSpace(r.Product+" "+r.Version), "mode", r.Mode, "lifetime", r.Lifetime, "state", cell{string(r.State), stateShade(string(r.State))}, "why", r.Reason,
		"waits", waiting(r, a.ui.now()), "undoes", r.Undoes, "undone by", r.UndoneBy, "target", target, "devices", fmt.Sprint(r.Targets), "floors", strings.Join(floors, ", "),
		"failures", fmt.Sprintf("%d, %s", r.Failures, tolerated), "limits", strings.Join(limits, "; "), "health", health,
		"in flight", fmt.Sprintf("%d of at most %d", r.InFlight, p.MaxInFlight), "device timeout", p.DeviceTimeout, "verified for", p.VerifyFor, "retries", retries,
		"soak", p.Soak, "offline grace", p.OfflineGrace, "window", windowText(p.Window), "pace", paceText(p), "sites", siteText(p.Sites), "rollback", rollbackText(p.Rollback),
		"start at", p.StartAt, "approval", approval, "created", text(r.CreatedAt)+" by "+r.CreatedBy, "started", r.StartedAt, "ended", r.EndedAt)
}

func limitText(l api.Limit) string {
	kinds := make([]string, len(l.Kinds))
	for i, k := range l.Kinds {
		kinds[i] = string(k)
	}
	what := first(strings.Join(kinds, " or "), "failures")
	switch {
	case l.Percent > 0 && l.Confidence > 0:
		what = fmt.Sprintf("%d%% %s of %d at %d%% confidence", l.Percent, what, l.MinSample, l.Confidence)
	case l.Percent > 0:
		what = fmt.Sprintf("%d%% %s of %d", l.Percent, what, l.MinSample)
	default:
		what = fmt.Sprintf("%d %s", l.Count, what)
	}
	return what + ", then " + first(string(l.Then), "halt")
}

func windowText(w api.Window) string {
	if w.Cron == "" {
		return ""
	}
	zone := first(w.Zone, "UTC")
	if w.ZoneLabel != "" {
		zone += ", or the device's label " + w.ZoneLabel
	}
	return fmt.Sprintf("%s for %s, %s", w.Cron, w.Length, zone)
}

func paceText(p api.Plan) string {
	var out []string
	if p.Pace.Base > 0 {
		out = append(out, fmt.Sprintf("%d a minute, times %g after each %s", p.Pace.Base, p.Pace.Factor, many(p.Pace.Every, "success")))
	}
	if p.Pace.PerMinute > 0 {
		out = append(out, fmt.Sprintf("at most %d a minute", p.Pace.PerMinute))
	}
	if p.BytesPerSecond > 0 {
		out = append(out, size(p.BytesPerSecond)+"/s")
	}
	return strings.Join(out, ", ")
}

func siteText(s api.SiteBudget) string {
	switch {
	case s.Percent > 0:
		return fmt.Sprintf("%d%% of each %s at once", s.Percent, s.Label)
	case s.Count > 0:
		return fmt.Sprintf("%d of each %s at once", s.Count, s.Label)
	}
	return ""
}

func rollbackText(b api.RollbackPlan) string {
	if b.PreviousSlot {
		return "to the image in the other slot"
	}
	if b.Version != "" {
		return "to " + b.Version
	}
	return ""
}

// waiting says what a rollout waits for, at the server's time now.
func waiting(r api.Rollout, now time.Time) string {
	var st api.RolloutStage
	if r.Stage > 0 && r.Stage <= len(r.Stages) {
		st = r.Stages[r.Stage-1]
	}
	soak, _ := time.ParseDuration(r.Plan.Soak)
	switch {
	case r.State == api.RolloutStateScheduled:
		return "for its start at " + text(r.Plan.StartAt)
	case r.State == api.RolloutStateDraft && r.Plan.Approval && r.Approved.By == "":
		return "for somebody else than " + r.CreatedBy + " to approve it"
	case r.State != api.RolloutStateRunning:
		return ""
	case !st.HeldAt.IsZero():
		return fmt.Sprintf("held at the end of stage %d: muster rollout advance %s", r.Stage, r.ID)
	case !st.DoneAt.IsZero() && r.Counts["pending"]+r.Counts["waiting"] > 0 && r.Stage == len(r.Stages):
		return "for " + many(r.Counts["pending"]+r.Counts["waiting"], "offline device")
	case !st.DoneAt.IsZero() && st.DoneAt.Add(soak).After(now):
		return fmt.Sprintf("stage %d soaks for another %s", r.Stage, about(st.DoneAt.Add(soak).Sub(now)))
	case r.WindowShut:
		return "for its window"
	case r.NextGrant.After(now.Add(time.Second)):
		return "for its pace: the next offer is in " + about(r.NextGrant.Sub(now))
	}
	return ""
}

func (a *app) printStages(r api.Rollout) {
	t := a.ui.table("STAGE", "UP TO", "OFFERED", "SUCCEEDED", "IN FLIGHT", "FAILED", "STATE")
	for _, s := range r.Stages {
		t.row(stageName(s), s.Quota, s.Started, s.Counts["succeeded"], s.InFlight, s.Failures, stageState(r, s))
	}
	t.print()
}

func stageName(s api.RolloutStage) string { return stageTitle(s.Number, s.Name, s.Count, s.Percent) }

func stageTitle(number int, name string, count, percent int) string {
	what := fmt.Sprint(count)
	if percent > 0 {
		what = fmt.Sprintf("%d%%", percent)
	}
	if name != "" {
		what += " " + name
	}
	return fmt.Sprintf("%d: %s", number, what)
}

func stageState(r api.Rollout, s api.RolloutStage) cell {
	switch {
	case !s.ClosedAt.IsZero():
		return cell{"done", green}
	case s.OpenedAt.IsZero():
		return cell{"to come", dim}
	case r.State != api.RolloutStateRunning:
		return cell{string(r.State), stateShade(string(r.State))}
	case !s.HeldAt.IsZero():
		return cell{"held", yellow}
	case !s.DoneAt.IsZero() && s.Number == len(r.Stages) && r.Counts["pending"]+r.Counts["waiting"] > 0:
		return cell{"offline devices", yellow}
	case !s.DoneAt.IsZero():
		return cell{"soaking", yellow}
	}
	return cell{"open", plain}
}

func (a *app) rolloutDevices() *cobra.Command {
	var state string
	var limit int
	c := &cobra.Command{Use: "devices ID", Short: "list the devices of a rollout", Args: cobra.ExactArgs(1)}
	c.Flags().StringVar(&state, "state", "", "only in this state, like failed")
	c.Flags().IntVar(&limit, "limit", 0, "at most this many; 0: all")
	return a.online(c, func(ctx context.Context, args []string) error {
		js, err := take(limit, func(cursor string) ([]api.Job, string, error) {
			l, err := client.Read[api.JobList](a.client.ListRolloutDevices(ctx, args[0], &api.ListRolloutDevicesParams{Limit: 500, Cursor: cursor, State: api.JobState(state)}))
			return l.Items, l.NextCursor, err
		})
		if err != nil {
			return err
		}
		return a.ui.show(js, func() {
			if len(js) == 0 {
				a.ui.note("no devices")
				return
			}
			t := a.ui.table("DEVICE", "STATE", "STAGE", "TRIES", "LOADED", "SINCE", "WHY")
			for _, j := range js {
				stage, loaded, why := "", "", j.Cause
				if j.State == "waiting" && why == "" {
					why = j.Last
				}
				if j.Stage > 0 {
					stage = fmt.Sprint(j.Stage)
				}
				if j.Percent > 0 {
					loaded = fmt.Sprintf("%d%%", j.Percent)
				}
				if j.Text != "" {
					why += ": " + j.Text
				}
				tries := ""
				if j.Attempts > 0 {
					tries = fmt.Sprint(j.Attempts)
				}
				if j.Floor != "" {
					why = "takes " + j.Floor + " first"
				}
				if !j.RetryAt.IsZero() && j.State == "waiting" {
					why += ", tried again " + a.ui.ago(j.RetryAt)
				}
				t.row(j.Device, cell{string(j.State), stateShade(string(j.State))}, stage, tries, loaded, a.ui.ago(j.StateAt), why)
			}
			t.print()
		})
	})
}

func (a *app) rolloutHistory() *cobra.Command {
	c := &cobra.Command{Use: "history ID", Short: "show every decision with its reason", Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		l, err := client.Read[api.DecisionList](a.client.ListRolloutDecisions(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			t := a.ui.table("WHEN", "STAGE", "STATE", "DECISION", "WHO", "WHY")
			for _, d := range l.Items {
				stage := ""
				if d.Stage > 0 {
					stage = fmt.Sprint(d.Stage)
				}
				t.row(text(d.At), stage, cell{d.To, stateShade(d.To)}, d.Code, first(d.Who, "muster"), d.Text)
			}
			t.print()
		})
	})
}
