package est

import (
	"bytes"
	"encoding/base64"
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
	// maxRest bounds what is read, and thrown away, of a body that is refused, in bytes.
	maxRest = 2 << 20
)

// readCSR returns the request in the body, DER.
func readCSR(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != "application/pkcs10" || r.Header.Get("Content-Encoding") != "" {
		return nil, errMediaType
	}
	// Where the connection cannot have a deadline, the server's own limits hold.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	defer func() { _ = http.NewResponseController(w).SetReadDeadline(time.Time{}) }()
	var text []byte
	if r.ContentLength <= maxBody {
		if text, err = io.ReadAll(io.LimitReader(r.Body, maxBody+1)); err != nil {
			return nil, fleet.Wrap(fleet.Invalid, err, "the body did not arrive whole")
		}
	}
	if r.ContentLength > maxBody || len(text) > maxBody {
		// A client that is still writing when the connection is reset never reads why.
		_, _ = io.CopyN(io.Discard, r.Body, maxRest)
		return nil, tooLarge()
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
