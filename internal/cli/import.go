package cli

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"muster/api"
	"muster/internal/client"
)

// importBatch is how many devices are registered in one call.
const importBatch = 1000

// importDevices registers the devices of a CSV file, batch after batch.
func (a *app) importDevices(ctx context.Context, file string, update bool) error {
	in := a.env.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	ds, err := readDevices(in)
	if err != nil {
		return err
	}
	var total api.DeviceImportReport
	m := a.ui.meter("adding devices", int64(len(ds)), func(n int64) string { return fmt.Sprint(n) })
	done := 0
	for batch := range slices.Chunk(ds, importBatch) {
		rep, err := client.Read[api.DeviceImportReport](a.client.ImportDevices(ctx, api.DeviceImport{Devices: batch, Update: update}))
		if err != nil {
			m.end()
			if done > 0 {
				a.ui.note("the first %d devices are registered; the fault is among the next %d; mend the file and add it again", done, len(batch))
			}
			return err
		}
		total.Created += rep.Created
		total.Updated += rep.Updated
		total.Unchanged += rep.Unchanged
		done += len(batch)
		if len(ds) > importBatch {
			m.set(int64(done))
		}
	}
	m.end()
	return a.ui.show(total, func() {
		if update {
			a.ui.printf("added %d, updated %d, unchanged %d\n", total.Created, total.Updated, total.Unchanged)
		} else {
			a.ui.printf("added %d, unchanged %d\n", total.Created, total.Unchanged)
		}
	})
}

// readDevices reads a CSV file (RFC 4180) whose first line names its columns: id, product, hardware, groups, label:KEY.
func readDevices(r io.Reader) ([]api.NewDevice, error) {
	var out []api.NewDevice
	err := readDeviceRows(r, nil, func(d api.NewDevice, _ map[string]string) { out = append(out, d) })
	return out, err
}

// readDeviceRows is readDevices with further columns, those for which extra is true: row gets their values, by column.
func readDeviceRows(r io.Reader, extra func(column string) bool, row func(d api.NewDevice, more map[string]string)) error {
	c := csv.NewReader(r)
	head, err := c.Read()
	if err != nil {
		return usagef("the CSV file has no line that names its columns")
	}
	head[0] = strings.TrimPrefix(head[0], "\ufeff") // spreadsheets begin a file with it
	var needed int
	for _, h := range head {
		switch key, isLabel := strings.CutPrefix(h, "label:"); {
		case h == "id", h == "product":
			needed++
		case h == "hardware", h == "groups", isLabel && key != "":
		case extra != nil && extra(h):
		case extra != nil:
			return usagef("the CSV file has a column that is none of id, product, hardware, groups, label:KEY, mac, wifi_ssid, wifi_password, value:NAME")
		default:
			return usagef("the CSV file has a column that is none of id, product, hardware, groups, label:KEY")
		}
	}
	if needed != 2 || len(slices.Compact(slices.Sorted(slices.Values(head)))) != len(head) {
		return usagef("the CSV file needs the columns id and product, and each column once")
	}
	n := 0
	for {
		fields, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return usagef("the CSV file: %v", err)
		}
		d, more := api.NewDevice{Labels: api.Labels{}}, map[string]string{}
		for i, h := range head {
			switch v := strings.TrimSpace(fields[i]); h {
			case "id":
				d.ID = v
			case "product":
				d.Product = v
			case "hardware":
				d.Hardware = v
			case "groups":
				d.Groups = splitGroups(v)
			default:
				if key, isLabel := strings.CutPrefix(h, "label:"); !isLabel {
					more[h] = fields[i]
				} else if v != "" {
					d.Labels[key] = v
				}
			}
		}
		row(d, more)
		n++
	}
	if n == 0 {
		return usagef("the CSV file holds no device")
	}
	return nil
}

// splitGroups reads a column of groups, which have a ; between them.
func splitGroups(v string) (out []string) {
	for _, g := range strings.Split(v, ";") {
		if g = strings.TrimSpace(g); g != "" {
			out = append(out, g)
		}
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
