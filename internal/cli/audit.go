package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/audit"
	"muster/internal/client"
)

// Exit codes of audit verify, for cron.
const (
	auditBroken = 1 // the trail is not what was recorded
	auditUnsure = 2 // it could not be judged
)

func (a *app) auditCmd() *cobra.Command {
	var limit int
	c := &cobra.Command{Use: "audit", Short: "show who did what, newest first; verify and export it", Args: cobra.NoArgs}
	c.Flags().IntVar(&limit, "limit", 50, "at most this many lines; 0: all")
	c.AddCommand(a.auditVerify(), a.auditExport(), a.auditCheckpoint(), a.auditKeys())
	return a.online(c, func(ctx context.Context, _ []string) error {
		es, err := take(limit, func(cursor string) ([]api.AuditEntry, string, error) {
			p := api.ListAuditParams{Limit: 500, Cursor: cursor}
			if limit > 0 && limit < 500 {
				p.Limit = limit
			}
			l, err := client.Read[api.AuditList](a.client.ListAudit(ctx, &p))
			return l.Items, l.NextCursor, err
		})
		if err != nil {
			return err
		}
		return a.ui.show(es, func() {
			t := a.ui.table("WHEN", "WHO", "WHAT", "ON", "DETAILS")
			for _, e := range es {
				t.row(text(e.At), e.Who, e.What, e.On, e.Details)
			}
			t.print()
		})
	})
}

// maxKeys is more than a file of public keys takes, in bytes.
const maxKeys = 64 << 10

func entries(n uint64) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

// pins are what an auditor holds against a trail.
type pins struct {
	key, checkpoint, keep string // files
	onlyNew               bool   // look only at what came after the checkpoint

	ring    audit.Keyring     // nil: no key
	witness *audit.Checkpoint // nil: none kept
}

func (a *app) load(p *pins) (err error) {
	if p.key != "" {
		text, err := a.readInput(p.key, maxKeys)
		if err != nil {
			return err
		}
		if p.ring, err = audit.ParseKeyring(text); err != nil {
			return fmt.Errorf("%s: %w", p.key, err)
		}
	}
	file := cmp.Or(p.checkpoint, p.keep)
	if file == "" {
		return nil
	}
	text, err := a.readInput(file, audit.MaxCheckpoint+2)
	if errors.Is(err, fs.ErrNotExist) && p.keep != "" {
		return nil // the first time
	}
	if err != nil {
		return err
	}
	c, err := audit.OpenCheckpoint(strings.TrimSpace(string(text)), p.ring)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	p.witness = &c
	return nil
}

// keepNewest writes the newest good checkpoint of a trail to the file of --keep, unless an even newer one is kept there.
func (p *pins) keepNewest(v audit.Verdict) error {
	if p.keep == "" || v.Newest == "" {
		return nil
	}
	c, err := audit.OpenCheckpoint(v.Newest, nil)
	if err != nil || p.witness != nil && c.Seq <= p.witness.Seq {
		return err
	}
	return replaceFile(p.keep, []byte(v.Newest+"\n"), 0o644)
}

// finding is what audit verify says with --output json.
type finding struct {
	Result string      `json:"result"` // intact, broken or unsure
	Entry  uint64      `json:"entry,omitempty"`
	Fault  audit.Fault `json:"fault,omitempty"`
	Why    string      `json:"why,omitempty"`
	audit.Verdict
}

func find(v audit.Verdict, err error) finding {
	if b, ok := errors.AsType[*audit.Broken](err); ok {
		return finding{Result: "broken", Entry: b.Seq, Fault: b.Fault, Why: b.Msg, Verdict: v}
	}
	if err != nil {
		return finding{Result: "unsure", Why: err.Error(), Verdict: v}
	}
	return finding{Result: "intact", Verdict: v}
}

