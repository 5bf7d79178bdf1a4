package simdev

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-json-experiment/json"

	"muster/internal/fleet"
)

// Names of the files in a credentials folder, as `muster device credentials` writes it for one device. Those that hold a
// secret have mode 0600.
const (
	KeyFile       = "key.pem"           // PKCS #8, EC P-256; absent where the device makes its own key
	CertFile      = "cert.pem"          // leaf, then intermediate; absent together with the key
	TrustKeyFile  = "trust-key.pem"     // by which new trust bundles are checked; absent where the device takes none
	TrustFile     = "trust.pem"         // roots: who the servers must be, and who may sign this device's certificate
	PasswordFile  = "fallback-password" // one line; absent where the device may not recover by itself
	EndpointsFile = "endpoints.json"    // Endpoints
)

// Endpoints are where a device finds muster, each as host:port. The host is what the server's certificate must name.
type Endpoints struct {
	Device        fleet.DeviceID `json:"device"`
	MQTT          string         `json:"mqtt"`
	FallbackMQTT  string         `json:"fallback_mqtt"`
	HTTPS         string         `json:"https"`
	RecoveryHTTPS string         `json:"recovery_https"`
}

// Credentials are what one device is made with.
type Credentials struct {
	Key       []byte   // PKCS #8, DER; nil if the device makes its own
	Chain     [][]byte // leaf, then intermediate; DER; nil without a key
	Trust     [][]byte // roots, DER
	TrustKey  []byte   // SubjectPublicKeyInfo, DER; nil if it takes no new trust bundles
	Password  string   // for the fallback; may be empty
	Endpoints Endpoints
}

// LoadCredentials reads the credentials folder of one device. Errors of kind Invalid name the file and what is wrong
// with it; they never hold its content.
func LoadCredentials(dir string) (Credentials, error) {
	var c Credentials
	b, err := os.ReadFile(filepath.Join(dir, EndpointsFile))
	if err != nil {
		return Credentials{}, fleet.Wrap(fleet.Invalid, err, "not a credentials folder as `muster device credentials` writes it")
	}
	if err := json.Unmarshal(b, &c.Endpoints, json.RejectUnknownMembers(true)); err != nil {
		return Credentials{}, fleet.Wrap(fleet.Invalid, err, "%s is not as `muster device credentials` writes it", EndpointsFile)
	}
	if c.Trust, err = readPEM(dir, TrustFile, "CERTIFICATE"); err != nil {
		return Credentials{}, err
	}
	if c.Chain, err = readPEM(dir, CertFile, "CERTIFICATE"); err != nil {
		return Credentials{}, err
	}
	trustKey, err := readPEM(dir, TrustKeyFile, "PUBLIC KEY")
	if err != nil {
		return Credentials{}, err
	}
	if len(trustKey) > 0 {
		c.TrustKey = trustKey[0]
	}
	key, err := readPEM(dir, KeyFile, "PRIVATE KEY")
	if err != nil {
		return Credentials{}, err
	}
	if len(key) > 0 {
		c.Key = key[0]
	}
	pw, err := os.ReadFile(filepath.Join(dir, PasswordFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Credentials{}, fleet.Wrap(fleet.Invalid, err, "%s cannot be read", PasswordFile)
	}
	c.Password = strings.TrimSpace(string(pw))
	return c, c.check()
}

// readPEM returns the DER of every block in a file of dir; nil if there is no such file.
func readPEM(dir, name, typ string) ([][]byte, error) {
	rest, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "%s cannot be read", name)
	}
	var out [][]byte
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != typ {
			return nil, fleet.Errorf(fleet.Invalid, "%s holds a PEM block that is no %s", name, typ)
		}
		out = append(out, block.Bytes)
	}
	if len(out) == 0 || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, fleet.Errorf(fleet.Invalid, "%s is not PEM", name)
	}
	return out, nil
}

