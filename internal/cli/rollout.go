package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) rolloutCmd() *cobra.Command {
	return group("rollout", "how a release spreads",
		a.rolloutCreate(), a.rolloutList(), a.rolloutShow(), a.rolloutWatch(), a.rolloutDevices(), a.rolloutHistory(),
		a.rolloutDo("start", "start a draft"),
		a.rolloutDo("pause", "offer nothing more; devices that are updating may finish"),
		a.rolloutDo("resume", "go on with a rollout that is paused or halted"),
		a.rolloutDo("abort", "end a rollout for good"))
}

func (a *app) rolloutCreate() *cobra.Command {
	in := api.NewRollout{}
	var stages, labels []string
	var start bool
	c := &cobra.Command{
		Use: "create [ID] --product NAME --version X.Y.Z", Short: "create a rollout as a draft", Args: cobra.MaximumNArgs(1),
		Long: `Creates a rollout. It grants nothing until it is started.

Stages are cumulative: --stage 1 --stage 25% --stage 100% offers the release to one device, then to a quarter of the target,
then to all. A stage that is done is watched for --soak before the next one opens. When more than --max-failures devices have
failed, nothing more is offered.`,
		Example: "  muster rollout create sensor-1-1-0 --product sensor --version 1.1.0 --stage 1 --stage 25% --stage 100% --max-failures 2 --soak 30m --start",
	}
	f := c.Flags()
	f.StringVar(&in.Product, "product", "", "product line")
	f.StringVar(&in.Version, "version", "", "version of the release")
	f.StringArrayVar(&stages, "stage", nil, "number of devices, or percent of the target, each more than the one before; may be repeated (default 1, 10%, 100%)")
	in.Plan.MaxFailures = f.Int("max-failures", 0, "failures that are tolerated; one more halts the rollout")
	f.IntVar(&in.Plan.MaxInFlight, "max-in-flight", 0, "devices that may update at once (default 100)")
	f.StringVar(&in.Plan.DeviceTimeout, "timeout", "", "from the offer to success, for each device (default 1h)")
	f.StringVar(&in.Plan.Soak, "soak", "", "how long a stage that is done is watched (default 0s)")
	f.StringVar(&in.Plan.OfflineGrace, "offline-grace", "", "how long the last stage waits for devices that are offline (default 168h)")
	f.StringArrayVar(&labels, "select", nil, "only devices with this label, key=value; may be repeated")
	f.StringSliceVar(&in.Target.Devices, "device", nil, "only these devices")
	f.BoolVar(&start, "start", false, "start it at once")
	_ = c.MarkFlagRequired("product")
	_ = c.MarkFlagRequired("version")
	return a.online(c, func(ctx context.Context, args []string) error {
		var err error
		if in.Plan.Stages, err = parseStages(stages); err != nil {
			return err
		}
		if in.Target.Labels, err = parseLabels(labels); err != nil {
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
			a.ui.printf("created %s: %s %s to %d devices in %d stages, %s\n", r.ID, clean(r.Product), clean(r.Version), r.Targets, len(r.Stages), r.State)
			if !start {
				a.ui.note("start it with muster rollout start %s", r.ID)
			}
		})
	})
}

// newRolloutID makes an id here, not at the server, so that a request that is repeated does not make a second rollout.
func newRolloutID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return "r" + hex.EncodeToString(b[:])
}

// parseStages reads "1" as a number of devices and "25%" as a share.
func parseStages(texts []string) ([]api.Stage, error) {
	var out []api.Stage
	for _, t := range texts {
		digits, percent := strings.CutSuffix(t, "%")
		n, err := strconv.Atoi(digits)
		if err != nil || n < 1 || percent && n > 100 {
			return nil, usagef("--stage is a number of devices, like 1, or a share, like 25%%")
		}
		if percent {
			out = append(out, api.Stage{Percent: n})
		} else {
			out = append(out, api.Stage{Count: n})
		}
	}
	return out, nil
}

