package simdev

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"

	"github.com/go-json-experiment/json"
)

// records are checked contents of a flash: a checksum goes before each, so that one torn by a power cut is found and
// counts as not there. Nothing that a device cannot do without is ever overwritten in place: there are two of each.
type records struct{ flash Flash }

// get returns what was put under name; nil if there is none or it is torn.
func (r records) get(name string) ([]byte, error) {
	b, err := r.flash.Read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) < 4 || binary.BigEndian.Uint32(b) != crc32.ChecksumIEEE(b[4:]) {
		return nil, nil
	}
	return b[4:], nil
}

func (r records) put(name string, b []byte) error {
	framed := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), crc32.ChecksumIEEE(b))
	return r.flash.Write(name, append(framed, b...))
}

// load reads a record of JSON into v, which stays as it is if there is none.
func load[T any](r records, name string, v *T) (bool, error) {
	b, err := r.get(name)
	if b == nil || err != nil {
		return false, err
	}
	var t T
	if json.Unmarshal(b, &t) != nil {
		return false, nil // written by another version of the firmware: as good as not there
	}
	*v = t
	return true, nil
}

func save[T any](r records, name string, v T) error {
	b, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return err
	}
	return r.put(name, b)
}

// twin keeps a small record twice, as ESP32's otadata does: each write goes to the older copy, and the newest copy that
// is whole counts. A torn write leaves the value as it was before.
type twin[T any] struct {
	r    records
	name string
}

type copyOf[T any] struct {
	Seq   uint64 `json:"seq"`
	Value T      `json:"value"`
}

// read returns the value, the zero value if there is none yet, and how many writes it has seen.
func (t twin[T]) read() (v T, seq uint64, err error) {
	for _, half := range []string{".0", ".1"} {
		var c copyOf[T]
		ok, err := load(t.r, t.name+half, &c)
		if err != nil {
			return v, 0, err
		}
		if ok && c.Seq > seq {
			v, seq = c.Value, c.Seq
		}
	}
	return v, seq, nil
}

func (t twin[T]) write(v T) error {
	_, seq, err := t.read()
	if err != nil {
		return err
	}
	half := ".0"
	if seq%2 == 1 {
		half = ".1"
	}
	return save(t.r, t.name+half, copyOf[T]{seq + 1, v})
}
