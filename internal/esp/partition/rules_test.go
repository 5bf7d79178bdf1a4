package partition_test

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"muster/internal/esp"
	"muster/internal/esp/partition"
	"muster/internal/fleet"
)

// The offsets that the documentation of ESP-IDF gives for partitions_two_ota.csv.
func TestOffsetsAreFilledIn(t *testing.T) {
	csv, ok := partition.Builtin("esp-idf-two-ota")
	if !ok {
		t.Fatal("no such table")
	}
	var got []string
	for _, p := range parse(t, string(csv)).Partitions {
		got = append(got, fmt.Sprintf("%s 0x%x 0x%x", p.Name, p.Offset, p.Size))
	}
	want := []string{"nvs 0x9000 0x4000", "otadata 0xd000 0x2000", "phy_init 0xf000 0x1000", "factory 0x10000 0x100000", "ota_0 0x110000 0x100000", "ota_1 0x210000 0x100000"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestCSVFields(t *testing.T) {
	at := func(name string, typ partition.Type, sub partition.Subtype, offset, size, flags uint32) partition.Partition {
		return partition.Partition{Name: name, Type: typ, Subtype: sub, Offset: offset, Size: size, Flags: flags}
	}
	const ro, enc = partition.ReadOnly, partition.Encrypted
	for line, want := range map[string]partition.Partition{
		"a,data,nvs,0x9000,0x5000":                  at("a", 1, 2, 0x9000, 0x5000, 0),
		"a,data,nvs,36K,20k,":                       at("a", 1, 2, 0x9000, 0x5000, 0),
		"\ta , DATA , Nvs , 36864 , 1M , ":          at("a", 1, 2, 0x9000, 1<<20, 0),
		"a,1,2,,0x5000,encrypted":                   at("a", 1, 2, 0x9000, 0x5000, enc),
		"a,data,nvs,,0x1000,readonly:encrypted":     at("a", 1, 2, 0x9000, 0x1000, ro|enc),
		"a,data,,,0x1000":                           at("a", 1, 6, 0x9000, 0x1000, 0),
		"a,0x40,7,,0x1000":                          at("a", 0x40, 7, 0x9000, 0x1000, 0),
		"a,0x40,,,0x1000":                           at("a", 0x40, 6, 0x9000, 0x1000, 0),
		"a,app,ota_15,,1M":                          at("a", 0, 0x1F, 0x10000, 1<<20, 0),
		"a,app,test,,1M":                            at("a", 0, 0x20, 0x10000, 1<<20, 0),
		"a,app,tee_1,,1M":                           at("a", 0, 0x31, 0x10000, 1<<20, 0),
		"a,data,littlefs,,1_000_0":                  at("a", 1, 0x83, 0x9000, 10000, 0),
		"a,data,tee_sec_stg,,0b1000000000000":       at("a", 1, 0x91, 0x9000, 0x1000, 0),
		"a,data,fat,,-0x200000":                     at("a", 1, 0x81, 0x9000, 0x1F7000, 0),
		"a,data,fat,,-2M":                           at("a", 1, 0x81, 0x9000, 0x1F7000, 0),
		"a,data,fat,,0x1000,,this is not looked at": at("a", 1, 0x81, 0x9000, 0x1000, 0),
		"boot,bootloader,primary,,":                 at("boot", 2, 0, 0x1000, 0x7000, 0),
		"boot,bootloader,primary,0x77,0x77":         at("boot", 2, 0, 0x1000, 0x7000, 0),
		"next,bootloader,ota,,":                     at("next", 2, 1, 0x9000, 0x7000, 0),
		"pt,partition_table,primary,,":              at("pt", 3, 0, 0x8000, 0x1000, 0),
		"pt,partition_table,ota,,":                  at("pt", 3, 1, 0x9000, 0x1000, 0),
		",data,fat,,0x1000":                         at("", 1, 0x81, 0x9000, 0x1000, 0),
	} {
		for _, text := range []string{line, "\ufeff# comment\r\n\r\n" + line + "\r\n", "#\r" + line + "\r"} {
			table, err := partition.ParseCSV([]byte(text), layout(t, "esp32"))
			if err != nil || len(table.Partitions) != 1 || table.Partitions[0] != want {
				t.Errorf("%q: %+v, want %+v (%v)", text, table.Partitions, want, err)
			}
		}
	}
}

func TestCSVRefusals(t *testing.T) {
	for csv, says := range map[string]string{
		"a":                                    "line 1: type is missing",
		"a,data":                               "line 1: the size is missing",
		"# x\n\na,data,nvs,,":                  "line 3: the size is missing",
		"a,app,,,1M":                           "an app needs a subtype",
		"a,dat,nvs,,1M":                        "is not known: use a number or one of app, data",
		"a,data,nvz,,1M":                       "nvs_keys",
		"a,0x40,nvs,,1M":                       "is no number",
		"a,256,1,,1M":                          "does not fit a byte",
		"a,data,-1,,1M":                        "does not fit a byte",
		"a,data,nvs,nine,1M":                   "offset \"nine\" is no number",
		"a,data,nvs,-4096,1M":                  "is no number",
		"a,data,nvs,,1.5M":                     "size \"1.5M\" is no number",
		"a,data,nvs,,010":                      "is no number",
		"a,data,nvs,,99999999999999999999":     "is no number",
		"a,data,nvs,,0xFFFFFFFFFF":             "beyond any flash",
		"a,data,nvs,0xFFFFF000,0x2000":         "beyond any flash",
		"a,data,nvs,,0x1000,secret":            "flag \"secret\" is not known",
		"a,data,nvs,,0x1000,# comment":         "is not known",
		"a,data,nvs,0x8000,0x1000":             "inside the partition table, which takes 0x8000 to 0x9000: use 0x9000",
		"a,data,nvs,,8K\nb,data,fat,0xa000,":   "line 2: the size is missing",
		"a,data,nvs,,8K\nb,data,fat,0xa000,4K": "line 2: offset 0xa000 overlaps the partition before, which ends at 0xb000",
		"a,data,fat,,-0x8000":                  "would end before it begins",
		"r,bootloader,recovery,,":              "no offset for a recovery bootloader",
		"a\x1b[2J,data,nvs,,4K":                "cannot be stored",
		"a\xff,data,nvs,,4K":                   "UTF-8",
		"fifteen-bytes--é,data,nvs,,4K":        "cannot be stored",
		strings.Repeat("a,data,fat,,4K\n", 96): "line 96: a table has at most 95 partitions",
	} {
		_, err := partition.ParseCSV([]byte(csv), layout(t, "esp32"))
		if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%.60q: %v, want %q", csv, err, says)
		}
	}
	if _, err := partition.ParseCSV(make([]byte, 1<<20), partition.Layout{}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("a megabyte: %v", err)
	}
	if _, err := partition.ParseCSV([]byte("b,bootloader,primary,,"), partition.Layout{Bootloader: 0x9000, Table: 0x8000}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a bootloader behind the table: %v", err)
	}
}

func TestCheck(t *testing.T) {
	base := "nvs,data,nvs,0x9000,0x5000\notadata,data,ota,0xe000,0x2000\napp0,app,ota_0,0x10000,1M\napp1,app,ota_1,,1M\n"
	type finding struct {
		severity esp.Severity
		code     string
	}
	bad := func(code string) []finding { return []finding{{esp.Error, code}} }
	odd := func(code string) []finding { return []finding{{esp.Warning, code}} }
	tests := []struct {
		name   string
		table  partition.Table
		change func(*partition.Layout)
		want   []finding
	}{
		{"two slots", parse(t, base), nil, nil},
		{"an app beside its page", parse(t, "a,app,factory,0x11000,1M"), nil, bad("esp_partition_offset")},
		{"data beside its sector", parse(t, "a,data,fat,0x9800,4K"), nil, bad("esp_partition_offset")},
		{"an app of half a sector", parse(t, "a,app,factory,,0x1800"), nil, bad("esp_partition_size")},
		{"data of half a sector", parse(t, "a,data,fat,,0x1800"), nil, nil},
		{"an app of a sector", parse(t, "a,app,factory,,0x1000"), nil, nil},
		{"the same with Secure Boot v1", parse(t, "a,app,factory,,0x1000"), func(l *partition.Layout) { l.SecureBootV1 = true }, bad("esp_partition_size")},
		{"nothing in it", parse(t, "a,data,fat,,0"), nil, odd("esp_partition_empty")},
		{"a small NVS", parse(t, "a,data,nvs,,0x2000"), nil, bad("esp_partition_nvs_size")},
		{"the same readonly", parse(t, "a,data,nvs,,0x2000,readonly"), nil, nil},
		{"an NVS flagged encrypted", parse(t, "a,data,nvs,,0x3000,encrypted"), nil, odd("esp_partition_nvs_encrypted")},
		{"readonly otadata", parse(t, "o,data,ota,,0x2000,readonly"), nil, bad("esp_partition_readonly")},
		{"a readonly core dump", parse(t, "c,data,coredump,,64K,readonly"), nil, bad("esp_partition_readonly")},
		{"small otadata", parse(t, "o,data,ota,,0x1000"), nil, bad("esp_partition_otadata")},
		{"small otadata of the TEE", parse(t, "o,data,tee_ota,,0x1000"), nil, bad("esp_partition_otadata")},
		{"otadata twice", parse(t, "o,data,ota,,0x2000\np,data,ota,,0x2000"), nil, bad("esp_partition_otadata")},
		{"a name twice", parse(t, "a,data,fat,,4K\na,data,fat,,4K"), nil, bad("esp_partition_twice")},
		{"names that are cut to one", parse(t, "sixteen-letters-a,data,fat,,4K\nsixteen-letters-b,data,fat,,4K"), nil,
			[]finding{{esp.Warning, "esp_partition_name"}, {esp.Warning, "esp_partition_name"}, {esp.Error, "esp_partition_twice"}}},
		{"the name of another type", parse(t, "app,data,fat,,4K"), nil, odd("esp_partition_named")},
		{"the name of another subtype", parse(t, "nvs,data,fat,,4K"), nil, odd("esp_partition_named")},
		{"the name of a subtype of several types", parse(t, "ota,data,ota,,0x2000"), nil, nil},
		{"a gap in the slots", parse(t, strings.Replace(base, "ota_1", "ota_2", 1)), nil, odd("esp_partition_slots")},
		{"slots of two sizes", parse(t, strings.Replace(base, "app1,app,ota_1,,1M", "app1,app,ota_1,,2M", 1)), nil, odd("esp_partition_slots")},
		{"slots without otadata", parse(t, "app0,app,ota_0,,1M\napp1,app,ota_1,,1M"), nil, odd("esp_partition_no_otadata")},
		{"a flash that is too small", parse(t, base), func(l *partition.Layout) { l.FlashSize = 2 << 20 }, bad("esp_partition_flash")},
		{"a flash that is large enough", parse(t, base), func(l *partition.Layout) { l.FlashSize = 4 << 20 }, nil},
		{"bootloader and table in the table", parse(t, "b,bootloader,primary,,\np,partition_table,primary,,\n"+base), nil, nil},
		{"an overlap", partition.Table{Partitions: []partition.Partition{{Name: "a", Type: 1, Subtype: 0x81, Offset: 0x9000, Size: 0x2000}, {Name: "b", Type: 1, Subtype: 0x81, Offset: 0xA000, Size: 0x1000}}}, nil, bad("esp_partition_overlap")},
		{"below the table", partition.Table{Partitions: []partition.Partition{{Name: "a", Type: 1, Subtype: 0x81, Offset: 0x7000, Size: 0x1000}}}, nil, bad("esp_partition_below")},
		{"an unknown flag", partition.Table{Partitions: []partition.Partition{{Name: "a", Type: 1, Subtype: 0x81, Offset: 0x9000, Size: 0x1000, Flags: 8}}}, nil, odd("esp_partition_flags")},
	}
	for _, tt := range tests {
		l := layout(t, "esp32")
		if tt.change != nil {
			tt.change(&l)
		}
		var got []finding
		for _, f := range tt.table.Check(l) {
			got = append(got, finding{f.Severity, f.Code})
		}
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: found %v, want %v", tt.name, tt.table.Check(l), tt.want)
		}
	}
}

