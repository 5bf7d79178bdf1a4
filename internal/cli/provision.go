package cli

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
	"muster/internal/escrow"
	"muster/internal/esp/nvs"
	"muster/internal/fleet"
	"muster/internal/provision"
)

// provisionFlags are what a person says.
type provisionFlags struct {
	single                            api.NewDevice
	mac, from, out                    string
	labels                            []string
	chip, bootloader, app, partitions string
	tableOffset                       string
	data                              []string
	nvsPartition, template            string
	wifiSSID, wifiPassword            string
	nvsEncryption, flashEncryption    string
	hmacBlock                         int
	secureBoot                        []string
	passphrase                        string
	keepDownload                      bool
	recipients                        []string
	recipientsFile                    string
	releaseKeys                       []string
	csr                               bool
	enrolFor, lifetime                string
	again, dryRun                     bool
}

func (a *app) provisionCmd() *cobra.Command {
	var f provisionFlags
	c := &cobra.Command{
		Use: "provision ID --product NAME --out DIR | provision --from FILE.csv --out DIR", Args: cobra.MaximumNArgs(1),
		Short: "make what a factory puts into ESP32 devices: a folder and a flash.sh for each",
		Long: `Registers devices, gives each an identity, and makes a folder DIR/<id> for each: NVS partition, partition table, bootloader
and app, signed and encrypted as the flags say, the keys for its eFuses, and flash.sh, which brings all of it into a board by Espressif's tools.
Without --bootloader and --app there is an NVS partition only. docs/factory.md is the guide.

The CSV file's first line names its columns: id, product, hardware, groups, label:KEY as in muster device add; mac, of the board that
is meant; wifi_ssid, wifi_password; and value:NAME, which stands for {{NAME}} in the --nvs-template. The template is a CSV as Espressif's
nvs_partition_gen reads it (key,type,encoding,value); {{id}}, {{product}}, {{hardware}}, {{mac}} and {{label:KEY}} are there as well.

A run that was interrupted, or in which some devices failed, can be repeated: what is complete is kept, and what is not goes on with
the same key. No device gets a second identity unless --again is given. DIR/station.log tells who did what.

The keys that are burnt into eFuses are made here. With --recipient they are sealed, one file a device, in DIR/escrow; only the age
identity of that recipient opens them (muster device decrypt-nvs). Without, they are gone when flash.sh is done.`,
		Example: `  muster provision lamp-0001 --product lamp --bootloader bootloader.bin --app firmware.bin --out ./factory
  muster provision --from lamps.csv --bootloader bootloader.bin --app firmware.bin --partitions partitions.csv --out ./factory \
    --flash-encryption on --nvs-encryption keys --secure-boot sb1.pem --recipient age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p --dry-run`,
	}
	fl := c.Flags()
	fl.StringVar(&f.single.Product, "product", "", "product of the one device")
	fl.StringVar(&f.single.Hardware, "hardware", "", "board revision of the one device")
	fl.StringArrayVar(&f.labels, "label", nil, "key=value, of the one device; may be repeated")
	fl.StringVar(&f.mac, "mac", "", "MAC address of the one board that is meant")
	fl.StringVar(&f.from, "from", "", "CSV file, or - for standard input")
	fl.StringVar(&f.out, "out", "", "folder to write to")
	fl.StringVar(&f.chip, "chip", "", "chip; needed only without --app, which tells it")
	fl.StringVar(&f.bootloader, "bootloader", "", "bootloader image")
	fl.StringVar(&f.app, "app", "", "application image")
	fl.StringVar(&f.partitions, "partitions", "arduino-default", "partition table, CSV or binary, or the name of a built-in one: arduino-default, arduino-min-spiffs, esp-idf-two-ota")
	fl.StringVar(&f.tableOffset, "table-offset", "0x8000", "where the partition table goes")
	fl.StringArrayVar(&f.data, "data", nil, "PARTITION=FILE: what goes into another partition; may be repeated")
	fl.StringVar(&f.nvsPartition, "nvs-partition", "", "NVS partition to fill, if not the first of the table")
	fl.StringVar(&f.template, "nvs-template", "", "CSV file with your own NVS entries")
	fl.StringVar(&f.wifiSSID, "wifi-ssid", "", "Wi-Fi network, if the CSV file does not say")
	fl.StringVar(&f.wifiPassword, "wifi-password-file", "", "file with its password")
	fl.StringVar(&f.nvsEncryption, "nvs-encryption", "none", "none, keys (in a partition, with flash encryption), or hmac (a key in an eFuse block)")
	fl.IntVar(&f.hmacBlock, "hmac-block", 0, "with hmac: key block 0 to 5, CONFIG_NVS_SEC_HMAC_EFUSE_KEY_ID of the firmware")
	fl.StringVar(&f.flashEncryption, "flash-encryption", "none", "none, on (the chip's usual kind), xts-128 or xts-256")
	fl.StringArrayVar(&f.secureBoot, "secure-boot", nil, "turn Secure Boot v2 on with this key, PEM: a private one signs here; of a public one, the images must have the signature already; may be repeated")
	fl.StringVar(&f.passphrase, "secure-boot-passphrase-file", "", "file with the passphrase of the --secure-boot keys")
	fl.BoolVar(&f.keepDownload, "keep-download", false, "leave the chip's download mode open (not for devices that leave the house)")
	fl.StringArrayVar(&f.recipients, "recipient", nil, "age recipient (age1...) who can open the escrow; may be repeated")
	fl.StringVar(&f.recipientsFile, "recipients-file", "", "file with recipients, one a line")
	fl.StringArrayVar(&f.releaseKeys, "release-key", nil, "public key, PEM: the device takes releases that it signed, and no others, for ever; at most two")
	fl.BoolVar(&f.csr, "csr", false, "the device makes its key itself: no key and certificate, but the passwords with which it asks for its first")
	fl.StringVar(&f.enrolFor, "enrol-for", "720h", "with --csr: how long the password for the first certificate works, 1m to 2160h")
	fl.StringVar(&f.lifetime, "lifetime", "", "how long the certificate is good, if shorter than the policy says")
	fl.BoolVar(&f.again, "again", false, "give a device that has an identity another one")
	fl.BoolVar(&f.dryRun, "dry-run", false, "check everything and show what would be done; asks and writes nothing")
	_ = c.MarkFlagRequired("out")
	c.MarkFlagsRequiredTogether("bootloader", "app")
	c.MarkFlagsMutuallyExclusive("from", "product")
	c.MarkFlagsMutuallyExclusive("csr", "lifetime")
	c.RunE = func(cmd *cobra.Command, args []string) error { return a.provision(cmd.Context(), f, args) }
	return c
}

