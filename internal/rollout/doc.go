// Package rollout decides how a firmware release spreads over a fleet (DESIGN §8). It does no I/O, reads no clock and
// starts no goroutine: Step is a pure function of a rollout, the rows that an event concerns, and the event. Every
// number that a decision rests on is in the header (Rollout), so the cost of a step does not depend on the size of the
// fleet, and a caller stores only what changed.
//
// # The two records
//
// A Rollout is the header: plan, state, counts. A Job is one row for each (rollout, device). Both belong to one
// transaction: the caller loads them, calls Step, checks the header with Check and stores what came back.
//
//	event                                  rows to pass
//	Added                                  those of Devices that have a row already
//	Started, PausedBy, ResumedBy           none
//	AbortedBy                              all in flight (at most Plan.MaxInFlight); more is allowed
//	Swept                                  any number of rows that are pending or in flight
//	Ticked                                 rows in flight with Deadline ≤ At, all or some
//	Asked, Reported, Confirmed, Reverted,  the row of the device; none if there is none
//	Excluded
//
// Step returns the rows that it changed, no others, and a header whose Rev grew if the header changed. Effects are for
// after the commit. They are hints or messages, never the truth: after a crash the records alone say what is due
// (Deadline of the rows in flight, Rollout.Sweep, Rollout.Room), and a Ticked finds the rest.
//
// # Order and stages
//
// Targets are ordered by Rank, the first 8 bytes of SHA-256 over rollout and device, then by device id: the same order
// on every machine and after every restart, another one for each rollout.
//
// A stage opens a quota: a number of devices, counted from the first stage on (cumulative), that may have been granted
// the release. A percentage is of all targets, skipped ones included, and rounds up: any share of a fleet is at least
// one device. The caller offers devices that are online, in rank order, by Asked, for as long as Room is positive; so a
// device that is offline neither holds a stage up nor passes it. It is not offered, and gets its turn when it comes back,
// under the gates then open. A pending device must not be offered out of that order (say, because it just said hello),
// or the cohort would be whoever calls first.
//
// A stage is done when nothing is in flight, at least one device that was granted in it has succeeded, and either its
// quota is used or no pending target is online. From then on it soaks for Plan.Soak and grants nothing; then the next
// stage opens. A stage whose quota an earlier one has used up is passed over. A stage whose quota is used, nothing in
// flight and not one success, halts the rollout: an empty or failed canary never passes. If the only success of a
// soaking stage is taken back (Reverted), it is not done any more.
//
// The last stage is the first one whose quota is all targets. It needs no success, since nothing comes after it. When
// every target is finished it soaks, and the rollout is completed. While only devices that are offline are left, it
// stays open to them; when that has lasted for Plan.OfflineGrace (and Soak) without a break, the rollout is completed
// and they are skipped. If no target is pending at an earlier stage, the rollout is completed after that stage's soak.
//
// # Success, failure and the limit
//
// Success is Confirmed and nothing else: a session that began after the grant and named the release's image. What a
// device says about itself (Reported) can only be progress or failure. Failures are: failed (also rejected),
// rolled-back and timed-out. The deadline is GrantedAt + Plan.DeviceTimeout; reports do not move it.
//
// Plan.MaxFailures is for the whole rollout, over all stages: the rollout halts when the number of failures since its
// start, or since it was last resumed from halted, is greater than MaxFailures. So 0 halts at the first failure, and 2
// at the third. Halting means that nothing more is granted; when nothing is in flight any more it is halted, and only an
// operator can resume it. By that he takes the failures on himself: they stay in the counts, the limit counts afresh,
// the soak starts again, and if the stage's quota was used without one success, the stage may try as many other devices
// as it had (StageStatus.Extra). Later successes never undo a halt.
//
// Evidence may come late, twice or out of order. A record is corrected by evidence and only by it: a device that
// failed, timed out or was cancelled and then is Confirmed has succeeded (Late), and is taken out of the failures; a device
// that succeeded and is then Reverted, while the rollout is not over, is rolled back, for good, and counts as a failure.
// Everything else that comes too late is a fact that changes nothing.
//
// A device that was granted once is never granted again in the same rollout; asking again while in flight gives the
// same grant with the same deadline.
//
// # Pause, abort and the sweep
//
// Paused: nothing more is granted, devices in flight may finish, deadlines run, the limit is watched, no stage opens.
// Aborted and completed are final at once. Rows that are still pending, or in flight after an abort, are closed
// afterwards in batches of the caller's choice: while Rollout.Sweep is set, the caller passes such rows with Swept.
package rollout
