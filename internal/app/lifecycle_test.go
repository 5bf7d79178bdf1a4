package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestStopRunsTheCleanupsBackwardsAndOnce(t *testing.T) {
	l := &lifecycle{log: slog.New(slog.DiscardHandler)}
	var order []string
	for _, name := range []string{"store", "listener", "consumer"} {
		l.onStop(name, func(context.Context) error {
			order = append(order, name)
			if name == "listener" {
				return errors.New("stuck")
			}
			return nil
		})
	}
	if err := l.stop(t.Context()); err == nil || !strings.Contains(err.Error(), "listener: stuck") {
		t.Errorf("got %v", err)
	}
	if err := l.stop(t.Context()); err != nil {
		t.Error(err)
	}
	if fmt.Sprint(order) != "[consumer listener store]" {
		t.Errorf("order %v", order)
	}
}

// A part that panics comes back; while it is down, its health says so.
func TestATaskThatPanicsIsStartedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lifecycle{log: slog.New(slog.DiscardHandler)}
		runs := 0
		var health []error
		l.task("pump", func(ctx context.Context) error {
			if runs++; runs < 3 {
				panic("boom")
			}
			<-ctx.Done()
			return nil
		}, func(err error) { health = append(health, err) })
		time.Sleep(time.Minute)
		if err := l.stop(t.Context()); err != nil {
			t.Error(err)
		}
		if runs != 3 || len(health) != 4 || health[0] == nil || health[3] != nil {
			t.Errorf("%d runs, health %v", runs, health)
		}
	})
}

func TestATaskThatDoesNotEndIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lifecycle{log: slog.New(slog.DiscardHandler)}
		release := make(chan struct{})
		l.task("stubborn", func(context.Context) error { <-release; return nil }, func(error) {})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.stop(ctx); err == nil || !strings.Contains(err.Error(), "stubborn") {
			t.Errorf("got %v", err)
		}
		close(release)
	})
}
