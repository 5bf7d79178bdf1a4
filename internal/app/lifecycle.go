// Package app puts muster together: New, Start, Addrs and Stop, in one straight piece of wiring, and what init writes.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"
)

// lifecycle is a stack of named cleanups and the tasks that run meanwhile. What was started last is stopped first.
type lifecycle struct {
	log *slog.Logger

	mu       sync.Mutex
	cleanups []cleanup
	stopped  bool

	tasks sync.WaitGroup
}

type cleanup struct {
	name string
	stop func(context.Context) error
}

// onStop registers what Stop is to do. The last one registered runs first.
func (l *lifecycle) onStop(name string, stop func(context.Context) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cleanups = append(l.cleanups, cleanup{name, stop})
}

// task starts run, which must end when its context does. Its cleanup cancels it and waits. Should run fail or panic
// before, it is started again after a pause: one part that fails must not take the others down, and /readyz tells of it.
func (l *lifecycle) task(name string, run func(context.Context) error, report func(error)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	l.tasks.Add(1)
	go func() {
		defer l.tasks.Done()
		defer close(done)
		for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
			began := time.Now()
			err := safely(ctx, run)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				err = errors.New("ended by itself")
			}
			l.log.Error("a part of muster failed and is started again", "part", name, "error", err, "again_in", pause)
			report(fmt.Errorf("%s: %w", name, err))
			if time.Since(began) > time.Minute {
				pause = time.Second
			}
			timer := time.NewTimer(pause)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
				report(nil)
			}
		}
	}()
	l.onStop(name, func(stop context.Context) error {
		cancel()
		select {
		case <-done:
			return nil
		case <-stop.Done():
			return stop.Err()
		}
	})
}

// safely turns a panic into an error, with the stack.
func safely(ctx context.Context, run func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return run(ctx)
}

// stop runs the cleanups, last first, within ctx. It runs them once; later calls do nothing.
func (l *lifecycle) stop(ctx context.Context) error {
	l.mu.Lock()
	if l.stopped {
		l.mu.Unlock()
		return nil
	}
	l.stopped = true
	cleanups := l.cleanups
	l.mu.Unlock()

	var errs []error
	for i := len(cleanups) - 1; i >= 0; i-- {
		if err := cleanups[i].stop(ctx); err != nil {
			l.log.Error("could not be stopped cleanly", "part", cleanups[i].name, "error", err)
			errs = append(errs, fmt.Errorf("%s: %w", cleanups[i].name, err))
		}
	}
	return errors.Join(errs...)
}
