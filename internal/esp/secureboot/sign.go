package secureboot

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/internal/fleet"
)

// Signing is an image that is being signed. It holds up to three signatures; WriteTo writes the signed image.
type Signing struct {
	msg    message
	blocks []block
}

// Start begins to sign the image in file, which has size bytes. Filler and signature after the image are left out; with
// keep, the blocks of a signed image stay, in their order, and must be valid. What no device would take is an
// Unprocessable error; other errors are file's own.
func Start(file io.ReaderAt, size int64, keep bool) (*Signing, error) {
	rep, err := image.Parse(io.NewSectionReader(file, 0, size), image.Any)
	if err != nil {
		return nil, err
	}
	s := &Signing{msg: message{file: file, rep: rep}}
	switch rep.Trailer.Kind {
	case image.NoTrailer, image.Filler:
	case image.Signature:
		if keep {
			return s, s.keep()
		}
	default:
		return nil, fleet.Coded(fleet.Unprocessable, "esp_trailing_data", "at offset 0x%x: the image is signed for something else (%s): sign the .bin as the build made it", rep.Trailer.Offset, rep.Trailer.Kind)
	}
	return s, nil
}

// keep takes over the blocks of the image.
func (s *Signing) keep() error {
	old, err := Inspect(s.msg.file, s.msg.rep)
	if err != nil {
		return err
	}
	if err := old.Err(); err != nil {
		return err
	}
	s.blocks = readSector(s.msg.rep.Trailer.Sector())
	return nil
}

// Image returns what is known of the image.
func (s *Signing) Image() *image.Report { return s.msg.rep }

// Request is what a key that is kept elsewhere must sign.
type Request struct {
	Scheme esp.Scheme
	Key    KeyDigest
	Digest []byte            // of the message: sign this, do not hash it again
	Opts   crypto.SignerOpts // for a crypto.Signer
}

// OpenSSL returns the command that signs the request's digest, read from the file digest.bin, as an example.
func (r Request) OpenSSL() string {
	s := fmt.Sprintf("openssl pkeyutl -sign -inkey KEY.pem -in digest.bin -out signature.bin -pkeyopt digest:sha%d", 8*len(r.Digest))
	if r.Scheme == esp.RSA3072 {
		s += " -pkeyopt rsa_padding_mode:pss -pkeyopt rsa_pss_saltlen:32 -pkeyopt rsa_mgf1_md:sha256"
	}
	return s
}

// String returns the digest as hex digits.
func (r Request) String() string { return hex.EncodeToString(r.Digest) }

// Request returns what k must sign. Its signature goes to Add.
func (s *Signing) Request(k Key) (Request, error) {
	if err := s.room(k); err != nil {
		return Request{}, err
	}
	digest, err := s.msg.digest(k.scheme)
	if err != nil {
		return Request{}, err
	}
	r := Request{Scheme: k.scheme, Key: k.Digest(), Digest: digest, Opts: pss}
	if k.scheme != esp.RSA3072 {
		r.Opts = curves[k.scheme].fn
	}
	return r, nil
}

// room refuses a key that cannot sign beside those that did.
func (s *Signing) room(k Key) error {
	switch {
	case k.scheme == "":
		return badKey("no key was given")
	case k.scheme == esp.ECDSAP192:
		return badKey("muster does not sign with P-192, which is too weak: use P-256")
	case len(s.blocks) == image.MaxBlocks:
		return fleet.Coded(fleet.Unprocessable, "esp_signature_full", "the image has %d signatures already, which is as many as fit", image.MaxBlocks)
	}
	name := k.Digest()
	for _, b := range s.blocks {
		if b.name == name {
			return fleet.Coded(fleet.Conflict, "esp_signature_twice", "key %s signed the image already", name)
		}
		if b.scheme != k.scheme {
			return fleet.Coded(fleet.Unprocessable, "esp_signature_mixed", "the image is signed with %s, a device knows only one scheme: it cannot be signed with %s too", b.scheme, k.scheme)
		}
	}
	return nil
}