func TestBuiltinsAreGood(t *testing.T) {
	if len(partition.Builtins()) != 3 {
		t.Errorf("%v", partition.Builtins())
	}
	for _, name := range partition.Builtins() {
		csv, ok := partition.Builtin(name)
		if !ok {
			t.Fatal(name)
		}
		l := layout(t, "esp32")
		l.FlashSize = 4 << 20
		table, err := partition.ParseCSV(csv, l)
		if err != nil || len(table.Check(l)) > 0 {
			t.Errorf("%s: %v, %v", name, err, table.Check(l))
		}
		if app, ok := table.FirstApp(); !ok || app.Offset != partition.DefaultApp || len(table.OTASlots()) != 2 || table.OTASize() == 0 {
			t.Errorf("%s: the first app is %+v, the slots have %d bytes", name, app, table.OTASize())
		}
	}
	if _, ok := partition.Builtin("none"); ok {
		t.Error("there is a table called none")
	}
	if l := layout(t, "esp32"); l.Bootloader != 0x1000 || l.Table != 0x8000 || layout(t, "esp32s3").Bootloader != 0 || layout(t, "esp32p4").Bootloader != 0x2000 {
		t.Errorf("%+v", l)
	}
}

func TestBinaryRefusals(t *testing.T) {
	good := golden(t, "seed_two_ota_nvs_enc.bin")
	change := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	for name, tt := range map[string]struct {
		file []byte
		says string
	}{
		"nothing":            {nil, "the empty row that ends a table is missing"},
		"no end":             {good[:0x120], "the empty row that ends a table is missing"},
		"half a row":         {good[:0x50], "at offset 0x40: the row has 16 bytes"},
		"a flipped bit":      {change(func(b []byte) { b[0x2F] ^= 1 }), "at offset 0x100: the MD5"},
		"a flipped MD5":      {change(func(b []byte) { b[0x11F] ^= 1 }), "at offset 0x100: the MD5"},
		"no magic":           {change(func(b []byte) { b[0x40] = 0 }), "at offset 0x40: the row begins with 0050"},
		"a row after it":     {change(func(b []byte) { copy(b[0x120:], b[:32]) }), "at offset 0x120: a row follows"},
		"a name that hides":  {change(func(b []byte) { b[12] = 7 }), "at offset 0x0: the name"},
		"bytes after a name": {change(func(b []byte) { b[27] = 'x' }), "bytes follow the end of the name"},
		"encrypted":          {bytes.Repeat([]byte{0x5A, 0xC3}, 1536), "encrypted"},
	} {
		_, err := partition.ParseBinary(tt.file)
		if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", name, err, tt.says)
		}
	}
	if _, err := partition.ParseBinary(make([]byte, 0x1001)); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("more than a sector: %v", err)
	}
	if table, err := partition.ParseBinary(bytes.Repeat([]byte{0xFF}, 0xC00)); err != nil || len(table.Partitions) != 0 {
		t.Errorf("an empty table: %+v, %v", table, err)
	}
	var full partition.Table
	for i := range 95 {
		full.Partitions = append(full.Partitions, partition.Partition{Name: fmt.Sprint(i), Type: 1, Subtype: 0x81, Offset: uint32(0x9000 + i*0x1000), Size: 0x1000})
	}
	if _, err := full.Binary(); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("95 partitions and an MD5: %v", err)
	}
	full.NoMD5 = true
	if b, err := full.Binary(); err != nil || len(b) != 0xC00 {
		t.Errorf("95 partitions: %d bytes, %v", len(b), err)
	}
	for _, name := range []string{"a,b", "#a", " a", "a "} {
		bad := partition.Table{Partitions: []partition.Partition{{Name: name, Type: 1, Offset: 0x9000}}}
		if _, err := bad.CSV(); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%q as CSV: %v", name, err)
		}
	}
}

