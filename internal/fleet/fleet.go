// Package fleet holds the words that every other package shares: typed ids, the one error type and paging.
// It imports nothing of muster and does no I/O.
package fleet

import (
	"encoding/hex"
	"math/big"
	"strings"
)

// DeviceID names a device. It is at once a topic level, a routing-key word, a DNS label, a file name, the MQTT client
// id and the common name of the device's certificate, so only what is legal in all of these is allowed (DESIGN §4).
type DeviceID string

// MaxDeviceIDLen is the longest device id, in bytes.
const MaxDeviceIDLen = 40

// ParseDeviceID returns s as a DeviceID, or an Invalid error that says what is allowed.
func ParseDeviceID(s string) (DeviceID, error) {
	if !validLabel(s, MaxDeviceIDLen) {
		return "", Errorf(Invalid, "device id: use 1 to %d of a-z, 0-9 and -, neither first nor last a -", MaxDeviceIDLen)
	}
	return DeviceID(s), nil
}

// Valid reports whether d has the form that ParseDeviceID accepts.
func (d DeviceID) Valid() bool { return validLabel(string(d), MaxDeviceIDLen) }

// RolloutID names a rollout. It has the form of a device id, but is shorter: it stands in every update offer, which must
// fit the smallest receive buffer in the field (DESIGN §6).
type RolloutID string

// MaxRolloutIDLen is the longest rollout id, in bytes.
const MaxRolloutIDLen = 24

// ParseRolloutID returns s as a RolloutID, or an Invalid error that says what is allowed.
func ParseRolloutID(s string) (RolloutID, error) {
	if !validLabel(s, MaxRolloutIDLen) {
		return "", Errorf(Invalid, "rollout id: use 1 to %d of a-z, 0-9 and -, neither first nor last a -", MaxRolloutIDLen)
	}
	return RolloutID(s), nil
}

// ProductID names a product line: devices that can run the same firmware. It has the form of a device id.
type ProductID string

// ParseProductID returns s as a ProductID, or an Invalid error that says what is allowed.
func ParseProductID(s string) (ProductID, error) {
	if !validLabel(s, MaxDeviceIDLen) {
		return "", Errorf(Invalid, "product: use 1 to %d of a-z, 0-9 and -, neither first nor last a -", MaxDeviceIDLen)
	}
	return ProductID(s), nil
}

// Serial is the serial number of a certificate as lower-case hex without leading zeros: the form in which it stands in
// the certificate's URI, in RabbitMQ's events and in muster's store. Smallstep and OpenSSL's CRL tools use decimal;
// convert with Big.
type Serial string

// ParseSerial returns s as a Serial: 1 to 40 digits (RFC 5280 §4.1.2.2 allows 20 octets) of lower-case hex, not zero.
func ParseSerial(s string) (Serial, error) {
	if len(s) == 0 || len(s) > 40 || s[0] == '0' || strings.Trim(s, "0123456789abcdef") != "" {
		return "", Errorf(Invalid, "serial: use 1 to 40 lower-case hex digits without leading zeros")
	}
	return Serial(s), nil
}

// SerialOf returns n, which must be positive, in muster's form.
func SerialOf(n *big.Int) Serial { return Serial(n.Text(16)) }

// Big returns the number that s stands for; nil if s is not hex.
func (s Serial) Big() *big.Int {
	n, ok := new(big.Int).SetString(string(s), 16)
	if !ok {
		return nil
	}
	return n
}

// Hash is a SHA-256 as 64 lower-case hex digits.
type Hash string

// ParseHash returns s as a Hash, or an Invalid error.
func ParseHash(s string) (Hash, error) {
	if len(s) != 64 || strings.Trim(s, "0123456789abcdef") != "" {
		return "", Errorf(Invalid, "sha256: use 64 lower-case hex digits")
	}
	return Hash(s), nil
}

// HashOf returns sum, the result of sha256.Sum256, as a Hash.
func HashOf(sum [32]byte) Hash { return Hash(hex.EncodeToString(sum[:])) }

// validLabel reports whether s is 1 to max bytes of a-z, 0-9 and -, with - neither first nor last.
func validLabel(s string, max int) bool {
	if len(s) == 0 || len(s) > max || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// Page asks for part of a list. After is the key of the last item already seen, empty for the first page.
type Page struct {
	After string
	Limit int
}

// Limits of a page, in items.
const (
	DefaultPageLimit = 100
	MaxPageLimit     = 500
)
