package partition_test

import (
	"bytes"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"muster/internal/esp/partition"
	"muster/internal/fleet"
)

// FuzzParseCSV: nothing panics, and what was read is written as CSV and binary that mean the same.
func FuzzParseCSV(f *testing.F) {
	f.Add(golden(f, "seed_two_ota_nvs_enc.csv"))
	f.Add(golden(f, "roundtrip.csv"))
	for _, name := range partition.Builtins() {
		csv, _ := partition.Builtin(name)
		f.Add(csv)
	}
	f.Add([]byte("b,bootloader,primary,,\np,partition_table,primary,,\nx,0x40,1,,-1M,readonly:encrypted"))
	l := layout(f, "esp32")
	f.Fuzz(func(t *testing.T, b []byte) {
		one, err := partition.ParseCSV(b, l)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) && !fleet.Is(err, fleet.TooLarge) {
				t.Fatal(err)
			}
			return
		}
		one.Check(l)
		csv, err := one.CSV()
		if err != nil {
			t.Fatalf("%q was read and cannot be written: %v", b, err)
		}
		two, err := partition.ParseCSV(csv, l)
		if err != nil || !reflect.DeepEqual(one, two) {
			t.Fatalf("%q became %q, then %+v (%v)", b, csv, two, err)
		}
		bin, err := one.Binary()
		if len(one.Partitions) > 94 {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		back, err := partition.ParseBinary(bin)
		if err != nil || len(back.Partitions) != len(one.Partitions) {
			t.Fatalf("%q: %+v, %v", b, back, err)
		}
		if again, err := back.Binary(); err != nil || !bytes.Equal(again, bin) {
			t.Fatalf("%q: other bytes (%v)", b, err)
		}
	})
}

// FuzzParseBinary: nothing panics, and what was read is written with the same bytes.
func FuzzParseBinary(f *testing.F) {
	f.Add(golden(f, "seed_two_ota_nvs_enc.bin"))
	f.Add(golden(f, "seed_two_ota_nvs_enc_nomd5.bin"))
	f.Add(golden(f, "seed_two_ota_nvs_enc.bin")[:0x140])
	f.Fuzz(func(t *testing.T, b []byte) {
		table, err := partition.ParseBinary(b)
		if err != nil {
			if !fleet.Is(err, fleet.Invalid) && !fleet.Is(err, fleet.TooLarge) {
				t.Fatal(err)
			}
			return
		}
		table.Check(layout(t, "esp32"))
		out, err := table.Binary()
		if err != nil {
			return // more rows than may be written
		}
		used := 32 * len(table.Partitions)
		if !bytes.Equal(out[:used], b[:used]) {
			t.Fatalf("%x became %x", b, out)
		}
		if back, err := partition.ParseBinary(out); err != nil || !reflect.DeepEqual(back, table) {
			t.Fatalf("%+v became %+v (%v)", table, back, err)
		}
	})
}

// FuzzOTA: entries are read as they were written, and what is selected is what boots.
func FuzzOTA(f *testing.F) {
	f.Add(golden(f, "seq2_new.bin")[:32], golden(f, "seq2_new.bin")[0x1000:0x1020], 1, 2)
	f.Fuzz(func(t *testing.T, a, b []byte, slot, slots int) {
		raw := bytes.Repeat([]byte{0xFF}, 0x2000)
		copy(raw, a[:min(len(a), 32)])
		copy(raw[0x1000:], b[:min(len(b), 32)])
		ota, err := partition.ParseOTA(raw)
		if err != nil || !bytes.Equal(ota.Bytes(), raw) {
			t.Fatalf("%+v, %v", ota, err)
		}
		next, err := ota.Select(slot, slots, partition.New)
		if err != nil {
			return
		}
		if got, ok := next.Slot(slots); !ok || got != slot {
			t.Fatalf("%+v selects %d of %d, but %d boots (%v)", next, slot, slots, got, ok)
		}
	})
}

// Whatever slots are selected in whatever order, the one selected last boots, and one sector stays as it was.
func TestSelectingSlots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		slots := rapid.IntRange(1, partition.MaxOTA).Draw(t, "slots")
		ota := partition.BlankOTA()
		for range rapid.IntRange(1, 20).Draw(t, "updates") {
			slot := rapid.IntRange(0, slots-1).Draw(t, "slot")
			next, err := ota.Select(slot, slots, partition.Valid)
			if err != nil {
				t.Fatal(err)
			}
			if got, ok := next.Slot(slots); !ok || got != slot {
				t.Fatalf("selected %d of %d, %d boots", slot, slots, got)
			}
			if active, ok := ota.Active(); ok && next[active] != ota[active] {
				t.Fatalf("the active sector was written: %+v became %+v", ota, next)
			}
			ota = next
		}
	})
}
