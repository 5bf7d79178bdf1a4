package devapi

import (
	"container/list"
	"strconv"
	"sync"

	"golang.org/x/sync/singleflight"

	"muster/internal/fleet"
)

// cache keeps whole images in memory, up to a number of bytes, the least recently used going first. A rollout serves one
// or two images thousands of times.
type cache struct {
	max  int64 // bytes
	load singleflight.Group

	mu    sync.Mutex
	used  int64                        // bytes; guarded by mu
	items map[fleet.Hash]*list.Element // of cached; guarded by mu
	order *list.List                   // most recently used first; guarded by mu
}

type cached struct {
	hash  fleet.Hash
	bytes []byte
}

func newCache(max int64) *cache {
	return &cache{max: max, items: map[fleet.Hash]*list.Element{}, order: list.New()}
}

// get returns the image, loading it once however many ask at the same time. It returns nil for an image that is too
// large to keep: more than half of the cache.
func (c *cache) get(h fleet.Hash, size int64, load func() ([]byte, error)) ([]byte, error) {
	if size > c.max/2 {
		return nil, nil
	}
	if b, ok := c.lookup(h); ok {
		return b, nil
	}
	b, err, _ := c.load.Do(string(h), func() (any, error) {
		if b, ok := c.lookup(h); ok { // somebody was faster
			return b, nil
		}
		b, err := load()
		if err == nil {
			c.keep(h, b)
		}
		return b, err
	})
	if err != nil {
		return nil, err
	}
	return b.([]byte), nil
}

func (c *cache) lookup(h fleet.Hash) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.items[h]
	if !ok {
		return nil, false
	}
	c.order.MoveToFront(e)
	return e.Value.(cached).bytes, true
}

func (c *cache) keep(h fleet.Hash, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.items[h] = c.order.PushFront(cached{h, b})
	c.used += int64(len(b))
	for c.used > c.max {
		last := c.order.Back()
		old := c.order.Remove(last).(cached)
		delete(c.items, old.hash)
		c.used -= int64(len(old.bytes))
	}
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
