package nvs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"muster/internal/esp"
	"muster/internal/fleet"
)

const head = "key,type,encoding,value\nns,namespace,,\n"

// files is what CSV lines of type file may name in tests.
func files(m map[string]string) func(string) (io.ReadCloser, error) {
	return func(name string) (io.ReadCloser, error) {
		s, ok := m[name]
		if !ok {
			return nil, errors.New("no such file")
		}
		return io.NopCloser(strings.NewReader(s)), nil
	}
}

func TestCSVValues(t *testing.T) {
	open := files(map[string]string{"hex": "00FF\n", "b64": "AAEC\nAwQF\n", "num": " 12 \n", "raw": "\x00\xFF", "text": "line\r\n"})
	for _, v := range []struct {
		line string
		want Entry
	}{
		{"k,data,u8,255", NewNumber("ns", "k", uint8(255))},
		{"k,data,U8,255", NewNumber("ns", "k", uint8(255))},
		{"k, data , u8 , +7 ", NewNumber("ns", "k", uint8(7))},
		{"k,data,u8,-0", NewNumber("ns", "k", uint8(0))},
		{"k,data,u32,1_000_000", NewNumber("ns", "k", uint32(1000000))},
		{"k,data,u16,007", NewNumber("ns", "k", uint16(7))},
		{"k,data,i8,-128", NewNumber("ns", "k", int8(-128))},
		{"k,data,i64,-9223372036854775808", NewNumber("ns", "k", int64(-1<<63))},
		{"k,data,u64,18446744073709551615", NewNumber("ns", "k", uint64(1<<64-1))},
		{"k,data,string,", NewString("ns", "k", "")},
		{"k,data,string, spaces stay ", NewString("ns", "k", " spaces stay ")},
		{`k,data,string,"a, ""quoted"" one"`, NewString("ns", "k", `a, "quoted" one`)},
		{`k,data,string,mid"dle`, NewString("ns", "k", `mid"dle`)},
		{`k,data,string,"be"hind`, NewString("ns", "k", `behind`)},
		{`k,data,string, "not quoted"`, NewString("ns", "k", ` "not quoted"`)},
		{"k,data,string,\"two\r\nlines\"", NewString("ns", "k", "two\nlines")},
		{"k,data,string,\"one\n# a comment even here\nthree\"", NewString("ns", "k", "one\nthree")},
		{"k,data,string,ümlaut", NewString("ns", "k", "ümlaut")},
		{"k,data,string,trailing,,", NewString("ns", "k", "trailing")},
		{"k,data,hex2bin, 00ffDE ", NewBlob("ns", "k", []byte{0, 0xFF, 0xDE})},
		{"k,data,HEX2BIN,00", NewBlob("ns", "k", []byte{0})},
		{"k,data,hex2bin,", NewBlob("ns", "k", nil)},
		{"k,data,base64,AAEC", NewBlob("ns", "k", []byte{0, 1, 2})},
		{"k,data,base64,AA==", NewBlob("ns", "k", []byte{0})},
		{"k,data,binary,text", NewBlob("ns", "k", []byte("text"))},
		{"k,data,blob_fill(6;0xa5),ab", NewBlob("ns", "k", []byte("ab\xA5\xA5\xA5\xA5"))},
		{"k,data,blob_fill(3;0x00),", NewBlob("ns", "k", []byte{0, 0, 0})},
		{"k,data,blob_sz_fill(4;0xFF),ab", NewBlob("ns", "k", []byte("\x02\x00\x00\x00ab\xFF\xFF"))},
		{"k,file,hex2bin,hex", NewBlob("ns", "k", []byte{0, 0xFF})},
		{"k,file,base64,b64", NewBlob("ns", "k", []byte{0, 1, 2, 3, 4, 5})},
		{"k,file,binary,raw", NewBlob("ns", "k", []byte{0, 0xFF})},
		{"k,file,string,text", NewString("ns", "k", "line\r\n")},
		{"k,file,i32,num", NewNumber("ns", "k", int32(12))},
	} {
		c, err := ParseCSV(strings.NewReader(head+v.line), CSVOptions{Open: open})
		if err != nil {
			t.Errorf("%s: %v", v.line, err)
			continue
		}
		same(t, v.line, c.Entries, []Entry{NewNamespace("ns"), v.want})
		if c.Entries[1].Line != 3 {
			t.Errorf("%s: line %d", v.line, c.Entries[1].Line)
		}
	}
}