func (a *app) auditVerify() *cobra.Command {
	var p pins
	c := &cobra.Command{
		Use: "verify [FILE]", Short: "say whether the audit trail is what was recorded", Args: cobra.MaximumNArgs(1),
		Long: `Follows the chain of hashes of the whole trail and checks its signed checkpoints: in FILE, which muster audit export wrote
(- for standard input), or else in musterd, as it is now.

Whoever controls musterd's machine can make another trail with another key. So hold against it what you keep elsewhere:
the public key (muster audit keys --out), and a checkpoint. With --keep the newest checkpoint that was found good is
written to a file, and held against the trail the next time: an end that was cut off, or a past that was rewritten, shows.

Exit codes:
  0    intact
  1    broken; the first entry of which that can be said is named
  2    it could not be judged: the export is cut short, or musterd cannot be reached`,
		Example: "  muster audit verify --key audit.pub.pem --keep last.checkpoint\n  muster audit verify trail.ndjson --key audit.pub.pem --checkpoint january.checkpoint",
	}
	f := c.Flags()
	f.StringVar(&p.key, "key", "", "file with the public keys to believe, PEM; without it, those that the trail names itself")
	f.StringVar(&p.checkpoint, "checkpoint", "", "file with a checkpoint that you kept: the trail must contain what it vouches for")
	f.StringVar(&p.keep, "keep", "", "the same, if the file exists; then write the newest good checkpoint to it")
	f.BoolVar(&p.onlyNew, "new", false, "look only at what came after that checkpoint: often, and now and then at all of it")
	c.MarkFlagsMutuallyExclusive("checkpoint", "keep")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if p.onlyNew && (p.checkpoint == "" && p.keep == "" || len(args) > 0) {
			return usagef("--new looks at what musterd wrote after a checkpoint: give --keep or --checkpoint, and no file")
		}
		v, err := a.verify(cmd.Context(), args, &p)
		if err == nil {
			err = p.keepNewest(v)
		}
		found := find(v, err)
		if a.ui.json {
			if err := a.ui.show(found, func() {}); err != nil {
				return err
			}
		}
		if err != nil {
			_, hints := judge(err, cmd)
			code := auditUnsure
			if found.Result == "broken" {
				code = auditBroken
			}
			if p.witness != nil && found.Result == "broken" {
				hints = append(hints, "a restored backup ends where it was made: muster audit then shows store.restore, and the store before was kept beside it")
			}
			a.ui.fail(err, hints)
			return &ending{err: err, code: code, quiet: true}
		}
		if !a.ui.json {
			a.printVerdict(v)
		}
		return nil
	}
	return c
}

// verify checks the trail in a file, or that of musterd.
func (a *app) verify(ctx context.Context, args []string, p *pins) (audit.Verdict, error) {
	if err := a.load(p); err != nil {
		return audit.Verdict{}, err
	}
	if len(args) == 0 {
		if err := a.connect(); err != nil {
			return audit.Verdict{}, err
		}
		var params api.ExportAuditParams
		if p.onlyNew && p.witness != nil {
			params.After = p.witness.Seq
		}
		res, err := a.client.ExportAudit(ctx, &params)
		if e, ok := errors.AsType[*client.Error](err); ok && e.Status == http.StatusNotFound && params.After > 0 {
			return audit.Verdict{}, audit.Break(params.After, audit.Missing, "%s missing: your checkpoint vouches for it", audit.Span(params.After, params.After))
		}
		if err != nil {
			return audit.Verdict{}, err
		}
		defer res.Body.Close()
		return audit.VerifyExport(res.Body, p.ring, p.witness)
	}
	in := a.env.Stdin
	if args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return audit.Verdict{}, err
		}
		defer f.Close()
		in = f
	}
	return audit.VerifyExport(in, p.ring, p.witness)
}

