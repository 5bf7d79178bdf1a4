package rollout

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"muster/internal/fleet"
)

// Step returns the rollout after ev, the rows that ev changed, and what to do about it. The package comment says which
// rows to pass for which event. Neither r nor jobs is changed; on an error r is returned as it was. What is late, unknown,
// repeated or out of order is not an error. Errors: Conflict if an operator asks for what the state of the rollout does
// not allow; Invalid if a rollout is started with a plan that does not fit its targets, or a device id is not one; Internal
// for a mistake of the caller.
func Step(r Rollout, jobs []Job, ev Event) (Rollout, []Job, []Effect, error) {
	if ev == nil || ev.when().IsZero() {
		return r, nil, nil, fleet.Errorf(fleet.Internal, "rollout %s: an event without a time", r.ID)
	}
	s := step{r: r, at: utc(ev.when()), online: OnlineUnknown, again: OnlineUnknown}
	if err := s.apply(jobs, ev); err != nil {
		return r, nil, nil, err
	}
	if s.dirty || s.tick {
		s.settle()
		s.closeSweep()
	}
	if s.err != nil {
		return r, nil, nil, s.err
	}
	if s.dirty {
		s.r.Rev++
	}
	if !s.wake.IsZero() {
		s.fx = append(s.fx, WakeAt{s.wake})
	}
	return s.r, s.rows, s.fx, nil
}

// step is one call of Step: the records as they become.
type step struct {
	r      Rollout
	owned  bool // r.Stages is ours to change
	dirty  bool // r was changed
	at     time.Time
	online int            // pending targets that are online and may be granted in the open stage, or OnlineUnknown
	again  int            // waiting targets that are online, or OnlineUnknown
	tick   bool           // the event is Ticked
	zone   *time.Location // of the plan's window, with Ticked
	blame  string         // the last failure that this step brought, for people
	rows   []Job          // changed rows
	fx     []Effect       // so far
	wake   time.Time      // the earliest time at which to look again
	err    error          // the first mistake found on the way
}

func (s *step) apply(jobs []Job, ev Event) error {
	for i := range jobs {
		if jobs[i].Rollout != s.r.ID {
			return fleet.Errorf(fleet.Internal, "rollout %s: was passed a row of rollout %s", s.r.ID, jobs[i].Rollout)
		}
	}
	switch ev := ev.(type) {
	case Added:
		return s.add(jobs, ev.Targets)
	case Filled:
		s.filled()
	case ApprovedBy:
		return s.approve(ev.Who)
	case Started:
		return s.start(ev.Who)
	case PausedBy:
		return s.pause(ev.Who)
	case ResumedBy:
		return s.resume(ev.Who)
	case AdvancedBy:
		return s.advanceBy(ev.Who)
	case RetriedBy:
		return s.retry(jobs, ev.Who)
	case AbortedBy:
		return s.abort(jobs, ev.Who, ev.Why)
	case RollbackBy:
		return s.rollback(ev.Who)
	case RollbackEnded:
		return s.rollbackEnded(ev.Completed)
	case Swept:
		return s.sweep(jobs)
	case Ticked:
		s.online, s.again, s.tick, s.zone = ev.OnlinePending, ev.OnlineWaiting, true, ev.Zone
		return s.expire(jobs, ev)
	case Asked:
		s.ask(jobs, ev)
	case Reported:
		s.report(jobs, ev)
	case Confirmed:
		s.confirm(jobs, ev)
	case Reverted:
		s.revert(jobs, ev)
	case Unhealthy:
		s.unhealthy(jobs, ev)
	case Compared:
		s.compare(ev)
	case Excluded:
		s.exclude(jobs, ev)
	default:
		return fleet.Errorf(fleet.Internal, "rollout %s: %T is not an event", s.r.ID, ev)
	}
	return nil
}

// find returns a copy of the row of d.
func find(jobs []Job, d fleet.DeviceID) (Job, bool) {
	for i := range jobs {
		if jobs[i].Device == d {
			return jobs[i], true
		}
	}
	return Job{}, false
}

