package client

import (
	"bufio"
	"bytes"
	"strings"
	"testing"
)

func TestEventsAreReadAsTheStandardSays(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want []Event
	}{
		"one":              {"event: rollout\ndata: {}\n\n", []Event{{Name: "rollout", Data: []byte("{}")}}},
		"ids stay":         {"id: 7\ndata: a\n\ndata: b\n\n", []Event{{ID: "7", Data: []byte("a")}, {ID: "7", Data: []byte("b")}}},
		"comments":         {": hello\n\n: still here\n\ndata: a\n\n", []Event{{Data: []byte("a")}}},
		"retry is passed":  {"retry: 2000\n\ndata: a\n\n", []Event{{Data: []byte("a")}}},
		"many lines":       {"data: a\ndata:  b\ndata\n\n", []Event{{Data: []byte("a\n b\n")}}},
		"CR LF":            {"event: e\r\ndata: a\r\n\r\n", []Event{{Name: "e", Data: []byte("a")}}},
		"no data, no one":  {"event: e\n\ndata: a\n\n", []Event{{Data: []byte("a")}}},
		"cut off":          {"data: a\n\ndata: b\n", []Event{{Data: []byte("a")}}},
		"NUL in an id":     {"id: 1\x002\ndata: a\n\n", []Event{{Data: []byte("a")}}},
		"unknown field":    {"colour: red\ndata: a\n\n", []Event{{Data: []byte("a")}}},
		"colon in a value": {"data: a: b\n\n", []Event{{Data: []byte("a: b")}}},
		"nothing":          {"", nil},
	} {
		e := events{r: bufio.NewReader(strings.NewReader(c.in))}
		for i, want := range c.want {
			got, err := e.next()
			if err != nil || got.Name != want.Name || got.ID != want.ID || !bytes.Equal(got.Data, want.Data) {
				t.Errorf("%s: event %d is %+v %v, want %+v", name, i, got, err, want)
			}
		}
		if got, err := e.next(); err == nil {
			t.Errorf("%s: one more, %+v", name, got)
		}
	}
	e := events{r: bufio.NewReader(strings.NewReader("data: " + strings.Repeat("x", maxEvent+1) + "\n\n"))}
	if _, err := e.next(); err != errLongEvent {
		t.Errorf("a long line: %v", err)
	}
	e = events{r: bufio.NewReader(strings.NewReader(strings.Repeat("data: "+strings.Repeat("x", 1<<20)+"\n", 9) + "\n"))}
	if _, err := e.next(); err != errLongEvent {
		t.Errorf("a long event: %v", err)
	}
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte("event: rollout\nid: 1\ndata: {}\n\n: c\n\ndata: a\r\n\r\n"))
	f.Add([]byte("data\n\n\x00\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		e := events{r: bufio.NewReader(bytes.NewReader(in))}
		for n := 0; ; n++ {
			got, err := e.next()
			if err != nil {
				return
			}
			if n > len(in) || strings.ContainsAny(got.Name+got.ID, "\n\x00") && !strings.Contains(got.Name, "\x00") {
				t.Fatalf("%d: %+v", n, got)
			}
		}
	})
}
