// Package provision says what a factory puts into an ESP32-class device: which bytes go where in flash, which eFuses are
// burnt in which order, and the script that does both with Espressif's tools (esp32.md §3.3, §4, §5; ESP-IDF's "Security
// Features Enablement Workflows"). New checks what all devices of a run share and returns a Plan; Plan.Make makes the files
// of one device. Package provision does no I/O and makes no identities: keys, certificates and passwords come in.
//
// Values are secrets: no error and no default print holds one.
package provision

import (
	"crypto/sha256"
	"fmt"
	"io"
	"regexp"
	"slices"
	"time"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/esp/nvs"
	"muster/internal/esp/partition"
	"muster/internal/esp/secureboot"
	"muster/internal/fleet"
)

// Scheme is how an NVS partition is encrypted.
type Scheme string

// Schemes (esp32.md §4.5).
const (
	Clear        Scheme = ""     // not at all
	KeyPartition Scheme = "keys" // by keys in an nvs_keys partition, which flash encryption protects
	HMAC         Scheme = "hmac" // by keys that the chip derives from an eFuse block with purpose HMAC_UP
)

// Codes of errors.
const (
	CodeChip       = "provision-chip"        // the chip cannot do that, or muster does not know how
	CodeLayout     = "provision-layout"      // something does not fit where it must go
	CodeSecureBoot = "provision-secure-boot" // images and keys do not fit each other
	CodeNVS        = "provision-nvs"         // the NVS partition cannot be made
	CodeTemplate   = "provision-template"    // the template of NVS entries is wrong
	CodeDump       = "provision-dump"        // not a dump that the record fits
)

// Data is what else goes into a partition.
type Data struct {
	Partition string
	Content   []byte
}

// Product is what all devices of a run share.
type Product struct {
	Chip  esp.Chip
	Table partition.Table
	// TableOffset is where the table goes in flash; 0 means partition.DefaultTable.
	TableOffset uint32

	// Bootloader and App are the images as the device shall find them, signed if it has Secure Boot. Both nil: the device
	// has its firmware already, and gets data only.
	Bootloader, App []byte
	Data            []Data

	NVSPartition string // empty: the first of the table
	NVS          Scheme
	HMACBlock    int // of HMAC: the eFuse key block, 0 to 5, that the firmware was built for (CONFIG_NVS_SEC_HMAC_EFUSE_KEY_ID)

	Flash esp.Cipher // of flash encryption; empty: there is none

	SecureBoot   []secureboot.KeyDigest // of the keys that shall be burnt, in the order of their slots; none: no Secure Boot
	KeepDownload bool                   // leave the download mode open: whoever holds the board can write to flash and eFuses

	Escrowed bool // the keys of each device are kept elsewhere, too; the script says so
}

// Device is one device.
type Device struct {
	ID      fleet.DeviceID
	MAC     string      // of the very board, as aa:bb:cc:dd:ee:ff; empty: any, and the script remembers which
	Entries []nvs.Entry // of its NVS partition
}

// Secrets are the keys of one device that eFuses and the key partition hold. Those that the Plan does not need are nil.
type Secrets struct {
	Flash []byte // flash encryption, as espsecure's key file
	NVS   []byte // 64 bytes of nvs.ParseKeys
	HMAC  []byte // 32 bytes
}

// String keeps the keys out of any print.
func (Secrets) String() string { return "secrets of a device" }

// GoString keeps the keys out of %#v.
func (s Secrets) GoString() string { return s.String() }

// File is a file of a device's folder.
type File struct {
	Name   string // with / for folders
	Data   []byte
	Secret bool // holds a secret of the device in the clear
	Run    bool // is to be executed
	Common bool // the same in every folder of the plan

	sum [sha256.Size]byte // of Common
}

// SHA256 returns the hash of the content.
func (f File) SHA256() [sha256.Size]byte {
	if f.Common {
		return f.sum
	}
	return sha256.Sum256(f.Data)
}

func commonFile(name string, data []byte) File {
	return File{Name: name, Data: data, Common: true, sum: sha256.Sum256(data)}
}

// Region is a piece of flash that the script writes.
type Region struct {
	Name      string `json:"name"`
	Offset    uint32 `json:"offset"`
	Room      int64  `json:"room"` // bytes up to what follows
	File      string `json:"file"`
	Size      int    `json:"size"` // bytes
	Encrypted bool   `json:"encrypted"`

	content  []byte            // nil: made for each device
	clearSum [sha256.Size]byte // of content, padded for encryption
}