func TestFindAndEncrypt(t *testing.T) {
	table := parse(t, string(golden(t, "seed_two_ota_nvs_enc.csv")))
	want := map[string]bool{"nvs": false, "otadata": true, "app0": true, "app1": true, "nvs_key": true, "certs": false, "fctry": false, "spiffs": false}
	for name, encrypted := range want {
		if p, ok := table.Find(name); !ok || p.MustEncrypt() != encrypted {
			t.Errorf("%s: %+v, encrypted is %v", name, p, p.MustEncrypt())
		}
	}
	if p := parse(t, "a,data,nvs,,0x3000,encrypted\nb,data,fat,,4K,encrypted"); p.Partitions[0].MustEncrypt() || !p.Partitions[1].MustEncrypt() {
		t.Error("the flag is heard for NVS, or not for others")
	}
	if table.OTASize() != 0x180000 || table.FlashSize() != 0x400000 || parse(t, "a,data,fat,,4K").OTASize() != 0 {
		t.Errorf("%#x, %#x", table.OTASize(), table.FlashSize())
	}
	if app, ok := table.FirstApp(); !ok || app.Name != "app0" {
		t.Errorf("%+v", app)
	}
}

func TestActiveSlot(t *testing.T) {
	e := partition.NewOTAEntry
	blank := partition.BlankOTA()[0]
	broken := e(9, partition.Valid)
	broken.CRC ^= 1
	for i, tt := range []struct {
		ota   partition.OTA
		slots int
		slot  int
		ok    bool
	}{
		{partition.OTA{blank, blank}, 2, 0, false},
		{partition.OTA{e(1, partition.Valid), blank}, 2, 0, true},
		{partition.OTA{blank, e(2, partition.Valid)}, 2, 1, true},
		{partition.OTA{e(3, partition.Valid), e(2, partition.Valid)}, 2, 0, true},
		{partition.OTA{e(3, partition.Valid), e(4, partition.PendingVerify)}, 2, 1, true},
		{partition.OTA{e(3, partition.Valid), e(4, partition.Aborted)}, 2, 0, true},
		{partition.OTA{e(3, partition.InvalidImage), e(4, partition.Aborted)}, 2, 0, false},
		{partition.OTA{e(3, partition.Valid), broken}, 2, 0, true},
		{partition.OTA{e(5, partition.Valid), blank}, 3, 1, true},
		{partition.OTA{e(5, partition.Valid), blank}, 0, 0, false},
		{partition.OTA{e(5, partition.Valid), blank}, 17, 0, false},
	} {
		if slot, ok := tt.ota.Slot(tt.slots); slot != tt.slot || ok != tt.ok {
			t.Errorf("%d: slot %d, %v", i, slot, ok)
		}
	}
	for _, bad := range [][2]int{{2, 2}, {-1, 2}, {0, 0}, {0, 17}} {
		if _, err := partition.BlankOTA().Select(bad[0], bad[1], partition.New); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("slot %d of %d: %v", bad[0], bad[1], err)
		}
	}
	worn := partition.OTA{e(0xFFFFFFFE, partition.Valid), blank}
	if _, err := worn.Select(0, 2, partition.New); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("after the last number: %v", err)
	}
	if _, err := partition.ParseOTA(make([]byte, 0x1000)); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("one sector: %v", err)
	}
	if got := fmt.Sprint(partition.New, partition.PendingVerify, partition.Valid, partition.InvalidImage, partition.Aborted, partition.NoState, partition.State(7)); got != "new pending-verify valid invalid aborted undefined 0x7" {
		t.Error(got)
	}
}