// Add adds a signature that was made elsewhere: RSASSA-PSS of 384 bytes, big-endian as every tool writes it; ECDSA as
// DER or as r and s side by side. One that does not verify is an Unprocessable error.
func (s *Signing) Add(k Key, sig []byte) error {
	req, err := s.Request(k)
	if err != nil {
		return err
	}
	got, ok := readSignature(k.scheme, sig)
	if !ok {
		return fleet.Coded(fleet.Unprocessable, "esp_signature_form", "%d bytes are no %s signature", len(sig), k.scheme)
	}
	if !k.verify(req.Digest, got) {
		return fleet.Coded(fleet.Unprocessable, "esp_signature_bad",
			"key %s did not make this signature: it must be of the digest %s itself, with RSA as PSS with SHA-256, MGF1-SHA-256 and 32 bytes of salt", req.Key, req)
	}
	s.blocks = append(s.blocks, readBlock(len(s.blocks), newBlock(k, req.Digest, got)))
	return nil
}

// Sign adds a signature by signer, whose randomness random is; some signers take none.
func (s *Signing) Sign(random io.Reader, signer crypto.Signer) error {
	k, err := KeyOf(signer.Public())
	if err != nil {
		return err
	}
	req, err := s.Request(k)
	if err != nil {
		return err
	}
	sig, err := signer.Sign(random, req.Digest, req.Opts)
	if err != nil {
		return fleet.Wrap(fleet.Unavailable, err, "the key %s could not sign", req.Key)
	}
	return s.Add(k, sig)
}

// Keys returns who signed, in order.
func (s *Signing) Keys() []KeyDigest {
	var all []KeyDigest
	for _, b := range s.blocks {
		all = append(all, b.name)
	}
	return all
}

// Findings returns what is worth saying before the image goes out.
func (s *Signing) Findings() esp.Findings {
	var fs esp.Findings
	rep := s.msg.rep
	if rep.Kind == image.App && rep.Len%image.PageSize != 0 {
		fs = append(fs, notPadded(rep))
	}
	chip, known := esp.ChipByID(rep.Header.Chip)
	for i, b := range s.blocks {
		if known && !chip.Signs(b.scheme) {
			fs = append(fs, esp.Finding{Severity: esp.Warning, Code: "esp_signature_scheme", Offset: rep.MessageLen(),
				Message: fmt.Sprintf("the %s does not know %s", chip.Name, b.scheme), Hint: fmt.Sprintf("sign with %v", chip.Schemes)})
		}
		if i > 0 && chip.FirstBlock {
			fs = append(fs, esp.Finding{Severity: esp.Warning, Code: "esp_signature_ignored", Offset: rep.MessageLen() + int64(i)*image.BlockSize,
				Message: fmt.Sprintf("the %s looks at the first signature only", chip.Name)})
		}
	}
	return fs
}

// Sector returns the signature sector, image.SectorSize bytes. Without a signature it is an Unprocessable error.
func (s *Signing) Sector() ([]byte, error) {
	if len(s.blocks) == 0 {
		return nil, fleet.Coded(fleet.Unprocessable, "esp_unsigned", "nobody has signed the image yet")
	}
	sector := bytes.Repeat([]byte{0xFF}, image.SectorSize)
	for i, b := range s.blocks {
		copy(sector[i*image.BlockSize:], b.raw)
	}
	return sector, nil
}

// WriteTo writes the signed image: the image, 0xFF up to the next sector, the signature sector. If the file changed since
// Start, so that the signatures are of something else, that is a Conflict error and what was written is worth nothing.
func (s *Signing) WriteTo(w io.Writer) (int64, error) {
	sector, err := s.Sector()
	if err != nil {
		return 0, err
	}
	sum := sha256.New()
	n, err := s.msg.writeTo(io.MultiWriter(w, sum))
	if err != nil {
		return n, err
	}
	if s.msg.rep.Message() != [sha256.Size]byte(sum.Sum(nil)) {
		return n, fleet.Coded(fleet.Conflict, "esp_file_changed", "the file changed while it was being signed: sign it again")
	}
	m, err := w.Write(sector)
	return n + int64(m), err
}