// Plan is a product that was found good. It may be used by several goroutines at once.
type Plan struct {
	p       Product
	nvs     partition.Partition
	nvsKeys partition.Partition
	regions []Region
	steps   []Step
	table   []byte
	notes   []string
	common  []File
}

// New checks a product and plans what to do. What a device could not work with is an Invalid or Unprocessable error.
func New(p Product) (*Plan, error) {
	if p.TableOffset == 0 {
		p.TableOffset = partition.DefaultTable
	}
	pl := &Plan{p: p}
	for _, check := range []func() error{pl.checkChip, pl.layOut, pl.checkImages, pl.planSteps} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	for i := range pl.regions {
		switch r := &pl.regions[i]; {
		case r.content == nil:
		case r.Encrypted:
			r.content = flashcrypt.Pad(r.content)
			r.clearSum = sha256.Sum256(r.content)
		default:
			pl.common = append(pl.common, commonFile(r.File, r.content))
		}
	}
	for i, digest := range p.SecureBoot {
		pl.common = append(pl.common, commonFile(digestFile(i), digest[:]))
	}
	return pl, nil
}

// Regions returns what is written to flash, by offset.
func (pl *Plan) Regions() []Region { return pl.regions }

// NVSFile returns the name of the file with the NVS partition.
func (pl *Plan) NVSFile() string { return fileOf(pl.nvs) }

// Steps returns what is burnt into eFuses, in order. None of it can be undone.
func (pl *Plan) Steps() []Step { return pl.steps }

// Notes says what is worth knowing of the product although it is no fault.
func (pl *Plan) Notes() []string { return pl.notes }

// Kept says in words what an operator loses who does not keep the keys of the plan's devices; empty if there are none.
func (pl *Plan) Kept() []string {
	var out []string
	if pl.p.Flash != "" {
		out = append(out, "the flash-encryption key of each device: nobody can then read a flash dump of a returned device, nor write its flash over the wire again")
	}
	if pl.p.NVS != Clear {
		out = append(out, "the NVS keys of each device: nobody can then read what a returned device has stored")
	}
	return out
}

// NewSecrets makes the keys of one device. random must be crypto/rand.Reader outside of tests.
func (pl *Plan) NewSecrets(random io.Reader) (s Secrets, err error) {
	if pl.p.Flash != "" {
		if s.Flash, err = flashcrypt.GenerateKey(pl.p.Flash, random); err != nil {
			return Secrets{}, err
		}
	}
	switch pl.p.NVS {
	case KeyPartition:
		k, err := nvs.GenerateKeys(random)
		if err != nil {
			return Secrets{}, err
		}
		s.NVS = k.Bytes()
	case HMAC:
		if s.HMAC, err = nvs.GenerateHMACKey(random); err != nil {
			return Secrets{}, err
		}
	}
	return s, nil
}

// keys returns what encrypts the device's NVS partition, nil if nothing does.
func (pl *Plan) keys(s Secrets) (*nvs.Keys, error) {
	switch pl.p.NVS {
	case KeyPartition:
		k, err := nvs.ParseKeys(s.NVS)
		return &k, err
	case HMAC:
		k, err := nvs.KeysFromHMAC(s.HMAC)
		return &k, err
	}
	return nil, nil
}

// Make returns the files of a device's folder, flash.sh last.
func (pl *Plan) Make(d Device, s Secrets) ([]File, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	made, err := pl.deviceRegions(d, s)
	if err != nil {
		return nil, err
	}
	files := slices.Clone(pl.common)
	for _, r := range pl.regions {
		if content, ok := made[r.File]; ok {
			files = append(files, File{Name: r.File, Data: content, Secret: pl.secret(r)})
		}
	}
	for name, key := range map[string][]byte{flashKeyFile: s.Flash, hmacKeyFile: s.HMAC} {
		if key != nil {
			files = append(files, File{Name: name, Data: key, Secret: true})
		}
	}
	sortFiles(files)
	sums := sumFile(files)
	script, err := pl.script(d, s, files)
	if err != nil {
		return nil, err
	}
	return append(files, sums, File{Name: ScriptFile, Data: script, Run: true}), nil
}

