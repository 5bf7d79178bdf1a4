// Package archtest holds the import table of muster (DESIGN §3): who may import whom, with a reason a row. Its test
// fails when code and table disagree, so that a new dependency is a decision and not an accident.
package archtest

// Layer is a group of packages with the same rights.
type Layer string

// Layers, from the inside out. A package may import packages of its own module only as its row says.
const (
	Words   Layer = "words"   // fleet: ids, the error type
	Core    Layer = "core"    // rules without I/O, clock, goroutine or log
	UseCase Layer = "usecase" // own the order of steps and declare the ports they need
	Adapter Layer = "adapter" // one technology each, never importing one another
	App     Layer = "app"     // the one place that wires everything
	Edge    Layer = "edge"    // what stands outside of musterd: programs, simulator, client, development broker
)

// Row is what a package may import of this module.
type Row struct {
	Layer Layer
	May   []string // paths below muster/
	Why   string
}

// Pure are the modules outside the standard library that core packages may import, with the reason.
var Pure = map[string]string{
	"github.com/go-json-experiment/json": "strict JSON (duplicate names, exact case, UTF-8) without I/O; becomes encoding/json/v2",
	"github.com/go-jose/go-jose/v4":      "JWS; computes only, its key sets are never fetched",
	"cel.dev/cel-go":                     "expressions over values that are given; evaluates only, with a cost limit",
	"github.com/robfig/cron/v3":          "only its parser, for windows; nothing is started",
	"golang.org/x/mod/semver":            "order of versions, pure functions on strings",
	"github.com/Masterminds/semver/v3":   "order of versions, pure functions on strings",
}

// CoreBans are the standard packages that no core package may import: they do I/O, log, or start something.
var CoreBans = []string{"os", "log", "log/slog", "net", "net/http", "io/fs", "os/exec", "os/signal", "syscall", "database/sql", "sync", "context", "math/rand", "math/rand/v2"}

