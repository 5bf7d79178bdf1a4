// Package esp32client tests the example client for the ESP32 (docs/examples/platformio): its portable part is compiled for this
// machine with the sanitizers of the compiler, and talks with muster's own codecs.
package esp32client
