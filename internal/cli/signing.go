package cli

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"muster/internal/esp"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/signing"
)

// offlineFirmware are the commands that need no server: the private key of a release stays on this machine.
func (a *app) offlineFirmware() []*cobra.Command {
	return []*cobra.Command{a.firmwareKeygen(), a.firmwareSign(), a.firmwareInspect()}
}

// passphrase reads the passphrase of a key from a file; without one there is none.
func (a *app) passphrase(file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	raw, err := a.readInput(file, 4096)
	if err != nil {
		return nil, fmt.Errorf("the passphrase: %w", err)
	}
	if raw = bytes.TrimRight(raw, "\r\n"); len(raw) == 0 {
		return nil, usagef("the passphrase file is empty")
	}
	return raw, nil
}

func (a *app) firmwareKeygen() *cobra.Command {
	var out, pass string
	c := &cobra.Command{
		Use: "keygen --out FILE", Short: "make a key that signs releases (offline)", Args: cobra.NoArgs,
		Long: `Makes an EC P-256 key: the private half in FILE, which only you can read, the public half in FILE.pub.pem. Register the
public half with muster firmware keys add; keep the private half off musterd's machine.`,
	}
	c.Flags().StringVar(&out, "out", "", "file for the private key")
	c.Flags().StringVar(&pass, "passphrase-file", "", "encrypt the private key with the passphrase in this file, or - for standard input")
	_ = c.MarkFlagRequired("out")
	c.RunE = func(*cobra.Command, []string) error {
		p, err := a.passphrase(pass)
		if err != nil {
			return err
		}
		k, err := signing.Keygen(out, p)
		if err != nil {
			return err
		}
		return a.ui.show(k, func() {
			a.ui.facts("key", k.ID, "private", k.Private, "public", k.Public)
			if pass == "" {
				a.ui.note("the private key is not encrypted: see --passphrase-file")
			}
		})
	}
	return c
}

// signFlags are what muster firmware sign was told.
type signFlags struct {
	order          signing.Order
	key, pass      string
	product        string
	version, least string
	hash           string

	bootKeys   []string
	bootPass   string
	signatures []string
	publics    []string
	request    string
	signedOut  string
	keep       bool

	fotaKey, fotaPass, fotaSignature, fotaPublic string
}

const signLong = `Writes the signed manifest of a release to IMAGE.jws. muster firmware upload sends both.

An ESP32 image is read and checked whole: chip, chip revisions, secure version and image hash of the manifest come from it, and
a flag that says something else is an error. Of any other file the flags alone tell.

With --secure-boot, a Secure Boot v2 signature sector is appended first: the signed image goes to a new file (IMAGE is not
changed, and nothing is overwritten), and the manifest is that of the signed image. Without --key only the sector is made.

Keys are files in PEM, or URIs of a key manager: pkcs11:token=…;object=…?pin-source=FILE (a muster made by make pkcs11), awskms:,
cloudkms: and azurekms: (built with -tags awskms and so on). One whose module has no such way signs in two steps:
  muster firmware sign app.bin --secure-boot-request digest.bin --public-key hsm.pub.pem
  (the module signs the digest in digest.bin)
  muster firmware sign app.bin --secure-boot-signature digest.bin.sig --public-key hsm.pub.pem --key release.pem ...

With --esp32fota, a signature for esp32FOTA clients that check one is written to IMAGE.esp32fota; upload sends it along. One
that was made elsewhere (openssl dgst -sha256 -sign KEY IMAGE) comes by --esp32fota-signature and --esp32fota-public-key.`

