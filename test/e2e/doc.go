// Package e2e holds scenarios: what a user of muster would see, with the real broker, the whole of musterd, the operator's
// CLI, simulated devices, and clients that muster did not write (mosquitto, curl, openssl).
package e2e
