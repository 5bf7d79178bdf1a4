package cli

import (
	"bytes"
	"fmt"

	"github.com/spf13/cobra"

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

func (a *app) firmwareSign() *cobra.Command {
	var o signing.Order
	var key, pass, product, version, minimum, hash string
	c := &cobra.Command{
		Use: "sign IMAGE --key FILE --product NAME --version X.Y.Z", Short: "sign the manifest of an image (offline)", Args: cobra.ExactArgs(1),
		Long: "Writes the signed manifest to IMAGE.jws. The image itself is not changed. muster firmware upload sends both.",
	}
	f := c.Flags()
	f.StringVar(&key, "key", "", "file with the private key")
	f.StringVar(&pass, "passphrase-file", "", "file with the passphrase of the key, or - for standard input")
	f.StringVar(&product, "product", "", "product line that the image is for")
	f.StringVar(&version, "version", "", "semantic version of the image")
	f.StringVar(&o.Chip, "chip", "", "chip that the image is for, like esp32s3")
	f.Uint32Var(&o.SecureVersion, "secure-version", 0, "anti-rollback counter of the image")
	f.StringVar(&minimum, "min-version", "", "versions below this one cannot be updated from")
	f.IntVar(&o.MinRevision, "min-chip-revision", 0, "lowest silicon revision that the image runs on, × 100: v3.1 is 301")
	f.IntVar(&o.MaxRevision, "max-chip-revision", 0, "highest silicon revision that the image runs on")
	f.StringVar(&hash, "image-hash", "", "hash by which a running image names itself; without: the SHA-256 of the file")
	f.StringVar(&o.Out, "out", "", "file for the signed manifest")
	f.BoolVar(&o.Replace, "force", false, "replace the signed manifest if it exists")
	for _, need := range []string{"key", "product", "version"} {
		_ = c.MarkFlagRequired(need)
	}
	c.RunE = func(_ *cobra.Command, args []string) error {
		o.Image, o.Product, o.Version = args[0], fleet.ProductID(product), firmware.Version(version)
		o.MinVersion, o.ImageHash = firmware.Version(minimum), fleet.Hash(hash)
		signer, err := signing.LoadKey(key, func() ([]byte, error) {
			p, err := a.passphrase(pass)
			if err == nil && p == nil {
				err = usagef("the key is encrypted: give --passphrase-file")
			}
			return p, err
		})
		if err != nil {
			return err
		}
		s, err := signing.Sign(o, signer)
		if err != nil {
			return err
		}
		return a.ui.show(s, func() {
			a.ui.printf("signed %s %s, %s, to %s\n", s.Manifest.Product, s.Manifest.Version, size(s.Manifest.Size), s.Path)
		})
	}
	return c
}

func (a *app) firmwareInspect() *cobra.Command {
	var public string
	c := &cobra.Command{
		Use: "inspect FILE", Short: "show a signed manifest, and verify it with --key (offline)", Args: cobra.ExactArgs(1),
	}
	c.Flags().StringVar(&public, "key", "", "file with the public key that must have signed it")
	c.RunE = func(_ *cobra.Command, args []string) error {
		r, err := signing.Inspect(args[0], public)
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			m, secure, verified := r.Manifest, "", cell{"not verified: no --key was given", yellow}
			if m.SecureVersion > 0 {
				secure = fmt.Sprint(m.SecureVersion)
			}
			if r.Verified {
				verified = cell{"good", green}
			}
			a.ui.facts("product", string(m.Product), "version", string(m.Version), "size", fmt.Sprintf("%d bytes", m.Size), "sha256", string(m.SHA256),
				"image hash", string(m.ImageHash), "chip", m.Chip, "secure version", secure, "minimum version", string(m.MinVersion),
				"key", r.KeyID, "signature", verified)
		})
	}
	return c
}