func TestCSVForms(t *testing.T) {
	want := []Entry{NewNamespace("ns"), NewNumber("ns", "k", uint8(1))}
	for name, text := range map[string]string{
		"usual":                 "key,type,encoding,value\nns,namespace,,\nk,data,u8,1\n",
		"Windows":               "key,type,encoding,value\r\nns,namespace,,\r\nk,data,u8,1\r\n",
		"old Mac":               "key,type,encoding,value\rns,namespace,,\rk,data,u8,1",
		"mark of a spreadsheet": "\xEF\xBB\xBFkey,type,encoding,value\nns,namespace,,\nk,data,u8,1\n",
		"no end of line":        "key,type,encoding,value\nns,namespace,,\nk,data,u8,1",
		"comments":              "# first\nkey,type,encoding,value\n#\nns,namespace,,\n#x,data,u8,2\nk,data,u8,1\n# last",
		"blank lines":           "\nkey,type,encoding,value\n\n \nns,namespace,,\n\t\nk,data,u8,1\n\n",
		"short namespace line":  "key,type,encoding,value\nns,namespace\nk,data,u8,1\n",
		"other order":           "type,value,key,note,encoding\nnamespace,,ns\ndata,1,k,x,u8\n",
		"the same again":        "key,type,encoding,value\nns,namespace,,\nns,namespace,,\nk,data,u8,1\n",
	} {
		c, err := ParseCSV(iotest.OneByteReader(strings.NewReader(text)), CSVOptions{})
		if err != nil || len(c.Findings) > 0 {
			t.Errorf("%s: %v", name, err)
			continue
		}
		same(t, name, c.Entries, want)
	}
}

// An error names the line and holds neither value nor anything else that could be one.
func TestCSVErrors(t *testing.T) {
	const secret = "s3cr3t"
	for _, v := range []struct {
		name, text string
		kind       fleet.Kind
		code       string
		says       string
	}{
		{"empty", "", fleet.Invalid, CodeCSV, "line 1:"},
		{"comments only", "# a\n", fleet.Invalid, CodeCSV, "line 1:"},
		{"no column", "key,type,encoding\n", fleet.Invalid, CodeCSV, "line 1: no column value"},
		{"not UTF-8", head + "k,data,string,\xFF" + secret, fleet.Invalid, CodeCSV, "UTF-8"},
		{"NUL", head + "k,data,string,\x00" + secret, fleet.Invalid, CodeCSV, "UTF-8"},
		{"before any namespace", "key,type,encoding,value\nk,data,string," + secret, fleet.Invalid, CodeCSV, "line 2: key \"k\""},
		{"a comma too many", head + "k,data,string,a," + secret, fleet.Invalid, CodeCSV, "line 3: 5 fields"},
		{"no value", head + "k,data,u8", fleet.Invalid, CodeCSV, "line 3: key \"k\" has no value"},
		{"unknown type", head + "k," + secret + ",u8,1", fleet.Invalid, CodeCSV, "line 3: the type"},
		{"no type", head + "k,,u8,1", fleet.Invalid, CodeCSV, "line 3: the type"},
		{"unknown encoding", head + "k,data," + secret + ",1", fleet.Invalid, CodeCSV, "line 3: key \"k\": unknown encoding"},
		{"no encoding", head + "k,data,,1", fleet.Invalid, CodeCSV, "line 3: key \"k\": unknown encoding"},
		{"a quote never closed", head + "\nk,data,string,\"" + secret + "\nmore\n", fleet.Invalid, CodeCSV, "line 4: a quote"},
		{"long key", head + strings.Repeat(secret, 3) + ",data,u8,1", fleet.Invalid, CodeKey, "line 3: a key of 18 bytes"},
		{"no key", head + ",data,u8,1", fleet.Invalid, CodeKey, "line 3: the key is empty"},
		{"long namespace", strings.Repeat("n", 16) + ",namespace,,", fleet.Invalid, CodeCSV, "line 1: no column"},
		{"long namespace below the head", head + strings.Repeat("n", 16) + ",namespace,,", fleet.Invalid, CodeKey, "line 3: a namespace of 16 bytes"},
		{"hex number", head + "k,data,u8,0x10", fleet.Invalid, CodeValue, "line 3: key \"k\": not a number"},
		{"no number", head + "k,data,u8,", fleet.Invalid, CodeValue, "decimal"},
		{"text", head + "k,data,u8," + secret, fleet.Invalid, CodeValue, "decimal"},
		{"u8 too large", head + "k,data,u8,256", fleet.Invalid, CodeValue, "u8"},
		{"u8 negative", head + "k,data,u8,-1", fleet.Invalid, CodeValue, "u8"},
		{"i8 too small", head + "k,data,i8,-129", fleet.Invalid, CodeValue, "i8"},
		{"i8 too large", head + "k,data,i8,128", fleet.Invalid, CodeValue, "i8"},
		{"i64 too large", head + "k,data,i64,9223372036854775808", fleet.Invalid, CodeValue, "i64"},
		{"i64 too small", head + "k,data,i64,-9223372036854775809", fleet.Invalid, CodeValue, "i64"},
		{"u64 too large", head + "k,data,u64,18446744073709551616", fleet.Invalid, CodeValue, "u64"},
		{"two signs", head + "k,data,i8,--1", fleet.Invalid, CodeValue, "decimal"},
		{"a sign alone", head + "k,data,i8,-", fleet.Invalid, CodeValue, "decimal"},
		{"underscores", head + "k,data,u8,1__0", fleet.Invalid, CodeValue, "decimal"},
		{"odd hex", head + "k,data,hex2bin,abc", fleet.Invalid, CodeValue, "pairs"},
		{"no hex", head + "k,data,hex2bin," + secret, fleet.Invalid, CodeValue, "pairs"},
		{"no base64", head + "k,data,base64,AA*=", fleet.Invalid, CodeValue, "base64"},
		{"base64 without its end", head + "k,data,base64,AAE", fleet.Invalid, CodeValue, "base64"},
		{"fill too short", head + "k,data,blob_fill(3;0x00)," + secret, fleet.Invalid, CodeValue, "longer than the 3"},
		{"fill too long", head + "k,data,blob_fill(9999999;0x00),", fleet.Invalid, CodeValue, "at most"},
		{"fill with more behind", head + "k,data,blob_fill(3;0x00)x,", fleet.Invalid, CodeCSV, "encoding"},
		{"files are not allowed", head + "k,file,string," + secret, fleet.Invalid, CodeFile, "line 3: key \"k\""},
		{"too many fields", head + strings.Repeat(",", 70), fleet.Invalid, CodeCSV, "64"},
		{"too long", strings.Repeat("#", MaxCSV+1), fleet.TooLarge, CodeFile, "longer than"},
	} {
		_, err := ParseCSV(strings.NewReader(v.text), CSVOptions{})
		e, ok := errors.AsType[*fleet.Error](err)
		if !ok || e.Kind != v.kind || e.Code != v.code || !strings.Contains(e.Msg, v.says) {
			t.Errorf("%s: got %v", v.name, err)
		}
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error holds the value: %v", v.name, err)
		}
	}
}

