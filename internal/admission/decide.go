package admission

import (
	"crypto/subtle"
	"time"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Decision is the answer to a Question.
type Decision struct {
	Allow  bool
	Reason Reason // Allowed if and only if Allow

	// Device and Serial are who asked, as far as the question told: not yet proven where Allow is false. Serial is empty
	// in vhost fallback.
	Device fleet.DeviceID
	Serial fleet.Serial
}

// Decide answers q at time at. rec is the record of the device that q.Claim names, nil if there is none. Each answer
// compares user name, vhost, client id and the presence of a password again, because the broker by itself fails open:
// a certificate without SAN may take any client id, and a user name with password beats the certificate
// (DESIGN §4, §5; rabbitmq.md §4.2).
func Decide(q Question, rec *Record, at time.Time) Decision {
	device, serial, reason := q.Claim()
	if reason == Allowed {
		reason = session(&q, device)
	}
	if reason == Allowed {
		reason = credential(&q, rec, device, serial, at)
	}
	if reason == Allowed {
		reason = use(&q, device)
	}
	return Decision{Allow: reason == Allowed, Reason: reason, Device: device, Serial: serial}
}

// session checks what the session is, before anything is known of the device.
func session(q *Question, device fleet.DeviceID) Reason {
	switch {
	case q.ClientID != string(device):
		return ClientID // AMQP, streams and the management API have none
	case q.Vhost == wire.VhostDevices && q.HasPassword:
		return PasswordUsed // even "none", even an empty one
	case q.Vhost == wire.VhostFallback && q.Kind == User && !q.HasPassword:
		return PasswordNeeded // a certificate, or nothing
	case q.Kind != User && q.HasPassword:
		return Malformed
	}
	return Allowed
}

// credential checks that rec lets the device in by this door now. The password comes with the login only; the later
// questions of a fallback session ask whether the door is still open.
func credential(q *Question, rec *Record, device fleet.DeviceID, serial fleet.Serial, at time.Time) Reason {
	switch {
	case q.Vhost == wire.VhostDevices:
		return certificate(rec, device, serial, at)
	case q.Kind == User:
		return password(rec, device, q.Password)
	}
	return recoverable(rec, device)
}

// use checks what the session wants to touch.
func use(q *Question, device fleet.DeviceID) Reason {
	switch q.Kind {
	case User, Vhost:
		return Allowed
	case Resource:
		return resource(q, device)
	case Topic:
		return topic(q, device)
	}
	return Malformed
}

// AdmitCertificate decides whether device may come in with the certificate of this serial, whose chain somebody else has
// verified: it must be in one of the two slots of rec, not past its end, and the device not disabled. rec is the device's
// record, nil if there is none.
func AdmitCertificate(rec *Record, device fleet.DeviceID, serial fleet.Serial, at time.Time) Decision {
	r := certificate(rec, device, serial, at)
	return Decision{Allow: r == Allowed, Reason: r, Device: device, Serial: serial}
}

func certificate(rec *Record, device fleet.DeviceID, serial fleet.Serial, at time.Time) Reason {
	if r := present(rec, device); r != Allowed {
		return r
	}
	for _, c := range rec.Certificates {
		if c.Serial == "" || c.Serial != serial {
			continue
		}
		if !at.Before(c.NotAfter) {
			return CertificateExpired
		}
		return Allowed
	}
	return CertificateUnknown
}

// AdmitPassword decides whether device may come in by the fallback with the password of this SHA-256. The comparison
// takes the same time for every password of the same record. rec is the device's record, nil if there is none.
func AdmitPassword(rec *Record, device fleet.DeviceID, sum fleet.Hash) Decision {
	r := password(rec, device, sum)
	return Decision{Allow: r == Allowed, Reason: r, Device: device}
}

func password(rec *Record, device fleet.DeviceID, sum fleet.Hash) Reason {
	if r := recoverable(rec, device); r != Allowed {
		return r
	}
	if !oneOf(rec.Passwords, sum) {
		return PasswordWrong
	}
	return Allowed
}

// oneOf compares sum with every password, so that the time does not tell which one was near.
func oneOf(passwords []fleet.Hash, sum fleet.Hash) bool {
	equal := 0
	for _, p := range passwords {
		equal |= subtle.ConstantTimeCompare([]byte(p), []byte(sum))
	}
	return equal == 1 && sum != ""
}

// recoverable reports whether the fallback is open to device.
func recoverable(rec *Record, device fleet.DeviceID) Reason {
	if r := present(rec, device); r != Allowed {
		return r
	}
	switch {
	case rec.RecoveryOff:
		return RecoveryOff
	case len(rec.Passwords) == 0:
		return NoPassword
	}
	return Allowed
}

// present reports whether rec is the record of device, and the device not disabled.
func present(rec *Record, device fleet.DeviceID) Reason {
	switch {
	case rec == nil || rec.Device != device || !device.Valid():
		return UnknownDevice
	case rec.Disabled:
		return Disabled
	}
	return Allowed
}
