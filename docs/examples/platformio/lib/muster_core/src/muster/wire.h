// The messages of api/asyncapi.yaml, as the device writes and reads them. The test compares both directions with muster's own
// codec, byte for byte.
#pragma once

#include <string>
#include <vector>

#include "muster/port.h"

namespace muster {

constexpr size_t kMaxPayload = 16 << 10;  // bytes of any message
constexpr int64_t kMaxVersion = (1LL << 53) - 1;

std::string up_topic(const std::string& id, const char* word);
std::string down_topic(const std::string& id, const char* word);
std::string down_filter(const std::string& id);
std::string cert_user(const std::string& id, const std::string& serial);

struct Hello {
  std::string version, image, hardware, chip;
  uint32_t secure_version = 0;
  std::string boot, serial;
  int64_t buffer = 0, bundle = 0, revision = 0;
  std::string previous;  // image in the other slot; empty: none that could run
  uint32_t previous_secure_version = 0;
};

// encode_hello leaves the other slot out where the message would not fit a client whose one buffer has so many bytes.
std::string encode_hello(const std::string& id, Hello h, size_t one_buffer);

enum class Step { accepted, downloading, downloaded, installed, rebooting, verifying, failed, rejected, rolled_back };
std::string encode_ota(const std::string& job, Step step, int percent, const std::string& error);
std::string encode_csr(const Bytes& csr);
std::string encode_stored(const std::string& serial);
std::string encode_cert_error(const std::string& why);

// Offer is dn/ota.
struct Offer {
  std::string job, version, path;
  int64_t size = 0, spread = 0;  // bytes; seconds
  Bytes sha256;
};
bool decode_offer(const std::string& payload, Offer& out);

// CertOrder is dn/cert.
struct CertOrder {
  enum class Op { renew, cert, part, no } op = Op::no;
  std::string serial, password, tag, why;
  std::vector<Bytes> chain;  // leaf, then intermediate; DER
  int64_t index = 0, count = 0, retry = 0, by = 0;
  Bytes data;
};
bool decode_cert_order(const std::string& payload, CertOrder& out);

// Cmd is dn/cmd. Ops beyond those of muster are the product's own.
struct Cmd {
  std::string op, job;
  int64_t time = 0, bundle = 0;
  Bytes image;
};
bool decode_cmd(const std::string& payload, Cmd& out);

// What a canonical encoder would have sent; only tests need it.
std::string encode_again(const Offer& o);
std::string encode_again(const CertOrder& o);
std::string encode_again(const Cmd& c);

// Assembler puts the slices of a certificate together. They may come twice and in any order; a slice with another tag or count
// starts afresh. It holds at most kMaxPayload bytes.
class Assembler {
 public:
  enum class Result { more, done, bad };
  Result add(Crypto& crypto, const CertOrder& part, CertOrder& whole);
  void clear();

 private:
  std::string tag_;
  std::vector<Bytes> parts_;
  size_t have_ = 0, size_ = 0;
};

}  // namespace muster