func (a *app) firmwareSign() *cobra.Command {
	var o signFlags
	c := &cobra.Command{
		Use: "sign IMAGE --key FILE --product NAME --version X.Y.Z", Short: "sign an image for Secure Boot, and its manifest (offline)", Args: cobra.ExactArgs(1),
		Long: signLong,
	}
	f := c.Flags()
	f.StringVar(&o.key, "key", "", "file with the private key of the release, or the URI of a key manager")
	f.StringVar(&o.pass, "passphrase-file", "", "file with the passphrase of the key, or - for standard input")
	f.StringVar(&o.product, "product", "", "product line that the image is for")
	f.StringVar(&o.version, "version", "", "semantic version of the image")
	f.StringVar(&o.order.Chip, "chip", "", "chip that the image is for, like esp32s3")
	f.Uint32Var(&o.order.SecureVersion, "secure-version", 0, "anti-rollback counter of the image")
	f.StringVar(&o.least, "min-version", "", "versions below this one cannot be updated from")
	f.IntVar(&o.order.MinRevision, "min-chip-revision", 0, "lowest silicon revision that the image runs on, × 100: v3.1 is 301")
	f.IntVar(&o.order.MaxRevision, "max-chip-revision", 0, "highest silicon revision that the image runs on")
	f.StringVar(&o.hash, "image-hash", "", "hash by which a running image names itself; without: the SHA-256 of a file that is no ESP32 image")
	f.StringVar(&o.order.Out, "out", "", "file for the signed manifest")
	f.BoolVar(&o.order.Replace, "force", false, "replace the signed manifest if it exists")
	f.StringArrayVar(&o.bootKeys, "secure-boot", nil, "sign for Secure Boot v2 with the private key in this file, or of this URI: RSA-3072, EC P-256 or P-384 (up to three times)")
	f.StringVar(&o.bootPass, "secure-boot-passphrase-file", "", "file with the passphrase of the Secure Boot keys, or - for standard input")
	f.StringArrayVar(&o.signatures, "secure-boot-signature", nil, "take a Secure Boot signature that was made elsewhere, by the --public-key in the same place")
	f.StringArrayVar(&o.publics, "public-key", nil, "file with the public half of a Secure Boot key")
	f.StringVar(&o.request, "secure-boot-request", "", "only write what --public-key must sign to this file")
	f.StringVar(&o.signedOut, "signed", "", "file for the signed image; without: IMAGE with .signed before its ending")
	f.StringVar(&o.fotaKey, "esp32fota", "", "sign for esp32FOTA with the private key in this file, or of this URI: RSA of 2048, 3072 or 4096 bits")
	f.StringVar(&o.fotaPass, "esp32fota-passphrase-file", "", "file with the passphrase of the esp32FOTA key, or - for standard input")
	f.StringVar(&o.fotaSignature, "esp32fota-signature", "", "take the esp32FOTA signature in this file")
	f.StringVar(&o.fotaPublic, "esp32fota-public-key", "", "file with the public key of --esp32fota-signature")
	f.BoolVar(&o.keep, "append-signatures", false, "keep the Secure Boot signatures that the image has")
	c.RunE = func(_ *cobra.Command, args []string) error {
		o.order.Image, o.order.Product, o.order.Version = args[0], fleet.ProductID(o.product), firmware.Version(o.version)
		o.order.MinVersion, o.order.ImageHash = firmware.Version(o.least), fleet.Hash(o.hash)
		if o.request != "" {
			return a.requestSecureBoot(o)
		}
		return a.sign(o)
	}
	return c
}

