package cli

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"os"
	"regexp"
	"strconv"
	"strings"

	"muster/api"
	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/partition"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
	"muster/internal/provision"
	"muster/internal/signing"
)

// Columns of the CSV file that muster device add does not know.
const (
	columnMAC      = "mac"
	columnSSID     = "wifi_ssid"
	columnPassword = "wifi_password"
	columnValue    = "value:"
)

// readUnits reads who is to be made: one device of the command line, or a CSV file.
func (l *line) readUnits(args []string) error {
	if l.f.from == "" {
		if len(args) != 1 || l.f.single.Product == "" {
			return usagef("an id and --product are needed, or --from")
		}
		d := l.f.single
		d.ID = args[0]
		var err error
		if d.Labels, err = parseLabels(l.f.labels); err != nil {
			return err
		}
		l.devices = []unit{l.newUnit(d, map[string]string{columnMAC: l.f.mac})}
		return nil
	}
	if len(args) > 0 || l.f.mac != "" || l.f.single.Hardware != "" || len(l.f.labels) > 0 {
		return usagef("with --from, the file says everything about the devices")
	}
	in := l.a.env.Stdin
	if l.f.from != "-" {
		file, err := os.Open(l.f.from)
		if err != nil {
			return err
		}
		defer file.Close()
		if info, err := file.Stat(); err == nil && info.Mode()&0o077 != 0 {
			defer func() {
				if len(l.devices) > 0 && l.devices[0].wifiPass != "" {
					l.a.ui.note("%s holds Wi-Fi passwords, and others may read it", l.f.from)
				}
			}()
		}
		in = file
	}
	extra := func(column string) bool {
		name, isValue := strings.CutPrefix(column, columnValue)
		return column == columnMAC || column == columnSSID || column == columnPassword || isValue && name != ""
	}
	return readDeviceRows(in, extra, func(d api.NewDevice, more map[string]string) { l.devices = append(l.devices, l.newUnit(d, more)) })
}

func (l *line) newUnit(d api.NewDevice, more map[string]string) unit {
	u := unit{NewDevice: d, mac: plainMAC(more[columnMAC]), wifiSSID: more[columnSSID], wifiPass: more[columnPassword]}
	u.values = map[string]string{"id": d.ID, "product": d.Product, "hardware": d.Hardware, "mac": u.mac}
	for k, v := range d.Labels {
		u.values["label:"+k] = v
	}
	for column, v := range more {
		if name, ok := strings.CutPrefix(column, columnValue); ok {
			u.values[name] = v
		}
	}
	return u
}

var macDigits = regexp.MustCompile(`^[0-9a-f]{12}$`)

// plainMAC writes a MAC address as aa:bb:cc:dd:ee:ff. What is none stays as it is.
func plainMAC(s string) string {
	digits := strings.NewReplacer(":", "", "-", "", ".", "").Replace(strings.ToLower(strings.TrimSpace(s)))
	if !macDigits.MatchString(digits) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(digits); i += 2 {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(digits[i : i+2])
	}
	return b.String()
}

// checkUnits refuses a list in which two lines are about one device or board, before anything is made.
func (l *line) checkUnits() error {
	ids, macs := map[string]bool{}, map[string]bool{}
	for i := range l.devices {
		u := &l.devices[i]
		if u.wifiSSID == "" {
			u.wifiSSID, u.wifiPass = l.f.wifiSSID, l.wifi
		}
		switch _, err := fleet.ParseDeviceID(u.ID); {
		case err != nil:
			return err
		case u.ID == escrowDir || u.ID == stationLog:
			return usagef("%s cannot be the name of a device's folder", u.ID)
		case ids[u.ID]:
			return usagef("two lines are about %s", u.ID)
		case u.mac != "" && macs[u.mac]:
			return usagef("two lines have the MAC address %s", u.mac)
		case u.Product != l.devices[0].Product:
			return usagef("one run is for one product: %s is a %s, %s a %s", l.devices[0].ID, l.devices[0].Product, u.ID, u.Product)
		case u.mac != "" && plainMAC(u.mac) != u.mac || u.mac != "" && !strings.Contains(u.mac, ":"):
			return usagef("%s: %s is no MAC address", u.ID, clean(u.mac))
		}
		ids[u.ID], macs[u.mac] = true, true
	}
	return nil
}

// readProduct reads images, tables and keys.
func (l *line) readProduct() error {
	p, f := &l.product, &l.f
	var err error
	if f.app != "" {
		if p.App, err = l.a.readInput(f.app, image.MaxSize); err != nil {
			return err
		}
		if p.Bootloader, err = l.a.readInput(f.bootloader, image.MaxSize); err != nil {
			return err
		}
	}
	for _, read := range []func() error{l.readChip, l.readTable, l.readData, l.readEncryption, l.readSecureBoot} {
		if err := read(); err != nil {
			return err
		}
	}
	p.NVSPartition, p.HMACBlock, p.KeepDownload = f.nvsPartition, f.hmacBlock, f.keepDownload
	return nil
}