func TestCSVFilesThatFail(t *testing.T) {
	broken := errors.New("cable")
	for name, open := range map[string]func(string) (io.ReadCloser, error){
		"not there": func(string) (io.ReadCloser, error) { return nil, broken },
		"broken":    func(string) (io.ReadCloser, error) { return io.NopCloser(iotest.ErrReader(broken)), nil },
	} {
		_, err := ParseCSV(strings.NewReader(head+"k,file,string,x"), CSVOptions{Open: open})
		if e, ok := errors.AsType[*fleet.Error](err); !ok || e.Kind != fleet.Invalid || e.Code != CodeFile || !errors.Is(err, broken) || !strings.HasPrefix(e.Msg, "line 3: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := files(map[string]string{"x": strings.Repeat("x", MaxFile+1)})
	if _, err := ParseCSV(strings.NewReader(head+"k,file,binary,x"), CSVOptions{Open: long}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("a long file: %v", err)
	}
	if _, err := ParseCSV(iotest.ErrReader(broken), CSVOptions{}); !errors.Is(err, broken) {
		t.Errorf("the CSV file itself: %v", err)
	}
	invalid := files(map[string]string{"x": "\xFF"})
	if _, err := ParseCSV(strings.NewReader(head+"k,file,string,x"), CSVOptions{Open: invalid}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("a string that is not UTF-8: %v", err)
	}
}

// closed counts what was closed.
type closed struct {
	io.Reader
	n *int
}

func (c closed) Close() error { *c.n++; return nil }

func TestCSVFilesAreClosed(t *testing.T) {
	n := 0
	open := func(string) (io.ReadCloser, error) { return closed{strings.NewReader("1"), &n}, nil }
	if _, err := ParseCSV(strings.NewReader(head+"a,file,u8,x\nb,file,hex2bin,x\n"), CSVOptions{Open: open}); err == nil {
		t.Error("odd hex was taken")
	}
	if n != 2 {
		t.Errorf("%d files closed", n)
	}
}

func TestCSVIsBounded(t *testing.T) {
	big := files(map[string]string{"x": strings.Repeat("x", MaxFile)})
	text := head + strings.Repeat("k,file,binary,x\n", 5)
	if _, err := ParseCSV(strings.NewReader(text), CSVOptions{Open: big}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("much data: %v", err)
	}
	text = head + strings.Repeat("k,data,u8,1\n", MaxSize/entrySize+1)
	if _, err := ParseCSV(strings.NewReader(text), CSVOptions{}); !fleet.Is(err, fleet.TooLarge) {
		t.Errorf("many lines: %v", err)
	}
	var many strings.Builder
	many.WriteString(head)
	for i := range maxNamespaces {
		fmt.Fprintf(&many, "n%d,namespace,,\n", i)
	}
	if _, err := ParseCSV(strings.NewReader(many.String()), CSVOptions{}); !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), "line 256") {
		t.Errorf("many namespaces: %v", err)
	}
	text = head + strings.Repeat("a,namespace,,\nns,namespace,,\nsta.ssid,data,string,x\n", MaxFindings)
	c, err := ParseCSV(strings.NewReader(text), CSVOptions{})
	if err != nil || len(c.Findings) != MaxFindings {
		t.Errorf("many findings: %v", err)
	}
	text = head + strings.Repeat("ap.ssid,data,string,x\n", maxAccessPoints+1)
	if _, err := ParseCSV(strings.NewReader(text), CSVOptions{AsGenerator: true}); !fleet.Is(err, fleet.Invalid) {
		t.Errorf("many access points: %v", err)
	}
}

