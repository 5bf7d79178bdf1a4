// Package deploy holds the tests of what is deployed: compose file, Dockerfile, units of systemd, and the documents that
// name settings, metrics and dependencies. It needs no container engine.
package deploy