// inOrder returns jobs by device id; a device that is in it twice would be counted twice, so that is an error.
func inOrder(jobs []Job) ([]Job, error) {
	jobs = slices.Clone(jobs)
	slices.SortFunc(jobs, func(a, b Job) int { return cmp.Compare(a.Device, b.Device) })
	for i := 1; i < len(jobs); i++ {
		if jobs[i].Device == jobs[i-1].Device {
			return nil, fleet.Errorf(fleet.Internal, "rollout %s: was passed the row of %s twice", jobs[i].Rollout, jobs[i].Device)
		}
	}
	return jobs, nil
}

// add makes rows for the devices that have none.
func (s *step) add(jobs []Job, targets []Target) error {
	live := s.r.Dynamic && !s.r.State.Final() && s.r.State != RollingBack
	if s.r.State != Draft && !live {
		return s.conflict("devices can be added", Draft)
	}
	targets = slices.Clone(targets)
	slices.SortFunc(targets, func(a, b Target) int { return cmp.Compare(a.Device, b.Device) })
	targets = slices.CompactFunc(targets, func(a, b Target) bool { return a.Device == b.Device })
	have := make(map[fleet.DeviceID]bool, len(jobs))
	for i := range jobs {
		have[jobs[i].Device] = true
	}
	added := 0
	for _, t := range targets {
		if !t.Device.Valid() {
			return fleet.Errorf(fleet.Invalid, "rollout %s: a target is not a device id", s.r.ID)
		}
		if have[t.Device] {
			continue
		}
		ring := t.Ring
		if ring == 0 {
			ring = s.r.Plan.Ring(func(int) bool { return false })
		}
		if ring < 1 || ring > len(s.r.Stages) {
			return fleet.Errorf(fleet.Internal, "rollout %s: %s belongs to stage %d of %d", s.r.ID, t.Device, ring, len(s.r.Stages))
		}
		s.rows = append(s.rows, Job{Rollout: s.r.ID, Device: t.Device, Rank: Rank(s.r.ID, t.Device), Ring: ring, Site: clean(t.Site), Image: t.Image,
			Rev: 1, State: Pending, StateAt: s.at})
		added++
	}
	if added == 0 {
		return nil
	}
	s.r.Targets += added
	s.r.Total.Pending += added
	s.dirty = true
	if s.r.Targets > MaxTargets {
		return fleet.Errorf(fleet.TooLarge, "rollout %s: more than %d targets", s.r.ID, MaxTargets)
	}
	if s.r.State != Draft {
		s.note(Joined, "%s joined the target, the first is %s", devices(added), s.rows[0].Device)
	}
	return nil
}

func (s *step) filled() {
	if s.r.Filling {
		s.r.Filling, s.dirty = false, true
	}
}

// ask answers a device that is online.
func (s *step) ask(jobs []Job, ev Asked) {
	j, ok := find(jobs, ev.Device)
	switch {
	case !ok:
		s.refuse(ev.Device, NotTarget, zero)
	case s.r.State.Final() && !j.State.Finished():
		s.refuse(ev.Device, NotRunning, zero)
	case j.State.InFlight() && j.State != Verifying && !s.at.Before(j.GrantedAt.Add(s.r.Plan.DeviceTimeout)): // the tick that says so is still to come
		s.timeOut(&j, false)
		if j.State == Waiting {
			s.refuse(ev.Device, BackOff, j.RetryAt)
		} else {
			s.refuse(ev.Device, JobDone, zero)
		}
	case j.State.InFlight(): // asked again: same grant, same deadline
		s.fx = append(s.fx, s.granted(j))
	case !j.State.Open():
		s.refuse(ev.Device, JobDone, zero)
	default:
		if why, until := s.refusal(j, ev); why != "" {
			s.refuse(ev.Device, why, until)
			return
		}
		s.grant(&j, ev)
	}
}

// refusal returns why a device that waits for its turn does not get it now, and when that may change.
func (s *step) refusal(j Job, ev Asked) (Refusal, time.Time) {
	if j.State == Waiting && s.at.Before(j.RetryAt) {
		return BackOff, j.RetryAt
	}
	switch why := s.r.StageRefusal(); {
	case why == "" || why == StageFull && j.State == Waiting: // it has its place
	default:
		return why, zero
	}
	if j.Ring > s.r.Stage {
		return RingClosed, zero
	}
	switch why := s.r.Refusal(s.at, ev.Zone); why {
	case "":
	case RateFull:
		return why, s.r.NextGrant
	case WindowClosed:
		_, until := s.r.Plan.Window.Open(s.at, ev.Zone)
		return why, until
	default:
		return why, zero
	}
	if w := s.r.Plan.Window; w.PerDevice() {
		if open, until := w.Open(s.at, ev.Zone); !open {
			return WindowClosed, until
		}
	}
	if s.r.Plan.Sites.Label != "" && j.Site != "" && ev.Disrupted >= s.r.Plan.SiteLimit(ev.SiteSize) {
		return SiteFull, zero
	}
	return "", zero
}