func (a *app) rolloutDo(verb, short string) *cobra.Command {
	c := &cobra.Command{Use: verb + " ID", Short: short, Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		do := map[string]func() (api.Rollout, error){
			"start":  func() (api.Rollout, error) { return client.Read[api.Rollout](a.client.StartRollout(ctx, args[0])) },
			"pause":  func() (api.Rollout, error) { return client.Read[api.Rollout](a.client.PauseRollout(ctx, args[0])) },
			"resume": func() (api.Rollout, error) { return client.Read[api.Rollout](a.client.ResumeRollout(ctx, args[0])) },
			"abort":  func() (api.Rollout, error) { return client.Read[api.Rollout](a.client.AbortRollout(ctx, args[0], api.RolloutAbort{})) },
		}[verb]
		r, err := do()
		if err != nil {
			return err
		}
		return a.ui.show(r, func() { a.ui.printf("%s is %s\n", r.ID, r.State) })
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
func failed(c api.Counts) int { return c["failed"] + c["rejected"] + c["rolled-back"] + c["timed-out"] + c["went-dark"] }

func (a *app) rolloutShow() *cobra.Command {
	c := &cobra.Command{Use: "show ID", Short: "show a rollout and how far each stage is", Args: cobra.ExactArgs(1)}
	return a.online(c, func(ctx context.Context, args []string) error {
		r, err := client.Read[api.Rollout](a.client.GetRollout(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			a.ui.facts("rollout", r.ID, "release", r.Product+" "+r.Version, "state", cell{string(r.State), stateShade(string(r.State))}, "why", r.Reason,
				"devices", fmt.Sprint(r.Targets), "failures", fmt.Sprintf("%d of %d tolerated", r.Failures, *r.Plan.MaxFailures),
				"in flight", fmt.Sprintf("%d of at most %d", r.InFlight, r.Plan.MaxInFlight), "device timeout", r.Plan.DeviceTimeout, "soak", r.Plan.Soak,
				"offline grace", r.Plan.OfflineGrace, "created", text(r.CreatedAt)+" by "+r.CreatedBy, "started", r.StartedAt, "ended", r.EndedAt)
			a.ui.printf("\n")
			a.printStages(r)
		})
	})
}

func (a *app) printStages(r api.Rollout) {
	t := a.ui.table("STAGE", "UP TO", "OFFERED", "SUCCEEDED", "IN FLIGHT", "FAILED", "STATE")
	for _, s := range r.Stages {
		t.row(stageName(s), s.Quota, s.Started, s.Counts["succeeded"], s.InFlight, s.Failures, stageState(r, s))
	}
	t.print()
}

func stageName(s api.RolloutStage) string {
	what := fmt.Sprint(s.Count)
	if s.Percent > 0 {
		what = fmt.Sprintf("%d%%", s.Percent)
	}
	if s.Name != "" {
		what += " " + s.Name
	}
	return fmt.Sprintf("%d: %s", s.Number, what)
}

func stageState(r api.Rollout, s api.RolloutStage) cell {
	switch {
	case !s.ClosedAt.IsZero():
		return cell{"done", green}
	case s.OpenedAt.IsZero():
		return cell{"to come", dim}
	case !s.DoneAt.IsZero():
		return cell{"soaking", yellow}
	case r.State != api.RolloutStateRunning:
		return cell{string(r.State), stateShade(string(r.State))}
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
			t := a.ui.table("DEVICE", "STATE", "STAGE", "LOADED", "SINCE", "WHY")
			for _, j := range js {
				stage, loaded, why := "", "", j.Cause
				if j.Stage > 0 {
					stage = fmt.Sprint(j.Stage)
				}
				if j.Percent > 0 {
					loaded = fmt.Sprintf("%d%%", j.Percent)
				}
				if j.Text != "" {
					why += ": " + j.Text
				}
				t.row(j.Device, cell{string(j.State), stateShade(string(j.State))}, stage, loaded, a.ui.ago(j.StateAt), why)
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
