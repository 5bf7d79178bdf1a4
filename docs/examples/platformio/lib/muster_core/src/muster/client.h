// A device's conduct: what it says when, what it does on a message, which way in it takes. It is driven by events and acts
// through Platform, all in one thread; it starts nothing, waits for nothing and reads no clock but Platform's.
#pragma once

#include <map>
#include <string>

#include "muster/doors.h"
#include "muster/vault.h"
#include "muster/wire.h"

namespace muster {

// Facts are what the device knows of itself when it starts.
struct Facts {
  std::string version;   // of the firmware that runs
  std::string image;     // its appended SHA-256, hex
  std::string hardware;  // board revision
  std::string chip;      // esp32, esp32s3, ...
  std::string boot;      // why it started
  uint32_t secure_version = 0;
  int64_t revision = 0;      // of the silicon, x 100
  int64_t buffer = 0;        // largest MQTT packet that it receives
  size_t one_buffer = 0;     // size of a buffer that both ways share; 0: hello may be of any size
  int64_t slot_size = 0;     // of the next OTA partition, bytes
  std::string previous;      // image in the other slot; empty: none that can run
  uint32_t previous_secure_version = 0;
  std::string failed_image;  // image that the bootloader marked as failed; empty: none
  bool must_verify = false;  // the image that runs has to prove itself
};

// Platform does what Client decides. The calls must not call back into Client: results come as events of the main loop.
class Platform {
 public:
  virtual ~Platform() = default;
  virtual int64_t ms() = 0;  // monotonic
  virtual uint32_t random() = 0;
  virtual bool publish(const std::string& topic, const std::string& payload) = 0;  // QoS 1
  virtual void leave() = 0;                                                          // end the session politely; left() follows
  virtual void set_clock(int64_t seconds) = 0;
  virtual void confirm_image() = 0;  // tell the bootloader to keep what runs
  virtual void restart(const char* why) = 0;
  // HTTPS to muster: at the recovery address with the password, else with the certificate of the session.
  virtual void fetch_trust(bool recovery) = 0;                                   // trust_fetched follows
  virtual void fetch_manifest(const Offer& o, bool recovery) = 0;                // manifest_fetched follows
  virtual void fetch_image(const Offer& o, bool recovery, int64_t delay_ms) = 0;  // progressed, then downloaded follow
  virtual void stop_fetching() = 0;
  // install ends the write: it has the bootloader's own check done, signature included, and returns the image's appended
  // SHA-256. select makes the bootloader start that image next. select_previous does so with what the other slot holds.
  virtual bool install(std::string& image, std::string& why) = 0;
  virtual bool select(std::string& why) = 0;
  virtual bool select_previous(std::string& why) = 0;
  // command hears commands that are not muster's.
  virtual void command(const std::string& op) { (void)op; }
  virtual void log(const std::string& line) { (void)line; }
};

struct Timing {
  int64_t backoff_base_ms = 2000, backoff_cap_ms = 5 * 60 * 1000;
  int64_t answer_ms = 2 * 60 * 1000;          // until hello is said again; doubles up to an hour
  int64_t fallback_stay_ms = 10 * 60 * 1000;   // a session there that brings nothing ends
  int64_t verify_ms = 10 * 60 * 1000;         // a new image that muster has not answered within it is rolled back
  int64_t new_cert_pause_ms = 60 * 60 * 1000;  // before a certificate that did not work is tried again
};

class Client {
 public:
  Client(Vault& v, Crypto& c, Platform& p, Facts f, Policy policy = {}, Timing timing = {});

  Door next() const { return doors_.next(); }
  // failed takes an attempt that led to no session. It returns how long to wait before the next, in milliseconds.
  int64_t failed(Outcome o);
  void entered();  // connected and subscribed
  int64_t left();  // the session has ended; as failed

  void message(const std::string& topic, const std::string& payload);
  void tick();  // about every second
  void state(const std::string& json) { say("state", json); }

  void trust_fetched(const std::string& jws);     // empty: it could not be fetched
  void manifest_fetched(const std::string& jws);  // empty: as above
  void progressed(int percent);
  void downloaded(bool ok, const std::string& why, const Bytes& sha256);

  // A first certificate by EST: the platform fetches kEstCerts, posts the request to kEstEnroll with the enrolment password, and
  // hands both answers over. It tries again later if that brings nothing.
  bool enrols() const { return vault_.enrols(); }
  bool enrol_request(std::string& body);
  bool enrolled(const std::string& cacerts, const std::string& answer);

  bool online() const { return in_session_ && answered_ && !door_.fallback; }
  int64_t now() const;  // seconds since 1970; at least a lower bound

 private:
  bool say(const char* word, const std::string& payload);
  void hello();
  void report(const std::string& job, Step s, int percent = 0, const std::string& error = "");
  void after_restart();
  void commanded(const Cmd& c);
  void offered(const Offer& o);
  std::string refusal(const Offer& o) const;
  void load();
  void give_up(const std::string& why);
  void end_update();
  void boot_previous(const Cmd& c);
  void ordered(const CertOrder& o);
  void ask();
  void take(const CertOrder& o);
  bool take_again(const CertOrder& o);
  void use(Slot s, const std::string& serial);
  bool keep_password(const CertOrder& o);
  void confirm();

  Vault& vault_;
  Crypto& crypto_;
  Platform& p_;
  Facts facts_;
  Timing timing_;
  Doors doors_;
  int64_t started_;  // when this life began

  Door door_;  // of the session, or of the last attempt
  bool in_session_ = false, answered_ = false, stored_ = false, leaving_ = false, helloed_ = false, confirmed_ = false;
  int failures_ = 0, alerts_ = 0;
  int64_t told_ = 0, told_at_ = 0;  // muster's time, and when it said so
  int64_t ask_at_ = 0, hello_at_ = 0, patience_ = 0, ends_at_ = 0, try_at_ = 0;  // 0: never
  Slot try_slot_ = 0;
  Assembler slices_;
  bool updating_ = false;
  Offer offer_;
  Manifest manifest_;
  std::map<std::string, int64_t> useless_;  // certificates that did not work, and when
};

}  // namespace muster
