package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
	"muster/internal/signing"
)

func (a *app) firmwareCmd() *cobra.Command {
	c := group("firmware", "signed releases and the keys that may sign them", a.firmwareUpload(), a.firmwareList(), a.firmwareShow(), a.firmwareFloor(), a.firmwareFOTA(), a.firmwareSlot(), a.keysCmd(), a.secureBootKeysCmd())
	c.AddCommand(a.offlineFirmware()...)
	return c
}

// maxManifest is the longest signed manifest, in bytes.
const maxManifest = 8 << 10

// readInput reads a file of at most max bytes, or standard input if it is -.
func (a *app) readInput(file string, max int64) ([]byte, error) {
	in := a.env.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) > max {
		return nil, usagef("%s is longer than %d bytes: is it the right file?", file, max)
	}
	return raw, nil
}

func (a *app) firmwareUpload() *cobra.Command {
	var manifest, fota string
	var burn bool
	c := &cobra.Command{
		Use: "upload IMAGE [--manifest FILE]", Short: "publish a signed release", Args: cobra.ExactArgs(1),
		Long: `Publishes an image with the manifest that muster firmware sign made; without --manifest, that is IMAGE.jws. A release never
changes: uploading the same again is harmless, another image needs another version.

The server checks an ESP32 image whole and compares it with the manifest. One that raises the secure version of its product
makes every device that takes it burn that into its eFuses, for good: that needs --burn-secure-version.

IMAGE.esp32fota, if there is one, or --esp32fota is the signature that esp32FOTA clients get before the image.`,
	}
	c.Flags().StringVar(&manifest, "manifest", "", "file with the signed manifest")
	c.Flags().StringVar(&fota, "esp32fota", "", "file with the signature for esp32FOTA")
	c.Flags().BoolVar(&burn, "burn-secure-version", false, "the release is meant to raise the secure version, which cannot be undone")
	return a.online(c, func(ctx context.Context, args []string) error {
		jws, err := a.readInput(first(manifest, args[0]+".jws"), maxManifest)
		if err != nil {
			return err
		}
		before, err := readFOTA(args[0], fota)
		if err != nil {
			return err
		}
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if !fi.Mode().IsRegular() || fi.Size() == 0 {
			return usagef("%s is not a file with an image", args[0])
		}
		p := api.UploadReleaseParams{MusterManifest: strings.TrimSpace(string(jws))}
		if burn {
			p.BurnSecureVersion = &burn
		}
		if err := a.preview(args[0], p.MusterManifest); err != nil {
			return err
		}
		m := a.ui.meter("uploading", fi.Size(), size)
		rel, created, err := a.client.Upload(ctx, p, f, fi.Size(), m.set)
		m.end()
		if err == nil && before != nil {
			if rel, err = client.Read[api.Release](a.client.SetESP32FOTA(ctx, rel.Product, rel.Version, *before)); err != nil {
				a.ui.note("the release is published, but without its signature for esp32FOTA: see muster firmware esp32fota")
			}
		}
		if err != nil {
			return err
		}
		return a.ui.show(rel, func() {
			verb := "published"
			if !created {
				verb = "was published before:"
			}
			a.ui.printf("%s %s %s, %s\n", verb, clean(rel.Product), clean(rel.Version), size(rel.Size))
			if before != nil {
				a.ui.printf("esp32FOTA clients get it behind a signature by key %s\n", short(rel.Esp32FotaKey))
			}
		})
	})
}

// readFOTA reads the signature for esp32FOTA that goes with an image: in file, or beside the image; nil if there is none.
func readFOTA(image, file string) (*api.NewESP32FOTA, error) {
	if file == "" {
		file = image + signing.FOTAEnding
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
	}
	s, err := signing.ReadFOTA(file)
	return &api.NewESP32FOTA{Signature: s.Signature, PublicKey: s.PublicKey}, err
}

