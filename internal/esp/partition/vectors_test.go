package partition_test

import (
	"bytes"
	"os"
	"reflect"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/partition"
)

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func layout(t testing.TB, name string) partition.Layout {
	t.Helper()
	c, ok := esp.ChipByName(name)
	if !ok {
		t.Fatal(name)
	}
	return partition.LayoutOf(c)
}

func parse(t testing.TB, csv string) partition.Table {
	t.Helper()
	table, err := partition.ParseCSV([]byte(csv), layout(t, "esp32"))
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestTableIsThatOfGenEsp32part(t *testing.T) {
	l := layout(t, "esp32")
	table, err := partition.ParseCSV(golden(t, "seed_two_ota_nvs_enc.csv"), l)
	if err != nil || len(table.Check(l)) > 0 {
		t.Fatal(err, table.Check(l))
	}
	for name, noMD5 := range map[string]bool{"seed_two_ota_nvs_enc.bin": false, "seed_two_ota_nvs_enc_nomd5.bin": true} {
		table.NoMD5 = noMD5
		b, err := table.Binary()
		if err != nil || !bytes.Equal(b, golden(t, name)) {
			t.Errorf("%s: other bytes (%v)", name, err)
		}
		back, err := partition.Parse(golden(t, name), l)
		if err != nil || !reflect.DeepEqual(back, table) {
			t.Errorf("%s is read as\n%+v, want\n%+v (%v)", name, back, table, err)
		}
	}
	csv, err := table.CSV()
	if err != nil || !bytes.Equal(csv, golden(t, "roundtrip.csv")) {
		t.Errorf("as CSV it is\n%s(%v)", csv, err)
	}
	if again, err := partition.Parse(csv, l); err != nil || !reflect.DeepEqual(again.Partitions, table.Partitions) {
		t.Errorf("%+v, %v", again, err)
	}
}

func TestOTADataIsThatOfArduinoAndIDF(t *testing.T) {
	one := partition.OTA{partition.NewOTAEntry(1, partition.NoState), partition.BlankOTA()[1]}
	valid := partition.OTA{partition.NewOTAEntry(1, partition.Valid), partition.BlankOTA()[1]}
	two, err := valid.Select(1, 2, partition.New)
	if err != nil {
		t.Fatal(err)
	}
	pending := two
	pending[1].State = partition.PendingVerify
	first, err := partition.BlankOTA().Select(0, 2, partition.NoState)
	if err != nil || first != one {
		t.Errorf("the first slot is selected by %+v (%v)", first, err)
	}
	for name, want := range map[string]struct {
		ota  partition.OTA
		slot int
		ok   bool
	}{
		"empty.bin":          {partition.BlankOTA(), 0, false},
		"boot_app0_like.bin": {one, 0, true},
		"seq2_new.bin":       {two, 1, true},
		"seq2_pending.bin":   {pending, 1, true},
	} {
		got, err := partition.ParseOTA(golden(t, name))
		if err != nil || got != want.ota {
			t.Errorf("%s is read as %+v, want %+v (%v)", name, got, want.ota, err)
		}
		if !bytes.Equal(want.ota.Bytes(), golden(t, name)) {
			t.Errorf("%s: other bytes", name)
		}
		if slot, ok := got.Slot(2); slot != want.slot || ok != want.ok {
			t.Errorf("%s boots slot %d, %v", name, slot, ok)
		}
	}
	if one[0].CRC != 0x4743989A {
		t.Errorf("the CRC of 1 is %#x", one[0].CRC)
	}
}
