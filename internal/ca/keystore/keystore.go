// Package keystore keeps the private keys of CAs: in files under a passphrase, or in a key manager (an HSM by PKCS #11, or
// a cloud's) that is named by a URI of go.step.sm/crypto/kms. Which key managers a program knows is decided when it is
// built: see Kinds. It needs no network and no musterd, so that a ceremony can use it on a machine that has neither.
package keystore

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"go.step.sm/crypto/kms"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"

	"muster/internal/fleet"
)

// Timeout is how long a key manager may take for one answer. A call cannot be stopped: one that takes longer is left
// behind, and at most maxCalls of a key are.
const (
	Timeout  = 5 * time.Second
	maxCalls = 16
)

// soft is the key manager that is a file; it is always there.
const soft = "softkms"

// managers are the key managers that can be compiled in, with the build tag that does it.
var managers = map[string]string{"pkcs11": "pkcs11", "awskms": "awskms", "cloudkms": "cloudkms", "azurekms": "azurekms"}

// Kinds returns the schemes of the URIs that this program can open.
func Kinds() []string {
	out := []string{soft}
	for _, kind := range slices.Sorted(maps.Keys(managers)) {
		if compiledIn(kind) {
			out = append(out, kind)
		}
	}
	return out
}

func compiledIn(kind string) bool {
	_, ok := apiv1.LoadKeyManagerNewFunc(apiv1.Type(kind))
	return ok
}

// Check returns an Invalid error if ref cannot be the URI of a key that this program can open. It asks no key manager.
func Check(ref string) error {
	kind, _, ok := strings.Cut(ref, ":")
	if !ok {
		return fleet.Errorf(fleet.Invalid, "a key is named by a URI such as pkcs11:token=muster;object=device-ca?pin-source=/path/to/pin, softkms:path=/path/to/key, awskms:key-id=…, cloudkms:projects/… or azurekms:name=…;vault=…")
	}
	kind = strings.ToLower(kind)
	tag, known := managers[kind]
	switch {
	case kind == soft:
		if path(ref) == "" {
			return fleet.Errorf(fleet.Invalid, "%s has no path: use softkms:path=/path/to/key", Show(ref))
		}
		return nil
	case !known:
		return fleet.Errorf(fleet.Invalid, "no key manager is called %q: use %s, or softkms", clip(kind), strings.Join(slices.Sorted(maps.Keys(managers)), ", "))
	case !compiledIn(kind) && kind == "pkcs11":
		return fleet.Errorf(fleet.Invalid, "this program was built without PKCS #11: use one made by `make pkcs11` (cgo and -tags pkcs11)")
	case !compiledIn(kind):
		return fleet.Errorf(fleet.Invalid, "this program was built without %s: build it with -tags %s", kind, tag)
	}
	if u, err := uri.Parse(ref); err != nil {
		return fleet.Errorf(fleet.Invalid, "%s is not a URI", Show(ref))
	} else if kind == "pkcs11" && u.Has("pin-prompt") {
		return fleet.Errorf(fleet.Invalid, "%s asks for its PIN: name a file with pin-source, for musterd starts without an operator", Show(ref))
	}
	return nil
}

func clip(s string) string { return s[:min(len(s), 40)] }

var secrets = regexp.MustCompile(`(?i)((?:pin-value|[a-z-]*secret[a-z-]*|[a-z-]*password[a-z-]*)=)[^;?&\s"']+`)

// Show returns ref, or a text that may hold one, without PINs and secrets.
func Show(ref string) string { return secrets.ReplaceAllString(ref, "${1}***") }

// masked is an error of a key manager, which may repeat the URI with its PIN.
type masked struct{ err error }

func (m masked) Error() string { return Show(m.err.Error()) }
func (m masked) Unwrap() error { return m.err }

// path returns that of a softkms URI, which may be softkms:path=FILE or softkms:FILE; empty for every other.
func path(ref string) string {
	kind, rest, _ := strings.Cut(ref, ":")
	if !strings.EqualFold(kind, soft) {
		return ""
	}
	if !strings.Contains(rest, "=") {
		return rest
	}
	u, err := uri.ParseWithScheme(soft, ref)
	if err != nil {
		return ""
	}
	return u.Get("path")
}

