package devapi

import (
	"net/http"
	"testing"
)

// The signed manifest is beside the image, on both listeners, for whom the image is.
func TestManifest(t *testing.T) {
	w := start(t, nil)
	w.rel.JWS = "header.payload.signature"
	w.grant("d1", w.rel)
	path := w.rel.Path() + ".jws"
	for name, get := range map[string]func() (*http.Response, []byte){
		"certificate": func() (*http.Response, []byte) {
			return w.do(w.client(w.cert), "GET", "https://"+w.devices+path)
		},
		"password": func() (*http.Response, []byte) {
			return w.do(w.client(), "GET", "https://"+w.recovery+path, "Authorization", basic("d1", secret))
		},
	} {
		res, body := get()
		if res.StatusCode != http.StatusOK || string(body) != w.rel.JWS || res.Header.Get("Content-Type") != "application/jose" || res.ContentLength != int64(len(body)) {
			t.Errorf("%s: %d %q %v", name, res.StatusCode, body, res.Header)
		}
	}
	other := w.client(w.admit("d2", 0xa2))
	for _, p := range []string{path, w.rel.Path() + ".JWS", w.rel.Path() + ".jws.jws", "/fw/.jws"} {
		if res, body := w.do(other, "GET", "https://"+w.devices+p); res.StatusCode != http.StatusNotFound {
			t.Errorf("%s without a grant: %d %s", p, res.StatusCode, body)
		}
	}
	if got := w.downloads(0); len(got) != 0 {
		t.Errorf("a manifest counts as a download: %+v", got)
	}
}
