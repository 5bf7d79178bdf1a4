package devapi

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// dial opens a TLS 1.2 connection like a device's.
func (w *world) dial() *tls.Conn {
	w.t.Helper()
	c, err := tls.Dial("tcp", w.devices, &tls.Config{RootCAs: w.ca.pool(), Certificates: []tls.Certificate{w.cert}, MaxVersion: tls.VersionTLS12})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		w.t.Fatal(err)
	}
	return c
}

// The requests of real clients, byte for byte, get what these clients accept (esp32.md §6.1, §6.2).
func TestRequestsOfRealClients(t *testing.T) {
	w := start(t, nil)
	files, err := filepath.Glob("testdata/requests/*.txt")
	if err != nil || len(files) != 7 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	sum := md5.Sum(w.image)
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		line, rest, _ := strings.Cut(string(text), "\r\n")
		word := strings.Fields(line) // method, path, version
		if len(word) != 3 {
			t.Fatalf("%s: request line %q", name, line)
		}
		c := w.dial()
		if _, err := io.WriteString(c, word[0]+" "+w.rel.Path()+" "+word[2]+"\r\n"+rest); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(c)
		status, err := in.Peek(len("HTTP/1.x"))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if string(status) != word[2] {
			t.Errorf("%s: answered in %s", name, status)
		}
		res, err := http.ReadResponse(in, &http.Request{Method: word[0]})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		wantStatus, want := 200, w.image
		switch {
		case strings.Contains(name, "resume"):
			wantStatus, want = 206, w.image[65536:]
		case strings.Contains(name, "partial_2"):
			wantStatus, want = 206, w.image[:65536]
		}
		if res.StatusCode != wantStatus || res.ContentLength != int64(len(want)) || len(res.TransferEncoding) != 0 {
			t.Errorf("%s: %s, length %d, transfer encoding %v", name, res.Status, res.ContentLength, res.TransferEncoding)
		}
		if word[0] == "HEAD" {
			want = nil
		}
		if !bytes.Equal(body, want) {
			t.Errorf("%s: another body, %d bytes", name, len(body))
		}
		if strings.Contains(name, "httpupdate") {
			if got := res.Header.Get("x-MD5"); got != hex.EncodeToString(sum[:]) {
				t.Errorf("%s: x-MD5 %q", name, got)
			}
			if _, err := in.ReadByte(); err != io.EOF {
				t.Errorf("%s: the connection stays open after an HTTP/1.0 answer: %v", name, err)
			}
			continue
		}
		if res.Close {
			t.Errorf("%s: the connection was closed", name)
		}
	}
}

// No header line of an answer exceeds the 512 bytes that esp_http_client has room for, and the whole header is small.
func TestAnswerFitsSmallBuffers(t *testing.T) {
	w := start(t, nil)
	c := w.dial()
	if _, err := io.WriteString(c, "GET "+w.rel.Path()+" HTTP/1.1\r\nHost: x\r\nRange: bytes=0-0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	in, total := bufio.NewReader(c), 0
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if total += len(line); len(line) > 400 || total > 1024 {
			t.Errorf("header of %d bytes, line %q", total, line)
		}
		if line == "\r\n" {
			return
		}
	}
}

