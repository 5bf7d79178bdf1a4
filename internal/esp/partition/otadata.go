package partition

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"muster/internal/fleet"
)

// State is how far a device has come with what an otadata entry selects.
type State uint32

// States (esp_ota_img_states_t).
const (
	New           State = 0 // to be booted for the first time
	PendingVerify State = 1 // booted, not confirmed yet
	Valid         State = 2 // confirmed
	InvalidImage  State = 3 // refused by itself
	Aborted       State = 4 // rebooted before it was confirmed
	NoState       State = 0xFFFFFFFF
)

// String returns the state in words.
func (s State) String() string {
	switch s {
	case New:
		return "new"
	case PendingVerify:
		return "pending-verify"
	case Valid:
		return "valid"
	case InvalidImage:
		return "invalid"
	case Aborted:
		return "aborted"
	case NoState:
		return "undefined"
	default:
		return fmt.Sprintf("0x%x", uint32(s))
	}
}

// OTAEntry is one of the two entries of otadata. The zero value is not blank: see BlankOTA.
type OTAEntry struct {
	Seq   uint32
	Label [20]byte
	State State
	CRC   uint32 // as stored
}

// NewOTAEntry returns an entry with the right CRC.
func NewOTAEntry(seq uint32, s State) OTAEntry {
	e := blankEntry
	e.Seq, e.State, e.CRC = seq, s, seqCRC(seq)
	return e
}

var blankEntry = OTAEntry{Seq: blankSeq, Label: [20]byte(bytes.Repeat([]byte{0xFF}, 20)), State: NoState, CRC: blankSeq}

const blankSeq = 0xFFFFFFFF

// seqCRC is esp_rom_crc32_le(UINT32_MAX, seq), which is not the usual start.
func seqCRC(seq uint32) uint32 {
	return crc32.Update(0xFFFFFFFF, crc32.IEEETable, binary.LittleEndian.AppendUint32(nil, seq))
}

// Usable reports whether a bootloader would follow the entry.
func (e OTAEntry) Usable() bool {
	return e.Seq != blankSeq && e.State != InvalidImage && e.State != Aborted && e.CRC == seqCRC(e.Seq)
}

// OTA is the content of an otadata partition: an entry at the start of each of its two sectors.
type OTA [2]OTAEntry

// BlankOTA returns erased otadata: a device boots its factory app, otherwise ota_0.
func BlankOTA() OTA { return OTA{blankEntry, blankEntry} }

// ParseOTA reads otadata, 0x2000 bytes, in clear. What follows the entries is not looked at.
func ParseOTA(b []byte) (OTA, error) {
	if len(b) != otaSize {
		return OTA{}, fleet.Coded(fleet.Invalid, "esp_otadata", "otadata has 0x%x bytes, not 0x%x", otaSize, len(b))
	}
	var o OTA
	for i := range o {
		raw := b[i*sector:]
		o[i] = OTAEntry{
			Seq:   binary.LittleEndian.Uint32(raw),
			Label: [20]byte(raw[4:24]),
			State: State(binary.LittleEndian.Uint32(raw[24:])),
			CRC:   binary.LittleEndian.Uint32(raw[28:]),
		}
	}
	return o, nil
}

// Bytes returns the content of the partition, 0x2000 bytes.
func (o OTA) Bytes() []byte {
	b := bytes.Repeat([]byte{0xFF}, otaSize)
	for i, e := range o {
		raw := b[i*sector:]
		binary.LittleEndian.PutUint32(raw, e.Seq)
		copy(raw[4:24], e.Label[:])
		binary.LittleEndian.PutUint32(raw[24:], uint32(e.State))
		binary.LittleEndian.PutUint32(raw[28:], e.CRC)
	}
	return b
}

// Active returns the entry that a bootloader follows: of the usable ones that with the greater number. False: none, the
// device boots its factory app, otherwise ota_0.
func (o OTA) Active() (int, bool) {
	a, b := o[0].Usable(), o[1].Usable()
	switch {
	case a && (!b || o[0].Seq >= o[1].Seq):
		return 0, true
	case b:
		return 1, true
	default:
		return 0, false
	}
}

// Slot returns which of that many OTA slots a bootloader starts; false if otadata selects none.
func (o OTA) Slot(slots int) (int, bool) {
	i, ok := o.Active()
	if !ok || slots < 1 || slots > MaxOTA {
		return 0, false
	}
	return int((o[i].Seq - 1) % uint32(slots)), true
}

// Select returns otadata after esp_ota_set_boot_partition: the entry that is not active selects slot, of that many. With
// rollback the state is New, without it NoState. A slot that there is not is an Invalid error.
func (o OTA) Select(slot, slots int, s State) (OTA, error) {
	if slots < 1 || slots > MaxOTA || slot < 0 || slot >= slots {
		return OTA{}, fleet.Errorf(fleet.Invalid, "there is no OTA slot %d of %d", slot, slots)
	}
	active, ok := o.Active()
	if !ok {
		o[0] = relabel(o[0], uint32(slot)+1, s)
		return o, nil
	}
	count := uint64(slots)
	seq := uint64(slot+1) % count
	if now := uint64(o[active].Seq); now > seq {
		seq += (now - seq + count - 1) / count * count
	}
	if seq == 0 { // only after a number that no device writes
		seq = count
	}
	if seq >= blankSeq {
		return OTA{}, fleet.Errorf(fleet.Invalid, "the numbers of otadata are used up: erase it")
	}
	next := 1 - active
	o[next] = relabel(o[next], uint32(seq), s)
	return o, nil
}

// relabel returns e with another number and state; the label stays, as ESP-IDF leaves it.
func relabel(e OTAEntry, seq uint32, s State) OTAEntry {
	e.Seq, e.State, e.CRC = seq, s, seqCRC(seq)
	return e
}