// Table has a row for every package of the module.
var Table = map[string]Row{
	"internal/fleet": {Words, nil, "the words that all others share"},

	"internal/pki":       {Core, []string{"internal/fleet"}, "life of a certificate"},
	"internal/firmware":  {Core, []string{"internal/fleet"}, "manifest, versions, compatibility"},
	"internal/target":    {Core, []string{"internal/firmware", "internal/fleet", "internal/wire"}, "which devices a rollout is for"},
	"internal/rollout":   {Core, []string{"internal/fleet"}, "stages, gates, grants"},
	"internal/wire":      {Core, []string{"internal/fleet"}, "topics and payloads"},
	"internal/admission": {Core, []string{"internal/fleet", "internal/wire"}, "who may enter the broker; topics are wire's"},

	"internal/esp":             {Core, []string{"internal/fleet"}, "what the ESP32 formats share: chips and findings"},
	"internal/esp/image":       {Core, []string{"internal/esp", "internal/fleet"}, "application and bootloader images"},
	"internal/esp/secureboot":  {Core, []string{"internal/esp", "internal/esp/image", "internal/fleet"}, "signature sectors; the message ends where the image does"},
	"internal/esp/partition":   {Core, []string{"internal/esp", "internal/fleet"}, "partition tables and otadata"},
	"internal/esp/xts":         {Core, []string{"internal/fleet"}, "the cipher that flash encryption and NVS share"},
	"internal/esp/flashcrypt":  {Core, []string{"internal/esp", "internal/esp/xts", "internal/fleet"}, "flash encryption"},
	"internal/esp/nvs":         {Core, []string{"internal/esp", "internal/esp/xts", "internal/fleet"}, "NVS partitions and their keys"},
	"internal/firmware/espapp": {Core, []string{"internal/esp", "internal/esp/image", "internal/esp/secureboot", "internal/firmware", "internal/fleet"}, "holds an ESP32 image to its manifest"},

	"internal/provision": {Core, []string{"internal/esp", "internal/esp/flashcrypt", "internal/esp/image", "internal/esp/nvs", "internal/esp/partition", "internal/esp/secureboot", "internal/fleet"}, "what a factory puts into a device, and in which order"},

	"internal/expiry": {Core, nil, "what ends, and how urgent that is"},
	"internal/audit":  {Core, []string{"internal/fleet"}, "the audit trail as a document: chain, checkpoints, exports"},

	"internal/access":     {UseCase, []string{"internal/audit", "internal/fleet"}, "operators"},
	"internal/downlink":   {UseCase, []string{"internal/fleet", "internal/wire"}, "outbox to broker"},
	"internal/uplink":     {UseCase, []string{"internal/fleet", "internal/wire"}, "queue to store"},
	"internal/inventory":  {UseCase, []string{"internal/access", "internal/fleet", "internal/target", "internal/wire"}, "registry; audits what operators change"},
	"internal/enroll":     {UseCase, []string{"internal/access", "internal/downlink", "internal/fleet", "internal/pki", "internal/wire"}, "certificates; says so to devices by the outbox"},
	"internal/revocation": {UseCase, []string{"internal/access", "internal/fleet", "internal/pki"}, "lists and answers about revoked certificates; signs no device's own"},
	"internal/crlapi":     {Adapter, []string{"internal/fleet", "internal/pki", "internal/revocation"}, "CRL and OCSP over HTTP, for everybody"},
	"internal/rotation":   {UseCase, []string{"internal/access", "internal/fleet", "internal/pki"}, "replaces CAs; signs and switches by a port"},
	"internal/trust":      {UseCase, []string{"internal/access", "internal/downlink", "internal/fleet", "internal/pki", "internal/wire"}, "brings the trust bundle to devices"},
	"internal/servercert": {UseCase, []string{"internal/access", "internal/expiry", "internal/fleet"}, "renews server certificates; its ports are satisfied by ca and tlsfiles"},
	"internal/recovery":   {UseCase, []string{"internal/access", "internal/downlink", "internal/enroll", "internal/fleet", "internal/pki", "internal/wire"}, "an enrolment by another door, so it uses enroll"},
	"internal/ota":        {UseCase, []string{"internal/access", "internal/downlink", "internal/esp/image", "internal/esp/secureboot", "internal/firmware", "internal/firmware/espapp", "internal/fleet", "internal/rollout", "internal/wire"}, "releases, and what a device gets now"},
	"internal/dispatch":   {UseCase, []string{"internal/access", "internal/downlink", "internal/firmware", "internal/fleet", "internal/pki", "internal/rollout", "internal/target", "internal/wire"}, "drives rollouts"},

	"internal/store/bolt":        {Adapter, []string{"internal/access", "internal/admission", "internal/audit", "internal/downlink", "internal/firmware", "internal/fleet", "internal/pki", "internal/rollout", "internal/uplink", "internal/wire"}, "keeps the records of the core and of the use cases"},
	"internal/store/storetest":   {Adapter, []string{"internal/store/bolt"}, "a checked store for tests"},
	"internal/ca":                {Adapter, []string{"internal/ca/ceremony", "internal/ca/keystore", "internal/fleet", "internal/pki", "internal/wire"}, "smallstep"},
	"internal/ca/ceremony":       {Edge, []string{"internal/ca/keystore", "internal/fleet", "internal/pki"}, "what an offline root signs, without smallstep; in the CLI, and in ca for a root made by init"},
	"internal/ca/keystore":       {Edge, []string{"internal/fleet"}, "keys of CAs in files and key managers; both of ca and of ceremonies"},
	"internal/broker":            {Adapter, []string{"internal/fleet", "internal/wire"}, "RabbitMQ: AMQP and management API"},
	"internal/broker/brokerconf": {Adapter, []string{"internal/fleet", "internal/wire"}, "RabbitMQ's configuration as text"},
	"internal/brokerauth":        {Adapter, []string{"internal/admission", "internal/fleet", "internal/wire"}, "RabbitMQ's http auth backend"},
	"internal/tlsfiles":          {Adapter, []string{"internal/fleet"}, "certificates, keys and trust in files"},
	"internal/blob":              {Adapter, []string{"internal/fleet"}, "images on disk"},
	"internal/httpapi":           {Adapter, []string{"api", "internal/access", "internal/audit", "internal/dispatch", "internal/enroll", "internal/expiry", "internal/firmware", "internal/fleet", "internal/inventory", "internal/ota", "internal/pki", "internal/recovery", "internal/rollout", "internal/rotation", "internal/servercert", "internal/target", "internal/trust", "internal/uplink"}, "ops REST; calls use cases and shows core types"},
	"internal/devapi":            {Adapter, []string{"internal/firmware", "internal/fleet", "internal/ota", "internal/wire"}, "device HTTPS"},
	"internal/est":               {Adapter, []string{"internal/fleet", "internal/pki"}, "EST over HTTP; mounted on devapi's listeners by app"},
	"internal/config":            {Adapter, nil, "settings from file, environment, flags"},
	"internal/obs":               {Adapter, nil, "log, health, metrics"},

	"api":                {Edge, nil, "generated from the contract"},
	"configs":            {Edge, nil, "the commented settings, embedded for init"},
	"internal/client":    {Edge, []string{"api", "internal/fleet"}, "speaks only REST"},
	"internal/signing":   {Edge, []string{"internal/ca/keystore", "internal/esp", "internal/esp/image", "internal/esp/secureboot", "internal/firmware", "internal/firmware/espapp", "internal/fleet", "internal/pki"}, "keys and signatures on the operator's own machine"},
	"internal/escrow":    {Edge, []string{"internal/fleet", "internal/provision"}, "what operators keep of devices, sealed by age; on their own machines only"},
	"internal/cli":       {Edge, []string{"api", "internal/audit", "internal/ca/ceremony", "internal/ca/keystore", "internal/client", "internal/escrow", "internal/esp", "internal/esp/image", "internal/esp/nvs", "internal/esp/partition", "internal/esp/secureboot", "internal/firmware", "internal/firmware/espapp", "internal/fleet", "internal/pki", "internal/provision", "internal/signing"}, "the ops CLI: REST, and what works offline"},
	"internal/simdev":    {Edge, []string{"internal/fleet", "internal/pki", "internal/wire"}, "a device knows only what reached it over the wire; reads trust bundles as one would"},
	"internal/devbroker": {Edge, []string{"internal/broker/brokerconf"}, "a RabbitMQ for development with the production configuration"},
	"internal/archtest":  {Edge, nil, "this table"},
}