// check refuses credentials with which a device could never work.
func (c Credentials) check() error {
	if !c.Endpoints.Device.Valid() {
		return fleet.Errorf(fleet.Invalid, "%s: device is not a device id", EndpointsFile)
	}
	for name, addr := range map[string]string{
		"mqtt": c.Endpoints.MQTT, "fallback_mqtt": c.Endpoints.FallbackMQTT, "https": c.Endpoints.HTTPS, "recovery_https": c.Endpoints.RecoveryHTTPS,
	} {
		if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || port == "" {
			return fleet.Errorf(fleet.Invalid, "%s: %s is not host:port", EndpointsFile, name)
		}
	}
	if len(c.Trust) == 0 {
		return fleet.Errorf(fleet.Invalid, "%s is missing: without it the device would trust nobody", TrustFile)
	}
	for _, der := range c.Trust {
		if _, err := x509.ParseCertificate(der); err != nil {
			return fleet.Wrap(fleet.Invalid, err, "%s holds something that is no certificate", TrustFile)
		}
	}
	if len(c.TrustKey) > 0 {
		if key, err := x509.ParsePKIXPublicKey(c.TrustKey); err != nil {
			return fleet.Wrap(fleet.Invalid, err, "%s holds no public key", TrustKeyFile)
		} else if _, ok := key.(*ecdsa.PublicKey); !ok {
			return fleet.Errorf(fleet.Invalid, "%s holds no EC key", TrustKeyFile)
		}
	}
	if (len(c.Key) == 0) != (len(c.Chain) == 0) {
		return fleet.Errorf(fleet.Invalid, "%s and %s belong together: one of them is missing", KeyFile, CertFile)
	}
	if len(c.Key) == 0 && c.Password == "" {
		return fleet.Errorf(fleet.Invalid, "neither %s nor %s: the device has no way in", KeyFile, PasswordFile)
	}
	if len(c.Key) > 0 {
		if _, err := (certSlot{Key: c.Key, Chain: c.Chain}).open(); err != nil {
			return err
		}
	}
	return nil
}

// Save writes c to the folder dir, which it makes if need be.
func (c Credentials) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	endpoints, err := json.Marshal(c.Endpoints)
	if err != nil {
		return err
	}
	files := map[string][]byte{EndpointsFile: endpoints, TrustFile: encodePEM("CERTIFICATE", c.Trust...)}
	if len(c.Key) > 0 {
		files[KeyFile], files[CertFile] = encodePEM("PRIVATE KEY", c.Key), encodePEM("CERTIFICATE", c.Chain...)
	}
	if len(c.TrustKey) > 0 {
		files[TrustKeyFile] = encodePEM("PUBLIC KEY", c.TrustKey)
	}
	if c.Password != "" {
		files[PasswordFile] = []byte(c.Password + "\n")
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func encodePEM(typ string, ders ...[]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})...)
	}
	return out
}

// identity is an opened certificate slot.
type identity struct {
	key    *ecdsa.PrivateKey
	leaf   *x509.Certificate
	chain  [][]byte
	serial fleet.Serial
}

// open parses the slot. It refuses, with an Invalid error, a certificate that does not fit the key.
func (s certSlot) open() (identity, error) {
	key, err := parseKey(s.Key)
	if err != nil {
		return identity{}, err
	}
	if len(s.Chain) == 0 {
		return identity{}, fleet.Errorf(fleet.Invalid, "no certificate")
	}
	leaf, err := x509.ParseCertificate(s.Chain[0])
	if err != nil {
		return identity{}, fleet.Wrap(fleet.Invalid, err, "certificate is not X.509")
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return identity{}, fleet.Errorf(fleet.Invalid, "certificate does not fit the key")
	}
	return identity{key, leaf, s.Chain, fleet.SerialOf(leaf.SerialNumber)}, nil
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fleet.Errorf(fleet.Invalid, "key is not PKCS #8") // the cause might quote the key
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fleet.Errorf(fleet.Invalid, "key is not an EC key")
	}
	return key, nil
}
