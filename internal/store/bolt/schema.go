package bolt

import (
	"encoding/binary"
	"fmt"
	"time"

	bbolt "go.etcd.io/bbolt"

	"muster/internal/pki"
)

// Buckets hold records (JSON, keyed by id) or indexes (keys only, derived from the records; Check holds them to that).
// The comment gives the key; · joins parts, with a zero byte after a text of variable length; be64 is big-endian.
var (
	bucketMeta = []byte("meta")

	bucketDevices = []byte("devices") // device
	bucketStatus  = []byte("status")  // device
	bucketOnline  = []byte("online")  // device, of those with a session in vhost devices

	bucketCerts         = []byte("certs")           // serial
	bucketCertsByDevice = []byte("certs-by-device") // device · be64 intended-at · serial
	bucketCertsByKey    = []byte("certs-by-key")    // key hash · serial
	bucketCertsByEnd    = []byte("certs-by-end")    // be64 not-after · serial, of issued, active and superseded ones
	bucketCertsIntended = []byte("certs-intended")  // be64 intended-at · serial
	bucketCertsReplaced = []byte("certs-replaced")  // be64 superseded-at · serial, of superseded ones
	bucketCertsDue      = []byte("certs-due")       // be64 moment of renewal · serial, of issued and active ones
	bucketCertsRevoked  = []byte("certs-revoked")   // be64 not-after · serial, of revoked ones
	bucketLists         = []byte("crls")            // issuer

	bucketMassRevocations = []byte("mass-revocations") // issuer

	bucketRequests   = []byte("requests")     // id
	bucketClosings   = []byte("closings")     // broker user
	bucketTrust      = []byte("trust")        // be64 version of a trust bundle
	bucketRotations  = []byte("rotations")    // be64 number of the generation that a rotation of the CAs brings
	bucketEnrolments = []byte("enrolments")   // device
	bucketBlocked    = []byte("blocked-keys") // key hash

	bucketReleases = []byte("releases")  // product · version
	bucketKeys     = []byte("keys")      // key id
	bucketBootKeys = []byte("boot-keys") // product · digest
	bucketOTASlots = []byte("ota-slots") // product
	bucketRepairs  = []byte("repairs")   // device, of those that get a release over the fallback

	bucketRollouts    = []byte("rollouts")      // rollout
	bucketJobs        = []byte("jobs")          // rollout · device
	bucketLive        = []byte("rollouts-live") // rollout, of those that the engine drives or that a device may join
	bucketSites       = []byte("rollout-sites") // rollout · site: counts of its targets
	bucketJobsPending = []byte("jobs-pending")  // rollout · ring byte · be64 rank · device
	bucketJobsOpen    = []byte("jobs-open")     // device · rollout, of those pending or waiting
	bucketJobsReady   = []byte("jobs-ready")    // rollout · p · ring byte · be64 rank · device, or rollout · w · be64 retry-at · device; of open ones that are online
	bucketJobsDue     = []byte("jobs-due")      // rollout · be64 deadline · device, of those in flight or waiting
	bucketJobsActive  = []byte("jobs-active")   // device → rollout, of those in flight
	bucketJobsLatest  = []byte("jobs-latest")   // device → rollout of its newest grant
	bucketDecisions   = []byte("decisions")     // rollout · be64 number
	bucketJoins       = []byte("joins")         // device, of those that may have come into the target of a running rollout
	bucketPenalties   = []byte("penalties")     // device

	bucketOutbox     = []byte("outbox")     // be64 number
	bucketQuarantine = []byte("quarantine") // be64 number
	bucketAudit      = []byte("audit")      // be64 number

	bucketCheckpoints = []byte("audit-checkpoints") // be64 number of an audit line
	bucketAuditKeys   = []byte("audit-keys")        // be64 number

	bucketTokens      = []byte("tokens")        // name
	bucketTokensBySHA = []byte("tokens-by-sha") // sha256 → name
)

var allBuckets = [][]byte{
	bucketMeta, bucketDevices, bucketStatus, bucketOnline,
	bucketCerts, bucketCertsByDevice, bucketCertsByKey, bucketCertsByEnd, bucketCertsIntended, bucketCertsReplaced, bucketCertsDue, bucketCertsRevoked, bucketLists, bucketMassRevocations, bucketRequests, bucketClosings, bucketTrust, bucketRotations, bucketEnrolments, bucketBlocked,
	bucketReleases, bucketKeys, bucketBootKeys, bucketOTASlots, bucketRepairs,
	bucketRollouts, bucketLive, bucketSites, bucketJobs, bucketJobsPending, bucketJobsOpen, bucketJobsReady, bucketJobsDue, bucketJobsActive, bucketJobsLatest,
	bucketDecisions, bucketJoins, bucketPenalties,
	bucketOutbox, bucketQuarantine, bucketAudit, bucketCheckpoints, bucketAuditKeys, bucketTokens, bucketTokensBySHA,
}

// SchemaVersion is the version of the records that this program writes.
const SchemaVersion = 3

var keySchema = []byte("schema")

// migrations[i] brings a store from version i+1 to i+2.
var migrations = []func(*bbolt.Tx) error{toSchema2, toSchema3}

// migrate creates what a new store needs and upgrades an old one, all in one transaction. A store of a newer muster is
// refused: going back needs the backup made before the upgrade.
func migrate(b *bbolt.Tx) error {
	noneDue, noneRevoked := b.Bucket(bucketCertsDue) == nil, b.Bucket(bucketCertsRevoked) == nil
	for _, name := range allBuckets {
		if _, err := b.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	meta := b.Bucket(bucketMeta)
	have := uint64(SchemaVersion)
	if v := meta.Get(keySchema); len(v) == 8 {
		have = binary.BigEndian.Uint64(v)
	} else if v != nil {
		return fmt.Errorf("schema version is unreadable: restore from a backup")
	} else if _, _, err := beginTrail(b, time.Now()); err != nil {
		return err
	}
	if have > SchemaVersion {
		return fmt.Errorf("written by a newer muster (schema %d, this one knows %d): run that version, or restore the backup made before the upgrade", have, SchemaVersion)
	}
	for ; have < SchemaVersion; have++ {
		if err := migrations[have-1](b); err != nil {
			return fmt.Errorf("migration from schema %d: %w", have, err)
		}
	}
	if noneDue {
		if err := fillCertsDue(b); err != nil {
			return fmt.Errorf("index of renewals: %w", err)
		}
	}
	if noneRevoked {
		if err := fillCertsRevoked(b); err != nil {
			return fmt.Errorf("index of revoked certificates: %w", err)
		}
	}
	return meta.Put(keySchema, be64(have))
}

// fillCertsDue makes the index of renewals of a store that was written before there was one.
func fillCertsDue(b *bbolt.Tx) error {
	tx := &Tx{b: b}
	return each(tx, bucketCerts, nil, func(_ []byte, c pki.Certificate) (bool, error) {
		return true, tx.reindex(bucketCertsDue, nil, certIndex(c)[certDue], []byte(c.Serial))
	})
}
