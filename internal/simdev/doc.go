// Package simdev simulates devices of the ESP32 class: many in one process, each with its own flash, certificates,
// firmware slots and faults. A device knows only what reached it over the wire: the credentials folder it was made
// with, MQTT and HTTPS. It is the reference for how a device should behave (DESIGN §9), so firmware can be written
// after it, and it misbehaves on request (Faults).
//
// Where to read on: device.go is a life from boot to reboot, door.go decides which way in to try next, session.go is
// one MQTT session, certs.go and update.go what a device does on dn/cert and dn/ota, flash.go what survives a power cut.
package simdev
