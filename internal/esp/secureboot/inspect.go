// Package secureboot reads, verifies and makes the signature sectors of Secure Boot v2 (esp32.md §2; espsecure's
// sign-data, verify-signature and digest-sbv2-public-key).
//
// A block carries its own public key, so a right signature says nothing by itself: Report.Check trusts registered key
// digests alone. Signing takes any crypto.Signer, or hands out the digest and takes back the signature that an HSM made.
// The package does no I/O of its own.
package secureboot

import (
	"bytes"
	"crypto/sha512"
	"fmt"
	"io"
	"slices"
	"strings"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/fleet"
)

// Status says what a block is worth, apart from whose key it holds.
type Status string

// Statuses.
const (
	Valid        Status = "valid"         // signs this image, by the key that it holds
	WrongImage   Status = "wrong-image"   // the digest inside is not this image's
	BadSignature Status = "bad-signature" // the key inside did not make it
	Malformed    Status = "malformed"     // nothing can be verified with it
)

// Block is what a report says of a signature block.
type Block struct {
	Index  int        `json:"index"` // in the sector, 0 to 2
	Scheme esp.Scheme `json:"scheme,omitempty"`
	Key    KeyDigest  `json:"key"`
	Status Status     `json:"status"`
	Why    string     `json:"why,omitempty"` // for Malformed
}

// Report is what the signature sector of an image says.
type Report struct {
	Blocks   []Block      `json:"blocks,omitempty"` // those that are present; none: the image is not signed
	Findings esp.Findings `json:"findings,omitempty"`
}

// Err returns the first finding that makes the sector unfit for any device, nil if there is none.
func (r *Report) Err() error { return r.Findings.Err() }

// Signed reports whether a block is present.
func (r *Report) Signed() bool { return len(r.Blocks) > 0 }

// Inspect verifies every block of the image that rep is of by the key that the block itself holds. file is that image;
// it is read only for blocks with SHA-384. The error is file's own.
func Inspect(file io.ReaderAt, rep *image.Report) (*Report, error) {
	out := &Report{}
	sector := rep.Trailer.Sector()
	if sector == nil {
		return out, nil
	}
	msg := message{file: file, rep: rep}
	at := rep.MessageLen()
	for _, b := range readSector(sector) {
		status, err := b.verify(&msg)
		if err != nil {
			return out, err
		}
		out.Blocks = append(out.Blocks, Block{Index: b.index, Scheme: b.scheme, Key: b.name, Status: status, Why: b.fault})
		out.judge(b, status, at+int64(b.index)*image.BlockSize)
	}
	out.judgeSector(sector, at)
	if rep.Kind == image.App && rep.Len%image.PageSize != 0 {
		out.Findings = append(out.Findings, notPadded(rep))
	}
	return out, nil
}

func (r *Report) add(s esp.Severity, code string, offset int64, hint, format string, a ...any) {
	r.Findings = append(r.Findings, esp.Finding{Severity: s, Code: code, Offset: offset, Message: fmt.Sprintf(format, a...), Hint: hint})
}

func notPadded(rep *image.Report) esp.Finding {
	return esp.Finding{Severity: esp.Warning, Code: "esp_not_secure_padded", Offset: rep.Len,
		Message: "the image ends inside a page of 64 KiB, so the rest of its last page is not signed",
		Hint:    "build with esptool elf2image --secure-pad-v2"}
}

// judge says what a block that is not valid means: some chips burn a key for good when a signature fails.
func (r *Report) judge(b block, status Status, at int64) {
	const hint = "sign the image again; a chip may revoke a key for good when it sees this"
	switch status {
	case WrongImage:
		r.add(esp.Error, "esp_signature_image", at, hint, "signature block %d is of another image", b.index)
	case BadSignature:
		r.add(esp.Error, "esp_signature_bad", at, hint, "signature block %d was not made by the key %.16s… that it names", b.index, b.name)
	case Malformed:
		r.add(esp.Error, "esp_signature_malformed", at, hint, "signature block %d is malformed: %s", b.index, b.fault)
	}
}

// judgeSector looks at what concerns more than one block.
func (r *Report) judgeSector(sector []byte, at int64) {
	for i, b := range r.Blocks {
		if first := r.Blocks[0].Scheme; b.Scheme != first && b.Scheme != "" && first != "" {
			r.add(esp.Error, "esp_signature_mixed", at+int64(b.Index)*image.BlockSize, "sign with keys of one kind",
				"signature block %d is %s, the first one %s: a device knows only one", b.Index, b.Scheme, first)
		}
		if b.Index != i {
			r.add(esp.Warning, "esp_signature_gap", at+int64(i)*image.BlockSize, "sign the image again",
				"signature block %d is absent or damaged although block %d follows: some chips look no further", i, b.Index)
			return
		}
	}
	used := len(r.Blocks) * image.BlockSize
	if !esp.Erased(sector[used:]) {
		r.add(esp.Warning, "esp_signature_filler", at+int64(used), "", "the rest of the signature sector is not all 0xFF")
	}
	for end := image.BlockSize; end <= used; end += image.BlockSize {
		if len(bytes.TrimLeft(sector[end-blockFiller:end], "\x00")) > 0 {
			r.add(esp.Warning, "esp_signature_filler", at+int64(end-blockFiller), "", "the last bytes of signature block %d are not zero", end/image.BlockSize-1)
		}
	}
}

