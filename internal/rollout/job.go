package rollout

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"muster/internal/fleet"
)

// Job is the row of one device in one rollout. Times are UTC; a zero time means that it has not happened.
type Job struct {
	Rollout    fleet.RolloutID `json:"rollout"`
	Device     fleet.DeviceID  `json:"device"`
	Rank       uint64          `json:"rank,string"` // see Rank; a string in JSON, for readers that have only float64
	Ring       int             `json:"ring"`        // the first stage, from 1, in which it may be granted
	Site       string          `json:"site,omitzero"`
	Rev        uint64          `json:"rev"` // grows by one with every change
	State      JobState        `json:"state"`
	StateAt    time.Time       `json:"state_at,omitzero"`    // when State was entered
	Stage      int             `json:"stage,omitzero"`       // number, from 1, of the stage in which it was first granted; 0 if it never was
	Attempts   int             `json:"attempts,omitzero"`    // grants so far
	Tries      int             `json:"tries,omitzero"`       // failed attempts that are followed by another one
	Last       JobState        `json:"last,omitzero"`        // while waiting: how the last attempt failed; empty after a floor
	RetryAt    time.Time       `json:"retry_at,omitzero"`    // while waiting: not before
	Floor      int             `json:"floor,omitzero"`       // number, from 1, of the floor that it takes now; 0: the release
	From       fleet.Hash      `json:"from,omitzero"`        // the image that it ran before its first grant
	Image      fleet.Hash      `json:"image,omitzero"`       // with PreviousSlot: the image that it is to go back to
	Report     Report          `json:"report,omitzero"`      // the last word of the device that was taken
	Percent    int             `json:"percent,omitzero"`     // the highest progress reported, 0 to 100
	GrantedAt  time.Time       `json:"granted_at,omitzero"`  // of the last attempt
	ProgressAt time.Time       `json:"progress_at,omitzero"` // of the last report that brought it further
	Deadline   time.Time       `json:"deadline,omitzero"`    // when the engine looks at it again if nothing happens
	FinishedAt time.Time       `json:"finished_at,omitzero"` // when it last entered a finished state
	Session    time.Time       `json:"session,omitzero"`     // start of the session whose image was last taken as evidence
	Watched    bool            `json:"watched,omitzero"`     // it counts in HealthCounts
	Bad        bool            `json:"bad,omitzero"`         // and behaved badly
	Late       bool            `json:"late,omitzero"`        // succeeded after the deadline, a failure, or the end of its grant
	Cause      Cause           `json:"cause,omitzero"`       // why it failed, or was cancelled or skipped; kept when it succeeds late
	Round      int             `json:"round,omitzero"`       // Rollout.Round in which it got its verdict; 0 if it has none
}

// due returns when the engine must look at an attempt again if nothing happens.
func (j Job) due(p Plan) time.Time {
	end := j.GrantedAt.Add(p.DeviceTimeout)
	step := func(since time.Time, limit time.Duration) time.Time {
		if d := since.Add(limit); limit > 0 && d.Before(end) {
			return d
		}
		return end
	}
	switch j.State {
	case Offered:
		return step(j.GrantedAt, p.AcceptTimeout)
	case Accepted, Downloading:
		return step(j.ProgressAt, p.DownloadTimeout)
	case Downloaded:
		return step(j.StateAt, p.InstallTimeout)
	case Installed, Rebooting:
		return step(j.StateAt, p.DarkAfter)
	}
	return end
}

// Cause says why a job ended as it did.
type Cause struct {
	Kind CauseKind `json:"kind"`
	Text string    `json:"text,omitzero"` // for people; may hold the device's own words, at most MaxCauseText bytes
}

// MaxCauseText is the longest text of a cause, in bytes; longer ones are cut.
const MaxCauseText = 200

// CauseKind is a stable word for programs.
type CauseKind string

// Kinds of causes.
const (
	ByReport   CauseKind = "failed"         // the device reported a failure
	ByRefusal  CauseKind = "rejected"       // the device refused the job
	ByHealth   CauseKind = "unhealthy"      // it ran the new image and was not healthy
	ByRollback CauseKind = "rolled-back"    // the device went back to another image
	ByDeadline CauseKind = "timed-out"      // a step took too long
	BySilence  CauseKind = "went-dark"      // it was not heard of again after the installation
	ByFloor    CauseKind = "floor"          // it has passed a floor and goes on
	ByUndoing  CauseKind = "rolled-back-by" // the rollout is rolled back
	ByAbort    CauseKind = "aborted"        // an operator aborted the rollout
	ByCaller   CauseKind = "excluded"       // the device was taken out: removed, disabled, incompatible, …
	HasImage   CauseKind = "has-image"      // it ran the image before its turn came
	WasOffline CauseKind = "offline"        // offline until the rollout was completed
)

// Report is what a device says about its job. The words are those of wire's d/<id>/up/ota.
type Report string

// The reports that mean something. Any other is a fact that changes nothing; above all, a device cannot report success.
const (
	ReportAccepted    Report = "accepted"
	ReportDownloading Report = "downloading"
	ReportDownloaded  Report = "downloaded"
	ReportInstalled   Report = "installed"
	ReportRebooting   Report = "rebooting"
	ReportVerifying   Report = "verifying"
	ReportFailed      Report = "failed"
	ReportRejected    Report = "rejected"
	ReportRolledBack  Report = "rolled-back"
)

// reports gives for each report the state it leads to, and its place among the reports of one job: an earlier one that
// arrives later changes nothing.
var reports = map[Report]struct {
	to    JobState
	place int
	cause CauseKind
}{
	ReportAccepted:    {to: Accepted, place: 1},
	ReportDownloading: {to: Downloading, place: 2},
	ReportDownloaded:  {to: Downloaded, place: 3},
	ReportInstalled:   {to: Installed, place: 4},
	ReportRebooting:   {to: Rebooting, place: 5},
	ReportVerifying:   {to: Rebooting, place: 6}, // its own word: only a session brings Verifying
	ReportFailed:      {to: Failed, place: 7, cause: ByReport},
	ReportRejected:    {to: Rejected, place: 7, cause: ByRefusal},
	ReportRolledBack:  {to: RolledBack, place: 7, cause: ByRollback},
}

// Rank returns the place of a device among the targets of a rollout: the first 8 bytes, big-endian, of
// SHA-256(rollout ‖ 0x00 ‖ device). Ids hold no zero byte, so no two pairs give the same text.
func Rank(id fleet.RolloutID, d fleet.DeviceID) uint64 {
	var buf [128]byte
	b := append(buf[:0], id...)
	b = append(b, 0)
	b = append(b, d...)
	sum := sha256.Sum256(b)
	return binary.BigEndian.Uint64(sum[:])
}

// Compare orders the jobs of one rollout: by Ring, then by Rank, then by device id.
func Compare(a, b Job) int {
	return cmp.Or(cmp.Compare(a.Ring, b.Ring), cmp.Compare(a.Rank, b.Rank), cmp.Compare(a.Device, b.Device))
}

// clean makes what came from outside fit to be stored and shown: valid UTF-8 without control characters, cut to
// MaxCauseText bytes at the start of a character.
func clean(s string) string {
	if len(s) > 4*MaxCauseText {
		s = s[:4*MaxCauseText]
	}
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	for len(s) > MaxCauseText {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return strings.TrimSpace(s)
}