func (a *app) firmwareFOTA() *cobra.Command {
	var file string
	var off, other bool
	c := &cobra.Command{
		Use: "esp32fota PRODUCT VERSION [--signature FILE [--new-key] | --off]", Short: "the signature that esp32FOTA clients get before an image", Args: cobra.ExactArgs(2),
		Long: `Gives a release that is published the signature that muster firmware sign --esp32fota made, or takes it off. The server checks it
as the device will. A key that is not the one of the product's other releases needs --new-key: sketches in the field hold the old.`,
	}
	c.Flags().StringVar(&file, "signature", "", "file with the signature, IMAGE.esp32fota")
	c.Flags().BoolVar(&other, "new-key", false, "it is meant to be another key than that of the other releases")
	c.Flags().BoolVar(&off, "off", false, "take the signature off: esp32FOTA clients get the image alone")
	return a.online(c, func(ctx context.Context, args []string) error {
		if off == (file != "") || off && other {
			return usagef("give --signature FILE, or --off alone")
		}
		var r api.Release
		var err error
		if off {
			r, err = client.Read[api.Release](a.client.ClearESP32FOTA(ctx, args[0], args[1]))
		} else {
			var in *api.NewESP32FOTA
			if in, err = readFOTA("", file); err != nil {
				return err
			}
			in.NewKey = other
			r, err = client.Read[api.Release](a.client.SetESP32FOTA(ctx, args[0], args[1], *in))
		}
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			if r.Esp32FotaKey == "" {
				a.ui.printf("esp32FOTA clients get %s %s as it is\n", clean(r.Product), clean(r.Version))
			} else {
				a.ui.printf("esp32FOTA clients get %s %s behind a signature by key %s\n", clean(r.Product), clean(r.Version), short(r.Esp32FotaKey))
			}
		})
	})
}

// preview says what the server only would note: that the image calls itself something else, or how much of the chip's
// anti-rollback counter it uses up. What is wrong with image or manifest the server says.
func (a *app) preview(path, jws string) error {
	p, err := signing.Preview(path, jws)
	if err != nil {
		return err
	}
	a.doubts(p.Warnings)
	if p.Steps != "" && p.SecureVersion > 0 {
		a.ui.note("secure version %d: %s", p.SecureVersion, p.Steps)
	}
	return nil
}

func (a *app) firmwareList() *cobra.Command {
	p := api.ListReleasesParams{Limit: 500}
	c := &cobra.Command{Use: "list", Short: "list releases", Args: cobra.NoArgs}
	c.Flags().StringVar(&p.Product, "product", "", "only of this product")
	return a.online(c, func(ctx context.Context, _ []string) error {
		rs, err := take(0, func(cursor string) ([]api.Release, string, error) {
			p.Cursor = cursor
			l, err := client.Read[api.ReleaseList](a.client.ListReleases(ctx, &p))
			return l.Items, l.NextCursor, err
		})
		if err != nil {
			return err
		}
		return a.ui.show(rs, func() {
			if len(rs) == 0 {
				a.ui.note("no releases")
				return
			}
			t := a.ui.table("PRODUCT", "VERSION", "SIZE", "CHIP", "IMAGE", "KEY", "UPLOADED", "BY")
			for _, r := range rs {
				t.row(r.Product, r.Version, size(r.Size), r.Chip, short(r.ImageHash), short(r.KeyID), a.ui.ago(r.UploadedAt), r.UploadedBy)
			}
			t.print()
		})
	})
}

// short shows enough of a hash to tell it from others.
func short(s string) string { return s[:min(12, len(s))] }

func (a *app) firmwareShow() *cobra.Command {
	c := &cobra.Command{Use: "show PRODUCT VERSION", Short: "show a release", Args: cobra.ExactArgs(2)}
	return a.online(c, func(ctx context.Context, args []string) error {
		r, err := client.Read[api.Release](a.client.GetRelease(ctx, args[0], args[1]))
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			secure := ""
			if r.SecureVersion > 0 {
				secure = fmt.Sprint(r.SecureVersion)
			}
			a.ui.facts("product", r.Product, "version", r.Version, "size", fmt.Sprintf("%d bytes", r.Size), "sha256", r.SHA256, "image hash", r.ImageHash,
				"chip", r.Chip, "chip revisions", revisions(r.MinChipRevision, r.MaxChipRevision), "secure version", secure, "minimum version", r.MinVersion, "floor", floorOf(r), "esp32FOTA key", r.Esp32FotaKey, "signed by", r.KeyID, "uploaded", r.UploadedAt, "by", r.UploadedBy)
		})
	})
}