// verify says what the block is worth.
func (b *block) verify(msg *message) (Status, error) {
	if b.fault != "" {
		return Malformed, nil
	}
	digest, err := msg.digest(b.scheme)
	if err != nil {
		return "", err
	}
	if !bytes.Equal(digest, b.digest) {
		return WrongImage, nil
	}
	if !b.key.verify(digest, b.signature()) {
		return BadSignature, nil
	}
	return Valid, nil
}

// message is what is signed: the image with 0xFF up to the next sector.
type message struct {
	file   io.ReaderAt
	rep    *image.Report
	sha384 []byte
}

// digest returns the digest that the scheme signs.
func (m *message) digest(s esp.Scheme) ([]byte, error) {
	if s != esp.ECDSAP384 {
		sum := m.rep.Message()
		return sum[:], nil
	}
	if m.sha384 == nil {
		h := sha512.New384()
		if _, err := m.writeTo(h); err != nil {
			return nil, err
		}
		m.sha384 = h.Sum(nil)
	}
	return m.sha384, nil
}

// writeTo writes the message.
func (m *message) writeTo(w io.Writer) (int64, error) {
	n, err := io.Copy(w, io.NewSectionReader(m.file, 0, m.rep.Len))
	if err != nil {
		return n, err
	}
	if n < m.rep.Len {
		return n, fleet.Coded(fleet.Unprocessable, "esp_truncated", "the file became shorter while it was read")
	}
	pad, err := w.Write(bytes.Repeat([]byte{0xFF}, int(m.rep.MessageLen()-n)))
	return n + int64(pad), err
}

// Slot is a key that a product or a device trusts, or no longer trusts.
type Slot struct {
	Key     KeyDigest `json:"key"`
	Revoked bool      `json:"revoked"`
}

// Policy is whom to trust. Keys are a product's registered keys, or a device's eFuse slots.
type Policy struct {
	Chip       esp.Chip // the zero value: not known
	Keys       []Slot
	FirstBlock bool // only the first block counts, as on an app that checks signatures without hardware Secure Boot
}

// Check returns the block that makes the image acceptable. What has no block whose key is registered and not revoked,
// and what holds a block that fails, is an Unprocessable error: offering it could cost a device its key.
func (r *Report) Check(p Policy) (Block, error) {
	if !r.Signed() {
		return Block{}, fleet.Coded(fleet.Unprocessable, "esp_unsigned", "the image has no Secure Boot signature: sign it with muster firmware sign --secure-boot")
	}
	if err := r.Err(); err != nil {
		return Block{}, err
	}
	if scheme := r.Blocks[0].Scheme; !p.Chip.Signs(scheme) {
		return Block{}, fleet.Coded(fleet.Unprocessable, "esp_signature_scheme", "the image is signed with %s, the %s knows %v only", scheme, p.Chip.Name, p.Chip.Schemes)
	}
	revoked := false
	for _, b := range r.Blocks {
		if (p.FirstBlock || p.Chip.FirstBlock) && b.Index > 0 {
			break
		}
		i := slices.IndexFunc(p.Keys, func(s Slot) bool { return p.same(s.Key, b.Key) })
		switch {
		case i < 0:
		case p.anyRevoked(b.Key):
			revoked = true
		default:
			return b, nil
		}
	}
	if revoked {
		return Block{}, fleet.Coded(fleet.Unprocessable, "esp_key_revoked", "the image is signed with a revoked key: sign it with one that is not (%s)", r.names())
	}
	return Block{}, fleet.Coded(fleet.Unprocessable, "esp_key_unknown", "no registered key signed the image where the device looks: it was signed by %s; register that key, or sign with one that is registered", r.names())
}

// same compares as many bytes of two digests as the chip burns.
func (p Policy) same(a, b KeyDigest) bool {
	n := len(a)
	if p.Chip.DigestBytes > 0 {
		n = p.Chip.DigestBytes
	}
	return bytes.Equal(a[:n], b[:n])
}

func (p Policy) anyRevoked(k KeyDigest) bool {
	return slices.ContainsFunc(p.Keys, func(s Slot) bool { return s.Revoked && p.same(s.Key, k) })
}

func (r *Report) names() string {
	var all []string
	for _, b := range r.Blocks {
		all = append(all, b.Key.String())
	}
	return strings.Join(all, ", ")
}