func (a *app) printVerdict(v audit.Verdict) {
	if v.First > v.Last {
		a.ui.printf("intact: nothing came after entry %d\n", v.Last)
	} else {
		a.ui.printf("intact: entries %d to %d\n", v.First, v.Last)
	}
	signed := fmt.Sprintf("up to entry %d, at %s", v.SignedTo, text(v.SignedAt))
	if v.SignedTo < v.Last {
		signed += fmt.Sprintf("; not yet: %s since %s", entries(v.Last-v.SignedTo), text(v.UnsignedAt))
	}
	kept := ""
	if v.WitnessedTo > 0 {
		kept = fmt.Sprintf("your checkpoint of entry %d is part of it", v.WitnessedTo)
	}
	keys := strings.Join(v.Keys, ", ")
	a.ui.facts("trail", v.Origin, "last hash", v.Hash, "checkpoints", fmt.Sprint(v.Checkpoints), "signed", signed, "key", keys, "kept", kept)
	if v.Adopted > 0 {
		a.ui.printf("entries 1 to %d are older than the chain: they are linked as they were found at %s\n", v.Adopted, text(v.ChainedAt))
	}
	switch {
	case v.Pinned:
	case v.WitnessedTo > 0:
		a.ui.note("what came after your checkpoint was checked with the key that the trail names itself: pin it with --key")
	default:
		a.ui.note("checked with the key that the trail names itself, which whoever made the trail anew would have exchanged: pin it with --key, or keep a checkpoint with --keep")
	}
}

func (a *app) auditExport() *cobra.Command {
	var out, since, until string
	var params api.ExportAuditParams
	c := &cobra.Command{
		Use: "export --out FILE", Short: "write the audit trail with its checkpoints to a file that proves itself", Args: cobra.NoArgs,
		Long: `Writes the trail as lines of JSON: its entries with their hashes, the signed checkpoints, and the public keys. The chain is
checked on the way. muster audit verify FILE does so at any time, on any machine. A part is vouched for by the checkpoint after it.`,
		Example: "  muster audit export --out trail.ndjson\n  muster audit export --since 2030-01-01 --until 2030-02-01 --out january.ndjson",
	}
	f := c.Flags()
	f.StringVar(&out, "out", "", "the file, which must not exist; - for standard output")
	f.StringVar(&since, "since", "", "begin with the entries of this time, like 2030-01-31, 2030-01-31T08:00:00Z or 720h (ago)")
	f.StringVar(&until, "until", "", "end with the first checkpoint after this time")
	f.Uint64Var(&params.After, "after", 0, "begin with the entry after this one")
	_ = c.MarkFlagRequired("out")
	return a.online(c, func(ctx context.Context, _ []string) (err error) {
		if params.Since, err = a.moment("since", since); err != nil {
			return err
		}
		if params.Until, err = a.moment("until", until); err != nil {
			return err
		}
		if out != "-" && exists(out) {
			return usagef("%s exists already", out)
		}
		res, err := a.client.ExportAudit(ctx, &params)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if out == "-" {
			_, err := copyTrail(a.env.Stdout, res.Body)
			return a.exported(err)
		}
		v, err := writeTrail(out, res.Body)
		if !v.Whole {
			return cmp.Or(err, errors.New("the export was cut short: try again"))
		}
		if err := a.exported(err); err != nil {
			return err
		}
		return a.ui.show(v, func() {
			a.ui.printf("wrote entries %d to %d and %s to %s\n", v.First, v.Last, many(v.Checkpoints, "checkpoint"), out)
			if v.SignedTo < v.Last {
				a.ui.note("not signed yet: %s; muster audit checkpoint signs", entries(v.Last-v.SignedTo))
			}
		})
	})
}

// exported lets a trail pass whose signatures cannot be judged yet: that is for who verifies.
func (a *app) exported(err error) error {
	if b, ok := errors.AsType[*audit.Broken](err); ok {
		return fmt.Errorf("the trail was exported, and it is broken: %w", b)
	}
	if _, ok := errors.AsType[*audit.Unsure](err); ok {
		return nil
	}
	return err
}