// The entries that Espressif's generator adds for Wi-Fi, in its order; the key is that of IEEE 802.11 annex J.4.1's second
// example.
func TestWifiKeysAsTheGeneratorHasThem(t *testing.T) {
	text := head + "ap.authmode,data,u8,0\nap.ssid,data,string,ThisIsASSID\nap.passwd,data,string,ThisIsAPassword\nap.authmode2,data,u8,3\n" +
		"sta.ssid,data,string,home\nsta.pswd,data,string,x\n"
	c, err := ParseCSV(strings.NewReader(text), CSVOptions{AsGenerator: true})
	if err != nil {
		t.Fatal(err)
	}
	names := func(c *CSV) string {
		var s []string
		for _, e := range c.Entries[1:] {
			s = append(s, e.Key)
		}
		return strings.Join(s, " ")
	}
	if got := names(c); got != "ap.authmode ap.ssid ap.passwd ap.authmode2 sta.ssid sta.apinfo sta.pmk sta.apsw sta.pswd" {
		t.Errorf("with an open access point: %s", got)
	}
	text = strings.Replace(text, "u8,0", "u8,3", 1)
	if c, err = ParseCSV(strings.NewReader(text), CSVOptions{AsGenerator: true}); err != nil {
		t.Fatal(err)
	}
	if got := names(c); got != "ap.authmode ap.ssid ap.pmk_info ap.passwd ap.authmode2 sta.ssid sta.apinfo sta.pmk sta.apsw sta.pswd" {
		t.Errorf("with a password: %s", got)
	}
	want := map[string]string{
		"ap.pmk_info": strings.Repeat("00", 100) + "0dc0d6eb90555ed6419756b9a15ec3e3209b63df707dd508d14581f8982721af",
		"sta.apinfo":  strings.Repeat("ff", 140), "sta.pmk": strings.Repeat("00", 32), "sta.apsw": "0000",
	}
	for _, e := range c.Entries {
		if w, ok := want[e.Key]; ok && (e.Text() != w || e.Type != Blob || e.Namespace != "ns") {
			t.Errorf("%v is %s", e, e.Text())
		}
	}
	if c, err = ParseCSV(strings.NewReader(text), CSVOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := names(c); got != "ap.authmode ap.ssid ap.passwd ap.authmode2 sta.ssid sta.pswd" {
		t.Errorf("as the file says: %s", got)
	}
	if len(c.Findings) != 5 || c.Findings[0].Severity != esp.Info || c.Findings[0].Offset != int64(len(head)) {
		t.Errorf("findings: %v", c.Findings)
	}
}

func TestOffsetsAreThoseOfTheFile(t *testing.T) {
	text := "\xEF\xBB\xBFkey,type,encoding,value\r\n# ümlaut\r\nns,namespace,,\r\nk,data,string,\"a\r\nb\"\r\nsta.ssid,data,string,x\r\n"
	c, err := ParseCSV(strings.NewReader(text), CSVOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Findings) != 1 || c.Findings[0].Offset != int64(strings.Index(text, "sta.ssid")) || !strings.Contains(c.Findings[0].Message, "line 6") {
		t.Errorf("findings: %v", c.Findings)
	}
}

// What was read from CSV, written and read again, is what the CSV said.
func TestACSVGoesThrough(t *testing.T) {
	c, err := ParseCSV(bytes.NewReader(file(t, "basic.csv")), CSVOptions{Open: open})
	if err != nil {
		t.Fatal(err)
	}
	p, err := Decode(encode(t, c.Entries, Options{Size: 0x6000}), nil)
	if err != nil || len(p.Findings) > 0 {
		t.Fatal(err, p.Findings)
	}
	if it, ok := p.Find("tls", "mqtt_host"); !ok || it.Text() != "mqtt.example.test" {
		t.Errorf("tls:mqtt_host is %v", it)
	}
}
