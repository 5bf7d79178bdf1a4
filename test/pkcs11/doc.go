// Package pkcs11 tests muster with the keys of its CA in a PKCS #11 token: SoftHSM, driven by the program itself, built
// with cgo and the tag pkcs11. Without that tag there is nothing to test; `make test` runs it with the tag.
package pkcs11
