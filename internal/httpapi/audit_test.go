package httpapi_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"muster/api"
	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/store/bolt"
)

// What an auditor takes away proves itself with the public key, and no page of it is lost.
func TestTheTrailIsExported(t *testing.T) {
	w := open(t)
	w.now = time.Now()
	w.update(func(tx *bolt.Tx) error {
		for i := range 1200 { // more than two pages
			if err := tx.Audit(access.Entry{At: w.now, Who: "alice", What: "test", On: fmt.Sprint(i)}); err != nil {
				return err
			}
		}
		return nil
	})
	var made api.Checkpoint
	w.want(w.send(access.Viewer, "POST", "/audit/checkpoints", nil), 403, "role_too_low")
	w.want(w.send(access.Operator, "POST", "/audit/checkpoints", nil), 201, "").decode(t, &made)
	var keys api.AuditKeyList
	w.want(w.send(access.Viewer, "GET", "/audit/keys", nil), 200, "").decode(t, &keys)
	if len(keys.Items) != 1 || keys.Items[0].ID != made.KeyID {
		t.Fatalf("keys %+v, signed by %s", keys, made.KeyID)
	}
	ring, err := audit.ParseKeyring([]byte(keys.Items[0].PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	res := w.want(w.send(access.Viewer, "GET", "/audit/export", nil), 200, "")
	if got := res.Header.Get("Content-Type"); got != "application/x-ndjson" {
		t.Errorf("type %s", got)
	}
	v, err := audit.VerifyExport(bytes.NewReader(res.body), ring, nil)
	if err != nil || v.First != 1 || v.Last < 1200 || v.SignedTo != made.Seq || v.SignedTo != v.Last || v.Newest != made.Signed {
		t.Errorf("%+v, %v", v, err)
	}
	part := w.want(w.send(access.Viewer, "GET", "/audit/export?after=700", nil), 200, "")
	if v, err := audit.VerifyExport(bytes.NewReader(part.body), ring, nil); err != nil || v.First != 701 || v.SignedTo != made.Seq {
		t.Errorf("a part: %+v, %v", v, err)
	}
	for _, c := range []struct {
		query, code string
		status      int
	}{
		{"after=100000", "not_found", 404}, {"after=-1", "query_invalid", 400}, {"since=yesterday", "query_invalid", 400},
		{"since=2030-01-02T00:00:00Z&until=2030-01-01T00:00:00Z", "range_invalid", 400}, {"from=1", "query_unknown", 400},
	} {
		w.want(w.send(access.Viewer, "GET", "/audit/export?"+c.query, nil), c.status, c.code)
	}

	var list api.CheckpointList
	w.want(w.send(access.Operator, "POST", "/audit/checkpoints", nil), 201, "")
	w.want(w.send(access.Viewer, "GET", "/audit/checkpoints?limit=1", nil), 200, "").decode(t, &list)
	if len(list.Items) != 1 || list.Items[0] != made || list.NextCursor == "" {
		t.Fatalf("%+v", list)
	}
	w.want(w.send(access.Viewer, "GET", "/audit/checkpoints?limit=1&cursor="+list.NextCursor, nil), 200, "").decode(t, &list)
	if len(list.Items) != 1 || list.Items[0].Seq <= made.Seq || list.NextCursor != "" {
		t.Errorf("%+v", list)
	}
}

// The log of musterd is a witness: each checkpoint stands in it, as it is signed.
func TestCheckpointsAreLogged(t *testing.T) {
	w := open(t)
	var made api.Checkpoint
	w.want(w.send(access.Operator, "POST", "/audit/checkpoints", nil), 201, "").decode(t, &made)
	if !strings.Contains(w.Log.String(), made.Signed) {
		t.Error("the log does not have it")
	}
}