// check refuses flags that do not go together.
func (o signFlags) check() error {
	boot := len(o.bootKeys)+len(o.signatures) > 0
	fota := o.fotaKey != "" || o.fotaSignature != ""
	switch {
	case o.fotaKey != "" && o.fotaSignature != "" || (o.fotaSignature == "") != (o.fotaPublic == ""):
		return usagef("give either --esp32fota, or --esp32fota-signature with --esp32fota-public-key")
	case o.fotaPass != "" && o.fotaKey == "":
		return usagef("--esp32fota-passphrase-file goes with --esp32fota")
	case len(o.publics) != len(o.signatures):
		return usagef("give one --public-key for each --secure-boot-signature, in the same order")
	case !boot && (o.keep || o.signedOut != "" || o.bootPass != ""):
		return usagef("--append-signatures, --signed and --secure-boot-passphrase-file go with --secure-boot or --secure-boot-signature")
	case o.key == "" && !boot && !fota:
		return usagef("give --key to sign a release, or --secure-boot to sign the image")
	case o.key == "" && (o.product != "" || o.version != "" || o.order.Out != ""):
		return usagef("a release needs --key")
	case o.key != "" && (o.product == "" || o.version == ""):
		return usagef("a release needs --product and --version")
	case o.pass == "-" && o.bootPass == "-", o.pass == "-" && o.fotaPass == "-", o.bootPass == "-" && o.fotaPass == "-":
		return usagef("standard input holds one passphrase only")
	}
	return nil
}

// secret returns how to come by a passphrase when a key wants one.
func (a *app) secret(file, flag string) func() ([]byte, error) {
	var kept []byte
	return func() ([]byte, error) {
		if kept != nil {
			return kept, nil
		}
		p, err := a.passphrase(file)
		if err == nil && p == nil {
			err = usagef("the key is encrypted: give --%s", flag)
		}
		kept = p
		return p, err
	}
}

// signResult is what muster firmware sign shows.
type signResult struct {
	SecureBoot *signing.SecureBootSigned `json:"secure_boot,omitempty"`
	Release    *signing.Signed           `json:"release,omitempty"`
	ESP32FOTA  *signing.FOTASigned       `json:"esp32fota,omitempty"`
}

func (a *app) sign(o signFlags) error {
	if err := o.check(); err != nil {
		return err
	}
	var release crypto.Signer
	var err error
	if o.key != "" { // before anything is written
		if release, err = signing.LoadKey(o.key, a.secret(o.pass, "passphrase-file")); err != nil {
			return err
		}
	}
	var fota crypto.Signer
	if o.fotaKey != "" {
		if fota, err = signing.LoadFOTAKey(o.fotaKey, a.secret(o.fotaPass, "esp32fota-passphrase-file")); err != nil {
			return err
		}
	}
	var out signResult
	if len(o.bootKeys)+len(o.signatures) > 0 {
		boot, err := a.signSecureBoot(o)
		if err != nil {
			return err
		}
		out.SecureBoot, o.order.Image = &boot, boot.Path
	}
	if release != nil {
		s, err := signing.Sign(o.order, release)
		if err != nil {
			if out.SecureBoot != nil { // so that the same command can be repeated
				err = errors.Join(err, os.Remove(out.SecureBoot.Path))
			}
			return err
		}
		out.Release = &s
	}
	var made signing.FOTASigned
	switch { // last: over the image as it is uploaded
	case fota != nil:
		made, err = signing.SignFOTA(o.order.Image, fota, o.order.Replace)
	case o.fotaSignature != "":
		made, err = signing.KeepFOTA(o.order.Image, o.fotaSignature, o.fotaPublic, o.order.Replace)
	}
	if err != nil {
		return err
	}
	if made.Path != "" {
		out.ESP32FOTA = &made
	}
	return a.ui.show(out, func() { a.showSigned(out) })
}

func (a *app) signSecureBoot(o signFlags) (signing.SecureBootSigned, error) {
	order := signing.SecureBootOrder{Image: o.order.Image, Out: o.signedOut, Append: o.keep}
	secret := a.secret(o.bootPass, "secure-boot-passphrase-file")
	for _, path := range o.bootKeys {
		k, err := signing.LoadSecureBootKey(path, secret)
		if err != nil {
			return signing.SecureBootSigned{}, err
		}
		order.Signers = append(order.Signers, k)
	}
	for i, path := range o.signatures {
		k, err := signing.LoadSecureBootPublicKey(o.publics[i])
		if err != nil {
			return signing.SecureBootSigned{}, err
		}
		order.Made = append(order.Made, signing.Made{Key: k, Signature: path})
	}
	return signing.SignSecureBoot(order)
}

