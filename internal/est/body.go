package est

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"mime"
	"net/http"
	"time"

	"muster/internal/fleet"
	"muster/internal/pki"
)

// Limits of a request's body.
const (
	// maxBody bounds the text, in bytes: the largest request in base64, with a line break of two bytes after every eight
	// characters.
	maxBody     = pki.MaxCSR*4/3*5/4 + 8
	bodyTimeout = 20 * time.Second
	lineLength  = 64 // of what is sent; openssl base64 -d wants lines
)

// readCSR returns the request in the body, DER.
func readCSR(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != "application/pkcs10" || r.Header.Get("Content-Encoding") != "" {
		return nil, errMediaType
	}
	if r.ContentLength > maxBody {
		return nil, tooLarge()
	}
	// Where the connection cannot have a deadline, the server's own limits hold.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge()
	}
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "the body did not arrive whole")
	}
	return DecodeBody(text)
}

func tooLarge() error {
	return fleet.Coded(fleet.TooLarge, pki.CodeTooLarge, "a certificate request has at most %d bytes", pki.MaxCSR)
}

// DecodeBody returns what a body of base64 holds (RFC 8951 §3.1): line breaks and other white space may be anywhere, or nowhere; a
// Content-Transfer-Encoding does not matter. Errors are coded refusals and hold none of the body.
func DecodeBody(text []byte) ([]byte, error) {
	if bytes.Contains(text, []byte("PRIVATE KEY-----")) {
		return nil, fleet.Coded(fleet.Invalid, pki.CodePrivateKey, "this is a private key, not a certificate request: it is compromised now, so make a new one")
	}
	if bytes.Contains(text, []byte("-----BEGIN ")) {
		return nil, fleet.Coded(fleet.Invalid, pki.CodeMalformed, "the body is PEM: send the base64 between its first and last line alone")
	}
	packed := make([]byte, 0, len(text))
	for _, b := range text {
		switch b {
		case ' ', '\t', '\r', '\n':
		default:
			packed = append(packed, b)
		}
	}
	der := make([]byte, base64.StdEncoding.DecodedLen(len(packed)))
	n, err := base64.StdEncoding.Decode(der, packed)
	switch {
	case err != nil:
		return nil, fleet.Coded(fleet.Invalid, pki.CodeMalformed, "the body is not base64 of a PKCS #10 request")
	case n == 0:
		return nil, fleet.Coded(fleet.Invalid, pki.CodeMalformed, "the body is empty: send a PKCS #10 request in base64")
	case n > pki.MaxCSR:
		return nil, tooLarge()
	}
	return der[:n], nil
}

// encodeBody returns der as base64 in lines.
func encodeBody(der []byte) []byte {
	text := base64.StdEncoding.EncodeToString(der)
	var out bytes.Buffer
	for len(text) > 0 {
		n := min(len(text), lineLength)
		out.WriteString(text[:n])
		out.WriteString("\r\n")
		text = text[n:]
	}
	return out.Bytes()
}
