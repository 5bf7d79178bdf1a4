#include "muster/client.h"

#include <algorithm>

#include "muster/download.h"
#include "muster/est.h"
#include "muster/jws.h"
#include "muster/text.h"

namespace muster {

Client::Client(Vault& v, Crypto& c, Platform& p, Facts f, Policy policy, Timing timing)
    : vault_(v), crypto_(c), p_(p), facts_(std::move(f)), timing_(timing), doors_(policy, v.preferred(), v.passwords()), started_(p.ms()) {}

int64_t Client::now() const {
  const int64_t bound = vault_.time_bound();
  return told_ == 0 ? bound : std::max(bound, told_ + (p_.ms() - told_at_) / 1000);
}

// ---- the way in

int64_t Client::failed(Outcome o) {
  door_ = doors_.next();
  // mbedTLS tells that there was an alert, not which. One alone may be the other side's trouble.
  alerts_ = o == Outcome::refused ? alerts_ + 1 : 0;
  if (o == Outcome::refused && alerts_ < 2) o = Outcome::unreachable;
  const Identity* id = door_.fallback ? nullptr : vault_.identity(door_.slot);
  if (id != nullptr && (o == Outcome::refused || (o == Outcome::denied && !vault_.proven(door_.slot)))) useless_[id->serial] = p_.ms();
  if (o == Outcome::refused) alerts_ = 0;
  if (doors_.note(p_.ms(), door_, o)) p_.log("goes to the fallback");
  return backoff_ms(failures_++, timing_.backoff_base_ms, timing_.backoff_cap_ms, p_.random());
}

void Client::entered() {
  door_ = doors_.next();
  doors_.note(p_.ms(), door_, Outcome::opened);
  in_session_ = true;
  answered_ = stored_ = leaving_ = helloed_ = updating_ = false;
  alerts_ = 0;
  ask_at_ = try_at_ = 0;
  slices_.clear();
  patience_ = timing_.answer_ms;
  ends_at_ = door_.fallback ? p_.ms() + timing_.fallback_stay_ms : 0;
  // The broker has accepted this certificate: only now may the other slot be overwritten.
  if (!door_.fallback) vault_.set_use(door_.slot, true);
  hello();
  if (door_.fallback) {
    ask();
  } else {
    after_restart();
  }
}

int64_t Client::left() {
  if (!in_session_) return failed(Outcome::unreachable);
  in_session_ = false;
  p_.stop_fetching();
  updating_ = false;
  if (door_.fallback && !stored_) doors_.note(p_.ms(), door_, Outcome::barren);
  if (stored_) return 0;  // a new certificate waits to be used
  if (answered_ && !door_.fallback) failures_ = 0;
  return backoff_ms(failures_++, timing_.backoff_base_ms, timing_.backoff_cap_ms, p_.random());
}

// ---- saying

bool Client::say(const char* word, const std::string& payload) { return in_session_ && p_.publish(up_topic(vault_.id(), word), payload); }

void Client::hello() {
  Hello h;
  h.version = facts_.version;
  h.image = facts_.image;
  h.hardware = facts_.hardware;
  h.chip = facts_.chip;
  h.secure_version = facts_.secure_version;
  h.boot = facts_.boot;
  h.buffer = facts_.buffer;
  h.bundle = vault_.bundle();
  h.revision = facts_.revision;
  h.previous = facts_.previous;
  h.previous_secure_version = facts_.previous.empty() ? 0 : facts_.previous_secure_version;
  const Identity* id = door_.fallback ? nullptr : vault_.identity(door_.slot);
  if (id != nullptr) h.serial = id->serial;
  say("hello", encode_hello(vault_.id(), h, facts_.one_buffer));
  hello_at_ = answered_ ? 0 : p_.ms() + patience_;
}

void Client::report(const std::string& job, Step s, int percent, const std::string& error) {
  if (!door_.fallback && !job.empty()) say("ota", encode_ota(job, s, percent, error));  // the fallback carries hello and cert alone
}

// after_restart says what became of an update.
void Client::after_restart() {
  Update u = vault_.update();
  if (u.job.empty()) return;
  if (u.image == facts_.image) {
    if (facts_.must_verify && !confirmed_) report(u.job, Step::verifying);
    return;  // confirm clears the job
  }
  if (u.image == facts_.failed_image) {
    report(u.job, Step::rolled_back, 0, "the image did not prove itself");
    u.failed_file = u.file;
  } else {
    report(u.job, Step::failed, 0, "interrupted before the new image was selected");
  }
  u.job.clear();
  u.file.clear();
  vault_.set_update(u);
}

// ---- hearing

void Client::message(const std::string& topic, const std::string& payload) {
  if (!in_session_) return;
  if (topic == down_topic(vault_.id(), "cmd")) {
    Cmd c;
    return decode_cmd(payload, c) ? commanded(c) : p_.log("dn/cmd: not understood");
  }
  if (topic == down_topic(vault_.id(), "ota")) {
    Offer o;
    return decode_offer(payload, o) ? offered(o) : p_.log("dn/ota: not understood");
  }
  if (topic == down_topic(vault_.id(), "cert")) {
    CertOrder o;
    return decode_cert_order(payload, o) ? ordered(o) : p_.log("dn/cert: not understood");
  }
  p_.log("a topic that is not this device's");
}

void Client::tick() {
  const int64_t t = p_.ms();
  if (facts_.must_verify && !confirmed_ && t - started_ >= timing_.verify_ms) {
    started_ = t;
    p_.log("this image did not reach muster: the bootloader takes the old one");
    p_.restart("rollback");  // without confirm_image the bootloader goes back
    return;
  }
  if (!in_session_) return;
  if (hello_at_ != 0 && t >= hello_at_ && !answered_) {
    patience_ = std::min<int64_t>(2 * patience_, 60 * 60 * 1000);
    hello();
  }
  if (ask_at_ != 0 && t >= ask_at_) {
    ask_at_ = 0;
    ask();
  }
  if (try_at_ != 0 && t >= try_at_) {
    try_at_ = 0;
    const Identity* id = vault_.identity(try_slot_);
    if (id != nullptr) use(try_slot_, id->serial);
  }
  if (ends_at_ != 0 && t >= ends_at_) {
    if (updating_) {
      ends_at_ = t + timing_.fallback_stay_ms;  // it loads an image
    } else {
      p_.leave();
    }
  }
}

void Client::commanded(const Cmd& c) {
  if (c.op == "hello") {
    answered_ = true;
    hello_at_ = 0;
    if (c.time > vault_.time_bound()) {
      told_ = c.time;
      told_at_ = p_.ms();
      vault_.set_clock(c.time);
      p_.set_clock(c.time);
    }
    if (!door_.fallback) confirm();
  } else if (c.op == "trust") {
    if (c.bundle > vault_.bundle() && vault_.takes_bundles()) p_.fetch_trust(door_.fallback);
  } else if (c.op == "reboot") {
    p_.restart("commanded");
  } else if (c.op == "boot-previous-slot") {
    boot_previous(c);
  } else if (c.op == "report") {
    hello();
  } else {
    p_.command(c.op);
  }
}

// confirm: muster has answered over the certificate, so this image can reach it. Only then may the bootloader keep it.
void Client::confirm() {
  if (confirmed_) return;
  confirmed_ = true;
  if (facts_.must_verify) p_.confirm_image();
  Update u = vault_.update();
  if (!u.job.empty() && u.image == facts_.image) {
    u.job.clear();
    vault_.set_update(u);
  }
}

void Client::trust_fetched(const std::string& jws) {
  Bundle b;
  std::string why = "it could not be fetched";
  if (jws.empty() || !vault_.take_bundle(jws, b, why)) {
    p_.log("trust bundle: " + why);  // the next hello brings the word again
    return;
  }
  if (b.time > now()) {  // signed, so it is a lower bound of the time
    told_ = b.time;
    told_at_ = p_.ms();
    vault_.set_clock(b.time);
  }
  hello();
}

// ---- updates

void Client::offered(const Offer& o) {
  if (updating_ && offer_.job == o.job && offer_.sha256 == o.sha256) return;  // messages come at least once
  if (!door_.fallback) confirm();                                              // whoever offers an update has heard the hello
  const std::string file = hex(o.sha256.data(), o.sha256.size());
  const Update& u = vault_.update();
  if (file == facts_.image || (file == u.file && u.image == facts_.image)) {  // it runs already
    if (!helloed_) hello();
    helloed_ = true;
    return;
  }
  const std::string why = refusal(o);
  if (!why.empty()) return report(o.job, Step::rejected, 0, why);
  p_.stop_fetching();
  updating_ = true;
  offer_ = o;
  manifest_ = Manifest();
  report(o.job, Step::accepted);
  if (!vault_.release_keys().empty()) return p_.fetch_manifest(o, door_.fallback);
  load();
}

// load begins the download. It overwrites the other slot, so what was there can no longer be booted.
void Client::load() {
  facts_.previous.clear();
  p_.fetch_image(offer_, door_.fallback, offer_.spread == 0 ? 0 : p_.random() % (offer_.spread * 1000));
}

std::string Client::refusal(const Offer& o) const {
  if (hex(o.sha256.data(), o.sha256.size()) == vault_.update().failed_file) return "this image was rolled back here before";
  if (facts_.slot_size > 0 && o.size > facts_.slot_size) return "larger than the slot of " + std::to_string(facts_.slot_size) + " bytes";
  return "";
}

// manifest_fetched: the release key must say the same as the offer. So nobody who took muster over can send an image that
// was never released.
void Client::manifest_fetched(const std::string& jws) {
  if (!updating_) return;
  std::string why = "the manifest could not be fetched";
  if (jws.empty() || !read_manifest(crypto_, vault_.release_keys(), jws, manifest_, why)) return give_up("manifest: " + why);
  if (manifest_.sha256 != hex(offer_.sha256.data(), offer_.sha256.size()) || manifest_.size != offer_.size || manifest_.version != offer_.version) {
    return give_up("the signed manifest is of another image");
  }
  if (!manifest_.chip.empty() && manifest_.chip != facts_.chip) return give_up("the image is for " + manifest_.chip);
  if (manifest_.secure_version < static_cast<int64_t>(facts_.secure_version)) return give_up("its secure version is below the one in the eFuses");
  load();
}

void Client::progressed(int percent) {
  if (updating_) report(offer_.job, Step::downloading, percent);
}

void Client::downloaded(bool ok, const std::string& why, const Bytes& sha256) {
  if (!updating_) return;
  if (!ok) return give_up(why);
  if (sha256 != offer_.sha256) return give_up("SHA-256 differs");
  report(offer_.job, Step::downloaded, 100);
  Update u = vault_.update();
  std::string reason;
  if (!p_.install(u.image, reason)) return give_up(reason);
  if (!manifest_.image_hash.empty() && manifest_.image_hash != u.image) return give_up("the signed manifest names another image hash");
  u.job = offer_.job;
  u.file = hex(sha256.data(), sha256.size());
  // Stored before the bootloader is told: after_restart tells apart whether the image failed or was never started.
  if (!vault_.set_update(u)) return give_up("the flash takes nothing");
  if (!p_.select(reason)) return give_up(reason);
  report(u.job, Step::installed);
  report(u.job, Step::rebooting);
  p_.restart("update");
}

void Client::give_up(const std::string& why) {
  report(offer_.job, Step::failed, 0, why);
  end_update();
}

void Client::end_update() {
  p_.stop_fetching();
  updating_ = false;
  if (leaving_) p_.leave();
}

void Client::boot_previous(const Cmd& c) {
  const std::string want = hex(c.image.data(), c.image.size());
  if (!c.job.empty() && want == facts_.image) {  // done before, or always so: hello is the proof
    if (!helloed_) hello();
    helloed_ = true;
    return;
  }
  std::string why;
  if (facts_.previous.empty()) {
    why = "there is no image in the other slot";
  } else if (!c.job.empty() && want != facts_.previous) {
    why = "the other slot holds another image";
  } else if (facts_.previous_secure_version < facts_.secure_version) {
    why = "the secure version of the other slot is below the one in the eFuses";
  }
  if (why.empty() && !c.job.empty()) {
    report(c.job, Step::accepted);
    Update u = vault_.update();
    u.job = c.job;
    u.image = facts_.previous;
    u.file.clear();
    vault_.set_update(u);
  }
  if (!why.empty() || !p_.select_previous(why)) return report(c.job, Step::rejected, 0, why);
  report(c.job, Step::rebooting);
  p_.restart("commanded");
}

// ---- certificates

void Client::ordered(const CertOrder& o) {
  CertOrder whole;
  switch (o.op) {
    case CertOrder::Op::renew:
      ask();
      ask_at_ = o.retry > 0 ? p_.ms() + o.retry * 1000 : 0;
      return;
    case CertOrder::Op::part:
      switch (slices_.add(crypto_, o, whole)) {
        case Assembler::Result::more: return;
        case Assembler::Result::bad: return p_.log("dn/cert: the slices are not those of one certificate");
        case Assembler::Result::done: return take(whole);
      }
      return;
    case CertOrder::Op::cert: return take(o);
    case CertOrder::Op::no:
      p_.log("no certificate: " + o.why);
      ask_at_ = o.retry > 0 ? p_.ms() + o.retry * 1000 : 0;
      if (o.retry == 0 && door_.fallback) p_.leave();
      return;
  }
}

void Client::ask() {
  Bytes key, csr;
  if (!vault_.key_to_certify(door_.fallback, key) || !crypto_.make_csr(key, vault_.id(), csr)) {
    say("cert", encode_cert_error("a key could not be made or stored"));
    return;
  }
  say("cert", encode_csr(csr));
}

void Client::take(const CertOrder& o) {
  if (take_again(o)) return;
  Identity id;
  std::string why;
  if (!vault_.judge(o.serial, o.chain, id, why)) {
    say("cert", encode_cert_error(why));
    return;
  }
  // The password first: if the power goes between the two, both passwords still work.
  const Slot to = keep_password(o) ? vault_.keep(id, door_.fallback ? Slot(0) : door_.slot) : Slot(0);
  if (to == 0) {
    say("cert", encode_cert_error("the flash takes nothing"));
    return;
  }
  use(to, o.serial);
}

bool Client::enrol_request(std::string& body) {
  Bytes key, csr;
  if (!vault_.key_to_certify(false, key) || !crypto_.make_csr(key, vault_.id(), csr)) return false;
  body = base64(csr.data(), csr.size());
  return true;
}

// enrolled takes the first certificate. The answer holds it alone; the intermediate is among the certificates of the CA.
bool Client::enrolled(const std::string& cacerts, const std::string& answer) {
  std::vector<Bytes> chain, above;
  std::string why = "the answer holds no certificate";
  Identity id;
  CertInfo info;
  if (!read_est_certs(answer, chain) || !read_est_certs(cacerts, above) || !crypto_.cert_info(chain[0], info)) {
    p_.log("enrolment: " + why);
    return false;
  }
  chain.resize(1);
  for (const Bytes& one : above) {
    if (std::find(vault_.roots().begin(), vault_.roots().end(), one) == vault_.roots().end()) chain.push_back(one);
  }
  why = "the flash takes nothing";
  const Slot to = vault_.judge(info.serial, chain, id, why) ? vault_.keep(id, Slot(0)) : Slot(0);
  if (to == 0) {
    p_.log("enrolment: " + why);
    return false;
  }
  vault_.set_use(to, false);
  doors_.stored(to);
  return true;
}

// take_again handles a certificate that is in a slot already: messages come at least once.
bool Client::take_again(const CertOrder& o) {
  for (Slot s : {'a', 'b'}) {
    const Identity* id = vault_.identity(s);
    if (id == nullptr || id->chain[0] != o.chain[0]) continue;
    const Identity* mine = door_.fallback ? nullptr : vault_.identity(door_.slot);
    if (mine != nullptr && (s == door_.slot || id->not_before < mine->not_before)) {  // in use, or older
      say("cert", encode_stored(id->serial));
      return true;
    }
    keep_password(o);
    const auto bad = useless_.find(id->serial);
    if (bad != useless_.end() && p_.ms() - bad->second < timing_.new_cert_pause_ms) {
      if (!door_.fallback) {
        try_slot_ = s;
        try_at_ = bad->second + timing_.new_cert_pause_ms;
      }
      say("cert", encode_cert_error("stored before, but the broker does not accept it"));
      return true;
    }
    use(s, id->serial);
    return true;
  }
  return false;
}

bool Client::keep_password(const CertOrder& o) {
  if (!door_.fallback || o.password.empty()) return true;
  if (!vault_.add_password(o.password, door_.slot)) return false;
  doors_.set_passwords(vault_.passwords());
  return true;
}

// use says that the certificate is stored and ends the session: the next one uses it. A download on the fallback is brought to
// its end before: the image may be what the front needs.
void Client::use(Slot s, const std::string& serial) {
  vault_.set_use(s, false);
  doors_.stored(s);
  stored_ = true;
  say("cert", encode_stored(serial));
  if (door_.fallback && updating_) {
    leaving_ = true;
    return;
  }
  p_.leave();
}

}  // namespace muster