func (s *step) refuse(d fleet.DeviceID, why Refusal, until time.Time) {
	if !until.IsZero() {
		s.wakeAt(until)
	}
	s.fx = append(s.fx, Refuse{d, why, until})
}

// granted is the answer to a device that holds a grant.
func (s *step) granted(j Job) Grant { return Grant{j.Device, j.GrantedAt.Add(s.r.Plan.DeviceTimeout)} }

func (s *step) grant(j *Job, ev Asked) {
	if ev.Floor < 0 || ev.Floor > len(s.r.Floors) {
		s.fault("%s is to take floor %d of %d", j.Device, ev.Floor, len(s.r.Floors))
		return
	}
	if j.Attempts == 0 {
		j.Stage, j.From = s.r.Stage, ev.From
	}
	j.Attempts++
	j.Floor, j.Last, j.RetryAt, j.Late = ev.Floor, "", zero, false
	j.Report, j.Percent = "", 0
	j.GrantedAt, j.ProgressAt = s.at, s.at
	s.move(j, Offered)
	j.Deadline = j.due(s.r.Plan)
	s.changed(*j)
	s.stage().DoneAt = zero // the last stage is open to devices that come back
	s.pace()
	s.fx = append(s.fx, s.granted(*j))
	s.wakeAt(j.Deadline)
}

// burst is how far grants may come before their time, so that a high rate does not need a wake-up for each.
const burst = time.Second

// Interval returns the time from one grant to the next that the pace and the byte budget demand; 0: none.
func (r Rollout) Interval() (every time.Duration) {
	if rate := r.Plan.Pace.rate(r.Total.Succeeded); rate > 0 {
		every = time.Duration(float64(time.Minute) / rate)
	}
	if b, n := r.Plan.BytesPerSecond, r.Release.Size; b > 0 && n > 0 && r.Mode == Download {
		every = max(every, time.Duration(min(float64(n)/float64(b)*float64(time.Second), float64(MaxTimeout))))
	}
	return every
}

// pace sets when the next device may be granted: the generic cell rate algorithm (ITU-T I.371). NextGrant is the
// theoretical arrival time less the burst.
func (s *step) pace() {
	every := s.r.Interval()
	switch {
	case every == 0:
		return
	case every >= burst:
		s.r.NextGrant = s.at.Add(every)
	default:
		s.r.NextGrant = later(s.r.NextGrant.Add(burst), s.at).Add(every - burst)
	}
	s.dirty = true
}

// report takes the word of a device in flight: progress, or a failure.
func (s *step) report(jobs []Job, ev Reported) {
	to, known := reports[ev.Report]
	j, ok := find(jobs, ev.Device)
	if !known || !ok || !j.State.InFlight() {
		return
	}
	place, percent := reports[j.Report].place, min(max(ev.Percent, j.Percent), 100)
	switch {
	case j.Attempts > 1 && (s.at.Before(j.GrantedAt) || j.State == Offered && to.cause == "" && to.place >= reports[ReportInstalled].place):
		return // a word about the attempt before: a job has one name for all of them
	case j.State == Verifying && (to.cause == "" || !j.State.CanGo(to.to)):
		return // a session has said more
	case to.cause != "":
		j.Report = ev.Report
		s.fail(&j, to.to, Cause{to.cause, clean(ev.Text)})
	case to.place < place || to.place == place && percent == j.Percent:
		return // out of order, or again
	default:
		j.Report, j.Percent, j.ProgressAt = ev.Report, percent, s.at
		if j.State != to.to {
			s.move(&j, to.to)
		} else {
			j.Rev++
		}
		j.Deadline = j.due(s.r.Plan)
		s.wakeAt(j.Deadline)
	}
	s.changed(j)
}