// What is not HTTP, or too much of it, costs its sender the connection and nobody else anything.
func TestBadRequests(t *testing.T) {
	w := start(t, nil)
	path := w.rel.Path()
	for name, c := range map[string]struct{ send, want string }{
		"not HTTP":                 {"hello\r\n\r\n", "400"},
		"HTTP/2 preface":           {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "404"},
		"no host":                  {"GET " + path + " HTTP/1.1\r\n\r\n", "400"},
		"header too long":          {"GET " + path + " HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 64<<10) + "\r\n\r\n", "431"},
		"too many headers":         {"GET " + path + " HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", 10000) + "\r\n", "431"},
		"two lengths":              {"GET " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nhello", "400"},
		"length and chunks":        {"GET " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
		"with a body":              {"GET " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "400"},
		"with a body to come":      {"GET " + path + " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", "400"},
		"CONNECT":                  {"CONNECT example.test:443 HTTP/1.1\r\nHost: example.test:443\r\n\r\n", "40"},
		"folded header":            {"GET " + path + " HTTP/1.1\r\nHost: x\r\nRange: bytes=0-\r\n 5\r\n\r\n", ""},
		"byte zero in the path":    {"GET /fw/\x00 HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		"absolute URI, other host": {"GET https://example.test" + path + " HTTP/1.1\r\nHost: example.test\r\nRange: bytes=0-0\r\n\r\n", "206"},
	} {
		conn := w.dial()
		// The server may stop reading before everything is sent.
		_, _ = io.WriteString(conn, c.send)
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: no answer: %v", name, err)
			continue
		}
		if err == nil && !strings.Contains(line, " "+c.want) {
			t.Errorf("%s: %q", name, line)
		}
	}
	if res, _ := w.do(w.client(w.cert), "GET", w.path()); res.StatusCode != 200 {
		t.Errorf("afterwards: %s", res.Status)
	}
}

// curl, an HTTP client that nobody here wrote, plays resuming and old clients. Where it is missing, the other tests stand
// alone.
func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Log("no curl on this machine")
		return
	}
	w := start(t, nil)
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(w.cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	block := func(kind string, ders ...[]byte) (out []byte) {
		for _, der := range ders {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		return out
	}
	ca := write("ca.pem", block("CERTIFICATE", w.ca.root.Raw))
	cert := write("cert.pem", block("CERTIFICATE", w.cert.Certificate...))
	keyFile := write("key.pem", block("PRIVATE KEY", key))
	run := func(args ...string) (string, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, curl, append([]string{"--silent", "--show-error", "--cacert", ca, "--max-time", "20"}, args...)...).CombinedOutput()
		return string(out), err
	}
	mtls := func(args ...string) string {
		t.Helper()
		out, err := run(append([]string{"--cert", cert, "--key", keyFile}, args...)...)
		if err != nil {
			t.Fatalf("curl %q: %v: %s", args, err, out)
		}
		return out
	}
	file := filepath.Join(dir, "image")
	whole := func(what string) {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(b, w.image) {
			t.Errorf("%s: %d bytes, %v", what, len(b), err)
		}
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--http1.0"}, "200 1"}, // so curl writes 1.0
		{[]string{"--http1.1"}, "200 1.1"},
		{[]string{"--http2"}, "200 1.1"},
		{[]string{"--tls-max", "1.2"}, "200 1.1"},
	} {
		out := mtls(append(c.args, "--fail", "-o", file, "-w", "%{http_code} %{http_version}", w.path())...)
		if out != c.want {
			t.Errorf("%q: %s", c.args, out)
		}
		whole(c.args[0])
	}
	write("image", w.image[:100_000])
	if out := mtls("--fail", "-C", "-", "-o", file, "-w", "%{http_code}", w.path()); out != "206" {
		t.Errorf("resume: %s", out)
	}
	whole("resume")
	if out := mtls("-r", "10-19", w.path()); out != string(w.image[10:20]) {
		t.Errorf("range: %d bytes", len(out))
	}
	if out := mtls("--head", w.path()); !strings.Contains(out, "Content-Length: 300000\r\n") || !strings.Contains(out, "x-MD5: ") || !strings.Contains(out, "Accept-Ranges: bytes\r\n") {
		t.Errorf("head: %s", out)
	}
	if out := mtls("--compressed", "--head", w.path()); strings.Contains(out, "Content-Encoding") {
		t.Errorf("compressed: %s", out)
	}
	if out, err := run("-o", file, w.path()); err == nil {
		t.Errorf("without a certificate: %s", out)
	}
	recovery := "https://" + w.recovery + w.rel.Path()
	for user, want := range map[string]string{"d1:" + secret: "200", "d1:wrong": "401"} {
		config := write("auth", []byte("user = \""+user+"\"\n")) // not on the command line, where others could read it
		if out, err := run("-K", config, "-o", file, "-w", "%{http_code}", recovery); err != nil || out != want {
			t.Errorf("recovery: %s, want %s: %v", out, want, err)
		}
	}
}
