package bolt

import (
	"muster/internal/firmware"
	"muster/internal/fleet"
)

func releaseKey(p fleet.ProductID, v firmware.Version) []byte { return join(text(p), []byte(v)) }

// Release returns that release, or a NotFound error.
func (tx *Tx) Release(p fleet.ProductID, v firmware.Version) (firmware.Release, error) {
	return must[firmware.Release](tx, bucketReleases, releaseKey(p, v), "release")
}

// PutRelease stores r. The image of a product and version never changes: another one is a Conflict.
func (tx *Tx) PutRelease(r firmware.Release) error {
	key := releaseKey(r.Product, r.Version)
	old, ok, err := get[firmware.Release](tx, bucketReleases, key)
	if err != nil {
		return err
	}
	if ok && old.SHA256 != r.SHA256 {
		return fleet.Coded(fleet.Conflict, "release_exists", "%s %s exists with another image: give this one another version", r.Product, r.Version)
	}
	return put(tx, bucketReleases, key, r)
}

// Releases returns the releases of a product, of all products if p is empty, in key order.
func (tx *Tx) Releases(p fleet.ProductID) ([]firmware.Release, error) {
	var prefix []byte
	if p != "" {
		prefix = text(p)
	}
	return all[firmware.Release](tx, bucketReleases, prefix)
}

// Key returns the signing key with that id, or a NotFound error.
func (tx *Tx) Key(id string) (firmware.Key, error) {
	return must[firmware.Key](tx, bucketKeys, []byte(id), "signing key")
}

// PutKey stores k.
func (tx *Tx) PutKey(k firmware.Key) error { return put(tx, bucketKeys, []byte(k.ID), k) }

// Keys returns all signing keys, revoked ones included, in id order.
func (tx *Tx) Keys() ([]firmware.Key, error) { return all[firmware.Key](tx, bucketKeys, nil) }

func bootKey(p fleet.ProductID, digest fleet.Hash) []byte { return join(text(p), []byte(digest)) }

// SecureBootKey returns that Secure Boot key of a product, or a NotFound error.
func (tx *Tx) SecureBootKey(p fleet.ProductID, digest fleet.Hash) (firmware.SecureBootKey, error) {
	return must[firmware.SecureBootKey](tx, bucketBootKeys, bootKey(p, digest), "Secure Boot key")
}

// PutSecureBootKey stores k.
func (tx *Tx) PutSecureBootKey(k firmware.SecureBootKey) error {
	return put(tx, bucketBootKeys, bootKey(k.Product, k.Digest), k)
}

// SecureBootKeys returns the Secure Boot keys of a product, of all products if p is empty, revoked ones included, in key
// order.
func (tx *Tx) SecureBootKeys(p fleet.ProductID) ([]firmware.SecureBootKey, error) {
	var prefix []byte
	if p != "" {
		prefix = text(p)
	}
	return all[firmware.SecureBootKey](tx, bucketBootKeys, prefix)
}

// OTASlot returns how large the OTA slots of a product are; false if nobody said.
func (tx *Tx) OTASlot(p fleet.ProductID) (firmware.OTASlot, bool, error) {
	return get[firmware.OTASlot](tx, bucketOTASlots, []byte(p))
}

// OTASlots returns those of all products, in their order.
func (tx *Tx) OTASlots() ([]firmware.OTASlot, error) {
	return all[firmware.OTASlot](tx, bucketOTASlots, nil)
}

// PutOTASlot stores s.
func (tx *Tx) PutOTASlot(s firmware.OTASlot) error {
	return put(tx, bucketOTASlots, []byte(s.Product), s)
}

// DropOTASlot forgets that of a product.
func (tx *Tx) DropOTASlot(p fleet.ProductID) error {
	return tx.b.Bucket(bucketOTASlots).Delete([]byte(p))
}
