package httpapi

import (
	"context"
	"crypto/x509"
	"time"

	"muster/internal/access"
	"muster/internal/audit"
	"muster/internal/dispatch"
	"muster/internal/enroll"
	"muster/internal/expiry"
	"muster/internal/firmware"
	"muster/internal/fleet"
	"muster/internal/inventory"
	"muster/internal/ota"
	"muster/internal/pki"
	"muster/internal/rollout"
	"muster/internal/rotation"
	"muster/internal/servercert"
	"muster/internal/trust"
	"muster/internal/uplink"
)

// The ports below are what the API calls. at is the time of the call, by the name of the token that made it. Whoever
// satisfies a method that changes something writes its audit line in the same transaction. Errors are fleet.Errors; what
// is not one is shown as an internal fault.
type (
	// Devices is the registry. It is inventory.Inventory.
	Devices interface {
		// Add brings devices that exist to their description if update is set.
		Add(ctx context.Context, at time.Time, specs []inventory.Spec, update bool, by string) ([]inventory.Added, error)
		Preview(ctx context.Context, f inventory.Filter) (inventory.Preview, error)
		UpdateMany(ctx context.Context, at time.Time, b inventory.Bulk, by string) (inventory.BulkReport, error)
		Get(ctx context.Context, id fleet.DeviceID) (inventory.Row, error)
		List(ctx context.Context, f inventory.Filter, page fleet.Page) (rows []inventory.Row, more bool, err error)
		Update(ctx context.Context, at time.Time, id fleet.DeviceID, c inventory.Change, by string) (fleet.Device, error)
	}

	// Doors opens and closes the doors of a device. Each is idempotent; an unknown device is NotFound. It is
	// enroll.Enroller.
	Doors interface {
		// Disable refuses the device everywhere and closes its connections.
		Disable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (enroll.Evidence, error)
		// Remove revokes the device's certificates, closes its connections and forgets it.
		Remove(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (enroll.Evidence, error)
		Enable(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error
		// NewPassword makes a fallback password that replaces all others of the device.
		NewPassword(ctx context.Context, at time.Time, id fleet.DeviceID, by string) (password string, err error)
		// NewEnrolment makes a password for EST that works once, within life, and replaces the one before.
		NewEnrolment(ctx context.Context, at time.Time, id fleet.DeviceID, life time.Duration, by string) (password string, until time.Time, err error)
	}

	// ServerCertificates are those by which muster and its broker prove themselves. It is servercert.Keeper.
	ServerCertificates interface {
		List(at time.Time) []servercert.State
		// Renew returns NotFound for an unknown name, Conflict for one of another CA.
		Renew(ctx context.Context, at time.Time, name, by string) (servercert.State, error)
	}

	// Expiries lists what ends, the soonest first. What it returns beside an error is what it could find out.
	Expiries interface {
		List(ctx context.Context, at time.Time) ([]expiry.Item, error)
	}

	// Certificates is what lets devices in. It is enroll.Enroller.
	Certificates interface {
		// Issue signs a request (PKCS #10, DER) for a device. The same key gets the same certificate again.
		Issue(ctx context.Context, at time.Time, id fleet.DeviceID, csr []byte, o enroll.IssueOptions) (pki.Certificate, error)
		Certificate(ctx context.Context, s fleet.Serial) (pki.Certificate, error)
		// CertificatesOf returns all of a device, oldest first; NotFound if there is no such device.
		CertificatesOf(ctx context.Context, id fleet.DeviceID) ([]pki.Certificate, error)
		// CertificatesEnding returns up to limit issued, active and superseded ones that end before before, soonest first.
		CertificatesEnding(ctx context.Context, before time.Time, limit int) ([]pki.Certificate, error)
		// Revoke is idempotent. reason is of RFC 5280 §5.3.1.
		Revoke(ctx context.Context, at time.Time, s fleet.Serial, reason int, by string) (enroll.Revocation, error)
		// RevokeIssuer orders to revoke all certificates of an issuer; DrillIssuer tries it. NotFound if it signed none.
		RevokeIssuer(ctx context.Context, at time.Time, id pki.IssuerID, reason int, by string) (pki.MassRevocation, error)
		DrillIssuer(ctx context.Context, at time.Time, id pki.IssuerID, by string) (enroll.Drill, error)
		MassRevocation(ctx context.Context, id pki.IssuerID) (m pki.MassRevocation, closing int, err error)
		RenewPass(ctx context.Context, at time.Time, o enroll.RenewOptions) (enroll.Renewals, error)
		FleetStatus(ctx context.Context, at time.Time) (enroll.FleetStatus, error)
		Forecast(ctx context.Context, at time.Time, o enroll.ForecastOptions) (enroll.FleetForecast, error)
		CertificatePolicy(ctx context.Context) (pki.Policy, error)
		// TryPolicy says what SetPolicy would do, and whether it would refuse.
		TryPolicy(ctx context.Context, at time.Time, t pki.Terms) (i pki.Impact, refused bool, err error)
		SetPolicy(ctx context.Context, at time.Time, t pki.Terms, force bool, by string) (pki.Policy, pki.Impact, error)
		// BlockKey is idempotent and returns the certificates that the key has.
		BlockKey(ctx context.Context, at time.Time, h fleet.Hash, why, by string) (pki.BlockedKey, []pki.Certificate, error)
		UnblockKey(ctx context.Context, at time.Time, h fleet.Hash, by string) error
		BlockedKeys(ctx context.Context) ([]pki.BlockedKey, error)
	}

	// Lists are the revocation lists. It is revocation's use case.
	Lists interface {
		All(ctx context.Context) ([]pki.List, error)
		List(ctx context.Context, id pki.IssuerID) (pki.List, error)
		// SignNow signs a new one and writes who asked for it into the audit trail.
		SignNow(ctx context.Context, at time.Time, id pki.IssuerID, by string) (pki.List, error)
	}

	// TrustBundles is trust's use case.
	TrustBundles interface {
		Current(ctx context.Context) (pki.Published, error)
		Make(ctx context.Context, at time.Time, roots, cross []*x509.Certificate, force bool, by string) (pki.Published, error)
		Publish(ctx context.Context, at time.Time, signed string, force bool, by string) (pki.Published, error)
		Spread(ctx context.Context, limit int) (trust.Spread, error)
	}

	// Rotations replaces CAs. It is rotation.Rotator.
	Rotations interface {
		List(ctx context.Context) ([]pki.Rotation, error)
		Show(ctx context.Context, id int64) (rotation.View, error)
		// Start returns Conflict while another one is under way.
		Start(ctx context.Context, at time.Time, kind pki.RotationKind, keys rotation.Keys, by string) (pki.Rotation, error)
		Requests(ctx context.Context, id int64) ([]rotation.Request, error)
		Certificates(ctx context.Context, id int64) (g rotation.Generation, roots, cross []*x509.Certificate, err error)
		Import(ctx context.Context, at time.Time, id int64, certs []*x509.Certificate, by string) (pki.Rotation, error)
		// Advance returns Conflict while something stands against the step; force takes it all the same.
		Advance(ctx context.Context, at time.Time, id int64, force bool, why, by string) (rotation.View, error)
		Back(ctx context.Context, at time.Time, id int64, why, by string) (rotation.View, error)
		Cancel(ctx context.Context, at time.Time, id int64, why, by string) (rotation.View, error)
	}

	// Recovery holds the certificate requests with a new key. It is recovery's use case.
	Recovery interface {
		// Requests returns all of them, decided ones too, in id order.
		Requests(ctx context.Context) ([]pki.Request, error)
		// Approve and Deny are idempotent; the other decision afterwards is a Conflict.
		Approve(ctx context.Context, at time.Time, id, by string) (pki.Request, error)
		Deny(ctx context.Context, at time.Time, id, by string) (pki.Request, error)
	}

	// Firmware holds releases and the keys that may sign them. It is ota.Catalog.
	Firmware interface {
		// Publish judges the manifest before it reads the image. The same release again returns the stored one, whose
		// UploadedAt is then not at.
		Publish(ctx context.Context, at time.Time, u ota.Upload) (firmware.Release, error)
		Release(ctx context.Context, p fleet.ProductID, v firmware.Version) (firmware.Release, error)
		Releases(ctx context.Context, p fleet.ProductID) ([]firmware.Release, error)
		// SetFloor marks a release as a floor, or takes the mark off.
		SetFloor(ctx context.Context, at time.Time, p fleet.ProductID, v firmware.Version, on bool, why, by string) (firmware.Release, error)
		// SetOTASlot says how large the OTA slots of a product are, in bytes; ClearOTASlot forgets it.
		SetOTASlot(ctx context.Context, at time.Time, p fleet.ProductID, bytes int64, force bool, by string) (firmware.OTASlot, error)
		ClearOTASlot(ctx context.Context, at time.Time, p fleet.ProductID, by string) error
		OTASlots(ctx context.Context) ([]firmware.OTASlot, error)
		// SignForFOTA keeps the signature that esp32FOTA clients get before the image; UnsignForFOTA takes it away.
		SignForFOTA(ctx context.Context, at time.Time, p fleet.ProductID, v firmware.Version, o ota.FOTAOrder) (firmware.Release, error)
		UnsignForFOTA(ctx context.Context, at time.Time, p fleet.ProductID, v firmware.Version, by string) (firmware.Release, error)
		AddKey(ctx context.Context, at time.Time, text []byte, p fleet.ProductID, by string) (firmware.Key, error)
		Keys(ctx context.Context) ([]firmware.Key, error)
		RevokeKey(ctx context.Context, at time.Time, id, by string) (firmware.Key, error)
		// AddSecureBootKey takes a public key in PEM, or its digest.
		AddSecureBootKey(ctx context.Context, at time.Time, p fleet.ProductID, text, by string) (firmware.SecureBootKey, error)
		RevokeSecureBootKey(ctx context.Context, at time.Time, p fleet.ProductID, digest fleet.Hash, by string) (firmware.SecureBootKey, error)
		SecureBootKeys(ctx context.Context, p fleet.ProductID) ([]firmware.SecureBootKey, error)
		// Repair orders a release for a device over the fallback; the same order again changes nothing.
		Repair(ctx context.Context, at time.Time, id fleet.DeviceID, v firmware.Version, by string) (firmware.Repair, error)
		CancelRepair(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error
		Repairs(ctx context.Context) ([]firmware.Repair, error)
	}

	// Rollouts is dispatch.Dispatcher.
	Rollouts interface {
		Create(ctx context.Context, at time.Time, s dispatch.Spec, by string) (rollout.Rollout, error)
		Start(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error)
		Pause(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error)
		Resume(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error)
		// AbortFor takes a reason for the history, which may be empty.
		AbortFor(ctx context.Context, at time.Time, id fleet.RolloutID, why, by string) (rollout.Rollout, error)
		Approve(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error)
		Advance(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error)
		Rollback(ctx context.Context, at time.Time, id fleet.RolloutID, by string) (rollout.Rollout, error)
		Retry(ctx context.Context, at time.Time, id fleet.RolloutID, kind rollout.JobState, by string) (rollout.Rollout, int, error)
		RetryAs(ctx context.Context, at time.Time, id fleet.RolloutID, kind rollout.JobState, as fleet.RolloutID, by string) (rollout.Rollout, int, error)
		// Plan says what a rollout would do.
		Plan(ctx context.Context, at time.Time, s dispatch.Spec, by string) (dispatch.Preview, error)
		Get(ctx context.Context, id fleet.RolloutID) (rollout.Rollout, error)
		List(ctx context.Context) ([]rollout.Rollout, error)
		Jobs(ctx context.Context, id fleet.RolloutID, state rollout.JobState, page fleet.Page) (jobs []rollout.Job, more bool, err error)
		History(ctx context.Context, id fleet.RolloutID) ([]rollout.Decision, error)
		Since(ctx context.Context, id fleet.RolloutID, seq uint64, limit int) (rollout.Rollout, []dispatch.Line, error)
		// Why says why a device is not updating; Pardon lets it out of the penalty box.
		Why(ctx context.Context, at time.Time, id fleet.DeviceID) ([]dispatch.Reason, error)
		Pardon(ctx context.Context, at time.Time, id fleet.DeviceID, by string) error
	}

	// Quarantine holds the messages that could not be handled.
	Quarantine interface {
		// Quarantined returns up to limit after number after, oldest first.
		Quarantined(ctx context.Context, after uint64, limit int) ([]uplink.Quarantined, error)
		QuarantinedOne(ctx context.Context, seq uint64) (uplink.Quarantined, error)
		DropQuarantined(ctx context.Context, at time.Time, seq uint64, by string) error
	}

	// Trail is access.Trail: the audit trail as a document that proves itself.
	Trail interface {
		// Export emits pieces of whole lines.
		Export(ctx context.Context, r access.Range, emit func([]byte) error) error
		Checkpoints(ctx context.Context, after uint64, limit int) ([]audit.SignedCheckpoint, error)
		Checkpoint(ctx context.Context, at time.Time, by string) (audit.SignedCheckpoint, error)
		Keys(ctx context.Context) ([]audit.Key, error)
	}

	// Operators is access.Access.
	Operators interface {
		Authenticate(ctx context.Context, at time.Time, from, secret string) (access.Principal, error)
		Create(ctx context.Context, at time.Time, name string, role access.Role, ttl time.Duration, by string) (secret string, t access.Token, err error)
		Delete(ctx context.Context, at time.Time, name, by string) error
		Tokens(ctx context.Context) ([]access.Token, error)
		Audit(ctx context.Context, before uint64, limit int) ([]access.Entry, error)
		Forbid(ctx context.Context, from string, e access.Entry) error
	}
)
