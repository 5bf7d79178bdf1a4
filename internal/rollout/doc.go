// Package rollout decides how a firmware release spreads over a fleet (DESIGN §8). It does no I/O, reads no clock and
// starts no goroutine: Step is a pure function of a rollout, the rows that an event concerns, and the event. Every
// number that a decision rests on is in the header (Rollout), so the cost of a step does not depend on the size of the
// fleet, and a caller stores only what changed. docs/rollouts.md tells the same to those who run a fleet.
//
// # The two records
//
// A Rollout is the header: plan, state, counts. A Job is one row for each (rollout, device). Both belong to one
// transaction: the caller loads them, calls Step, checks the header with Check and stores what came back.
//
//	event                                  rows to pass
//	Added                                  those of Targets that have a row already
//	Filled, ApprovedBy, Started, PausedBy, none
//	ResumedBy, AdvancedBy, RollbackBy,
//	RollbackEnded, Compared
//	AbortedBy                              none, or any that are not finished: the others are for Swept
//	RetriedBy                              rows that failed, as many as are to be tried again
//	Swept                                  any number of rows that are not finished
//	Ticked                                 rows in flight or waiting with Deadline ≤ At, all or some
//	Asked, Reported, Confirmed, Reverted,  the row of the device; none if there is none
//	Unhealthy, Excluded
//
// Step returns the rows that it changed, no others, and a header whose Rev grew if the header changed. Effects are for
// after the commit. They are hints or messages, never the truth: after a crash the records alone say what is due
// (Job.Deadline, Rollout.Sweep, Rollout.UndoneBy, Rollout.Room), and a Ticked finds the rest.
//
// # Order, rings and stages
//
// Targets are ordered by Ring, then by Rank, the first 8 bytes of SHA-256 over rollout and device, then by device id: the
// same order on every machine and after every restart, another one for each rollout. A device's ring is the first stage
// that it may be granted in (Stage.Where, judged by the caller; Plan.Ring).
//
// A stage opens a quota: a number of devices, counted from the first stage on (cumulative), that may have been granted
// the release. A percentage is of all targets, skipped ones and those that joined later included, and rounds up. The
// caller offers devices that are online, in order, by Asked, for as long as Room is positive; waiting ones (another
// attempt) have their place already and need only Refusal to be empty. A device that is offline neither holds a stage up
// nor passes it. A pending device must not be offered out of order, or the cohort would be whoever calls first.
//
// A stage is done when nothing is in flight, enough devices granted in it have succeeded (Stage.MinSuccess, at least
// one), and nobody who is online can still be offered the release in it. It then soaks for Plan.Soak and grants nothing;
// then the next stage opens, or with Stage.Hold when an operator advances (AdvancedBy, which also shortens a soak, but
// passes no gate). A stage whose quota an earlier one has used up is passed over. One whose quota is used, nothing in
// flight or waiting, and too few successes, brings Plan.FailThen: an empty or failed canary never passes.
//
// The last stage is the first one whose quota is all targets and that is open to every ring. It needs no success. When
// every target is finished it soaks, and the rollout is completed. While only devices that are offline are left, it stays
// open to them; when that has lasted for Plan.OfflineGrace (and Soak) without a break, they are skipped.
//
// # When a device is granted
//
// Besides its stage: Plan.MaxInFlight; Plan.Window, in the plan's zone or (ZoneLabel) the device's; Plan.Pace and
// Plan.BytesPerSecond (with Release.Size), as the time of the next grant, up to one second ahead; Plan.Sites, devices of
// the site in flight; Job.RetryAt. A device that must take a floor first (Asked.Floor) is granted that, and waits for its
// next turn once a session has named it. A second Asked in flight gives the same grant with the same deadline.
//
// # Success and failure
//
// Success is Confirmed and nothing else: a session that began after the grant and named the image that the job wants,
// followed by Plan.VerifyFor (Verifying) in which the device stayed healthy and was not silent for DarkAfter at its end.
// What a device says about itself (Reported) can only be progress or failure. Failures are failed (also by Plan.Health),
// rejected, rolled-back, timed-out and went-dark. The whole attempt has Plan.DeviceTimeout from the grant on, which no
// report moves; AcceptTimeout, DownloadTimeout and InstallTimeout limit its steps. After failed (by its own report) and
// timed-out a device gets Plan.Retries further attempts, RetryBackoff apart, doubled each time, plus up to a quarter that
// its Rank chooses. A waiting device that stays offline for DeviceTimeout after its turn gets its last failure for good.
// While presence is not known (Ticked.Blind) nobody goes dark.
//
// # Stop rules and reactions
//
// Plan.MaxFailures (with FailThen) and Plan.Limits judge the verdicts of this round, over all stages, while the rollout is
// running or paused by an operator. A rule is passed when failures are more than it tolerates: 0 stops at the first. A
// percentage needs MinSample verdicts, and with Confidence the lower Wilson bound must be above it. With Health.Compare
// the devices with the image are held against those without (Compared). The hardest reaction is taken: pause, halt
// (halting until nothing is in flight), abort, or roll back by another rollout (Rollout.UndoneBy, effect RollBack).
//
// After a pause by the engine or a halt, an operator who resumes takes the failures on himself: they stay in the counts,
// a new round begins, the soak starts again, and if the stage's quota was used with too few successes, the stage may try
// as many other devices as it had (StageStatus.Extra). Later successes never undo a stop.
//
// Evidence may come late, twice or out of order. A record is corrected by evidence and only by it: a device that
// failed, timed out, went dark or was cancelled and then is Confirmed has succeeded (Late); one that succeeded and is then
// Reverted, while the rollout is not over, is rolled back, for good. An image that ran but was not healthy stays failed.
// Everything else that comes too late is a fact that changes nothing.
//
// # Clocks, pause, abort and the sweep
//
// A grant, a soak or a pace that lies in the future was made by a clock that has been set back: Ticked begins it again.
//
// Paused: nothing more is granted, devices in flight may finish, deadlines run, no stage opens. Aborted, completed and
// rolled-back are final; only a rollback may follow the first two. Rows still open or in flight are closed afterwards in
// batches of the caller's choice: while Rollout.Sweep is set, the caller passes such rows with Swept.
package rollout
