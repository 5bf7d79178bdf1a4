// What the portable part needs of the machine it runs on. The ESP32 implements it in src/, the test on a desk in host/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace muster {

using Bytes = std::vector<uint8_t>;

// Store keeps what must survive a reboot, by names of at most 15 bytes. A write replaces the whole value in one step: after a
// power cut there is the old value or the new one. NVS does that by itself: it writes the new entry before it erases the old.
class Store {
 public:
  virtual ~Store() = default;
  virtual bool read(const char* name, Bytes& out) = 0;         // false: there is none
  virtual bool write(const char* name, const Bytes& value) = 0;  // false: it is not stored
  virtual bool erase(const char* name) = 0;                      // true if there was none
};

// CertInfo is what the device looks at in a certificate.
struct CertInfo {
  std::string serial;            // lower-case hex without leading zeros
  std::vector<std::string> dns;  // subject alternative names
  std::vector<std::string> uri;
  int64_t not_before = 0;  // seconds since 1970
};

// Crypto is what mbedTLS does (lib/muster_mbedtls). Keys are DER, EC P-256; certificates are DER.
class Crypto {
 public:
  virtual ~Crypto() = default;
  virtual void sha256(const uint8_t* data, size_t size, uint8_t out[32]) = 0;
  // verify_es256 checks r and s, 32 bytes each, over data. spki is a SubjectPublicKeyInfo.
  virtual bool verify_es256(const Bytes& spki, const uint8_t* data, size_t size, const uint8_t sig[64]) = 0;
  virtual bool make_key(Bytes& key) = 0;
  virtual bool make_csr(const Bytes& key, const std::string& name, Bytes& csr) = 0;
  virtual bool cert_info(const Bytes& cert, CertInfo& out) = 0;
  virtual bool key_fits(const Bytes& key, const Bytes& cert) = 0;
  virtual bool same_key(const Bytes& a, const Bytes& b) = 0;
  // chain_ok says whether chain (leaf first) leads to one of the roots and is for TLS clients. Dates are muster's business:
  // the device's clock may be wrong.
  virtual bool chain_ok(const std::vector<Bytes>& chain, const std::vector<Bytes>& roots) = 0;
};

}  // namespace muster
