package devapi

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/labstack/echo/v4"
)

// Whatever a Range header says, the answer is whole (200), one range with the right bytes and length (206), or 416; never
// multipart, never an empty 206.
func FuzzRange(f *testing.F) {
	for _, s := range []string{"", "bytes=0-", "bytes=-0", "bytes=-1", "bytes=5-2", "bytes=0-1,3-4", "bytes= 1-2", "lines=1-2", "bytes=0-9999999999999999999", "bytes=\t-\t0", "bytes=-+0", "bytes=,"} {
		f.Add(s)
	}
	image := randomImage(1000)
	e := echo.New()
	f.Fuzz(func(t *testing.T, spec string) {
		for _, content := range []*memory{{bytes.NewReader(image), image}} {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header["Range"] = []string{spec}
			w := httptest.NewRecorder()
			w.Header().Set("Content-Type", "application/octet-stream")
			c := e.NewContext(r, w)
			serve(c, content, int64(len(image)), nil)
			body := w.Body.Bytes()
			switch w.Code {
			case http.StatusOK:
				if !bytes.Equal(body, image) {
					t.Fatalf("%q: 200 with %d bytes", spec, len(body))
				}
			case http.StatusPartialContent:
				span, ok := strings.CutPrefix(w.Header().Get("Content-Range"), "bytes ")
				span, total, _ := strings.Cut(span, "/")
				first, last, _ := strings.Cut(span, "-")
				from, err1 := strconv.Atoi(first)
				to, err2 := strconv.Atoi(last)
				if !ok || err1 != nil || err2 != nil || total != "1000" || from > to || to > 999 || !bytes.Equal(body, image[from:to+1]) ||
					w.Header().Get("Content-Length") != strconv.Itoa(len(body)) {
					t.Fatalf("%q: 206 %q, length %s, %d bytes", spec, w.Header().Get("Content-Range"), w.Header().Get("Content-Length"), len(body))
				}
			case http.StatusRequestedRangeNotSatisfiable:
			default:
				t.Fatalf("%q: %d", spec, w.Code)
			}
			if strings.HasPrefix(w.Header().Get("Content-Type"), "multipart") {
				t.Fatalf("%q: multipart", spec)
			}
		}
	})
}
