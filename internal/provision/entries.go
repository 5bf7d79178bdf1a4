package provision

import (
	"bytes"
	"encoding/csv"
	"errors"
	"io"
	"regexp"
	"strings"

	"muster/internal/esp/nvs"
	"muster/internal/fleet"
)

// Namespace is the NVS namespace of what muster gives a device, and the device keeps for muster.
const Namespace = "muster"

// Keys in Namespace that the factory writes, all but the bundle strings: text, or PEM. They are those of the example client
// (docs/esp32.md, "What is in NVS"). A text that is too long for an NVS string is a blob with a final NUL.
const (
	KeyID            = "id"
	KeyMQTT          = "mqtt"      // host:port
	KeyFallbackMQTT  = "fb_mqtt"   // host:port
	KeyHTTPS         = "https"     // host:port
	KeyRecoveryHTTPS = "rec_https" // host:port
	KeyRoots         = "roots"     // certificates
	KeyTrustKey      = "trust_key" // public key by which new trust bundles are checked
	KeyBundle        = "bundle"    // the trust bundle in force, a compact JWS; a blob, because the device will write newer ones as such
	KeyReleaseKeys   = "rel_keys"  // public keys that sign releases, up to two
	KeyCert          = "cert"      // leaf and intermediate
	KeyKey           = "key"       // of the certificate, PKCS #8
	KeyPassword      = "fb_pw"     // for the fallback
	KeyEnrolPassword = "enrol_pw"  // for the first certificate by EST, once
	KeyWiFiSSID      = "wifi_ssid"
	KeyWiFiPassword  = "wifi_psk"
)

// open are the keys in Namespace whose values are no secrets.
var open = map[string]bool{
	KeyID: true, KeyMQTT: true, KeyFallbackMQTT: true, KeyHTTPS: true, KeyRecoveryHTTPS: true, KeyRoots: true, KeyTrustKey: true,
	KeyBundle: true, KeyReleaseKeys: true, KeyCert: true, KeyWiFiSSID: true, "use": true, "clock": true, "update": true,
}

// Public reports whether a value in NVS may be shown to whoever looks: only what is known to hold no secret.
func Public(namespace, key string) bool { return namespace == Namespace && open[key] }

// Identity is what a device must know to be part of the fleet. Empty texts are left out.
type Identity struct {
	Device                                   fleet.DeviceID
	MQTT, FallbackMQTT, HTTPS, RecoveryHTTPS string
	Roots, TrustKey, Bundle, ReleaseKeys     string
	Chain, Key                               string // neither, if the device makes its own key
	Password, EnrolPassword                  string
	WiFiSSID, WiFiPassword                   string
}

// String keeps the secrets out of any print.
func (i Identity) String() string { return "identity of " + string(i.Device) }

// GoString keeps the secrets out of %#v.
func (i Identity) GoString() string { return i.String() }

// Entries returns the NVS entries of an identity.
func (i Identity) Entries() []nvs.Entry {
	var out []nvs.Entry
	for _, e := range []struct{ key, text string }{
		{KeyID, string(i.Device)}, {KeyMQTT, i.MQTT}, {KeyFallbackMQTT, i.FallbackMQTT}, {KeyHTTPS, i.HTTPS}, {KeyRecoveryHTTPS, i.RecoveryHTTPS},
		{KeyRoots, i.Roots}, {KeyTrustKey, i.TrustKey}, {KeyBundle, i.Bundle}, {KeyReleaseKeys, i.ReleaseKeys}, {KeyCert, i.Chain}, {KeyKey, i.Key},
		{KeyPassword, i.Password}, {KeyEnrolPassword, i.EnrolPassword}, {KeyWiFiSSID, i.WiFiSSID}, {KeyWiFiPassword, i.WiFiPassword},
	} {
		switch {
		case e.text == "":
		case e.key == KeyBundle:
			out = append(out, nvs.NewBlob(Namespace, e.key, []byte(e.text)))
		case len(e.text) > nvs.MaxString:
			out = append(out, nvs.NewBlob(Namespace, e.key, append([]byte(e.text), 0)))
		default:
			out = append(out, nvs.NewString(Namespace, e.key, e.text))
		}
	}
	return out
}

// Template is a user's own NVS entries: the CSV of Espressif's nvs_partition_gen, whose values may hold {{NAME}}, which each
// device has a value for.
type Template struct {
	rows  [][]string
	names []string
}

var placeholder = regexp.MustCompile(`\{\{\s*([A-Za-z0-9_.:-]+)\s*\}\}`)

// valueField is the index of the value in a row.
const valueField = 3

// ParseTemplate reads a template. What cannot be read is an Invalid error that names the line.
func ParseTemplate(b []byte) (*Template, error) {
	if len(b) > nvs.MaxCSV {
		return nil, fleet.Coded(fleet.TooLarge, CodeTemplate, "the template has more than %d bytes", nvs.MaxCSV)
	}
	r := csv.NewReader(bytes.NewReader(b))
	r.FieldsPerRecord, r.Comment = -1, '#'
	t := &Template{}
	for {
		row, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "the template of NVS entries")
		}
		for i, field := range row {
			found := placeholder.FindAllStringSubmatch(field, -1)
			if line, _ := r.FieldPos(i); len(found) > 0 && i != valueField {
				return nil, fleet.Coded(fleet.Invalid, CodeTemplate, "line %d of the template: {{%s}} may stand in the value only", line, found[0][1])
			}
			for _, f := range found {
				t.names = append(t.names, f[1])
			}
		}
		t.rows = append(t.rows, row)
	}
	if len(t.rows) == 0 {
		return nil, fleet.Coded(fleet.Invalid, CodeTemplate, "the template is empty: it begins with key,type,encoding,value")
	}
	return t, nil
}

// Names returns what stands between braces, in the order of the template.
func (t *Template) Names() []string { return t.names }

// Entries returns a device's entries. open opens files that the template names. A line whose whole value is a placeholder that
// is empty for this device is left out.
func (t *Template) Entries(values map[string]string, open func(name string) (io.ReadCloser, error)) ([]nvs.Entry, error) {
	var filled bytes.Buffer
	w := csv.NewWriter(&filled)
	for _, row := range t.rows {
		row, err := fill(row, values)
		if err != nil {
			return nil, err
		}
		if row == nil {
			continue
		}
		if err := w.Write(row); err != nil {
			return nil, fleet.Wrap(fleet.Internal, err, "fill the template")
		}
	}
	w.Flush()
	read, err := nvs.ParseCSV(&filled, nvs.CSVOptions{Open: open})
	if err != nil {
		return nil, err
	}
	return read.Entries, nil
}

// fill returns a row with a device's values, nil if it has none.
func fill(row []string, values map[string]string) ([]string, error) {
	if len(row) <= valueField || !strings.Contains(row[valueField], "{{") {
		return row, nil
	}
	var missing string
	filled := placeholder.ReplaceAllStringFunc(row[valueField], func(m string) string {
		name := placeholder.FindStringSubmatch(m)[1]
		v, ok := values[name]
		if !ok {
			missing = name
		}
		return v
	})
	if missing != "" {
		return nil, fleet.Coded(fleet.Invalid, CodeTemplate, "the template asks for {{%s}}, which no column of the devices has", missing)
	}
	if filled == "" {
		return nil, nil
	}
	out := append([]string{}, row...)
	out[valueField] = filled
	return out, nil
}