// provision is the whole command.
func (a *app) provision(ctx context.Context, f provisionFlags, args []string) error {
	l, err := a.newLine(f, args)
	if err != nil {
		return err
	}
	if f.dryRun {
		return l.rehearse()
	}
	l.warn()
	if err := a.connect(); err != nil {
		return err
	}
	if err := l.fetch(ctx); err != nil {
		return err
	}
	return l.run(ctx)
}

// line is a production line: what is the same for all devices of a run.
type line struct {
	a         *app
	f         provisionFlags
	product   provision.Product
	plan      *provision.Plan
	devices   []unit
	template  *provision.Template
	wifi      string   // password
	notes     []string // what is worth saying before anything is made
	escrow    escrow.Recipients
	dir       string
	common    commonFiles
	relKeys   string // PEM
	trust     api.Trust
	bundle    string
	endpoints api.Endpoints
}

// unit is a device to make.
type unit struct {
	api.NewDevice
	mac                string
	wifiSSID, wifiPass string
	values             map[string]string // of the template
}

// newLine reads and checks all that needs no server.
func (a *app) newLine(f provisionFlags, args []string) (*line, error) {
	l := &line{a: a, f: f, dir: f.out}
	for _, read := range []func() error{
		func() error { return l.readUnits(args) }, l.readProduct, l.readTemplate, l.readWiFi, l.readRecipients, l.readReleaseKeys,
	} {
		if err := read(); err != nil {
			return nil, err
		}
	}
	l.product.Escrowed = len(l.escrow) > 0
	plan, err := provision.New(l.product)
	if err != nil {
		return nil, err
	}
	l.plan = plan
	return l, l.checkUnits()
}

