// Package nvs writes and reads the NVS partitions of ESP-IDF (esp32.md §4): pages of 32-byte entries, numbers, strings
// and blobs in namespaces, in the clear or encrypted. Encode makes byte for byte what Espressif's nvs_partition_gen makes
// of the same entries; Decode reads what a device has written and says what is damaged. ParseCSV reads the generator's
// input. Nothing here does I/O of its own.
//
// Values are secrets: no error, finding or default print holds one.
package nvs

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"muster/internal/fleet"
)

// Sizes and limits. What has a device's limit is named for it; the others keep hostile input small.
const (
	PageSize    = 4096    // bytes of a page, which is a sector of flash
	MaxSize     = 4 << 20 // longest partition that is read or written, bytes
	MinSize     = 0x3000  // smallest partition that a device can write to, bytes
	MaxKey      = 15      // longest key or namespace name, bytes
	MaxString   = 3967    // longest string in format 2, bytes without the final NUL: it must fit one page with its header
	MaxStringV1 = 1983    // the same in format 1
	MaxBlob     = 508000  // longest blob in format 2, bytes: 127 chunks of at most 4000
	MaxBlobV1   = 1984    // longest blob in format 1, bytes
)

const (
	headerSize    = 32
	bitmapOffset  = 32
	entriesOffset = 64
	entrySize     = 32
	pageEntries   = 126
	maxNamespaces = 254
	maxChunks     = 127
	anyChunk      = 0xFF // chunkIndex of all but blob data
)

// Codes of errors and findings.
const (
	CodeSize       = "nvs-size"          // not a size that a partition can have
	CodeFull       = "nvs-full"          // the entries do not fit the partition
	CodeKey        = "nvs-key"           // a key or a namespace name that NVS cannot hold
	CodeType       = "nvs-type"          // not a type, or not one of that place
	CodeValue      = "nvs-value"         // a value that its type cannot hold
	CodeDuplicate  = "nvs-duplicate"     // a key that is there twice
	CodeNamespace  = "nvs-namespace"     // a namespace that is missing, there twice, or one too many
	CodeCSV        = "nvs-csv"           // a line of a CSV file that cannot be read
	CodeFile       = "nvs-file"          // a file named by a CSV line that cannot be read
	CodeKeys       = "nvs-keys"          // keys, or a key partition, of a wrong size
	CodeKeysCRC    = "nvs-keys-crc"      // a key partition that is damaged or still flash-encrypted
	CodeKeysEmpty  = "nvs-keys-empty"    // a key partition that no device has written yet
	CodePage       = "nvs-page"          // a page that a device would discard
	CodeVersion    = "nvs-version"       // a page of a format that ESP-IDF does not know yet
	CodeEntry      = "nvs-entry"         // an entry whose checksum or span is wrong
	CodeTorn       = "nvs-torn"          // what a device was writing or moving when it lost power
	CodeData       = "nvs-data"          // a value whose checksum or form is wrong
	CodeBlob       = "nvs-blob"          // a blob of which parts are missing or left over
	CodeNoFreePage = "nvs-no-free"       // no empty page is left, which a device needs
	CodeUnreadable = "nvs-unreadable"    // not one entry can be read: encrypted, or with another key
	CodeGenerator  = "nvs-generator"     // where Espressif's generator does something else than the file says
	CodeMore       = "nvs-more"          // there are more findings than are kept
	CodeRandomness = "nvs-no-randomness" // no keys without it
)

// Type is the type of a value as users name it.
type Type string

// Types. A Namespace entry only creates its namespace.
const (
	U8        Type = "u8"
	I8        Type = "i8"
	U16       Type = "u16"
	I16       Type = "i16"
	U32       Type = "u32"
	I32       Type = "i32"
	U64       Type = "u64"
	I64       Type = "i64"
	String    Type = "string"
	Blob      Type = "blob"
	Namespace Type = "namespace"
)

// Codes of types in an entry.
const (
	codeU8       = 0x01
	codeString   = 0x21
	codeBlobV1   = 0x41 // a blob on one page
	codeBlobData = 0x42 // one chunk of a blob
	codeBlobIdx  = 0x48 // what holds a blob's chunks together
)

// number is how a type of integers is stored.
type number struct {
	code   byte
	bytes  int
	signed bool
}

var numbers = map[Type]number{
	U8: {codeU8, 1, false}, I8: {0x11, 1, true}, U16: {0x02, 2, false}, I16: {0x12, 2, true},
	U32: {0x04, 4, false}, I32: {0x14, 4, true}, U64: {0x08, 8, false}, I64: {0x18, 8, true},
}

var numberTypes = func() map[byte]Type {
	m := map[byte]Type{}
	for t, n := range numbers {
		m[n.code] = t
	}
	return m
}()

// holds reports whether v is within the type: all bits above its size are copies of its sign.
func (n number) holds(v uint64) bool {
	return n.extend(v) == v
}

// extend keeps the low bytes of v and spreads the sign.
func (n number) extend(v uint64) uint64 {
	shift := 64 - 8*n.bytes
	if n.signed {
		return uint64(int64(v<<shift) >> shift)
	}
	return v << shift >> shift
}