func (l *line) readChip() error {
	name := l.f.chip
	if l.product.App != nil {
		rep, err := image.Parse(bytes.NewReader(l.product.App), image.App)
		if err != nil {
			return fleet.Wrap(fleet.KindOf(err), err, "%s", l.f.app)
		}
		if own := rep.Header.Chip.String(); name == "" {
			name = own
		} else if name != own {
			return usagef("%s is for the %s, not the %s", l.f.app, own, name)
		}
	}
	if name == "" {
		return usagef("without --app, --chip must say which chip it is")
	}
	chip, ok := esp.ChipByName(name)
	if !ok {
		return usagef("muster does not know the chip %s", clean(name))
	}
	l.product.Chip = chip
	return nil
}

// maxTable is the longest file with a partition table, in bytes.
const maxTable = 64 << 10

func (l *line) readTable() error {
	offset, err := strconv.ParseUint(l.f.tableOffset, 0, 24)
	if err != nil || offset == 0 || offset%partition.Size != 0 {
		return usagef("--table-offset is a multiple of 0x1000, such as 0x8000")
	}
	l.product.TableOffset = uint32(offset)
	raw, ok := partition.Builtin(l.f.partitions)
	if !ok || exists(l.f.partitions) {
		if raw, err = l.a.readInput(l.f.partitions, maxTable); err != nil {
			return err
		}
	}
	l.product.Table, err = partition.Parse(raw, partition.Layout{Bootloader: l.product.Chip.Bootloader, Table: uint32(offset)})
	return err
}

func (l *line) readData() error {
	for _, d := range l.f.data {
		name, file, ok := strings.Cut(d, "=")
		if !ok || name == "" {
			return usagef("write --data as PARTITION=FILE")
		}
		content, err := l.a.readInput(file, image.MaxSize)
		if err != nil {
			return err
		}
		l.product.Data = append(l.product.Data, provision.Data{Partition: name, Content: content})
	}
	return nil
}

func (l *line) readEncryption() error {
	switch l.f.nvsEncryption {
	case "none":
	case string(provision.KeyPartition), string(provision.HMAC):
		l.product.NVS = provision.Scheme(l.f.nvsEncryption)
	default:
		return usagef("--nvs-encryption is none, keys or hmac")
	}
	switch l.f.flashEncryption {
	case "none":
	case "on":
		if l.product.Flash = provision.DefaultCipher(l.product.Chip); l.product.Flash == "" {
			return usagef("muster does not know how the %s encrypts its flash", l.product.Chip.Name)
		}
	case string(esp.CipherXTS128), string(esp.CipherXTS256):
		l.product.Flash = esp.Cipher(l.f.flashEncryption)
	default:
		return usagef("--flash-encryption is none, on, xts-128 or xts-256")
	}
	return nil
}

// readSecureBoot reads the keys, and signs bootloader and app with the private ones.
func (l *line) readSecureBoot() error {
	var signers []crypto.Signer
	for _, file := range l.f.secureBoot {
		raw, err := l.a.readInput(file, 64<<10)
		if err != nil {
			return err
		}
		var key secureboot.Key
		if bytes.Contains(raw, []byte("PRIVATE KEY")) {
			signer, err := signing.LoadSecureBootKey(file, func() ([]byte, error) { return l.a.passphrase(l.f.passphrase) })
			if err != nil {
				return err
			}
			signers = append(signers, signer)
			key, err = secureboot.KeyOf(signer.Public())
			if err != nil {
				return err
			}
		} else if key, err = signing.LoadSecureBootPublicKey(file); err != nil {
			return err
		}
		l.product.SecureBoot = append(l.product.SecureBoot, key.Digest())
	}
	if len(signers) == 0 || l.product.App == nil {
		return nil
	}
	var err error
	keep := len(signers) < len(l.product.SecureBoot) // signatures of the keys that are elsewhere
	if l.product.Bootloader, err = l.signImage(l.f.bootloader, l.product.Bootloader, signers, keep); err != nil {
		return err
	}
	l.product.App, err = l.signImage(l.f.app, l.product.App, signers, keep)
	return err
}

// signImage signs the image of a file, with keep in addition to the signatures that it has.
func (l *line) signImage(file string, content []byte, signers []crypto.Signer, keep bool) ([]byte, error) {
	s, err := secureboot.Start(bytes.NewReader(content), int64(len(content)), keep)
	if err != nil {
		return nil, fleet.Wrap(fleet.KindOf(err), err, "%s", file)
	}
	for _, signer := range signers {
		if err := s.Sign(rand.Reader, signer); err != nil {
			return nil, fleet.Wrap(fleet.KindOf(err), err, "%s", file)
		}
	}
	for _, f := range s.Findings() {
		l.notes = append(l.notes, file+": "+f.String())
	}
	var out bytes.Buffer
	if _, err := s.WriteTo(&out); err != nil {
		return nil, fleet.Wrap(fleet.KindOf(err), err, "%s", file)
	}
	return out.Bytes(), nil
}