func (l *line) readTemplate() error {
	if l.f.template == "" {
		return nil
	}
	raw, err := l.a.readInput(l.f.template, nvs.MaxCSV)
	if err != nil {
		return err
	}
	l.template, err = provision.ParseTemplate(raw)
	return err
}

func (l *line) readWiFi() error {
	if l.f.wifiPassword == "" {
		return nil
	}
	raw, err := l.a.readInput(l.f.wifiPassword, 256)
	l.wifi = strings.TrimRight(string(raw), "\r\n")
	return err
}

func (l *line) readRecipients() error {
	text := strings.Join(l.f.recipients, "\n")
	if l.f.recipientsFile != "" {
		raw, err := l.a.readInput(l.f.recipientsFile, 64<<10)
		if err != nil {
			return err
		}
		text += "\n" + string(raw)
	}
	if strings.TrimSpace(text) == "" {
		return nil
	}
	var err error
	l.escrow, err = escrow.ParseRecipients(text)
	return err
}

// maxReleaseKeys is how many the example client keeps.
const maxReleaseKeys = 2

func (l *line) readReleaseKeys() error {
	if len(l.f.releaseKeys) > maxReleaseKeys {
		return usagef("a device keeps at most %d release keys", maxReleaseKeys)
	}
	for _, file := range l.f.releaseKeys {
		raw, err := l.a.readInput(file, 16<<10)
		if err != nil {
			return err
		}
		block, _ := pem.Decode(raw)
		if block == nil || block.Type != "PUBLIC KEY" {
			return usagef("%s holds no public key in PEM", file)
		}
		if _, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil {
			return usagef("%s holds no public key in PEM", file)
		}
		l.relKeys += string(pem.EncodeToMemory(block))
	}
	return nil
}

// openFile opens a file that a template names, relative to the template.
func (l *line) openFile(name string) (io.ReadCloser, error) {
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(l.f.template), name)
	}
	return os.Open(name)
}

// entries returns the NVS entries of a device.
func (l *line) entries(u unit, id provision.Identity) ([]nvs.Entry, error) {
	id.Device = fleet.DeviceID(u.ID)
	id.WiFiSSID, id.WiFiPassword = u.wifiSSID, u.wifiPass
	out := id.Entries()
	if l.template == nil {
		return out, nil
	}
	own, err := l.template.Entries(u.values, l.openFile)
	if err != nil {
		return nil, err
	}
	return append(out, own...), nil
}

// rehearse shows what a run would do, and tries it with stand-ins for what musterd gives.
func (l *line) rehearse() error {
	filler := func(n int) string { return strings.Repeat("x", n) }
	stand := provision.Identity{
		MQTT: filler(40), FallbackMQTT: filler(40), HTTPS: filler(40), RecoveryHTTPS: filler(40), Roots: filler(1600), TrustKey: filler(180), Bundle: filler(2600),
		ReleaseKeys: filler(360), Password: filler(43),
	}
	if l.f.csr {
		stand.EnrolPassword = filler(43)
	} else {
		stand.Chain, stand.Key = filler(2200), filler(250)
	}
	for _, u := range l.devices {
		entries, err := l.entries(u, stand)
		if err != nil {
			return fmt.Errorf("%s: %w", u.ID, err)
		}
		if _, err := nvs.Encode(entries, nvs.Options{Size: l.nvsRoom()}); err != nil {
			return fmt.Errorf("%s: %w", u.ID, err)
		}
	}
	return l.show()
}

func (l *line) nvsRoom() int {
	for _, r := range l.plan.Regions() {
		if r.File == l.plan.NVSFile() {
			return r.Size
		}
	}
	return 0
}

