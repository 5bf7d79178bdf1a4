package nvs

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha1"

	"muster/internal/fleet"
)

// maxAccessPoints is how often the settings of an access point may come up in a file: each costs 4096 hashes.
const maxAccessPoints = 30

// isWifiKey reports whether Espressif's generator may write entries for the key that no line asks for (esp32.md §4.4).
func isWifiKey(key string) bool {
	switch key {
	case "ap.ssid", "ap.passwd", "ap.authmode", "sta.ssid", "sta.pswd":
		return true
	}
	return false
}

// wifiKeys follows those keys through a file.
type wifiKeys struct {
	ssid, password, mode string // of the access point
	points               int    // how often its keys came up
	station              bool   // the station's entries are written
}

// companions returns what the generator writes before and after the row's own entry.
func (w *wifiKeys) companions(row csvRow) (before, after []Entry, err error) {
	switch row.key {
	case "ap.ssid":
		w.ssid = row.value
	case "ap.passwd":
		w.password = row.value
	case "ap.authmode":
		if row.value != "0" {
			w.mode = row.value
		}
	case "sta.ssid", "sta.pswd":
		if w.station {
			return nil, nil, nil
		}
		w.station = true
		return nil, []Entry{
			{Key: "sta.apinfo", Type: Blob, Data: bytes.Repeat([]byte{0xFF}, 140)},
			{Key: "sta.pmk", Type: Blob, Data: make([]byte, 32)},
			{Key: "sta.apsw", Type: Blob, Data: make([]byte, 2)},
		}, nil
	default:
		return nil, nil, nil
	}
	if w.points++; w.points > maxAccessPoints {
		return nil, nil, fleet.Coded(fleet.Invalid, CodeCSV, "key %q: more than %d lines with settings of an access point", row.key, maxAccessPoints)
	}
	if w.ssid == "" || w.password == "" || w.mode == "" {
		return nil, nil, nil
	}
	// IEEE 802.11-2020 annex J.4: the pre-shared key of a pass phrase.
	pmk, err := pbkdf2.Key(sha1.New, w.password, []byte(w.ssid), 4096, 32)
	if err != nil {
		return nil, nil, fleet.Wrap(fleet.Internal, err, "pre-shared key of the access point")
	}
	return []Entry{{Key: "ap.pmk_info", Type: Blob, Data: append(make([]byte, 100), pmk...)}}, nil, nil
}