// confirm takes the evidence of a session with the image that the job wants.
func (s *step) confirm(jobs []Job, ev Confirmed) {
	j, ok := find(jobs, ev.Device)
	if !ok {
		return
	}
	at := utc(ev.Session)
	if ev.Floor > 0 {
		if j.State.InFlight() && j.Floor == ev.Floor && at.After(j.GrantedAt) {
			s.passFloor(&j, at)
		}
		return
	}
	if j.State == Pending { // it came by the image without us: no success of ours
		j.Cause = Cause{Kind: HasImage, Text: "runs the image of the release already"}
		s.move(&j, Skipped)
		s.changed(j)
		return
	}
	if j.State == Verifying && ev.Stayed && !s.at.Before(j.Session.Add(s.r.Plan.VerifyFor)) {
		s.move(&j, Succeeded)
		s.changed(j)
		return
	}
	switch {
	case j.State == Verifying || !j.State.CanGo(Succeeded) || j.GrantedAt.IsZero() || !at.After(j.GrantedAt) || !at.After(j.Session):
		return
	case j.Cause.Kind == ByHealth && j.State == Failed: // that it runs was never in doubt
		return
	}
	j.Late = !j.State.InFlight() || !s.at.Before(j.GrantedAt.Add(s.r.Plan.DeviceTimeout)) || s.r.State.Final()
	j.Session = at
	if j.Late || s.r.Plan.VerifyFor == 0 {
		s.move(&j, Succeeded)
		s.changed(j)
		return
	}
	s.move(&j, Verifying)
	j.Deadline = s.at.Add(s.r.Plan.VerifyFor)
	s.wakeAt(j.Deadline)
	if s.r.Plan.Health.Set() && !j.Watched {
		j.Watched = true
		s.r.Health.Watched++
	}
	s.changed(j)
}

// passFloor puts a device back in line that runs the floor which it had to take first.
func (s *step) passFloor(j *Job, session time.Time) {
	j.Session = session
	j.Cause = Cause{ByFloor, "runs " + s.r.Floors[j.Floor-1].Version + " and goes on"}
	j.RetryAt = s.at
	s.move(j, Waiting)
	j.Deadline = s.at.Add(s.r.Plan.DeviceTimeout)
	s.wakeAt(s.at)
	s.changed(*j)
}

// revert takes the evidence of a session with another image.
func (s *step) revert(jobs []Job, ev Reverted) {
	j, ok := find(jobs, ev.Device)
	if !ok {
		return
	}
	at := utc(ev.Session)
	switch {
	case (j.State == Installed || j.State == Rebooting) && at.After(j.StateAt):
	case j.State == Verifying && at.After(j.Session):
	case j.State == Succeeded && at.After(j.Session) && !s.r.State.Final():
	default:
		return
	}
	j.Session = at
	why := "a later session runs another image"
	if s.r.Mode == Renewal {
		why = "a later session uses the certificate before"
	}
	s.fail(&j, RolledBack, Cause{ByRollback, why})
	s.changed(j)
}

// unhealthy takes what a device did that runs the new image.
func (s *step) unhealthy(jobs []Job, ev Unhealthy) {
	j, ok := find(jobs, ev.Device)
	if !ok || j.State != Verifying {
		return
	}
	if s.r.Plan.Health.Compare {
		if j.Bad {
			return
		}
		j.Bad = true
		j.Rev++
		s.r.Health.Bad++
		s.dirty = true
		s.changed(j)
		return
	}
	s.fail(&j, Failed, Cause{ByHealth, clean(ev.Why)})
	s.changed(j)
}

// compare holds the devices with the new image against those without.
func (s *step) compare(ev Compared) {
	p, h := s.r.Plan.Health, s.r.Health
	if !p.Compare || !s.judging() || h.Watched < p.MinSample || ev.Control < p.MinSample {
		return
	}
	low, _ := wilson(h.Bad, h.Watched, p.Confidence)
	_, high := wilson(min(max(ev.Bad, 0), ev.Control), ev.Control, p.Confidence)
	if low <= high {
		return
	}
	s.react(p.Then, HealthWorse, fmt.Sprintf("%d of %d devices with the new image were unhealthy, %d of %d without it: at least %.1f %% against at most %.1f %%, each at %d %% confidence",
		h.Bad, h.Watched, ev.Bad, ev.Control, 100*low, 100*high, p.Confidence))
}