// secret reports whether a region's file gives secrets away: an NVS partition in the clear. NVS keys are never in the clear.
func (pl *Plan) secret(r Region) bool {
	return r.Offset == pl.nvs.Offset && pl.p.NVS == Clear
}

// deviceRegions makes the content of the regions that differ from device to device, encrypted where it has to be.
func (pl *Plan) deviceRegions(d Device, s Secrets) (map[string][]byte, error) {
	keys, err := pl.keys(s)
	if err != nil {
		return nil, err
	}
	image, err := nvs.Encode(d.Entries, nvs.Options{Size: int(pl.nvs.Size), ReadOnly: pl.nvs.Flags&partition.ReadOnly != 0, Keys: keys})
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{fileOf(pl.nvs): image}
	if pl.p.NVS == KeyPartition {
		out[fileOf(pl.nvsKeys)] = keys.Partition()
	}
	if pl.p.Flash == "" {
		return out, nil
	}
	cipher, err := flashcrypt.New(pl.p.Flash, s.Flash)
	if err != nil {
		return nil, err
	}
	for _, r := range pl.regions {
		if !r.Encrypted {
			continue
		}
		clear := r.content
		if clear == nil {
			clear = out[r.File]
		}
		clear = flashcrypt.Pad(clear)
		sealed := make([]byte, len(clear))
		if err := cipher.Encrypt(sealed, clear, r.Offset); err != nil {
			return nil, err
		}
		out[r.File] = sealed
	}
	return out, nil
}

var macForm = regexp.MustCompile(`^([0-9a-f]{2}:){5}[0-9a-f]{2}$`)

func (d Device) check() error {
	if _, err := fleet.ParseDeviceID(string(d.ID)); err != nil {
		return err
	}
	if d.MAC != "" && !macForm.MatchString(d.MAC) {
		return fleet.Errorf(fleet.Invalid, "the MAC address of %s has not the form 24:0a:c4:00:00:01, in lower case", d.ID)
	}
	return nil
}

// Record is what an operator must keep of a device to read its flash when it comes back: it goes into escrow. It is as
// secret as the device's keys.
type Record struct {
	Version int            `json:"version"` // RecordVersion
	Device  fleet.DeviceID `json:"device"`
	Product string         `json:"product"`
	Chip    string         `json:"chip"`
	MAC     string         `json:"mac,omitempty"`
	MadeAt  time.Time      `json:"made_at"`

	FlashCipher esp.Cipher `json:"flash_cipher,omitempty"`
	FlashConfig int        `json:"flash_crypt_config,omitempty"` // FLASH_CRYPT_CONFIG, of the ESP32 only
	FlashKey    []byte     `json:"flash_key,omitempty"`
	NVSScheme   Scheme     `json:"nvs_scheme,omitempty"`
	NVSKeys     []byte     `json:"nvs_keys,omitempty"`
	HMACKey     []byte     `json:"hmac_key,omitempty"`
	HMACBlock   int        `json:"hmac_block,omitempty"`

	Table        []byte `json:"partition_table"`
	TableOffset  uint32 `json:"partition_table_offset"`
	NVSPartition string `json:"nvs_partition"`
}

// RecordVersion is the version of Record.
const RecordVersion = 1

// String keeps the keys out of any print.
func (r Record) String() string { return fmt.Sprintf("record of %s", r.Device) }

// GoString keeps the keys out of %#v.
func (r Record) GoString() string { return r.String() }

// Record returns what to keep of a device.
func (pl *Plan) Record(d Device, product string, s Secrets, at time.Time) Record {
	r := Record{
		Version: RecordVersion, Device: d.ID, Product: product, Chip: pl.p.Chip.Name, MAC: d.MAC, MadeAt: at,
		FlashCipher: pl.p.Flash, FlashKey: s.Flash, NVSScheme: pl.p.NVS, NVSKeys: s.NVS, HMACKey: s.HMAC,
		Table: pl.table, TableOffset: pl.p.TableOffset, NVSPartition: pl.nvs.Name,
	}
	if pl.p.NVS == HMAC {
		r.HMACBlock = pl.p.HMACBlock
	}
	if pl.p.Flash == esp.CipherESP32 {
		r.FlashConfig = flashcrypt.DefaultConfig
	}
	return r
}
