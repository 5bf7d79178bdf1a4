// What the device knows of itself: endpoints, two certificate slots, two passwords, the trust bundle, the update under way.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "muster/doors.h"
#include "muster/jws.h"
#include "muster/port.h"

namespace muster {

// Names in the store. The factory writes those of the first group, once; the device writes the others. docs/examples says what
// is in each.
namespace names {
constexpr const char* id = "id";
constexpr const char* mqtt = "mqtt";            // host:port
constexpr const char* fallback = "fb_mqtt";     // host:port
constexpr const char* https = "https";          // host:port
constexpr const char* recovery = "rec_https";   // host:port
constexpr const char* roots = "roots";          // PEM
constexpr const char* trust_key = "trust_key";  // PEM
constexpr const char* release_keys = "rel_keys";  // PEM, up to two; may be absent
constexpr const char* cert = "cert";            // PEM, leaf and intermediate; absent together with the key
constexpr const char* key = "key";              // PEM
constexpr const char* password = "fb_pw";
constexpr const char* enrol = "enrol_pw";  // for the first certificate

constexpr const char* slot[2] = {"slot_a", "slot_b"};
constexpr const char* pw[2] = {"pw_a", "pw_b"};
constexpr const char* pending = "pending";  // a key for which there is no certificate yet
constexpr const char* use = "use";
constexpr const char* bundle = "bundle";
constexpr const char* clock = "clock";
constexpr const char* update = "update";
}  // namespace names

// Identity is a certificate slot that can be used.
struct Identity {
  Bytes key;                 // DER
  std::vector<Bytes> chain;  // leaf, then intermediate; DER
  std::string serial;
  int64_t not_before = 0;
};

struct Password {
  Slot slot = 0;
  std::string text;
  uint32_t seq = 0;
};

// Update is what must be known of an update after the restart.
struct Update {
  std::string job;          // to report to; empty when there is nothing left to say
  std::string image;        // appended SHA-256 of the image that was selected, hex
  std::string file;         // SHA-256 of its file, hex: how offers name it
  std::string failed_file;  // file of the image that was rolled back last: it is not taken again
};

// Vault reads and writes them. Each write is one value of the Store, so a power cut leaves the old or the new.
class Vault {
 public:
  Vault(Store& s, Crypto& c) : store_(s), crypto_(c) {}

  // load reads everything, once in a life; false with a reason if the device was never provisioned.
  bool load(std::string& why);

  const std::string& id() const { return id_; }
  std::string endpoint(const char* name) const;
  const std::vector<Bytes>& roots() const { return roots_; }
  int64_t bundle() const { return bundle_; }
  bool takes_bundles() const { return !trust_key_.empty(); }
  const std::vector<Bytes>& release_keys() const { return release_keys_; }

  // take_bundle checks a signed bundle and stores it, if its version is above the one here.
  bool take_bundle(const std::string& jws, Bundle& out, std::string& why);

  const Identity* identity(Slot s) const;
  std::vector<Slot> preferred() const;  // slots in the order of trying: the one in use, then the newer
  std::vector<Slot> passwords() const;  // newest first
  std::string password(Slot s) const;
  // enrols says that the device has no certificate, and a password with which to get its first.
  bool enrols() const { return !ids_[0] && !ids_[1] && !enrol_.empty(); }
  const std::string& enrol_password() const { return enrol_; }
  bool add_password(const std::string& pw, Slot opened);

  // key_to_certify returns the key for which to ask. At the front it is a new key, made and stored before it is used, the same
  // one until it has a certificate. On the fallback it is the newest that muster knows, because that needs no operator.
  bool key_to_certify(bool fallback, Bytes& key);

  // judge checks a certificate before it takes a slot: that it fits a key of this device, names it, and was signed by whom it
  // trusts.
  bool judge(const std::string& serial, const std::vector<Bytes>& chain, Identity& out, std::string& why);
  // keep writes it to the slot that is not in use (0 on the fallback), and returns which that is; 0 if it cannot be stored.
  Slot keep(const Identity& id, Slot in_use);
  bool set_use(Slot s, bool proven);
  bool proven(Slot s) const { return use_ == s && proven_; }

  int64_t time_bound() const;  // the earliest that it can be now, seconds since 1970
  bool set_clock(int64_t seconds);

  const Update& update() const { return update_; }
  bool set_update(const Update& u);

 private:
  std::string text(const char* name) const;
  Slot spare(const Bytes& key, Slot in_use) const;
  bool load_slot(Slot s);
  bool load_trust(std::string& why);

  Store& store_;
  Crypto& crypto_;
  std::string id_, enrol_;
  std::vector<Bytes> roots_, release_keys_;
  Bytes trust_key_;
  int64_t bundle_ = 0, clock_ = 0;
  std::optional<Identity> ids_[2];
  std::vector<Password> passwords_;
  Slot use_ = 0;
  bool proven_ = false;
  Update update_;
};

}  // namespace muster