// exclude takes a device out that has not finished.
func (s *step) exclude(jobs []Job, ev Excluded) {
	j, ok := find(jobs, ev.Device)
	if !ok || j.State.Finished() {
		return
	}
	s.drop(&j, Skipped, Cause{ByCaller, clean(ev.Why)})
}

// drop ends a job that has not finished without judging it anew: a pending one goes to the given state, a waiting one to
// the failure that it waits to make good, one in flight is cancelled.
func (s *step) drop(j *Job, pending JobState, why Cause) {
	switch {
	case j.State == Pending:
		j.Cause = why
		s.move(j, pending)
	case j.State == Waiting && j.Last != "":
		s.move(j, j.Last)
	case j.State == Waiting:
		j.Cause = why
		s.move(j, Cancelled)
	default:
		j.Cause = why
		s.move(j, Cancelled)
		s.fx = append(s.fx, Withdraw{j.Device})
	}
	s.changed(*j)
}

// expire looks at the rows whose time has come.
func (s *step) expire(jobs []Job, ev Ticked) error {
	jobs, err := inOrder(jobs)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		if !j.State.InFlight() && j.State != Waiting {
			continue
		}
		if s.rebase(&j) || s.at.Before(j.Deadline) {
			continue
		}
		since, offline := ev.Offline[j.Device]
		switch {
		case j.State == Waiting:
			s.waited(&j, offline && !ev.Blind)
		case j.State == Verifying:
			s.verified(&j, utc(since), offline, ev.Blind)
		case s.at.Before(j.GrantedAt.Add(s.r.Plan.DeviceTimeout)) && (j.State == Installed || j.State == Rebooting) && (!offline || ev.Blind):
			// Not silent: it may still take its time to restart.
			j.Deadline = j.GrantedAt.Add(s.r.Plan.DeviceTimeout)
			s.keep(&j)
		default:
			s.timeOut(&j, offline && !ev.Blind)
		}
	}
	return nil
}

// rebase begins an attempt again that lies in the future: the clock was set back, and what it is to wait for would not
// come for as long as the clock was ahead.
func (s *step) rebase(j *Job) bool {
	if !j.GrantedAt.After(s.at.Add(time.Minute)) {
		return false
	}
	j.GrantedAt, j.ProgressAt, j.StateAt = s.at, s.at, s.at
	if j.State == Verifying {
		j.Session = s.at
	}
	switch j.State {
	case Waiting:
		j.RetryAt = s.at
		j.Deadline = s.at.Add(s.r.Plan.DeviceTimeout)
	case Verifying:
		j.Deadline = s.at.Add(s.r.Plan.VerifyFor)
	default:
		j.Deadline = j.due(s.r.Plan)
	}
	s.keep(j)
	return true
}

// keep stores a row whose state did not change.
func (s *step) keep(j *Job) {
	j.Rev++
	s.changed(*j)
	s.wakeAt(j.Deadline)
}

// waited ends the wait of a device that did not come back; any other is given more time.
func (s *step) waited(j *Job, offline bool) {
	if s.r.State != Running || !offline {
		j.Deadline = s.at.Add(s.r.Plan.DeviceTimeout)
		s.keep(j)
		return
	}
	to := j.Last
	if to == "" {
		to, j.Cause = TimedOut, Cause{ByDeadline, "passed a floor and did not come back for the release"}
	}
	s.blame = fmt.Sprintf("%s: %s", j.Device, j.Cause.Kind)
	s.move(j, to)
	s.changed(*j)
}

