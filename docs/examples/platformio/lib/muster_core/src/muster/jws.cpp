#include "muster/jws.h"

#include "muster/json.h"
#include "muster/text.h"

namespace muster {
namespace {

// open_jws returns the payload if one of the keys signed it. Nothing of the payload is read before that.
bool open_jws(Crypto& crypto, const std::vector<Bytes>& keys, const std::string& jws, size_t max, const char* type, std::string& payload, std::string& why) {
  const size_t first = jws.find('.');
  const size_t second = first == std::string::npos ? first : jws.find('.', first + 1);
  if (jws.size() > max || second == std::string::npos || jws.find('.', second + 1) != std::string::npos) {
    why = "not a JWS in compact form";
    return false;
  }
  Bytes head, body, sig;
  if (!base64url_decode(jws.substr(0, first), head) || !base64url_decode(jws.substr(first + 1, second - first - 1), body) ||
      !base64url_decode(jws.substr(second + 1), sig) || sig.size() != 64) {
    why = "not base64url";
    return false;
  }
  std::string alg, kid, typ;
  std::vector<Field> f{{"alg", alg}, {"kid", kid}, {"typ", typ}};
  if (!json_read(std::string(head.begin(), head.end()), f) || alg != "ES256" || typ != type || !f[1].seen) {
    why = "its header is not alg ES256, typ " + std::string(type) + " and kid";
    return false;
  }
  for (const Bytes& key : keys) {
    if (crypto.verify_es256(key, reinterpret_cast<const uint8_t*>(jws.data()), second, sig.data())) {
      payload.assign(body.begin(), body.end());
      return true;
    }
  }
  why = "it is not signed by a key that this device holds";
  return false;
}

}  // namespace

bool read_bundle(Crypto& crypto, const Bytes& key, const std::string& jws, Bundle& out, std::string& why) {
  out = Bundle();
  std::string payload;
  if (!open_jws(crypto, {key}, jws, kMaxBundle, "muster-trust+jws", payload, why)) return false;
  std::vector<std::string> roots, cross;
  std::vector<Field> f{{"v", out.version}, {"t", out.time}, {"roots", roots}, {"cross", cross}};
  why = "it is not a trust bundle";
  if (!json_read(payload, f) || out.version < 1 || out.version > kMaxVersion || out.time < 1 || out.time > kMaxVersion || roots.empty()) return false;
  for (const std::string& one : roots) {
    Bytes der;
    CertInfo info;
    if (!base64_decode(one, der) || !crypto.cert_info(der, info)) return false;
    out.roots.push_back(std::move(der));
  }
  why.clear();
  return true;
}

bool read_manifest(Crypto& crypto, const std::vector<Bytes>& keys, const std::string& jws, Manifest& m, std::string& why) {
  m = Manifest();
  std::string payload;
  if (!open_jws(crypto, keys, jws, kMaxManifest, "muster-release+jws", payload, why)) return false;
  std::vector<Field> f{{"product", m.product},
                       {"version", m.version},
                       {"size", m.size},
                       {"sha256", m.sha256},
                       {"image_hash", m.image_hash},
                       {"chip", m.chip},
                       {"secure_version", m.secure_version},
                       {"min_version", m.min_version},
                       {"min_chip_revision", m.min_revision},
                       {"max_chip_revision", m.max_revision}};
  why = "it is not the manifest of a release";
  if (!json_read(payload, f) || m.version.empty() || m.size < 1 || !is_hash(m.sha256) || !is_hash(m.image_hash) || m.secure_version < 0) return false;
  why.clear();
  return true;
}

}  // namespace muster
