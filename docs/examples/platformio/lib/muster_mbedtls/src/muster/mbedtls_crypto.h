// Crypto by mbedTLS. On the ESP32 the entropy comes from the hardware; the radio must be on when a key is made (ESP-IDF,
// "Random Number Generation").
#pragma once

#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>

#include "muster/port.h"

namespace muster {

class MbedtlsCrypto : public Crypto {
 public:
  MbedtlsCrypto();
  ~MbedtlsCrypto() override;
  MbedtlsCrypto(const MbedtlsCrypto&) = delete;
  MbedtlsCrypto& operator=(const MbedtlsCrypto&) = delete;

  bool ready() const { return ready_; }
  void sha256(const uint8_t* data, size_t size, uint8_t out[32]) override;
  bool verify_es256(const Bytes& spki, const uint8_t* data, size_t size, const uint8_t sig[64]) override;
  bool make_key(Bytes& key) override;
  bool make_csr(const Bytes& key, const std::string& name, Bytes& csr) override;
  bool cert_info(const Bytes& cert, CertInfo& out) override;
  bool key_fits(const Bytes& key, const Bytes& cert) override;
  bool same_key(const Bytes& a, const Bytes& b) override;
  bool chain_ok(const std::vector<Bytes>& chain, const std::vector<Bytes>& roots) override;

 private:
  mbedtls_entropy_context entropy_;
  mbedtls_ctr_drbg_context random_;
  bool ready_ = false;
};

}  // namespace muster
