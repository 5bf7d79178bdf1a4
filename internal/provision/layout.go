package provision

import (
	"bytes"
	"cmp"
	"fmt"
	"regexp"
	"slices"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/esp/partition"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
)

// Names of the files in a device's folder.
const (
	ScriptFile     = "flash.sh"
	SumsFile       = "SHA256SUMS"
	bootloaderFile = "bootloader.bin"
	tableFile      = "partition-table.bin"
	appFile        = "app.bin"
	flashKeyFile   = "efuse/flash-encryption.bin"
	hmacKeyFile    = "efuse/hmac.bin"
)

// fileOf names the file of a partition. A partition may be called anything; a file, and a word in a shell script, may not.
func fileOf(p partition.Partition) string {
	name := p.Name
	if !plainName.MatchString(name) || name == "app" || name == "bootloader" || name == "partition-table" {
		name = fmt.Sprintf("part-0x%x", p.Offset)
	}
	return name + ".bin"
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]*$`)

func digestFile(i int) string { return fmt.Sprintf("efuse/secure-boot-%d.bin", i) }

// checkChip checks what the chip can do.
func (pl *Plan) checkChip() error {
	p, c := &pl.p, pl.p.Chip
	refuse := func(format string, a ...any) error { return fleet.Coded(fleet.Unprocessable, CodeChip, format, a...) }
	switch {
	case c.Name == "":
		return fleet.Coded(fleet.Invalid, CodeChip, "the chip is not known")
	case p.Flash != "" && !slices.Contains(c.Ciphers, p.Flash):
		return refuse("the %s has no flash encryption %s", c.Name, p.Flash)
	case p.Flash != "" && p.App == nil:
		return refuse("with flash encryption all of the flash is encrypted by the same key: give bootloader and app as well")
	case len(p.SecureBoot) > 0 && p.App == nil:
		return refuse("Secure Boot needs the signed bootloader and app in flash before it is turned on: give both")
	case p.NVS == HMAC && !c.HMACNVS:
		return refuse("the %s cannot derive NVS keys by HMAC: use a key partition with flash encryption", c.Name)
	case p.NVS == HMAC && (p.HMACBlock < 0 || p.HMACBlock >= keyBlocks):
		return refuse("the HMAC key goes into key block 0 to 5")
	case p.NVS == KeyPartition && p.Flash == "":
		return refuse("NVS keys in a partition are protected by flash encryption alone, and it is off: turn it on, or use HMAC where the chip can")
	case p.NVS != Clear && p.NVS != HMAC && p.NVS != KeyPartition:
		return refuse("an NVS partition is encrypted by keys or hmac")
	case len(p.SecureBoot) > max(c.KeySlots, 0):
		return refuse("the %s has %d slots for Secure Boot keys, not %d", c.Name, c.KeySlots, len(p.SecureBoot))
	case len(p.SecureBoot) > 0 && c.DigestBytes != len(secureboot.KeyDigest{}):
		return refuse("muster does not burn the shortened key digests of the %s", c.Name)
	case (p.Bootloader == nil) != (p.App == nil):
		return refuse("give both bootloader and app, or neither")
	}
	return nil
}

// layOut finds a place for everything, from the partition table.
func (pl *Plan) layOut() error {
	l := partition.Layout{Bootloader: pl.p.Chip.Bootloader, Table: pl.p.TableOffset}
	if err := pl.p.Table.Check(l).Err(); err != nil {
		return err
	}
	var err error
	if pl.table, err = pl.p.Table.Binary(); err != nil {
		return err
	}
	if pl.p.App != nil {
		if err := pl.layOutFirmware(); err != nil {
			return err
		}
	}
	if err := pl.layOutNVS(); err != nil {
		return err
	}
	for _, d := range pl.p.Data {
		part, ok := pl.p.Table.Find(d.Partition)
		if !ok {
			return fleet.Coded(fleet.Invalid, CodeLayout, "the partition table has no partition %s", d.Partition)
		}
		if err := pl.place(part, fileOf(part), d.Content); err != nil {
			return err
		}
	}
	slices.SortFunc(pl.regions, func(a, b Region) int { return cmp.Compare(a.Offset, b.Offset) })
	for i := 1; i < len(pl.regions); i++ {
		if a, b := pl.regions[i-1], pl.regions[i]; int64(a.Offset)+a.Room > int64(b.Offset) {
			return fleet.Coded(fleet.Invalid, CodeLayout, "%s and %s go to the same place in flash", a.Name, b.Name)
		}
	}
	return nil
}

func (pl *Plan) layOutFirmware() error {
	encrypted := pl.p.Flash != ""
	room := int64(pl.p.TableOffset) - int64(pl.p.Chip.Bootloader)
	if n := int64(len(pl.p.Bootloader)); n > room {
		return fleet.Coded(fleet.Unprocessable, CodeLayout, "the bootloader has %d bytes, and there are %d up to the partition table at 0x%x: build it with less logging, or with a table further back (--table-offset)", n, room, pl.p.TableOffset)
	}
	pl.regions = append(pl.regions,
		Region{Name: "bootloader", Offset: pl.p.Chip.Bootloader, Room: room, File: bootloaderFile, Size: len(pl.p.Bootloader), Encrypted: encrypted, content: pl.p.Bootloader},
		Region{Name: "partition table", Offset: pl.p.TableOffset, Room: partition.Size, File: tableFile, Size: len(pl.table), Encrypted: encrypted, content: pl.table})
	app, ok := pl.p.Table.FirstApp()
	if !ok {
		return fleet.Coded(fleet.Unprocessable, CodeLayout, "the partition table has no partition for an app")
	}
	if err := pl.place(app, appFile, pl.p.App); err != nil {
		return err
	}
	if data, ok := pl.p.Table.FindType(partition.Data, partition.OTAData); ok {
		return pl.place(data, fileOf(data), partition.BlankOTA().Bytes())
	}
	return nil
}

func (pl *Plan) layOutNVS() error {
	var ok bool
	if pl.p.NVSPartition != "" {
		pl.nvs, ok = pl.p.Table.Find(pl.p.NVSPartition)
		ok = ok && pl.nvs.Is(partition.Data, partition.NVS)
	} else {
		pl.nvs, ok = pl.p.Table.FindType(partition.Data, partition.NVS)
	}
	if !ok {
		return fleet.Coded(fleet.Unprocessable, CodeNVS, "the partition table has no such NVS partition (data, nvs)")
	}
	if pl.nvs.Flags&partition.Encrypted != 0 {
		return fleet.Coded(fleet.Unprocessable, CodeNVS, "NVS partition %s is flagged encrypted, which devices refuse: only nvs_keys has that flag", pl.nvs.Name)
	}
	pl.regions = append(pl.regions, Region{Name: pl.nvs.Name, Offset: pl.nvs.Offset, Room: int64(pl.nvs.Size), File: fileOf(pl.nvs), Size: int(pl.nvs.Size)})
	if pl.p.NVS != KeyPartition {
		return nil
	}
	if pl.nvsKeys, ok = pl.p.Table.FindType(partition.Data, partition.NVSKeys); !ok {
		return fleet.Coded(fleet.Unprocessable, CodeNVS, "the partition table has no partition for NVS keys: add nvs_key, data, nvs_keys, , 0x1000, encrypted")
	}
	pl.regions = append(pl.regions, Region{Name: pl.nvsKeys.Name, Offset: pl.nvsKeys.Offset, Room: int64(pl.nvsKeys.Size), File: fileOf(pl.nvsKeys), Size: partition.Size, Encrypted: true})
	return nil
}

// place puts content into a partition.
func (pl *Plan) place(p partition.Partition, file string, content []byte) error {
	if int64(len(content)) > int64(p.Size) {
		return fleet.Coded(fleet.Unprocessable, CodeLayout, "%s has %d bytes, partition %s only %d", file, len(content), p.Name, p.Size)
	}
	pl.regions = append(pl.regions, Region{
		Name: p.Name, Offset: p.Offset, Room: int64(p.Size), File: file, Size: len(content), Encrypted: pl.p.Flash != "" && p.MustEncrypt(), content: content,
	})
	return nil
}

// checkImages checks bootloader and app as a device would, and that the keys to burn have signed both.
func (pl *Plan) checkImages() error {
	if pl.p.App == nil {
		return nil
	}
	policy := secureboot.Policy{Chip: pl.p.Chip}
	for _, d := range pl.p.SecureBoot {
		policy.Keys = append(policy.Keys, secureboot.Slot{Key: d})
	}
	for _, im := range []struct {
		what    string
		kind    image.Kind
		content []byte
	}{{"the bootloader", image.Any, pl.p.Bootloader}, {"the app", image.App, pl.p.App}} {
		rep, err := image.Parse(bytes.NewReader(im.content), im.kind)
		if err != nil {
			return fleet.Wrap(fleet.KindOf(err), err, "%s", im.what)
		}
		if im.kind == image.Any && rep.Kind == image.App {
			return fleet.Coded(fleet.Invalid, CodeLayout, "the bootloader is an app: are the two files confused?")
		}
		if rep.Header.Chip != pl.p.Chip.ID {
			return fleet.Coded(fleet.Invalid, CodeChip, "%s is for the %s, not for the %s", im.what, rep.Header.Chip, pl.p.Chip.Name)
		}
		if len(pl.p.SecureBoot) == 0 {
			continue
		}
		if need := pl.p.Chip.SchemeMinRev; uint16(rep.Header.MinRev) < need && im.kind == image.App {
			pl.notes = append(pl.notes, fmt.Sprintf("Secure Boot v2 needs a %s of revision %s or later, and the app runs on %s: see to it that no older board gets to the station", pl.p.Chip.Name, esp.Revision(need), rep.Header.MinRev))
		}
		if err := checkSigned(im.content, rep, policy); err != nil {
			return fleet.Wrap(fleet.KindOf(err), err, "%s", im.what)
		}
	}
	return nil
}

// checkSigned demands that each key that will be burnt has signed: a chip whose slot 1 holds a key that signed nothing works,
// and nobody would notice that the key is the wrong one.
func checkSigned(content []byte, rep *image.Report, policy secureboot.Policy) error {
	blocks, err := secureboot.Inspect(bytes.NewReader(content), rep)
	if err != nil {
		return err
	}
	if _, err := blocks.Check(policy); err != nil {
		return err
	}
	for _, slot := range policy.Keys {
		if !slices.ContainsFunc(blocks.Blocks, func(b secureboot.Block) bool { return b.Key == slot.Key && b.Status == secureboot.Valid }) {
			return fleet.Coded(fleet.Unprocessable, CodeSecureBoot, "Secure Boot key %s shall be burnt, but has not signed it", slot.Key)
		}
	}
	return nil
}

// DefaultCipher returns how a chip encrypts its flash unless somebody chooses, empty if it cannot.
func DefaultCipher(c esp.Chip) esp.Cipher {
	if len(c.Ciphers) == 0 {
		return ""
	}
	return c.Ciphers[0]
}
