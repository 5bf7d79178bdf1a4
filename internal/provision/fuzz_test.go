package provision_test

import (
	"bytes"
	"testing"
	"time"

	"muster/internal/esp"
	"muster/internal/fleet"
	"muster/internal/provision"
)

// FuzzOpen opens dumps of all kinds by a good record: none makes it panic or fail as a fault of muster's own.
func FuzzOpen(f *testing.F) {
	pl := plan(f, sealed(f, "esp32", esp.CipherESP32))
	s := secrets(f, pl)
	made, err := pl.Make(lamp, s)
	if err != nil {
		f.Fatal(err)
	}
	rec := pl.Record(lamp, "lamp", s, time.Unix(1e9, 0))
	for _, file := range made {
		if file.Name == pl.NVSFile() {
			f.Add(file.Data, rec.Table, true)
			f.Add(file.Data[:0x3000], rec.Table, false)
		}
	}
	f.Add([]byte{}, []byte{}, true)
	f.Add(bytes.Repeat([]byte{0xFF}, 0x5000), rec.Table, false)
	f.Fuzz(func(t *testing.T, dump, table []byte, encrypted bool) {
		r := rec
		r.Table = table
		if !encrypted {
			r.NVSScheme = provision.Clear
		}
		o, err := r.Open(dump, "")
		if err != nil {
			if fleet.KindOf(err) == fleet.Internal {
				t.Errorf("%v", err)
			}
			return
		}
		for _, it := range o.Items {
			if text, hidden := provision.Value(it.Entry, false); hidden && len(it.Data) > 40 && text == it.Text() {
				t.Error("a secret is shown")
			}
		}
	})
}

// FuzzTemplate fills templates of all kinds: what a device's values hold never becomes another line.
func FuzzTemplate(f *testing.F) {
	f.Add([]byte("key,type,encoding,value\nuser,namespace,,\na,data,string,{{v}}\n"), "plain")
	f.Add([]byte("key,type,encoding,value\nuser,namespace,,\na,data,string,x{{ v }}y{{v}}\n# c\n"), "a\"\nevil,data,u8,1")
	f.Add([]byte("key,type,encoding,value\nuser,namespace,,\na,data,u8,{{v}}\n"), "1,2")
	f.Add([]byte("\"{{v}}\",data"), "")
	f.Fuzz(func(t *testing.T, csv []byte, value string) {
		tpl, err := provision.ParseTemplate(csv)
		if err != nil {
			return
		}
		values := map[string]string{}
		for _, n := range tpl.Names() {
			values[n] = value
		}
		got, err := tpl.Entries(values, nil)
		if err != nil {
			return
		}
		for n := range values {
			values[n] = "1"
		}
		if plain, err := tpl.Entries(values, nil); err == nil && len(got) > len(plain) {
			t.Errorf("%q makes %d entries of %d", value, len(got), len(plain))
		}
	})
}