// verified ends the time in which a device had to stay healthy.
func (s *step) verified(j *Job, since time.Time, offline, blind bool) {
	switch dark := later(since, j.Session).Add(s.r.Plan.DarkAfter); {
	case blind:
		j.Deadline = s.at.Add(time.Minute)
		s.keep(j)
	case !offline:
		s.move(j, Succeeded)
		s.changed(*j)
	case s.at.Before(dark):
		j.Deadline = dark
		s.keep(j)
	default:
		s.fail(j, WentDark, Cause{BySilence, "was seen with the new image and then not for " + s.r.Plan.DarkAfter.String()})
		s.changed(*j)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (s *step) timeOut(j *Job, offline bool) {
	to, why := TimedOut, Cause{ByDeadline, fmt.Sprintf("no success in time; last known: %s since %s", j.State, j.StateAt.Format(time.RFC3339))}
	if offline && (j.State == Installed || j.State == Rebooting) {
		to, why = WentDark, Cause{BySilence, "installed the image and was not heard of again"}
	}
	s.fail(j, to, why)
	s.changed(*j)
	s.fx = append(s.fx, Withdraw{j.Device})
}

// fail ends an attempt: by another one if the plan has one left for this kind of failure. An image that a device refused,
// went back from or died of is not offered to it again.
func (s *step) fail(j *Job, to JobState, why Cause) {
	j.Cause = why
	s.blame = fmt.Sprintf("%s: %s", j.Device, why.Kind)
	again := (to == Failed && why.Kind == ByReport || to == TimedOut) && j.Tries < s.r.Plan.Retries
	if !again || !j.State.CanGo(Waiting) || s.r.State.Final() || s.r.Sweep != "" {
		s.move(j, to)
		return
	}
	wait := s.r.Plan.RetryBackoff << j.Tries
	// Spread by up to a quarter, the same for the same device: those that failed together do not come back together.
	wait += time.Duration(float64(wait) / 4 * float64(j.Rank%1024) / 1024)
	j.Tries++
	j.Last, j.RetryAt = to, s.at.Add(wait)
	s.move(j, Waiting)
	j.Deadline = j.RetryAt.Add(s.r.Plan.DeviceTimeout)
	s.wakeAt(j.RetryAt)
}

// sweep closes the given rows after the rollout has ended.
func (s *step) sweep(jobs []Job) error {
	if s.r.Sweep == "" {
		return nil
	}
	jobs, err := inOrder(jobs)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		if j.State.Finished() {
			continue
		}
		s.drop(&j, s.r.Sweep, s.r.SweepWhy)
	}
	return nil
}

// closeSweep ends the sweep when no row is left open, whatever closed the last one.
func (s *step) closeSweep() {
	if s.r.Sweep != "" && s.r.Total.Open()+s.r.Total.InFlight() == 0 {
		s.r.Sweep, s.r.SweepWhy = "", Cause{}
	}
}

// move brings j to another state and keeps the counts in step.
func (s *step) move(j *Job, to JobState) {
	from := j.State
	if !from.CanGo(to) {
		s.fault("%s has no way from %s to %s", j.Device, from, to)
		return
	}
	*s.r.Total.at(from)--
	*s.r.Total.at(to)++
	if j.Stage > len(s.r.Stages) {
		s.fault("%s was granted in stage %d of %d", j.Device, j.Stage, len(s.r.Stages))
		return
	}
	if j.Stage > 0 {
		c := &s.stages()[j.Stage-1].Counts
		if from != Pending {
			*c.at(from)--
		}
		*c.at(to)++
	}
	if n := s.r.Verdicts.of(from); n != nil && j.Round == s.r.Round {
		*n--
	}
	j.Round = 0
	if n := s.r.Verdicts.of(to); n != nil {
		*n++
		j.Round = s.r.Round
	}
	s.r.Failures = s.r.Verdicts.Failures()
	j.State, j.StateAt = to, s.at
	j.FinishedAt = zero
	if to.Finished() {
		j.FinishedAt = s.at
	}
	j.Rev++
	s.dirty = true
}

func (s *step) changed(j Job) { s.rows = append(s.rows, j) }

func (s *step) fault(format string, a ...any) {
	if s.err == nil {
		s.err = fleet.Errorf(fleet.Internal, "rollout "+string(s.r.ID)+": "+format, a...)
	}
}

// stages returns the stages of the copy, for change.
func (s *step) stages() []StageStatus {
	if !s.owned {
		s.r.Stages, s.owned = slices.Clone(s.r.Stages), true
	}
	s.dirty = true
	return s.r.Stages
}

// stage returns the open stage, for change.
func (s *step) stage() *StageStatus { return &s.stages()[s.r.Stage-1] }

func (s *step) wakeAt(at time.Time) {
	if s.wake.IsZero() || at.Before(s.wake) {
		s.wake = at
	}
}
