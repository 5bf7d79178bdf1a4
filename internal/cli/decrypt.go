package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"muster/internal/escrow"
	"muster/internal/esp"
	"muster/internal/esp/nvs"
	"muster/internal/fleet"
	"muster/internal/provision"
)

// shownEntry is an NVS entry as it is shown.
type shownEntry struct {
	Namespace string `json:"namespace"`
	Key       string `json:"key"`
	Type      string `json:"type"`
	Value     string `json:"value,omitempty"`
	Hidden    bool   `json:"hidden,omitempty"`
	Bytes     int    `json:"bytes,omitempty"` // of strings and blobs
}

// shownNVS is the outcome of decrypt-nvs.
type shownNVS struct {
	Device    string       `json:"device"`
	Chip      string       `json:"chip"`
	MadeAt    string       `json:"made_at"`
	Partition string       `json:"partition"`
	Offset    string       `json:"offset"`
	Keys      string       `json:"keys,omitempty"`
	Entries   []shownEntry `json:"entries"`
	Findings  esp.Findings `json:"findings,omitempty"`
}

func (a *app) deviceDecryptNVS() *cobra.Command {
	var record, identity, partition string
	var secrets bool
	c := &cobra.Command{
		Use: "decrypt-nvs DUMP --escrow FILE --identity FILE", Short: "read what a returned device has stored (offline)", Args: cobra.ExactArgs(1),
		Long: `Reads the NVS partition of a device that was made by muster provision with an escrow. DUMP is the device's flash from its start, or that
partition alone, as esptool reads it. --escrow is the device's file in the escrow folder, or the folder, in which every record is tried that the
identity opens. Values that may be secret are hidden unless --show-secrets is given. Nothing leaves this machine.`,
		Example: "  esptool read-flash 0 ALL flash.bin\n  muster device decrypt-nvs flash.bin --escrow factory/escrow/lamp-0001.age --identity operator.txt",
	}
	f := c.Flags()
	f.StringVar(&record, "escrow", "", "the device's sealed record, or the folder that holds it")
	f.StringVar(&identity, "identity", "", "file with the age identity that opens it, or - for standard input")
	f.StringVar(&partition, "partition", "", "another NVS partition than the one that the factory filled")
	f.BoolVar(&secrets, "show-secrets", false, "show keys and passwords, too")
	_ = c.MarkFlagRequired("escrow")
	_ = c.MarkFlagRequired("identity")
	c.RunE = func(_ *cobra.Command, args []string) error {
		raw, err := a.readInput(identity, 64<<10)
		if err != nil {
			return err
		}
		ids, err := escrow.ParseIdentities(raw)
		if err != nil {
			return err
		}
		dump, err := a.readInput(args[0], provision.MaxDump)
		if err != nil {
			return err
		}
		rec, opened, err := openDump(dump, record, partition, ids)
		if err != nil {
			return err
		}
		return a.showNVS(rec, opened, secrets)
	}
	return c
}

// openDump opens a dump by a record, or by the one record of a folder that fits it.
func openDump(dump []byte, path, partition string, ids escrow.Identities) (provision.Record, *provision.Opened, error) {
	info, err := os.Stat(path)
	if err != nil {
		return provision.Record{}, nil, err
	}
	if !info.IsDir() {
		rec, err := readRecord(path, ids)
		if err != nil {
			return rec, nil, err
		}
		opened, err := rec.Open(dump, partition)
		return rec, opened, err
	}
	files, err := filepath.Glob(filepath.Join(path, "*"+escrow.Extension))
	if err != nil {
		return provision.Record{}, nil, err
	}
	for _, file := range files {
		rec, err := readRecord(file, ids)
		if err != nil {
			continue // sealed to others, or damaged: the device's own may be another
		}
		opened, err := rec.Open(dump, partition)
		if err != nil {
			continue
		}
		if id, ok := opened.Find(provision.Namespace, provision.KeyID); ok && id.Text() == string(rec.Device) {
			return rec, opened, nil
		}
	}
	return provision.Record{}, nil, fleet.Errorf(fleet.NotFound, "none of the %d records in %s that this identity opens fits the dump", len(files), path)
}

func readRecord(path string, ids escrow.Identities) (provision.Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return provision.Record{}, err
	}
	defer f.Close()
	return escrow.Open(f, ids)
}

// clip shortens a certificate or a bundle to what a line of a table takes; --output json has it whole.
func clip(s string) string {
	const most = 80
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

func (a *app) showNVS(rec provision.Record, o *provision.Opened, secrets bool) error {
	out := shownNVS{
		Device: string(rec.Device), Chip: rec.Chip, MadeAt: rec.MadeAt.UTC().Format("2006-01-02T15:04:05Z"), Partition: o.Name, Offset: fmt.Sprintf("0x%x", o.Offset), Keys: o.Keys,
		Entries: []shownEntry{}, Findings: o.Findings,
	}
	hidden := 0
	for _, it := range o.Items {
		if it.Type == nvs.Namespace {
			continue
		}
		e := shownEntry{Namespace: it.Namespace, Key: it.Key, Type: string(it.Type), Bytes: len(it.Data)}
		if e.Value, e.Hidden = provision.Value(it.Entry, secrets); e.Hidden {
			e.Value = ""
			hidden++
		}
		out.Entries = append(out.Entries, e)
	}
	return a.ui.show(out, func() {
		u := a.ui
		u.facts("device", out.Device, "chip", out.Chip, "made", out.MadeAt, "partition", out.Partition+" at "+out.Offset, "keys", out.Keys)
		u.printf("\n")
		t := u.table("NAMESPACE", "KEY", "TYPE", "VALUE")
		for _, e := range out.Entries {
			value := clip(strings.ReplaceAll(strings.TrimSpace(e.Value), "\n", " "))
			if e.Hidden {
				value = fmt.Sprintf("(hidden, %d bytes)", e.Bytes)
			}
			t.row(e.Namespace, e.Key, e.Type, value)
		}
		t.print()
		for _, f := range out.Findings {
			u.note("%s", clean(f.String()))
		}
		if hidden > 0 {
			u.note("%d values are hidden; --show-secrets shows them", hidden)
		}
	})
}
