// The portable part of the example on a desk: a program that plays a device whose radio, flash and bootloader are the lines on
// its standard input and output. muster's own tests drive it (test/esp32client). One command a line, words separated by a space,
// bytes in hex with - for none; the answer ends with a line that holds a dot.
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>

#include "muster/client.h"
#include "muster/download.h"
#include "muster/mbedtls_crypto.h"
#include "muster/text.h"

using namespace muster;

namespace {

using Words = std::vector<std::string>;

Bytes unhex(const std::string& s) {
  Bytes b;
  if (s != "-" && !hex_decode(s, b)) {
    std::cerr << "not hex: " << s << "\n";
    std::exit(2);
  }
  return b;
}

std::string unhex_text(const std::string& s) {
  const Bytes b = unhex(s);
  return std::string(b.begin(), b.end());
}

std::string text_hex(const std::string& s) { return s.empty() ? "-" : hex(reinterpret_cast<const uint8_t*>(s.data()), s.size()); }

// MemoryStore is a flash whose power can be cut at a write.
class MemoryStore : public Store {
 public:
  bool read(const char* name, Bytes& out) override {
    const auto it = values_.find(name);
    if (it == values_.end()) return false;
    out = it->second;
    return true;
  }
  bool write(const char* name, const Bytes& value) override {
    if (!powered()) return false;
    values_[name] = value;
    return true;
  }
  bool erase(const char* name) override {
    if (!powered()) return false;
    values_.erase(name);
    return true;
  }
  void put(const std::string& name, const Bytes& value) { values_[name] = value; }
  void cut_after(long writes) { left_ = writes; }
  long writes() const { return writes_; }
  bool off() const { return left_ == 0 && cut_; }
  void power_on() {
    left_ = -1;
    cut_ = false;
  }

 private:
  bool powered() {
    if (left_ == 0) {
      cut_ = true;
      return false;
    }
    if (left_ > 0) left_--;
    writes_++;
    return true;
  }
  std::map<std::string, Bytes> values_;
  long left_ = -1, writes_ = 0;
  bool cut_ = false;
};

// LinePlatform prints what the device does. A device without power does nothing.
class LinePlatform : public Platform {
 public:
  explicit LinePlatform(MemoryStore& s) : store_(s) {}
  int64_t ms() override { return ms_; }
  uint32_t random() override { return random_; }
  bool publish(const std::string& topic, const std::string& payload) override {
    line("publish " + topic + " " + text_hex(payload));
    return !store_.off();
  }
  void leave() override { line("leave"); }
  void set_clock(int64_t s) override { line("clock " + std::to_string(s)); }
  void confirm_image() override { line("confirm"); }
  void restart(const char* why) override { line(std::string("restart ") + why); }
  void fetch_trust(bool r) override { line(std::string("fetch-trust ") + (r ? "recovery" : "device")); }
  void fetch_manifest(const Offer& o, bool r) override { line("fetch-manifest " + o.path + (r ? " recovery" : " device")); }
  void fetch_image(const Offer& o, bool r, int64_t delay) override {
    line("fetch-image " + o.path + (r ? " recovery " : " device ") + std::to_string(delay));
  }
  void stop_fetching() override {}
  bool install(std::string& image, std::string& why) override {
    image = installs_;
    why = "the bootloader refuses the image";
    line("install");
    return !installs_.empty();
  }
  bool select(std::string&) override {
    line("select");
    return true;
  }
  bool select_previous(std::string&) override {
    line("select-previous");
    return true;
  }
  void command(const std::string& op) override { line("command " + op); }
  void log(const std::string& text) override { line("log " + text); }

  int64_t ms_ = 1000;
  uint32_t random_ = 0;
  std::string installs_;

