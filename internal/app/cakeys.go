package app

import (
	"context"
	"time"
)

// keyCheck is how often the keys of the CA have to sign something that is thrown away.
const keyCheck = 30 * time.Second

// runKeyCheck looks after the keys of the CA: one in a key manager may stop to answer, and /readyz should say so before a
// device has to wait.
func (a *App) runKeyCheck(ctx context.Context) error {
	ticker := time.NewTicker(keyCheck)
	defer ticker.Stop()
	failing := false
	for {
		err := a.cas.check()
		a.health.Set("ca-keys", err)
		switch {
		case err != nil && !failing:
			a.log.Error("a key of the CA does not sign", "error", err)
		case err == nil && failing:
			a.log.Info("the keys of the CA sign again")
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}
