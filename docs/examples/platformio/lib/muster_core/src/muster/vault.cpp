#include "muster/vault.h"

#include <algorithm>

#include "muster/json.h"
#include "muster/text.h"

namespace muster {
namespace {

size_t at(Slot s) { return s == 'b' ? 1 : 0; }
constexpr Slot kSlots[] = {'a', 'b'};

Bytes bytes(const std::string& s) { return Bytes(s.begin(), s.end()); }

// A slot is one value, so that key and certificate can never come apart: version, then each part with its length.
Bytes pack(const Identity& id) {
  Bytes out{1};
  auto put = [&out](const Bytes& b) {
    out.push_back(static_cast<uint8_t>(b.size() >> 8));
    out.push_back(static_cast<uint8_t>(b.size()));
    out.insert(out.end(), b.begin(), b.end());
  };
  put(id.key);
  for (const Bytes& der : id.chain) put(der);
  return out;
}

bool unpack(const Bytes& b, Identity& id) {
  if (b.empty() || b[0] != 1) return false;
  std::vector<Bytes> parts;
  for (size_t i = 1; i < b.size();) {
    if (b.size() - i < 2) return false;
    const size_t n = static_cast<size_t>(b[i]) << 8 | b[i + 1];
    i += 2;
    if (n == 0 || b.size() - i < n) return false;
    parts.emplace_back(b.begin() + static_cast<std::ptrdiff_t>(i), b.begin() + static_cast<std::ptrdiff_t>(i + n));
    i += n;
  }
  if (parts.size() < 2) return false;
  id.key = parts[0];
  id.chain.assign(parts.begin() + 1, parts.end());
  return true;
}

}  // namespace

std::string Vault::text(const char* name) const {
  Bytes b;
  if (!store_.read(name, b)) return "";
  while (!b.empty() && (b.back() == 0 || b.back() == '\n')) b.pop_back();  // strings of NVS end with NUL
  return std::string(b.begin(), b.end());
}

std::string Vault::endpoint(const char* name) const { return text(name); }

bool Vault::load(std::string& why) {
  id_ = text(names::id);
  if (!is_label(id_, 40)) {
    why = "the store holds no device id: this device was not provisioned";
    return false;
  }
  if (!load_trust(why)) return false;
  for (Slot s : kSlots) load_slot(s);
  for (Slot s : kSlots) {
    Bytes b;
    if (store_.read(names::pw[at(s)], b) && b.size() > 4) {
      const uint32_t seq = static_cast<uint32_t>(b[0]) << 24 | static_cast<uint32_t>(b[1]) << 16 | static_cast<uint32_t>(b[2]) << 8 | b[3];
      passwords_.push_back({s, std::string(b.begin() + 4, b.end()), seq});
    }
  }
  // What the factory gave holds slot a until the device itself writes there.
  const bool a_written = std::any_of(passwords_.begin(), passwords_.end(), [](const Password& p) { return p.slot == 'a'; });
  const std::string made = text(names::password);
  if (!a_written && !made.empty()) passwords_.push_back({'a', made, 0});
  std::sort(passwords_.begin(), passwords_.end(), [](const Password& x, const Password& y) { return x.seq > y.seq; });
  Bytes b;
  if (store_.read(names::use, b) && b.size() == 2) {
    use_ = static_cast<Slot>(b[0]);
    proven_ = b[1] == 1;
  }
  if (store_.read(names::clock, b) && b.size() == 8) {
    uint64_t seconds = 0;
    for (uint8_t one : b) seconds = seconds << 8 | one;
    clock_ = std::max(clock_, static_cast<int64_t>(seconds));
  }
  std::vector<Field> f{{"job", update_.job}, {"image", update_.image}, {"file", update_.file}, {"failed", update_.failed_file}};
  const std::string u = text(names::update);
  if (!u.empty() && !json_read(u, f)) update_ = Update();
  enrol_ = text(names::enrol);
  if (!ids_[0] && !ids_[1] && passwords_.empty() && enrol_.empty()) {
    why = "neither a certificate nor a password: there is no way in";
    return false;
  }
  return true;
}

bool Vault::load_trust(std::string& why) {
  std::vector<Bytes> keys;
  if (pem_decode(text(names::trust_key), "PUBLIC KEY", keys)) trust_key_ = keys[0];
  if (!pem_decode(text(names::release_keys), "PUBLIC KEY", release_keys_)) release_keys_.clear();
  const std::string jws = text(names::bundle);
  if (!jws.empty() && takes_bundles()) {
    Bundle b;
    if (read_bundle(crypto_, trust_key_, jws, b, why)) {
      bundle_ = b.version;
      roots_ = b.roots;
      clock_ = std::max(clock_, b.time);
      return true;
    }
  }
  if (pem_decode(text(names::roots), "CERTIFICATE", roots_)) return true;
  why = "the store holds no roots: the device would trust nobody";
  return false;
}

bool Vault::load_slot(Slot s) {
  Identity id;
  Bytes b;
  if (store_.read(names::slot[at(s)], b)) {
    if (!unpack(b, id)) return false;
  } else {
    std::vector<Bytes> keys;
    const std::string key = text(names::key);
    if (s != 'a' || !pem_decode(text(names::cert), "CERTIFICATE", id.chain)) return false;
    if (!pem_decode(key, "PRIVATE KEY", keys) && !pem_decode(key, "EC PRIVATE KEY", keys)) return false;
    id.key = keys[0];
  }
  CertInfo info;
  if (!crypto_.cert_info(id.chain[0], info) || !crypto_.key_fits(id.key, id.chain[0])) return false;
  id.serial = info.serial;
  id.not_before = info.not_before;
  ids_[at(s)] = std::move(id);
  return true;
}

const Identity* Vault::identity(Slot s) const { return ids_[at(s)] ? &*ids_[at(s)] : nullptr; }

std::vector<Slot> Vault::preferred() const {
  std::vector<Slot> out;
  for (Slot s : kSlots) {
    if (ids_[at(s)]) out.push_back(s);
  }
  if (out.size() == 2 && (use_ == 'b' || (use_ != 'a' && ids_[1]->not_before > ids_[0]->not_before))) std::swap(out[0], out[1]);
  return out;
}

std::vector<Slot> Vault::passwords() const {
  std::vector<Slot> out;
  for (const Password& p : passwords_) out.push_back(p.slot);
  return out;
}

std::string Vault::password(Slot s) const {
  for (const Password& p : passwords_) {
    if (p.slot == s) return p.text;
  }
  return "";
}

bool Vault::add_password(const std::string& pw, Slot opened) {
  uint32_t seq = 1;
  for (const Password& p : passwords_) {
    if (p.text == pw) return true;
    seq = std::max(seq, p.seq + 1);
  }
  const Slot to = other(opened);  // the one that opened this session works until the new one is proven
  Bytes b{static_cast<uint8_t>(seq >> 24), static_cast<uint8_t>(seq >> 16), static_cast<uint8_t>(seq >> 8), static_cast<uint8_t>(seq)};
  b.insert(b.end(), pw.begin(), pw.end());
  if (!store_.write(names::pw[at(to)], b)) return false;
  passwords_.erase(std::remove_if(passwords_.begin(), passwords_.end(), [to](const Password& p) { return p.slot == to; }), passwords_.end());
  passwords_.insert(passwords_.begin(), {to, pw, seq});
  return true;
}

bool Vault::key_to_certify(bool fallback, Bytes& key) {
  if (fallback && (ids_[0] || ids_[1])) {
    const bool b = !ids_[0] || (ids_[1] && ids_[1]->not_before > ids_[0]->not_before);
    key = ids_[b ? 1 : 0]->key;
    return true;
  }
  if (store_.read(names::pending, key)) {
    bool in_slot = false;
    for (Slot s : kSlots) in_slot = in_slot || (ids_[at(s)] && crypto_.same_key(key, ids_[at(s)]->key));
    if (!in_slot) return true;  // asking twice asks for the same
  }
  return crypto_.make_key(key) && store_.write(names::pending, key);
}

bool Vault::judge(const std::string& serial, const std::vector<Bytes>& chain, Identity& out, std::string& why) {
  CertInfo info;
  if (chain.empty() || !crypto_.cert_info(chain[0], info)) {
    why = "not a certificate";
    return false;
  }
  Bytes key;
  bool fits = store_.read(names::pending, key) && crypto_.key_fits(key, chain[0]);
  for (Slot s : kSlots) {
    if (!fits && ids_[at(s)] && crypto_.key_fits(ids_[at(s)]->key, chain[0])) {
      key = ids_[at(s)]->key;
      fits = true;
    }
  }
  if (!fits) {
    why = "does not fit a key of this device";
    return false;
  }
  if (info.serial != serial || std::find(info.dns.begin(), info.dns.end(), id_) == info.dns.end() || info.uri.size() != 1 ||
      info.uri[0] != cert_user(id_, serial)) {
    why = "is not made out to this device, or with another serial than the message says";
    return false;
  }
  if (!crypto_.chain_ok(chain, roots_)) {
    why = "is not signed by whom this device trusts";
    return false;
  }
  out.key = key;
  out.chain = chain;
  out.serial = serial;
  out.not_before = info.not_before;
  return true;
}

// spare is the slot that a certificate for key may overwrite: never the one in use. On the fallback none is in use: there an
// empty one is best, then one with another key, so that the key that muster knows is never lost; then the older one.
Slot Vault::spare(const Bytes& key, Slot in_use) const {
  if (in_use != 0) return other(in_use);
  if (!ids_[0]) return 'a';
  if (!ids_[1]) return 'b';
  const bool a = crypto_.same_key(ids_[0]->key, key), b = crypto_.same_key(ids_[1]->key, key);
  if (a != b) return a ? 'b' : 'a';
  return ids_[0]->not_before > ids_[1]->not_before ? 'b' : 'a';
}

Slot Vault::keep(const Identity& id, Slot in_use) {
  const Slot to = spare(id.key, in_use);
  if (!store_.write(names::slot[at(to)], pack(id))) return 0;
  ids_[at(to)] = id;
  // From here on the key is in a slot. If the power goes before the next line, key_to_certify sees that, and makes a new one.
  store_.erase(names::pending);
  return to;
}

bool Vault::set_use(Slot s, bool proven) {
  if (use_ == s && proven_ == proven) return true;
  if (!store_.write(names::use, {static_cast<uint8_t>(s), static_cast<uint8_t>(proven)})) return false;
  use_ = s;
  proven_ = proven;
  return true;
}

bool Vault::take_bundle(const std::string& jws, Bundle& out, std::string& why) {
  if (!read_bundle(crypto_, trust_key_, jws, out, why)) return false;
  if (!follows(out, bundle_)) {
    why = "its version is not above the one that this device has";
    return false;
  }
  if (!store_.write(names::bundle, bytes(jws))) {
    why = "it cannot be stored";
    return false;
  }
  bundle_ = out.version;
  roots_ = out.roots;
  return true;
}

int64_t Vault::time_bound() const {
  int64_t t = clock_;
  for (const auto& id : ids_) {
    if (id) t = std::max(t, id->not_before);
  }
  return t;
}

bool Vault::set_clock(int64_t seconds) {
  if (seconds < clock_ + 3600) return true;  // once an hour, to spare the flash; never back
  Bytes b;
  for (int shift = 56; shift >= 0; shift -= 8) b.push_back(static_cast<uint8_t>(seconds >> shift));
  if (!store_.write(names::clock, b)) return false;
  clock_ = seconds;
  return true;
}

bool Vault::set_update(const Update& u) {
  JsonWriter w;
  w.text("job", u.job).text("image", u.image).text("file", u.file).text("failed", u.failed_file);
  if (!store_.write(names::update, bytes(w.done()))) return false;
  update_ = u;
  return true;
}

}  // namespace muster
