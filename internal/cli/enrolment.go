package cli

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"muster/api"
	"muster/internal/client"
)

func (a *app) deviceEnrolPassword() *cobra.Command {
	var life, out string
	var force bool
	c := &cobra.Command{
		Use: "enrol-password ID...", Short: "make a password with which a device gets its first certificate by EST", Args: cobra.MinimumNArgs(1),
		Long: `Makes a password with which a device that has no certificate asks for one by EST (RFC 7030), and prints it, this once. It works
for one key, once, until its time is over; the one that the device had does not work any more. Of several devices, the output
is CSV: device, password, until. With --out it goes to a new file that only you can read.`,
		Example: "  muster device enrol-password sensor-0001 --for 2h\n  muster device enrol-password sensor-0001 sensor-0002 --out passwords.csv",
	}
	c.Flags().StringVar(&life, "for", "24h", "how long it works, 1m to 2160h")
	c.Flags().StringVar(&out, "out", "", "write to this file")
	c.Flags().BoolVar(&force, "force", false, "replace the file")
	return a.online(c, func(ctx context.Context, args []string) error {
		if out != "" && exists(out) && !force {
			return fmt.Errorf("%s exists already: use --force to replace it", out)
		}
		made, failed := a.enrolPasswords(ctx, args, life)
		if len(made) == 0 {
			return failed
		}
		// What was made is shown even if others failed: it would be lost.
		if out != "" {
			if err := replaceFile(out, passwordLines(made), 0o600); err != nil {
				return errors.Join(failed, err)
			}
			return errors.Join(failed, a.ui.show(map[string]any{"file": out, "passwords": len(made)}, func() { a.ui.printf("wrote %d to %s\n", len(made), out) }))
		}
		return errors.Join(failed, a.ui.show(made, func() { a.ui.printf("%s", passwordLines(made)) }))
	})
}

// enrolPasswords makes a password for each device, up to the first failure.
func (a *app) enrolPasswords(ctx context.Context, ids []string, life string) (made []api.EnrolmentPassword, err error) {
	for _, id := range ids {
		p, err := client.Read[api.EnrolmentPassword](a.client.NewEnrolmentPassword(ctx, id, api.EnrolmentPasswordRequest{For: life}))
		if err != nil {
			return made, fmt.Errorf("%s: %w", clean(id), err)
		}
		made = append(made, p)
	}
	return made, nil
}

// passwordLines returns the one password, or CSV of several.
func passwordLines(made []api.EnrolmentPassword) []byte {
	if len(made) == 1 {
		return []byte(clean(made[0].Password) + "\n")
	}
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	rows := [][]string{{"device", "password", "until"}}
	for _, p := range made {
		rows = append(rows, []string{clean(p.Device), clean(p.Password), p.Until.UTC().Format(time.RFC3339)})
	}
	// A buffer takes every write.
	_ = w.WriteAll(rows)
	return b.Bytes()
}
