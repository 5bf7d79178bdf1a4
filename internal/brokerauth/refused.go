package brokerauth

import (
	"time"

	"muster/internal/admission"
	"muster/internal/fleet"
)

// keptRefusals is how many devices of one shard have their last refusal kept: a quarter of a million in all. When there
// are more, one of them is forgotten; the metrics count them all.
const keptRefusals = 1024

// refused is the last refusal of a device.
type refused struct {
	reason admission.Reason
	at     time.Time
}

// note keeps the last refusal of a device that exists: names that anybody makes up take no memory.
func (x *Index) note(id fleet.DeviceID, reason admission.Reason, at time.Time) {
	s := x.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.records[id] == nil {
		return
	}
	if _, had := s.refused[id]; !had && len(s.refused) >= keptRefusals {
		for other := range s.refused {
			delete(s.refused, other)
			break
		}
	}
	if s.refused == nil {
		s.refused = map[fleet.DeviceID]refused{}
	}
	s.refused[id] = refused{reason, at}
}

// LastRefusal says in words why the broker was last told to refuse a device, or somebody who said to be it, and when.
// It is forgotten when muster restarts.
func (x *Index) LastRefusal(id fleet.DeviceID) (why string, at time.Time, ok bool) {
	s := x.shard(id)
	s.mu.RLock()
	r, ok := s.refused[id]
	s.mu.RUnlock()
	if !ok {
		return "", time.Time{}, false
	}
	return words(r.reason), r.at, true
}

// words says a reason as it is and, where that helps an operator, in words.
func words(r admission.Reason) string {
	if w := inWords[r]; w != "" {
		return string(r) + ": " + w
	}
	return string(r)
}

// inWords says for an operator what a reason means. Those that are not here speak for themselves, or say nothing of the
// device.
var inWords = map[admission.Reason]string{
	admission.ClientID:           "its MQTT client id is not its device id",
	admission.PasswordUsed:       "it sent a password where only a certificate counts",
	admission.PasswordNeeded:     "it came to the fallback without a password",
	admission.Rate:               "too many logins over the fallback",
	admission.Disabled:           "it is disabled",
	admission.CertificateUnknown: "its certificate was replaced or revoked, or never issued",
	admission.CertificateExpired: "its certificate has ended",
	admission.RecoveryOff:        "the fallback is closed to it",
	admission.NoPassword:         "it has no fallback password",
	admission.PasswordWrong:      "the fallback password is wrong",
	admission.ResourceDenied:     "it asked for a queue or exchange that devices do not have",
	admission.OtherDevice:        "it used a topic of another device",
	admission.TopicDenied:        "it used a topic that devices do not have",
	admission.FallbackTopic:      "it used a topic that is not for recovery",
}