func (a *app) showSigned(out signResult) {
	if b := out.SecureBoot; b != nil {
		a.ui.printf("signed for Secure Boot, %s, to %s\n", size(b.Size), clean(b.Path))
		for i, k := range b.Keys {
			a.ui.printf("  block %d by key %s\n", i, k)
		}
	}
	if s := out.Release; s != nil {
		a.ui.printf("signed %s %s, %s, to %s\n", s.Manifest.Product, s.Manifest.Version, size(s.Manifest.Size), clean(s.Path))
		if s.ESP {
			a.ui.printf("  %s image %s\n", first(s.Manifest.Chip, "ESP32"), short(string(s.Manifest.ImageHash)))
		} else {
			a.ui.note("not an ESP32 image: nothing in it was checked")
		}
		if s.Steps != "" && s.Manifest.SecureVersion > 0 {
			a.ui.note("secure version %d: %s", s.Manifest.SecureVersion, s.Steps)
		}
		a.doubts(s.Findings)
	} else if out.SecureBoot != nil {
		a.doubts(out.SecureBoot.Findings)
	}
	if f := out.ESP32FOTA; f != nil {
		a.ui.printf("signed for esp32FOTA, %d bytes, to %s\n", f.Bytes, clean(f.Path))
		if f.Bytes != 512 {
			a.ui.note("the sketch must say setSignatureLen(%d)", f.Bytes)
		}
	}
}

// doubts prints what is worth saying before an image goes out.
func (a *app) doubts(fs esp.Findings) {
	for _, f := range fs {
		if f.Severity == esp.Info {
			continue
		}
		a.ui.note("%s", clean(f.String()))
	}
}

func (a *app) requestSecureBoot(o signFlags) error {
	if o.key != "" || len(o.bootKeys)+len(o.signatures) > 0 || len(o.publics) != 1 {
		return usagef("--secure-boot-request goes with one --public-key, and with neither --key nor another signature")
	}
	k, err := signing.LoadSecureBootPublicKey(o.publics[0])
	if err != nil {
		return err
	}
	r, err := signing.RequestSecureBoot(o.order.Image, o.request, k, o.keep)
	if err != nil {
		return err
	}
	return a.ui.show(r, func() {
		a.ui.facts("digest", r.Digest, "file", r.Path, "scheme", string(r.Scheme), "key", r.Key.String())
		a.ui.note("sign the digest as it is, without hashing it again; with OpenSSL: %s", clean(r.OpenSSL))
		a.ui.note("then: muster firmware sign %s --secure-boot-signature %s --public-key %s ...", clean(o.order.Image), clean(r.Path)+".sig", clean(o.publics[0]))
	})
}

func (a *app) firmwareInspect() *cobra.Command {
	var l signing.Look
	c := &cobra.Command{
		Use: "inspect FILE", Short: "show an image, a signed manifest, or both, and what is wrong with them (offline)", Args: cobra.ExactArgs(1),
		Long: `Shows what an ESP32 image holds, down to its signatures, and what a device would refuse in it. If the manifest is beside it
(FILE.jws, or --manifest), that is shown too and must agree with the image. FILE may be a signed manifest alone.

Exit code 0: nothing is wrong; 1: something is.`,
	}
	c.Flags().StringVar(&l.Public, "key", "", "file with the public key that must have signed the manifest")
	c.Flags().StringVar(&l.Manifest, "manifest", "", "file with the signed manifest of the image")
	c.RunE = func(_ *cobra.Command, args []string) error {
		l.File = args[0]
		r, err := signing.Inspect(l)
		if err != nil {
			return err
		}
		if err := a.ui.show(r, func() { a.showInspected(r) }); err != nil {
			return err
		}
		return r.Err()
	}
	return c
}