// revisions shows on which silicon something runs.
func revisions(lowest, highest int) string {
	show := func(n int) string { return fmt.Sprintf("v%d.%d", n/100, n%100) }
	switch {
	case lowest == 0 && highest == 0:
		return ""
	case highest == 0:
		return "from " + show(lowest) + " on"
	case lowest == 0:
		return "up to " + show(highest)
	}
	return show(lowest) + " to " + show(highest)
}

func floorOf(r api.Release) string {
	if !r.Floor {
		return ""
	}
	return strings.TrimSuffix("may not be skipped: "+r.FloorWhy, ": ")
}

func (a *app) firmwareFloor() *cobra.Command {
	var why string
	var off bool
	c := &cobra.Command{
		Use: "floor PRODUCT VERSION [--why TEXT | --off]", Short: "mark a release that may not be skipped", Args: cobra.ExactArgs(2),
		Long: `Marks a release as a floor: a device below it takes it first, in the same rollout, before it is offered a newer one. Rollouts that
exist already are not changed.`,
	}
	c.Flags().StringVar(&why, "why", "", "the reason, for those who wonder later")
	c.Flags().BoolVar(&off, "off", false, "take the mark off")
	return a.online(c, func(ctx context.Context, args []string) error {
		if off && why != "" {
			return usagef("--off takes the mark off and needs no --why")
		}
		var r api.Release
		var err error
		if off {
			r, err = client.Read[api.Release](a.client.ClearFloor(ctx, args[0], args[1]))
		} else {
			r, err = client.Read[api.Release](a.client.SetFloor(ctx, args[0], args[1], api.FloorMark{Why: why}))
		}
		if err != nil {
			return err
		}
		return a.ui.show(r, func() {
			if r.Floor {
				a.ui.printf("%s %s may not be skipped\n", clean(r.Product), clean(r.Version))
			} else {
				a.ui.printf("%s %s may be skipped\n", clean(r.Product), clean(r.Version))
			}
		})
	})
}

func (a *app) keysCmd() *cobra.Command {
	var product string
	add := &cobra.Command{
		Use: "add FILE", Short: "register a public key (PEM) that may sign releases", Args: cobra.ExactArgs(1),
	}
	add.Flags().StringVar(&product, "product", "", "the product whose releases it may sign; without: every product")
	a.online(add, func(ctx context.Context, args []string) error {
		raw, err := a.readInput(args[0], 64<<10)
		if err != nil {
			return err
		}
		k, err := client.Read[api.SigningKey](a.client.AddSigningKey(ctx, api.NewSigningKey{Product: product, PublicKey: string(raw)}))
		if err != nil {
			return err
		}
		return a.ui.show(k, func() { a.ui.printf("registered key %s\n", clean(k.ID)) })
	})
	list := a.online(&cobra.Command{Use: "list", Short: "list signing keys", Args: cobra.NoArgs}, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.SigningKeyList](a.client.ListSigningKeys(ctx))
		if err != nil {
			return err
		}
		return a.ui.show(l.Items, func() {
			if len(l.Items) == 0 {
				a.ui.note("no signing keys: make one with muster firmware keygen, and add it")
				return
			}
			t := a.ui.table("ID", "PRODUCT", "STATE", "ADDED", "BY")
			for _, k := range l.Items {
				state := cell{"active", green}
				if k.Revoked {
					state = cell{"revoked", red}
				}
				t.row(k.ID, first(k.Product, "every"), state, a.ui.ago(k.AddedAt), k.AddedBy)
			}
			t.print()
		})
	})
	revoke := a.online(&cobra.Command{Use: "revoke ID", Short: "take a signing key out of use for good", Args: cobra.ExactArgs(1)}, func(ctx context.Context, args []string) error {
		k, err := client.Read[api.SigningKey](a.client.RevokeSigningKey(ctx, args[0]))
		if err != nil {
			return err
		}
		return a.ui.show(k, func() { a.ui.printf("revoked key %s\n", clean(k.ID)) })
	})
	return group("keys", "the keys that may sign releases", add, list, revoke)
}