// Key is a key in a key manager. It is a crypto.Signer whose every call ends within Timeout. Safe for concurrent use.
type Key struct {
	ref     string
	public  *ecdsa.PublicKey
	open    func() (crypto.Signer, io.Closer, error)
	timeout time.Duration
	calls   chan struct{} // a token for each call under way, those left behind included

	mu     sync.Mutex
	signer crypto.Signer // guarded by mu; nil after a failure: opened again by the next call
	closer io.Closer     // guarded by mu
	closed bool          // guarded by mu
	barred error         // guarded by mu; why it is not opened again: a token locks itself after some wrong PINs
}

// Open returns the key that ref names; a softkms one is a file that the passphrase decrypts. It must be EC P-256 or P-384.
// Errors: Invalid for what an operator must mend, Unavailable for a key manager that does not answer or has no such key.
func Open(ctx context.Context, ref string, passphrase []byte) (*Key, error) {
	if err := Check(ref); err != nil {
		return nil, err
	}
	return newKey(ctx, ref, func() (crypto.Signer, io.Closer, error) { return openSigner(ref, passphrase) }, Timeout)
}

// Later is Open for a key manager that may be away at this moment: the key is opened when it has to sign. public is what it
// must turn out to be.
func Later(ref string, passphrase []byte, public *ecdsa.PublicKey) (*Key, error) {
	if err := Check(ref); err != nil {
		return nil, err
	}
	return &Key{
		ref: Show(ref), public: public, timeout: Timeout, calls: make(chan struct{}, maxCalls),
		open: func() (crypto.Signer, io.Closer, error) { return openSigner(ref, passphrase) },
	}, nil
}

// openSigner asks the key manager. Its context is not that of a caller: cloud clients keep it for their later calls.
func openSigner(ref string, passphrase []byte) (crypto.Signer, io.Closer, error) {
	if p := path(ref); p != "" {
		signer, err := ReadFile(p, passphrase)
		return signer, nil, err
	}
	m, err := kms.New(context.Background(), apiv1.Options{URI: ref})
	if err != nil && strings.Contains(err.Error(), "CKR_PIN") {
		return nil, nil, fleet.Wrap(fleet.Invalid, masked{err}, "the PIN of %s is refused: check pin-source before the token locks itself, then start again", Show(ref))
	}
	if err != nil {
		return nil, nil, err
	}
	signer, err := m.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: ref})
	if err != nil {
		return nil, nil, errors.Join(err, m.Close())
	}
	return signer, m, nil
}

func newKey(ctx context.Context, ref string, open func() (crypto.Signer, io.Closer, error), timeout time.Duration) (*Key, error) {
	k := &Key{ref: Show(ref), open: open, timeout: timeout, calls: make(chan struct{}, maxCalls)}
	err := k.call(ctx, func() error {
		signer, closer, err := k.open()
		if err != nil {
			return err
		}
		public, ok := signer.Public().(*ecdsa.PublicKey)
		if !ok || public.Curve != elliptic.P256() && public.Curve != elliptic.P384() {
			if closer != nil {
				err = closer.Close()
			}
			return errors.Join(fleet.Errorf(fleet.Invalid, "the key %s is not EC P-256 or P-384: make another one", k.ref), err)
		}
		k.mu.Lock()
		k.signer, k.closer, k.public = signer, closer, public
		k.mu.Unlock()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return k, nil
}

// call runs f, and leaves it behind if it takes too long.
func (k *Key) call(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	slow := func() error {
		return fleet.Errorf(fleet.Unavailable, "the key manager of %s does not answer within %s", k.ref, k.timeout)
	}
	select {
	case k.calls <- struct{}{}:
	case <-ctx.Done():
		return slow()
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-k.calls }()
		done <- f()
	}()
	select {
	case err := <-done:
		if err == nil || fleet.Is(err, fleet.Invalid) { // an operator's to mend
			return err
		}
		return fleet.Wrap(fleet.Unavailable, masked{err}, "the key manager of %s", k.ref)
	case <-ctx.Done():
		return slow()
	}
}

// Public implements crypto.Signer.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer. After a failure the next call opens the key again: a token may have been put back, a
// session may have ended. The error is Unavailable.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	digest = slices.Clone(digest) // the call may outlive the caller
	signature := make(chan []byte, 1)
	err := k.call(context.Background(), func() error {
		signer, err := k.current()
		if err != nil {
			return err
		}
		s, err := signer.Sign(rand.Reader, digest, opts)
		if err != nil {
			return errors.Join(err, k.drop(signer))
		}
		signature <- s
		return nil
	})
	if fleet.Is(err, fleet.Invalid) {
		err = fleet.Wrap(fleet.Unavailable, err, "the key cannot be used")
	}
	if err != nil {
		return nil, err
	}
	return <-signature, nil
}

