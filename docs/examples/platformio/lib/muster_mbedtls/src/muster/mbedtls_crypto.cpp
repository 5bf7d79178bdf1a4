#include "muster/mbedtls_crypto.h"

#include <mbedtls/ecp.h>
#include <mbedtls/md.h>
#include <mbedtls/oid.h>
#include <mbedtls/pk.h>
#include <mbedtls/version.h>
#include <mbedtls/x509_crt.h>
#include <mbedtls/x509_csr.h>

#include <cstring>

namespace muster {
namespace {

// The objects of mbedTLS end with their scope.
struct Pk {
  mbedtls_pk_context c;
  Pk() { mbedtls_pk_init(&c); }
  ~Pk() { mbedtls_pk_free(&c); }
  Pk(const Pk&) = delete;
  Pk& operator=(const Pk&) = delete;

  bool p256() { return mbedtls_pk_can_do(&c, MBEDTLS_PK_ECDSA) != 0 && mbedtls_pk_get_bitlen(&c) == 256; }
  bool parse(const Bytes& der, mbedtls_ctr_drbg_context* random) {
#if MBEDTLS_VERSION_MAJOR >= 3
    const int err = mbedtls_pk_parse_key(&c, der.data(), der.size(), nullptr, 0, mbedtls_ctr_drbg_random, random);
#else
    (void)random;
    const int err = mbedtls_pk_parse_key(&c, der.data(), der.size(), nullptr, 0);
#endif
    return err == 0 && p256();
  }
  // spki returns the public half; empty if it cannot be written.
  Bytes spki() {
    Bytes out(128);
    const int n = mbedtls_pk_write_pubkey_der(&c, out.data(), out.size());
    if (n <= 0) return {};
    return Bytes(out.end() - n, out.end());  // it is written at the end of the buffer
  }
};

struct Crt {
  mbedtls_x509_crt c;
  Crt() { mbedtls_x509_crt_init(&c); }
  ~Crt() { mbedtls_x509_crt_free(&c); }
  Crt(const Crt&) = delete;
  Crt& operator=(const Crt&) = delete;
  bool add(const Bytes& der) { return mbedtls_x509_crt_parse_der(&c, der.data(), der.size()) == 0; }
};

// days since 1970 of a date of the Gregorian calendar.
int64_t days(int64_t y, int64_t m, int64_t d) {
  y -= m <= 2;
  const int64_t era = (y >= 0 ? y : y - 399) / 400, in_era = y - era * 400;
  const int64_t in_year = (153 * (m + (m > 2 ? -3 : 9)) + 2) / 5 + d - 1;
  return era * 146097 + in_era * 365 + in_era / 4 - in_era / 100 + in_year - 719468;
}

// der_integer appends a non-negative INTEGER of 32 bytes.
void der_integer(Bytes& out, const uint8_t* b) {
  size_t skip = 0;
  while (skip < 31 && b[skip] == 0) skip++;
  const bool pad = (b[skip] & 0x80) != 0;
  out.push_back(0x02);
  out.push_back(static_cast<uint8_t>(32 - skip + (pad ? 1 : 0)));
  if (pad) out.push_back(0);
  out.insert(out.end(), b + skip, b + 32);
}

int without_dates(void*, mbedtls_x509_crt*, int, uint32_t* flags) {
  *flags &= ~static_cast<uint32_t>(MBEDTLS_X509_BADCERT_EXPIRED | MBEDTLS_X509_BADCERT_FUTURE);
  return 0;
}

}  // namespace

MbedtlsCrypto::MbedtlsCrypto() {
  mbedtls_entropy_init(&entropy_);
  mbedtls_ctr_drbg_init(&random_);
  static const unsigned char purpose[] = "muster device";
  ready_ = mbedtls_ctr_drbg_seed(&random_, mbedtls_entropy_func, &entropy_, purpose, sizeof purpose) == 0;
}

MbedtlsCrypto::~MbedtlsCrypto() {
  mbedtls_ctr_drbg_free(&random_);
  mbedtls_entropy_free(&entropy_);
}

void MbedtlsCrypto::sha256(const uint8_t* data, size_t size, uint8_t out[32]) {
  if (mbedtls_md(mbedtls_md_info_from_type(MBEDTLS_MD_SHA256), data, size, out) != 0) std::memset(out, 0, 32);
}

bool MbedtlsCrypto::verify_es256(const Bytes& spki, const uint8_t* data, size_t size, const uint8_t sig[64]) {
  Pk key;
  if (mbedtls_pk_parse_public_key(&key.c, spki.data(), spki.size()) != 0 || !key.p256()) return false;
  Bytes body, der{0x30, 0};
  der_integer(body, sig);
  der_integer(body, sig + 32);
  der[1] = static_cast<uint8_t>(body.size());  // at most 70
  der.insert(der.end(), body.begin(), body.end());
  uint8_t hash[32];
  sha256(data, size, hash);
  return mbedtls_pk_verify(&key.c, MBEDTLS_MD_SHA256, hash, sizeof hash, der.data(), der.size()) == 0;
}

bool MbedtlsCrypto::make_key(Bytes& key) {
  Pk pk;
  if (!ready_ || mbedtls_pk_setup(&pk.c, mbedtls_pk_info_from_type(MBEDTLS_PK_ECKEY)) != 0) return false;
  if (mbedtls_ecp_gen_key(MBEDTLS_ECP_DP_SECP256R1, mbedtls_pk_ec(pk.c), mbedtls_ctr_drbg_random, &random_) != 0) return false;
  Bytes out(256);
  const int n = mbedtls_pk_write_key_der(&pk.c, out.data(), out.size());
  if (n <= 0) return false;
  key.assign(out.end() - n, out.end());
  return true;
}

bool MbedtlsCrypto::make_csr(const Bytes& key, const std::string& name, Bytes& csr) {
  Pk pk;
  if (!ready_ || !pk.parse(key, &random_)) return false;
  mbedtls_x509write_csr w;
  mbedtls_x509write_csr_init(&w);
  mbedtls_x509write_csr_set_md_alg(&w, MBEDTLS_MD_SHA256);
  mbedtls_x509write_csr_set_key(&w, &pk.c);
  Bytes out(1024);
  int n = mbedtls_x509write_csr_set_subject_name(&w, ("CN=" + name).c_str());
  if (n == 0) n = mbedtls_x509write_csr_der(&w, out.data(), out.size(), mbedtls_ctr_drbg_random, &random_);
  mbedtls_x509write_csr_free(&w);
  if (n <= 0) return false;
  csr.assign(out.end() - n, out.end());
  return true;
}

bool MbedtlsCrypto::cert_info(const Bytes& cert, CertInfo& out) {
  Crt crt;
  if (!crt.add(cert)) return false;
  out = CertInfo();
  static const char digits[] = "0123456789abcdef";
  for (size_t i = 0; i < crt.c.serial.len; i++) {
    const uint8_t b = crt.c.serial.p[i];
    if (!out.serial.empty() || b >> 4 != 0) out.serial += digits[b >> 4];
    if (!out.serial.empty() || (b & 15) != 0) out.serial += digits[b & 15];
  }
  constexpr int kDns = 2, kUri = 6;  // RFC 5280 §4.2.1.6
  for (const mbedtls_x509_sequence* s = &crt.c.subject_alt_names; s != nullptr && s->buf.p != nullptr; s = s->next) {
    const std::string text(reinterpret_cast<const char*>(s->buf.p), s->buf.len);
    if ((s->buf.tag & 0x1F) == kDns) out.dns.push_back(text);
    if ((s->buf.tag & 0x1F) == kUri) out.uri.push_back(text);
  }
  const mbedtls_x509_time& t = crt.c.valid_from;
  out.not_before = ((days(t.year, t.mon, t.day) * 24 + t.hour) * 60 + t.min) * 60 + t.sec;
  return true;
}

bool MbedtlsCrypto::key_fits(const Bytes& key, const Bytes& cert) {
  Pk pk;
  Crt crt;
  if (!pk.parse(key, &random_) || !crt.add(cert)) return false;
#if MBEDTLS_VERSION_MAJOR >= 3
  return mbedtls_pk_check_pair(&crt.c.pk, &pk.c, mbedtls_ctr_drbg_random, &random_) == 0;
#else
  return mbedtls_pk_check_pair(&crt.c.pk, &pk.c) == 0;
#endif
}

bool MbedtlsCrypto::same_key(const Bytes& a, const Bytes& b) {
  if (a == b) return true;
  Pk x, y;
  return x.parse(a, &random_) && y.parse(b, &random_) && x.spki() == y.spki();
}

bool MbedtlsCrypto::chain_ok(const std::vector<Bytes>& chain, const std::vector<Bytes>& roots) {
  Crt crt, trusted;
  for (const Bytes& der : chain) {
    if (!crt.add(der)) return false;
  }
  for (const Bytes& der : roots) {
    if (!trusted.add(der)) return false;
  }
  uint32_t flags = 0;
  if (mbedtls_x509_crt_verify(&crt.c, &trusted.c, nullptr, nullptr, &flags, without_dates, nullptr) != 0) return false;
  return mbedtls_x509_crt_check_extended_key_usage(&crt.c, MBEDTLS_OID_CLIENT_AUTH, MBEDTLS_OID_SIZE(MBEDTLS_OID_CLIENT_AUTH)) == 0;
}

}  // namespace muster
