package admission

import "slices"

// Reason is why a question was answered as it was. The set is closed: metrics have one counter for each, and nothing of
// what a client sent is ever part of one.
type Reason string

// Reasons, from the outside inwards.
const (
	Allowed Reason = "allowed"

	Malformed      Reason = "malformed"       // not a question that RabbitMQ asks
	Oversized      Reason = "oversized"       // longer than any question of a session that may pass
	UnknownVhost   Reason = "unknown-vhost"   // neither devices nor fallback
	UserName       Reason = "user-name"       // not the form that users of this vhost have
	ClientID       Reason = "client-id"       // missing, or another than the device's own id
	PasswordUsed   Reason = "password-used"   // a password where only a certificate counts
	PasswordNeeded Reason = "password-needed" // no password where only a password counts
	Rate           Reason = "rate"            // over the budget of fallback logins

	UnknownDevice      Reason = "unknown-device"
	Disabled           Reason = "disabled"            // the device, by an operator
	CertificateUnknown Reason = "certificate-unknown" // in neither slot: superseded, revoked or never issued
	CertificateExpired Reason = "certificate-expired"
	RecoveryOff        Reason = "recovery-off" // the fallback is closed to the device
	NoPassword         Reason = "no-password"  // it has no fallback password
	PasswordWrong      Reason = "password-wrong"

	ResourceDenied Reason = "resource"       // a queue, exchange or permission that devices do not have
	TopicLong      Reason = "topic-long"     // over wire.MaxTopicLen
	TopicForm      Reason = "topic-form"     // an empty word, too many, or a byte that topics do not have
	TopicWildcard  Reason = "topic-wildcard" // anything but the one # that ends an allowed filter
	OtherDevice    Reason = "other-device"   // a topic of another device
	TopicDenied    Reason = "topic"          // well formed, and not one that the device may use this way
	FallbackTopic  Reason = "fallback-topic" // its own, but not for recovery
)

// texts says each reason in words, for people.
var texts = map[Reason]string{
	Allowed:            "let in",
	Malformed:          "the question was not one that RabbitMQ asks; check the broker's version and that nobody else calls this address",
	Oversized:          "the question is too long: a topic, client id, user name or password of several kilobytes",
	UnknownVhost:       "the vhost is neither devices nor fallback",
	UserName:           "the user name is not of the form that this vhost uses",
	ClientID:           "the MQTT client id is missing or is not the device's id",
	PasswordUsed:       "a password was sent where only a certificate counts",
	PasswordNeeded:     "no password was sent where only a password counts",
	Rate:               "too many fallback logins; try again later",
	UnknownDevice:      "no device of this id is registered",
	Disabled:           "the device is disabled",
	CertificateUnknown: "the certificate is not one of the device's present ones: superseded, revoked or never issued",
	CertificateExpired: "the certificate has expired",
	RecoveryOff:        "the fallback is closed to the device",
	NoPassword:         "the device has no fallback password",
	PasswordWrong:      "the fallback password is wrong",
	ResourceDenied:     "the device asked for a queue, an exchange or a permission that devices do not have",
	TopicLong:          "the topic is too long",
	TopicForm:          "the topic has an empty level, too many levels or a character that is not allowed",
	TopicWildcard:      "the topic has a wildcard where none is allowed",
	OtherDevice:        "the topic belongs to another device",
	TopicDenied:        "the device may not use the topic this way",
	FallbackTopic:      "the topic may not be used while the device is recovering",
}

// Text says r in words, for people: a part of a sentence, without raw input. It is empty if r is not a Reason.
func (r Reason) Text() string { return texts[r] }

// Reasons returns all of them, sorted.
func Reasons() []Reason {
	all := make([]Reason, 0, len(texts))
	for r := range texts {
		all = append(all, r)
	}
	slices.Sort(all)
	return all
}