// Entry is one value in a namespace. Its default print leaves the value out.
type Entry struct {
	Namespace string
	Key       string // empty for a Namespace
	Type      Type
	Number    uint64 // of the integer types; signed ones as two's complement of 64 bits
	Data      []byte // of String, without its final NUL, and of Blob
	Line      int    // of the CSV file that it is from, else 0; for messages only
}

// Integer is any type of number that NVS stores.
type Integer interface {
	uint8 | int8 | uint16 | int16 | uint32 | int32 | uint64 | int64
}

// NewNumber returns an entry whose type is v's.
func NewNumber[T Integer](namespace, key string, v T) Entry {
	e := Entry{Namespace: namespace, Key: key, Number: uint64(v)}
	switch any(v).(type) {
	case uint8:
		e.Type = U8
	case int8:
		e.Type = I8
	case uint16:
		e.Type = U16
	case int16:
		e.Type = I16
	case uint32:
		e.Type = U32
	case int32:
		e.Type = I32
	case uint64:
		e.Type = U64
	case int64:
		e.Type = I64
	}
	return e
}

// NewString returns a string entry, which a device reads with a final NUL.
func NewString(namespace, key, v string) Entry {
	return Entry{Namespace: namespace, Key: key, Type: String, Data: []byte(v)}
}

// NewBlob returns a blob entry. It keeps v.
func NewBlob(namespace, key string, v []byte) Entry {
	return Entry{Namespace: namespace, Key: key, Type: Blob, Data: v}
}

// NewNamespace returns an entry that creates a namespace, which the first value in it would do as well.
func NewNamespace(name string) Entry { return Entry{Namespace: name, Type: Namespace} }

// String names the entry, without its value.
func (e Entry) String() string {
	if e.Type == Namespace {
		return fmt.Sprintf("namespace %q", e.Namespace)
	}
	return fmt.Sprintf("%q in %q (%s)", e.Key, e.Namespace, e.Type)
}

// GoString keeps the value out of %#v.
func (e Entry) GoString() string { return e.String() }

// Text returns the value for people: a number in decimal, a string as it is, a blob in hex. It is as secret as the value.
func (e Entry) Text() string {
	n, ok := numbers[e.Type]
	switch {
	case ok && n.signed:
		return strconv.FormatInt(int64(e.Number), 10)
	case ok:
		return strconv.FormatUint(e.Number, 10)
	case e.Type == Blob:
		return fmt.Sprintf("%x", e.Data)
	}
	return string(e.Data)
}

// where starts a message about an entry.
func (e Entry) where() string {
	if e.Line > 0 {
		return fmt.Sprintf("line %d: %s", e.Line, e)
	}
	return e.String()
}

// checkName says what is wrong with a key or a namespace name. It shows at most what fits a key, because in a shifted CSV line
// a value can stand where a key should.
func checkName(what, s string) error {
	switch {
	case s == "":
		return fleet.Coded(fleet.Invalid, CodeKey, "the %s is empty: use 1 to %d bytes", what, MaxKey)
	case len(s) > MaxKey:
		return fleet.Coded(fleet.Invalid, CodeKey, "a %s of %d bytes: use 1 to %d", what, len(s), MaxKey)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fleet.Coded(fleet.Invalid, CodeKey, "%s %q: use printable characters only", what, s)
	case strings.TrimSpace(s) != s:
		return fleet.Coded(fleet.Invalid, CodeKey, "%s %q: take away the spaces around it", what, s)
	}
	return nil
}

// check says what is wrong with the entry for a format.
func (e Entry) check(v Version) error {
	if err := checkName("namespace", e.Namespace); err != nil {
		return e.locate(err)
	}
	if e.Type == Namespace {
		return nil
	}
	if err := checkName("key", e.Key); err != nil {
		return e.locate(err)
	}
	longest := map[Type]int{String: MaxString, Blob: MaxBlob}
	if v == V1 {
		longest = map[Type]int{String: MaxStringV1, Blob: MaxBlobV1}
	}
	n, isNumber := numbers[e.Type]
	most, isData := longest[e.Type]
	switch {
	case isNumber && !n.holds(e.Number):
		return fleet.Coded(fleet.Invalid, CodeValue, "%s: the number does not fit its type", e.where())
	case isNumber:
		return nil
	case !isData:
		return fleet.Coded(fleet.Invalid, CodeType, "%s: not a type: use u8 to u64, i8 to i64, string or blob", e.where())
	case e.Type == String && strings.ContainsRune(string(e.Data), 0):
		return fleet.Coded(fleet.Invalid, CodeValue, "%s: a NUL within the string, where a device would end it: use a blob", e.where())
	case len(e.Data) > most && e.Type == String:
		return fleet.Coded(fleet.TooLarge, CodeValue, "%s: %d bytes, but a string has at most %d in format %d: use a blob", e.where(), len(e.Data), most, v)
	case len(e.Data) > most:
		return fleet.Coded(fleet.TooLarge, CodeValue, "%s: %d bytes, but a blob has at most %d in format %d", e.where(), len(e.Data), most, v)
	}
	return nil
}

// locate puts the line, where there is one, before a message.
func (e Entry) locate(err error) error {
	if e.Line == 0 {
		return err
	}
	return atLine(e.Line, err)
}