// writeTrail writes a file that appears only if the export has come to its end. A broken trail is written: it is evidence.
func writeTrail(path string, from io.Reader) (v audit.Verdict, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return v, err
	}
	defer os.Remove(f.Name()) // gone already if all went well
	v, err = copyTrail(f, from)
	if kept := errors.Join(f.Sync(), f.Close()); kept != nil || !v.Whole {
		v.Whole = false
		return v, cmp.Or(kept, err)
	}
	if moved := errors.Join(os.Rename(f.Name(), path), syncDir(filepath.Dir(path))); moved != nil {
		return v, moved
	}
	return v, err
}

// copyTrail copies an export to its end, and judges it on the way.
func copyTrail(to io.Writer, from io.Reader) (audit.Verdict, error) {
	w := bufio.NewWriter(to)
	lines := bufio.NewReaderSize(from, audit.MaxExportLine)
	judge := audit.NewVerifier(nil, nil)
	var broken error
	var last []byte
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil && len(line) == 0 && errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return audit.Verdict{}, fmt.Errorf("the export ends within a line: %w", err)
		}
		if _, err := w.Write(line); err != nil {
			return audit.Verdict{}, err
		}
		if broken == nil {
			broken = judge.Line(line[:len(line)-1])
		}
		last = append(last[:0], line...)
	}
	if err := w.Flush(); err != nil {
		return audit.Verdict{}, err
	}
	v, err := judge.Finish()
	if broken != nil {
		v.Whole, err = strings.HasPrefix(string(last), `{"end":`), broken
	}
	return v, err
}

// moment reads a time: a day, a time of RFC 3339, or how long ago.
func (a *app) moment(flag, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if at, err := time.Parse(layout, s); err == nil {
			return at.UTC(), nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return time.Time{}, usagef("--%s: use a day like 2030-01-31, a time like 2030-01-31T08:00:00Z, or how long ago, like 720h", flag)
	}
	return a.ui.now().Add(-d).UTC(), nil
}

func (a *app) auditCheckpoint() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use: "checkpoint", Short: "sign the audit trail as it ends now", Args: cobra.NoArgs,
		Long: `Makes a signed checkpoint that vouches for every entry so far. Keep it where musterd's operators cannot change it; hold it
against the trail later with muster audit verify --checkpoint. musterd makes one every hour in which something was written.`,
	}
	c.Flags().StringVar(&out, "out", "", "write it to this file, too")
	return a.online(c, func(ctx context.Context, _ []string) error {
		p, err := client.Read[api.Checkpoint](a.client.MakeCheckpoint(ctx))
		if err != nil {
			return err
		}
		if out != "" {
			if err := replaceFile(out, []byte(p.Signed+"\n"), 0o644); err != nil {
				return err
			}
		}
		return a.ui.show(p, func() {
			a.ui.facts("entry", fmt.Sprint(p.Seq), "hash", p.Hash, "signed", p.At, "key", p.KeyID, "file", out)
			if out == "" {
				a.ui.printf("%s\n", clean(p.Signed))
			}
		})
	})
}

func (a *app) auditKeys() *cobra.Command {
	var out string
	c := &cobra.Command{Use: "keys", Short: "show the public keys that sign the audit trail, the one in use last", Args: cobra.NoArgs}
	c.Flags().StringVar(&out, "out", "", "write them to this file, PEM, for muster audit verify --key")
	return a.online(c, func(ctx context.Context, _ []string) error {
		l, err := client.Read[api.AuditKeyList](a.client.ListAuditKeys(ctx))
		if err != nil {
			return err
		}
		if out != "" {
			var text strings.Builder
			for _, k := range l.Items {
				text.WriteString(k.PublicKey)
			}
			if err := replaceFile(out, []byte(text.String()), 0o644); err != nil {
				return err
			}
		}
		return a.ui.show(l.Items, func() {
			t := a.ui.table("KEY", "SINCE")
			for _, k := range l.Items {
				t.row(k.ID, text(k.Since))
			}
			t.print()
		})
	})
}