 private:
  void line(const std::string& s) {
    if (!store_.off()) std::cout << s << "\n";
  }
  MemoryStore& store_;
};

struct Desk {
  MbedtlsCrypto crypto;
  MemoryStore store;
  LinePlatform platform{store};
  Facts facts;
  Policy policy;
  std::unique_ptr<Vault> vault;
  std::unique_ptr<Client> client;
  std::unique_ptr<Download> download;
};

template <typename T, typename F>
void decode(const std::string& hex_text, F f) {
  T v;
  if (f(unhex_text(hex_text), v)) {
    std::cout << "ok " << text_hex(encode_again(v)) << "\n";
  } else {
    std::cout << "refused\n";
  }
}

void verdict(Download& d, Download::Verdict v) {
  static const char* const words[] = {"take", "restart", "wait", "fail"};
  std::cout << words[static_cast<int>(v)] << " " << d.have() << " " << d.wait_ms() << " " << text_hex(d.range()) << "\n";
}

Outcome outcome(const std::string& s) { return s == "refused" ? Outcome::refused : s == "denied" ? Outcome::denied : Outcome::unreachable; }

bool codec(Desk& d, const Words& w) {
  if (w[0] == "decode") {
    if (w[1] == "cmd") decode<Cmd>(w[2], decode_cmd);
    if (w[1] == "offer") decode<Offer>(w[2], decode_offer);
    if (w[1] == "cert-order") decode<CertOrder>(w[2], decode_cert_order);
  } else if (w[0] == "ota") {  // job step percent error
    std::cout << text_hex(encode_ota(w[1], static_cast<Step>(std::stoi(w[2])), std::stoi(w[3]), unhex_text(w[4]))) << "\n";
  } else if (w[0] == "bundle" || w[0] == "manifest") {  // key jws
    std::string why;
    Bundle b;
    Manifest m;
    const bool ok = w[0] == "bundle" ? read_bundle(d.crypto, unhex(w[1]), unhex_text(w[2]), b, why) : read_manifest(d.crypto, {unhex(w[1])}, unhex_text(w[2]), m, why);
    if (!ok) {
      std::cout << "refused " << why << "\n";
    } else if (w[0] == "bundle") {
      std::cout << "ok " << b.version << " " << b.time << " " << b.roots.size() << "\n";
    } else {
      std::cout << "ok " << m.product << " " << m.version << " " << m.size << " " << m.sha256 << "\n";
    }
  } else {
    return false;
  }
  return true;
}

bool downloads(Desk& d, const Words& w) {
  if (w[0] == "download") {
    d.download = std::make_unique<Download>(std::stoll(w[1]));
  } else if (w[0] == "answer") {  // status length range retry-after
    verdict(*d.download, d.download->answer({std::stoi(w[1]), std::stoll(w[2]), unhex_text(w[3]), std::stoll(w[4])}, 0));
  } else if (w[0] == "took") {
    d.download->took(std::stoll(w[1]));
  } else if (w[0] == "broke") {
    verdict(*d.download, d.download->broke(0));
  } else {
    return false;
  }
  return true;
}

void boot(Desk& d) {
  d.store.power_on();
  d.client.reset();
  d.vault = std::make_unique<Vault>(d.store, d.crypto);
  std::string why;
  if (!d.vault->load(why)) {
    std::cout << "unprovisioned " << why << "\n";
    return;
  }
  d.client = std::make_unique<Client>(*d.vault, d.crypto, d.platform, d.facts, d.policy);
}

bool fact(Desk& d, const Words& w) {
  Facts& f = d.facts;
  if (w[0] != "fact") return false;
  const std::string v = unhex_text(w[2]);
  std::map<std::string, std::string*> texts{{"v", &f.version}, {"img", &f.image}, {"hw", &f.hardware}, {"chip", &f.chip}, {"boot", &f.boot}, {"prev", &f.previous}, {"failed", &f.failed_image}};
  if (texts.count(w[1]) != 0) *texts[w[1]] = v;
  if (w[1] == "buf") f.buffer = std::stoll(v);
  if (w[1] == "one") f.one_buffer = static_cast<size_t>(std::stoul(v));
  if (w[1] == "rev") f.revision = std::stoll(v);
  if (w[1] == "sv") f.secure_version = static_cast<uint32_t>(std::stoul(v));
  if (w[1] == "psv") f.previous_secure_version = static_cast<uint32_t>(std::stoul(v));
  if (w[1] == "slot") f.slot_size = std::stoll(v);
  if (w[1] == "verify") f.must_verify = v == "1";
  if (w[1] == "installs") d.platform.installs_ = v;
  return true;
}

bool device(Desk& d, const Words& w) {
  if (w[0] == "put") {  // name value: what the factory writes
    d.store.put(w[1], unhex(w[2]));
  } else if (w[0] == "cut") {
    d.store.cut_after(std::stol(w[1]));
  } else if (w[0] == "writes") {
    std::cout << d.store.writes() << "\n";
  } else if (w[0] == "boot") {
    boot(d);
  } else if (d.client == nullptr) {
    return false;
  } else if (w[0] == "next") {
    const Door door = d.client->next();
    const Identity* id = door.fallback || door.slot == 0 ? nullptr : d.vault->identity(door.slot);
    std::cout << (door.fallback ? "fallback " : "devices ") << (door.fallback ? d.vault->password(door.slot) : id != nullptr ? id->serial : "-") << "\n";
  } else if (w[0] == "failed") {
    d.client->failed(outcome(w[1]));
  } else if (w[0] == "entered") {
    d.client->entered();
  } else if (w[0] == "left") {
    std::cout << "again " << (d.client->left() == 0 ? "now" : "later") << "\n";
  } else if (w[0] == "message") {  // topic payload
    d.client->message(w[1], unhex_text(w[2]));
  } else if (w[0] == "pass") {  // milliseconds
    d.platform.ms_ += std::stoll(w[1]);
    d.client->tick();
  } else if (w[0] == "random") {
    d.platform.random_ = static_cast<uint32_t>(std::stoul(w[1]));
  } else if (w[0] == "trust") {
    d.client->trust_fetched(unhex_text(w[1]));
  } else if (w[0] == "signed") {
    d.client->manifest_fetched(unhex_text(w[1]));
  } else if (w[0] == "progress") {
    d.client->progressed(std::stoi(w[1]));
  } else if (w[0] == "downloaded") {  // 1 sha256, or 0 why
    d.client->downloaded(w[1] == "1", w[1] == "1" ? "" : unhex_text(w[2]), w[1] == "1" ? unhex(w[2]) : Bytes());
  } else if (w[0] == "enrol-request") {
    std::string body;
    std::cout << (d.client->enrols() && d.client->enrol_request(body) ? text_hex(body) : "none") << "\n";
  } else if (w[0] == "enrolled") {  // cacerts answer
    std::cout << (d.client->enrolled(unhex_text(w[1]), unhex_text(w[2])) ? "yes" : "no") << "\n";
  } else if (w[0] == "now") {
    std::cout << d.client->now() << "\n";
  } else if (w[0] == "state") {
    d.client->state(unhex_text(w[1]));
  } else {
    return false;
  }
  return true;
}

}  // namespace

int main() {
  Desk desk;
  if (!desk.crypto.ready()) return 2;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    Words w;
    for (std::string word; in >> word;) w.push_back(word);
    w.resize(w.size() < 6 ? 6 : w.size(), "-");
    if (!codec(desk, w) && !downloads(desk, w) && !fact(desk, w) && !device(desk, w)) std::cout << "what?\n";
    std::cout << (desk.store.off() ? "off\n.\n" : ".\n") << std::flush;
  }
  return 0;
}
