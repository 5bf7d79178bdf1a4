package provision

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/esp/nvs"
	"muster/internal/esp/partition"
	"muster/internal/fleet"
)

// MaxDump is the largest flash dump that is read, bytes.
const MaxDump = 32 << 20

// Opened is what a dump of a returned device holds.
type Opened struct {
	*nvs.Partition
	Name   string // of the NVS partition
	Offset uint32 // in flash
	Keys   string // where the keys came from, in words; empty: it is not encrypted
}

// Open reads the NVS partition of a device from a dump: of that partition alone, or of the flash from its start. In a dump of
// the flash, keys that the device's nvs_keys partition holds by now go before those of the factory. name is another NVS partition
// than the record's, or empty. A dump that cannot be of this device is an Unprocessable error.
func (r Record) Open(dump []byte, name string) (*Opened, error) {
	if r.Version != RecordVersion {
		return nil, fleet.Coded(fleet.Invalid, CodeDump, "the record of %s has version %d, this muster reads %d: use a newer one", r.Device, r.Version, RecordVersion)
	}
	table, err := partition.ParseBinary(r.Table)
	if err != nil {
		return nil, err
	}
	if name == "" {
		name = r.NVSPartition
	}
	part, ok := table.Find(name)
	if !ok || !part.Is(partition.Data, partition.NVS) {
		return nil, fleet.Coded(fleet.NotFound, CodeDump, "%s has no NVS partition %s", r.Device, name)
	}
	o := &Opened{Name: name, Offset: part.Offset}
	image, whole := dump, false
	switch {
	case int64(len(dump)) == int64(part.Size):
	case int64(len(dump)) >= part.End():
		image, whole = dump[part.Offset:part.End()], true
	default:
		return nil, fleet.Coded(fleet.Unprocessable, CodeDump, "the dump has %d bytes: NVS partition %s has %d, and the flash up to its end %d", len(dump), name, part.Size, part.End())
	}
	var flash []byte
	if whole {
		flash = dump
	}
	keys, from, err := r.nvsKeys(table, flash)
	if err != nil {
		return nil, err
	}
	o.Keys = from
	if o.Partition, err = nvs.Decode(image, keys); err != nil {
		return nil, err
	}
	if o.Findings.Has(nvs.CodeUnreadable) {
		return nil, fleet.Coded(fleet.Unprocessable, CodeDump, "not one entry of NVS partition %s can be read: is the dump of %s?", name, r.Device)
	}
	return o, nil
}

// nvsKeys returns the keys of the device's NVS partitions. flash is nil if only the partition was dumped.
func (r Record) nvsKeys(table partition.Table, flash []byte) (*nvs.Keys, string, error) {
	switch r.NVSScheme {
	case Clear:
		return nil, "", nil
	case HMAC:
		k, err := nvs.KeysFromHMAC(r.HMACKey)
		return &k, "the escrowed HMAC key", err
	case KeyPartition:
		if k, ok := r.dumpedKeys(table, flash); ok {
			return &k, "the dump's NVS key partition, by the escrowed flash-encryption key", nil
		}
		k, err := nvs.ParseKeys(r.NVSKeys)
		return &k, "the escrowed NVS keys", err
	}
	return nil, "", fleet.Coded(fleet.Invalid, CodeDump, "the record of %s names the NVS encryption %q, which this muster does not know", r.Device, r.NVSScheme)
}

// dumpedKeys reads the key partition from a dump of the flash.
func (r Record) dumpedKeys(table partition.Table, flash []byte) (nvs.Keys, bool) {
	part, ok := table.FindType(partition.Data, partition.NVSKeys)
	if !ok || len(r.FlashKey) == 0 || int64(len(flash)) < int64(part.Offset)+partition.Size {
		return nvs.Keys{}, false
	}
	cipher, err := r.cipher()
	if err != nil {
		return nvs.Keys{}, false
	}
	clear := make([]byte, partition.Size)
	if err := cipher.Decrypt(clear, flash[part.Offset:][:partition.Size], part.Offset); err != nil {
		return nvs.Keys{}, false
	}
	k, err := nvs.ParseKeyPartition(clear)
	return k, err == nil
}

func (r Record) cipher() (*flashcrypt.Cipher, error) {
	if r.FlashCipher == esp.CipherESP32 {
		if r.FlashConfig < 0 || r.FlashConfig > flashcrypt.DefaultConfig {
			return nil, fleet.Coded(fleet.Invalid, CodeDump, "the record of %s has a FLASH_CRYPT_CONFIG of %d", r.Device, r.FlashConfig)
		}
		return flashcrypt.NewESP32(r.FlashKey, uint8(r.FlashConfig))
	}
	return flashcrypt.New(r.FlashCipher, r.FlashKey)
}

func printable(s string) bool {
	return s != "" && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\r' && r != '\t' })
}

// Value returns an entry's value for people, hidden unless it is public or show is set.
func Value(e nvs.Entry, show bool) (text string, hidden bool) {
	if show || Public(e.Namespace, e.Key) {
		if text := strings.TrimRight(string(e.Data), "\x00"); e.Type == nvs.Blob && printable(text) {
			return text, false // long texts, and trust bundles
		}
		return e.Text(), false
	}
	if len(e.Data) > 0 {
		return fmt.Sprintf("(hidden, %d bytes)", len(e.Data)), true
	}
	return "(hidden)", true
}