// current returns the signer, opened again if need be.
func (k *Key) current() (crypto.Signer, error) {
	k.mu.Lock()
	signer, closed, barred := k.signer, k.closed, k.barred
	k.mu.Unlock()
	if closed {
		return nil, errors.New("closed")
	}
	if barred != nil {
		return nil, barred
	}
	if signer != nil {
		return signer, nil
	}
	signer, closer, err := k.open() // not under mu: it may hang
	if err != nil {
		if fleet.Is(err, fleet.Invalid) {
			k.mu.Lock()
			k.barred = err
			k.mu.Unlock()
		}
		return nil, err
	}
	if !k.public.Equal(signer.Public()) {
		return nil, errors.Join(errors.New("there is another key now under this name"), closeIf(closer))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.signer != nil || k.closed { // somebody else was faster
		return signer, closeIf(closer)
	}
	k.signer, k.closer = signer, closer
	return signer, nil
}

// drop forgets a signer that failed.
func (k *Key) drop(failed crypto.Signer) error {
	k.mu.Lock()
	if k.signer != failed {
		k.mu.Unlock()
		return nil
	}
	closer := k.closer
	k.signer, k.closer = nil, nil
	k.mu.Unlock()
	return closeIf(closer)
}

func closeIf(c io.Closer) error {
	if c == nil {
		return nil
	}
	return c.Close()
}

// Check signs a throw-away digest and verifies the signature.
func (k *Key) Check() error { return CheckSigner(k) }

// CheckSigner returns an error if s cannot sign, or signs wrongly.
func CheckSigner(s crypto.Signer) error {
	digest := sha256.Sum256([]byte("muster: is this key there?"))
	signature, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	if pub, ok := s.Public().(*ecdsa.PublicKey); ok && !ecdsa.VerifyASN1(pub, digest[:], signature) {
		return fleet.Errorf(fleet.Internal, "the key signs wrongly")
	}
	return nil
}

// Close lets the key manager go. A call that hangs is not waited for.
func (k *Key) Close() error {
	k.mu.Lock()
	closer, done := k.closer, k.closed
	k.signer, k.closer, k.closed = nil, nil, true
	k.mu.Unlock()
	if done || closer == nil {
		return nil
	}
	return k.call(context.Background(), closer.Close)
}

// create are key managers whose own CreateKey does not serve.
var create = map[string]func(ref string) (name string, err error){}

// Create makes an EC P-256 key under ref and returns the URI by which it is to be opened: a cloud's key manager gives it
// a name of its own. It returns a Conflict error if there is a key already.
func Create(ctx context.Context, ref string, passphrase []byte) (string, error) {
	if err := Check(ref); err != nil {
		return "", err
	}
	if p := path(ref); p != "" {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return "", fmt.Errorf("key: %w", err)
		}
		abs, err := filepath.Abs(p)
		if err != nil {
			return "", err
		}
		return soft + ":path=" + abs, WriteFile(abs, key, passphrase)
	}
	made := make(chan string, 1)
	k := &Key{ref: Show(ref), timeout: Timeout * 4, calls: make(chan struct{}, 1)} // making one takes longer
	err := k.call(ctx, func() error {
		kind, _, _ := strings.Cut(ref, ":")
		if f := create[strings.ToLower(kind)]; f != nil {
			name, err := f(ref)
			made <- name
			return err
		}
		m, err := kms.New(context.Background(), apiv1.Options{URI: ref})
		if err != nil {
			return err
		}
		res, err := m.CreateKey(&apiv1.CreateKeyRequest{Name: ref, SignatureAlgorithm: apiv1.ECDSAWithSHA256})
		if err != nil {
			return errors.Join(err, m.Close())
		}
		made <- res.Name
		return m.Close()
	})
	if errors.Is(err, apiv1.AlreadyExistsError{}) {
		return "", fleet.Wrap(fleet.Conflict, err, "there is a key %s already: leave --create-keys out to use it", Show(ref))
	}
	if err != nil {
		return "", err
	}
	return <-made, nil
}