// rehearsal is the outcome of --dry-run.
type rehearsal struct {
	Devices int                `json:"devices"`
	Chip    string             `json:"chip"`
	Flash   []provision.Region `json:"flash"`
	Burnt   []provision.Step   `json:"cannot_be_undone,omitempty"`
	Lost    []string           `json:"lost_without_escrow,omitempty"`
}

func (l *line) show() error {
	out := rehearsal{Devices: len(l.devices), Chip: l.product.Chip.Name, Flash: l.plan.Regions(), Burnt: l.plan.Steps(), Lost: l.lost()}
	return l.a.ui.show(out, func() {
		u := l.a.ui
		u.facts("devices", fmt.Sprint(out.Devices), "chip", out.Chip)
		u.printf("\nThis would be made; nothing is, and musterd was not asked.\n\n")
		t := u.table("OFFSET", "FILE", "BYTES", "ROOM", "ENCRYPTED")
		for _, r := range out.Flash {
			t.row(fmt.Sprintf("0x%x", r.Offset), r.File, fmt.Sprint(r.Size), fmt.Sprint(r.Room), map[bool]string{true: "yes"}[r.Encrypted])
		}
		t.print()
		if len(out.Burnt) > 0 {
			u.printf("\nthen flash.sh burns, after asking, what CANNOT BE UNDONE:\n")
			for _, s := range out.Burnt {
				u.printf("  %s\n      %s\n", s.Title, s.Command())
			}
		}
		l.warn()
	})
}

func (l *line) lost() []string {
	if len(l.escrow) > 0 {
		return nil
	}
	return l.plan.Kept()
}

// warn says what the flags leave open.
func (l *line) warn() {
	if lost := l.lost(); len(lost) > 0 {
		l.a.ui.note("no --recipient: there is no escrow. When flash.sh is done, this is lost for good:")
		for _, w := range lost {
			l.a.ui.note("  %s", w)
		}
	}
	if l.product.Flash != "" && l.product.NVS == provision.Clear {
		l.a.ui.note("flash encryption does not cover NVS: the device's private key lies in flash in the clear. Add --nvs-encryption")
	}
	for _, n := range append(l.notes, l.plan.Notes()...) {
		l.a.ui.note("%s", n)
	}
	if l.product.KeepDownload && len(l.plan.Steps()) > 0 {
		l.a.ui.note("--keep-download: whoever holds such a board can still write to its flash and eFuses")
	}
}

// fetch asks musterd for what all devices share.
func (l *line) fetch(ctx context.Context) error {
	var err error
	c := l.a.client
	if l.trust, err = client.Read[api.Trust](c.GetTrust(ctx)); err != nil {
		return err
	}
	if l.endpoints, err = client.Read[api.Endpoints](c.GetEndpoints(ctx)); err != nil {
		return err
	}
	bundle, err := client.Read[api.TrustBundle](c.GetTrustBundle(ctx))
	if e, ok := errors.AsType[*client.Error](err); ok && e.Status == 404 {
		err = nil // none was published yet: the roots alone will do
	}
	if err != nil {
		return err
	}
	l.bundle = bundle.Signed
	return l.checkBootKeys(ctx)
}

// checkBootKeys demands that a key which is burnt for good is one of the product's, if the product has any.
func (l *line) checkBootKeys(ctx context.Context) error {
	if len(l.product.SecureBoot) == 0 {
		return nil
	}
	product := l.devices[0].Product
	known, err := client.Read[api.SecureBootKeyList](l.a.client.ListSecureBootKeys(ctx, &api.ListSecureBootKeysParams{Product: product}))
	if err != nil {
		return err
	}
	if len(known.Items) == 0 {
		l.a.ui.note("no Secure Boot key of %s is registered: muster firmware secure-boot-keys add keeps images away that these devices would refuse", product)
		return nil
	}
	for _, d := range l.product.SecureBoot {
		if !slices.ContainsFunc(known.Items, func(k api.SecureBootKey) bool { return k.Digest == d.String() && !k.Revoked }) {
			return fleet.Errorf(fleet.Conflict, "Secure Boot key %s is none that %s has registered: these devices would refuse every release", d, product)
		}
	}
	return nil
}
