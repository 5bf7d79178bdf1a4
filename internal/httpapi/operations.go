package httpapi

import (
	"net/http"

	"muster/internal/access"
)

// operation is one row of the API: who may call it, what it takes and what it does. An operation without a role does not
// start the server, and a path without an operation is 404: what is not listed is denied.
type operation struct {
	id       string // operationId of openapi.yaml
	method   string
	path     string // in the router's form, below api.Base
	role     access.Role
	query    []string // names of the query parameters that it takes
	body     bodyKind
	produces string // media type of its answer; empty: JSON
	do       func(*Server, *call) (answer, error)
}

var paged = []string{"limit", "cursor"}

// operations is the whole API. A test holds it against openapi.yaml, row by row.
var operations = []operation{
	{id: "listDevices", method: http.MethodGet, path: "/devices", role: access.Viewer, query: append([]string{"product", "label", "online", "q", "group", "where"}, paged...), do: (*Server).listDevices},
	{id: "createDevice", method: http.MethodPost, path: "/devices", role: access.Operator, body: jsonBody, do: (*Server).createDevice},
	{id: "importDevices", method: http.MethodPost, path: "/device-imports", role: access.Operator, body: bulkBody, do: (*Server).importDevices},
	{id: "updateDevices", method: http.MethodPost, path: "/devices/bulk-update", role: access.Operator, body: jsonBody, do: (*Server).updateDevices},
	{id: "previewTarget", method: http.MethodPost, path: "/targets/preview", role: access.Viewer, body: jsonBody, do: (*Server).previewTarget},
	{id: "getDevice", method: http.MethodGet, path: "/devices/:device", role: access.Viewer, do: (*Server).getDevice},
	{id: "updateDevice", method: http.MethodPatch, path: "/devices/:device", role: access.Operator, body: jsonBody, do: (*Server).updateDevice},
	{id: "removeDevice", method: http.MethodDelete, path: "/devices/:device", role: access.Operator, do: (*Server).removeDevice},
	{id: "disableDevice", method: http.MethodPost, path: "/devices/:device/disable", role: access.Operator, do: (*Server).disableDevice},
	{id: "enableDevice", method: http.MethodPost, path: "/devices/:device/enable", role: access.Operator, do: (*Server).enableDevice},
	{id: "newFallbackPassword", method: http.MethodPost, path: "/devices/:device/fallback-password", role: access.Operator, do: (*Server).newFallbackPassword},
	{id: "newEnrolmentPassword", method: http.MethodPost, path: "/devices/:device/enrolment-password", role: access.Operator, body: jsonBody, do: (*Server).newEnrolmentPassword},

	{id: "whyDevice", method: http.MethodGet, path: "/devices/:device/why", role: access.Viewer, do: (*Server).whyDevice},
	{id: "pardonDevice", method: http.MethodPost, path: "/devices/:device/pardon", role: access.Operator, do: (*Server).pardonDevice},

	{id: "listDeviceCertificates", method: http.MethodGet, path: "/devices/:device/certificates", role: access.Viewer, do: (*Server).listDeviceCertificates},
	{id: "issueCertificate", method: http.MethodPost, path: "/devices/:device/certificates", role: access.Operator, body: jsonBody, do: (*Server).issueCertificate},
	{id: "listCertificates", method: http.MethodGet, path: "/certificates", role: access.Viewer, query: []string{"within", "limit"}, do: (*Server).listCertificates},
	{id: "renewCertificates", method: http.MethodPost, path: "/certificates/renewals", role: access.Operator, body: jsonBody, do: (*Server).renewCertificates},
	{id: "getCertificateStatus", method: http.MethodGet, path: "/certificates/status", role: access.Viewer, do: (*Server).getCertificateStatus},
	{id: "forecastCertificates", method: http.MethodGet, path: "/certificates/forecast", query: []string{"within", "limit"}, role: access.Viewer, do: (*Server).forecastCertificates},
	{id: "getCertificatePolicy", method: http.MethodGet, path: "/certificates/policy", role: access.Viewer, do: (*Server).getCertificatePolicy},
	{id: "setCertificatePolicy", method: http.MethodPut, path: "/certificates/policy", role: access.Admin, body: jsonBody, do: (*Server).setCertificatePolicy},
	{id: "listBlockedKeys", method: http.MethodGet, path: "/blocked-keys", role: access.Viewer, do: (*Server).listBlockedKeys},
	{id: "blockKey", method: http.MethodPost, path: "/blocked-keys", role: access.Operator, body: jsonBody, do: (*Server).blockKey},
	{id: "unblockKey", method: http.MethodDelete, path: "/blocked-keys/:key", role: access.Admin, do: (*Server).unblockKey},
	{id: "getCertificate", method: http.MethodGet, path: "/certificates/:serial", role: access.Viewer, do: (*Server).getCertificate},
	{id: "revokeCertificate", method: http.MethodPost, path: "/certificates/:serial/revocation", role: access.Operator, body: jsonBody, do: (*Server).revokeCertificate},

	{id: "getMassRevocation", method: http.MethodGet, path: "/issuers/:issuer/revocation", role: access.Viewer, do: (*Server).getMassRevocation},
	{id: "revokeIssuer", method: http.MethodPost, path: "/issuers/:issuer/revocation", role: access.Admin, body: jsonBody, do: (*Server).revokeIssuer},
	{id: "listRevocationLists", method: http.MethodGet, path: "/revocation-lists", role: access.Viewer, do: (*Server).listRevocationLists},
	{id: "getRevocationList", method: http.MethodGet, path: "/revocation-lists/:issuer", role: access.Viewer, do: (*Server).getRevocationList},
	{id: "signRevocationList", method: http.MethodPost, path: "/revocation-lists/:issuer", role: access.Operator, do: (*Server).signRevocationList},
	{id: "getTrust", method: http.MethodGet, path: "/trust", role: access.Viewer, do: (*Server).getTrust},
	{id: "getTrustBundle", method: http.MethodGet, path: "/trust/bundle", role: access.Viewer, do: (*Server).getTrustBundle},
	{id: "publishTrustBundle", method: http.MethodPost, path: "/trust/bundle", role: access.Admin, body: jsonBody, do: (*Server).publishTrustBundle},
	{id: "listRotations", method: http.MethodGet, path: "/rotations", role: access.Viewer, do: (*Server).listRotations},
	{id: "startRotation", method: http.MethodPost, path: "/rotations", role: access.Admin, body: jsonBody, do: (*Server).startRotation},
	{id: "getRotation", method: http.MethodGet, path: "/rotations/:rotation", role: access.Viewer, do: (*Server).getRotation},
	{id: "listRotationRequests", method: http.MethodGet, path: "/rotations/:rotation/requests", role: access.Viewer, do: (*Server).listRotationRequests},
	{id: "getRotationCertificates", method: http.MethodGet, path: "/rotations/:rotation/certificates", role: access.Viewer, do: (*Server).getRotationCertificates},
	{id: "importRotationCertificates", method: http.MethodPut, path: "/rotations/:rotation/certificates", role: access.Admin, body: jsonBody, do: (*Server).importRotationCertificates},
	{id: "advanceRotation", method: http.MethodPost, path: "/rotations/:rotation/advance", role: access.Admin, body: maybeJSON, do: (*Server).advanceRotation},
	{id: "takeBackRotation", method: http.MethodPost, path: "/rotations/:rotation/back", role: access.Admin, body: maybeJSON, do: unwind(Rotations.Back)},
	{id: "cancelRotation", method: http.MethodPost, path: "/rotations/:rotation/cancel", role: access.Admin, body: maybeJSON, do: unwind(Rotations.Cancel)},
	{id: "listTrustDevices", method: http.MethodGet, path: "/trust/devices", role: access.Viewer, query: []string{"limit"}, do: (*Server).listTrustDevices},
	{id: "listServerCertificates", method: http.MethodGet, path: "/server-certificates", role: access.Viewer, do: (*Server).listServerCertificates},
	{id: "renewServerCertificate", method: http.MethodPost, path: "/server-certificates/:name/renewal", role: access.Admin, do: (*Server).renewServerCertificate},
	{id: "listExpiries", method: http.MethodGet, path: "/expiries", role: access.Viewer, do: (*Server).listExpiries},
	{id: "getEndpoints", method: http.MethodGet, path: "/endpoints", role: access.Viewer, do: (*Server).getEndpoints},

	{id: "listSigningKeys", method: http.MethodGet, path: "/firmware/keys", role: access.Viewer, do: (*Server).listSigningKeys},
	{id: "addSigningKey", method: http.MethodPost, path: "/firmware/keys", role: access.Admin, body: jsonBody, do: (*Server).addSigningKey},
	{id: "revokeSigningKey", method: http.MethodPost, path: "/firmware/keys/:key/revoke", role: access.Admin, do: (*Server).revokeSigningKey},
	{id: "listOTASlots", method: http.MethodGet, path: "/firmware/ota-slots", role: access.Viewer, do: (*Server).listOTASlots},
	{id: "setOTASlot", method: http.MethodPut, path: "/firmware/ota-slots/:product", role: access.Operator, body: jsonBody, do: (*Server).setOTASlot},
	{id: "clearOTASlot", method: http.MethodDelete, path: "/firmware/ota-slots/:product", role: access.Operator, do: (*Server).clearOTASlot},
	{id: "listSecureBootKeys", method: http.MethodGet, path: "/firmware/secure-boot-keys", role: access.Viewer, query: []string{"product"}, do: (*Server).listSecureBootKeys},
	{id: "addSecureBootKey", method: http.MethodPost, path: "/firmware/secure-boot-keys", role: access.Admin, body: jsonBody, do: (*Server).addSecureBootKey},
	{id: "revokeSecureBootKey", method: http.MethodPost, path: "/firmware/secure-boot-keys/:product/:digest/revoke", role: access.Admin, do: (*Server).revokeSecureBootKey},
	{id: "listReleases", method: http.MethodGet, path: "/firmware/releases", role: access.Viewer, query: append([]string{"product"}, paged...), do: (*Server).listReleases},
	{id: "uploadRelease", method: http.MethodPost, path: "/firmware/releases", role: access.Operator, query: []string{"burn_secure_version"}, body: image, do: (*Server).uploadRelease},
	{id: "getRelease", method: http.MethodGet, path: "/firmware/releases/:product/:version", role: access.Viewer, do: (*Server).getRelease},
	{id: "setFloor", method: http.MethodPut, path: "/firmware/releases/:product/:version/floor", role: access.Operator, body: jsonBody, do: (*Server).setFloor},
	{id: "clearFloor", method: http.MethodDelete, path: "/firmware/releases/:product/:version/floor", role: access.Operator, do: (*Server).clearFloor},
	{id: "setESP32FOTA", method: http.MethodPut, path: "/firmware/releases/:product/:version/esp32fota", role: access.Operator, body: jsonBody, do: (*Server).setESP32FOTA},
	{id: "clearESP32FOTA", method: http.MethodDelete, path: "/firmware/releases/:product/:version/esp32fota", role: access.Operator, do: (*Server).clearESP32FOTA},

	{id: "listRollouts", method: http.MethodGet, path: "/rollouts", role: access.Viewer, query: append([]string{"product", "state"}, paged...), do: (*Server).listRollouts},
	{id: "createRollout", method: http.MethodPost, path: "/rollouts", role: access.Operator, body: jsonBody, do: (*Server).createRollout},
	{id: "planRollout", method: http.MethodPost, path: "/rollouts/plan", role: access.Viewer, body: jsonBody, do: (*Server).planRollout},
	{id: "getRollout", method: http.MethodGet, path: "/rollouts/:rollout", role: access.Viewer, do: (*Server).getRollout},
	{id: "startRollout", method: http.MethodPost, path: "/rollouts/:rollout/start", role: access.Operator, do: operate(Rollouts.Start)},
	{id: "pauseRollout", method: http.MethodPost, path: "/rollouts/:rollout/pause", role: access.Operator, do: operate(Rollouts.Pause)},
	{id: "resumeRollout", method: http.MethodPost, path: "/rollouts/:rollout/resume", role: access.Operator, do: operate(Rollouts.Resume)},
	{id: "abortRollout", method: http.MethodPost, path: "/rollouts/:rollout/abort", role: access.Operator, body: maybeJSON, do: (*Server).abortRollout},
	{id: "approveRollout", method: http.MethodPost, path: "/rollouts/:rollout/approve", role: access.Operator, do: operate(Rollouts.Approve)},
	{id: "advanceRollout", method: http.MethodPost, path: "/rollouts/:rollout/advance", role: access.Operator, do: operate(Rollouts.Advance)},
	{id: "rollbackRollout", method: http.MethodPost, path: "/rollouts/:rollout/rollback", role: access.Operator, do: operate(Rollouts.Rollback)},
	{id: "retryRollout", method: http.MethodPost, path: "/rollouts/:rollout/retry", role: access.Operator, body: maybeJSON, do: (*Server).retryRollout},
	{id: "followRollout", method: http.MethodGet, path: "/rollouts/:rollout/events", role: access.Viewer, produces: eventsType, do: (*Server).followRollout},
	{id: "listRolloutDevices", method: http.MethodGet, path: "/rollouts/:rollout/devices", role: access.Viewer, query: append([]string{"state"}, paged...), do: (*Server).listRolloutDevices},
	{id: "listRolloutDecisions", method: http.MethodGet, path: "/rollouts/:rollout/decisions", role: access.Viewer, do: (*Server).listRolloutDecisions},

	{id: "listRecoveryRequests", method: http.MethodGet, path: "/recovery/requests", role: access.Viewer, query: append([]string{"state"}, paged...), do: (*Server).listRecoveryRequests},
	{id: "approveRecoveryRequest", method: http.MethodPost, path: "/recovery/requests/:request/approve", role: access.Operator, do: decide(Recovery.Approve)},
	{id: "denyRecoveryRequest", method: http.MethodPost, path: "/recovery/requests/:request/deny", role: access.Operator, do: decide(Recovery.Deny)},
	{id: "listRepairs", method: http.MethodGet, path: "/recovery/firmware", role: access.Viewer, query: paged, do: (*Server).listRepairs},
	{id: "repairDevice", method: http.MethodPut, path: "/recovery/firmware/:device", role: access.Operator, body: jsonBody, do: (*Server).repairDevice},
	{id: "cancelRepair", method: http.MethodDelete, path: "/recovery/firmware/:device", role: access.Operator, do: (*Server).cancelRepair},

	{id: "listQuarantine", method: http.MethodGet, path: "/quarantine", role: access.Viewer, query: paged, do: (*Server).listQuarantine},
	{id: "getQuarantined", method: http.MethodGet, path: "/quarantine/:seq", role: access.Viewer, do: (*Server).getQuarantined},
	{id: "dropQuarantined", method: http.MethodDelete, path: "/quarantine/:seq", role: access.Operator, do: (*Server).dropQuarantined},

	{id: "listTokens", method: http.MethodGet, path: "/tokens", role: access.Admin, do: (*Server).listTokens},
	{id: "createToken", method: http.MethodPost, path: "/tokens", role: access.Admin, body: jsonBody, do: (*Server).createToken},
	{id: "deleteToken", method: http.MethodDelete, path: "/tokens/:token", role: access.Admin, do: (*Server).deleteToken},
	{id: "listAudit", method: http.MethodGet, path: "/audit", role: access.Viewer, query: paged, do: (*Server).listAudit},
	{id: "exportAudit", method: http.MethodGet, path: "/audit/export", role: access.Viewer, query: []string{"after", "since", "until"}, produces: exportType, do: (*Server).exportAudit},
	{id: "listCheckpoints", method: http.MethodGet, path: "/audit/checkpoints", role: access.Viewer, query: paged, do: (*Server).listCheckpoints},
	{id: "makeCheckpoint", method: http.MethodPost, path: "/audit/checkpoints", role: access.Operator, do: (*Server).makeCheckpoint},
	{id: "listAuditKeys", method: http.MethodGet, path: "/audit/keys", role: access.Viewer, do: (*Server).listAuditKeys},
	{id: "whoAmI", method: http.MethodGet, path: "/whoami", role: access.Viewer, do: (*Server).whoAmI},
	{id: "getVersion", method: http.MethodGet, path: "/version", role: access.Viewer, do: (*Server).getVersion},
	{id: "getSpec", method: http.MethodGet, path: "/openapi.yaml", role: access.Viewer, produces: specType, do: (*Server).getSpec},
}
