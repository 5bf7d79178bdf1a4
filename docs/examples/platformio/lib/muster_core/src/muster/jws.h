// Signed documents: the trust bundle, and the manifest of a release. Both are a JWS in compact form (RFC 7515 §7.1), ES256.
#pragma once

#include <string>
#include <vector>

#include "muster/port.h"
#include "muster/wire.h"

namespace muster {

constexpr size_t kMaxBundle = 16 << 10, kMaxManifest = 4 << 10;  // bytes, signed

// Bundle is what a device trusts.
struct Bundle {
  int64_t version = 0, time = 0;  // seconds since 1970, a lower bound of now
  std::vector<Bytes> roots;       // DER
};

// read_bundle checks everything but the version: header, signature by key (SubjectPublicKeyInfo), form. See follows.
bool read_bundle(Crypto& crypto, const Bytes& key, const std::string& jws, Bundle& out, std::string& why);

// follows says whether a device that has version `have` may take b. Never an older one, whoever offers it.
inline bool follows(const Bundle& b, int64_t have) { return b.version > have; }

// Manifest is what the release key says of an image.
struct Manifest {
  std::string product, version, sha256, image_hash, chip, min_version;
  int64_t size = 0, secure_version = 0, min_revision = 0, max_revision = 0;
};

bool read_manifest(Crypto& crypto, const std::vector<Bytes>& keys, const std::string& jws, Manifest& out, std::string& why);

}  // namespace muster
