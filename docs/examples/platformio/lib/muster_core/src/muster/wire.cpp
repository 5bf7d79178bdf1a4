#include "muster/wire.h"

#include "muster/json.h"
#include "muster/text.h"

namespace muster {
namespace {

constexpr size_t kMaxJob = 24, kTag = 8;
constexpr int64_t kMaxSlices = 999, kMaxSpread = 900;

const char* word(Step s) {
  switch (s) {
    case Step::accepted: return "accepted";
    case Step::downloading: return "downloading";
    case Step::downloaded: return "downloaded";
    case Step::installed: return "installed";
    case Step::rebooting: return "rebooting";
    case Step::verifying: return "verifying";
    case Step::failed: return "failed";
    case Step::rejected: return "rejected";
    case Step::rolled_back: return "rolled-back";
  }
  return "failed";
}

bool blob(const Field& f, Bytes& out) { return !f.seen || (base64_decode(*f.text, out) && !out.empty()); }

bool path_ok(const std::string& p) {
  if (!is_plain(p) || p.empty() || p[0] != '/' || (p.size() > 1 && p[1] == '/')) return false;
  return p.find(' ') == std::string::npos && p.find('\\') == std::string::npos;
}

}  // namespace

std::string up_topic(const std::string& id, const char* w) { return "d/" + id + "/up/" + w; }
std::string down_topic(const std::string& id, const char* w) { return "d/" + id + "/dn/" + w; }
std::string down_filter(const std::string& id) { return "d/" + id + "/dn/#"; }
std::string cert_user(const std::string& id, const std::string& serial) { return "urn:muster:device:" + id + ":" + serial; }

std::string encode_hello(const std::string& id, Hello h, size_t one_buffer) {
  for (;;) {
    JsonWriter w;
    w.text("v", h.version).text("img", h.image);
    if (!h.hardware.empty()) w.text("hw", h.hardware);
    if (!h.chip.empty()) w.text("chip", h.chip);
    if (h.secure_version != 0) w.number("sv", h.secure_version);
    if (!h.boot.empty()) w.text("boot", h.boot);
    if (!h.serial.empty()) w.text("ser", h.serial);
    if (h.buffer != 0) w.number("buf", h.buffer);
    if (h.bundle != 0) w.number("tb", h.bundle);
    if (h.revision != 0) w.number("rev", h.revision);
    if (!h.previous.empty()) w.text("prev", h.previous);
    if (h.previous_secure_version != 0) w.number("psv", h.previous_secure_version);
    const std::string out = w.done();
    if (h.previous.empty() || one_buffer == 0 || 7 + up_topic(id, "hello").size() + out.size() <= one_buffer) return out;
    h.previous.clear();
    h.previous_secure_version = 0;
  }
}

std::string encode_ota(const std::string& job, Step step, int percent, const std::string& error) {
  JsonWriter w;
  w.text("job", job).text("step", word(step));
  if (percent != 0) w.number("pct", percent);
  if (!error.empty()) w.text("err", cut(error));
  return w.done();
}

std::string encode_csr(const Bytes& csr) { return JsonWriter().text("csr", base64(csr.data(), csr.size())).done(); }
std::string encode_stored(const std::string& serial) { return JsonWriter().text("ok", serial).done(); }
std::string encode_cert_error(const std::string& why) { return JsonWriter().text("err", cut(why)).done(); }

bool decode_offer(const std::string& payload, Offer& out) {
  out = Offer();
  std::string sha;
  std::vector<Field> f{{"job", out.job}, {"v", out.version}, {"n", out.size}, {"sha", sha}, {"p", out.path}, {"in", out.spread}};
  return payload.size() <= kMaxPayload && json_read(payload, f) && is_label(out.job, kMaxJob) && !out.version.empty() && is_plain(out.version) &&
         out.size >= 1 && base64_decode(sha, out.sha256) && out.sha256.size() == 32 && path_ok(out.path) && out.spread >= 0 && out.spread <= kMaxSpread;
}

bool decode_cert_order(const std::string& payload, CertOrder& out) {
  out = CertOrder();
  std::string op, data;
  std::vector<std::string> chain;
  std::vector<Field> f{{"op", op},        {"ser", out.serial}, {"crt", chain}, {"pw", out.password}, {"t", out.tag},  {"i", out.index},
                       {"of", out.count}, {"d", data},         {"why", out.why}, {"in", out.retry},    {"by", out.by}};
  if (payload.size() > kMaxPayload || !json_read(payload, f) || !f[0].seen || !blob(f[7], out.data)) return false;
  for (const std::string& one : chain) {
    Bytes der;
    if (!base64_decode(one, der) || der.empty()) return false;
    out.chain.push_back(std::move(der));
  }
  // Each op has its own members; any other is refused.
  auto only = [&](std::initializer_list<const char*> names) {
    for (const Field& one : f) {
      bool allowed = std::string("op") == one.name;
      for (const char* n : names) allowed = allowed || std::string(n) == one.name;
      if (one.seen && !allowed) return false;
    }
    return true;
  };
  if (op == "renew") {
    out.op = CertOrder::Op::renew;
    return only({"in", "by"}) && out.retry >= 0 && out.by >= 0;
  }
  if (op == "cert") {
    out.op = CertOrder::Op::cert;
    return only({"ser", "crt", "pw"}) && is_serial(out.serial) && !out.chain.empty() && is_plain(out.password);
  }
  if (op == "part") {
    out.op = CertOrder::Op::part;
    return only({"t", "i", "of", "d"}) && out.tag.size() == kTag && out.count >= 1 && out.count <= kMaxSlices && out.index >= 0 &&
           out.index < out.count && !out.data.empty();
  }
  out.op = CertOrder::Op::no;
  return op == "no" && only({"why", "in"}) && !out.why.empty() && is_plain(out.why) && out.retry >= 0;
}

bool decode_cmd(const std::string& payload, Cmd& out) {
  out = Cmd();
  std::string image;
  std::vector<Field> f{{"op", out.op}, {"t", out.time}, {"job", out.job}, {"img", image}, {"tb", out.bundle}};
  if (payload.size() > kMaxPayload || !json_read(payload, f) || out.op.empty() || !is_plain(out.op) || out.time < 0) return false;
  if (out.bundle < 0 || out.bundle > kMaxVersion || (out.bundle > 0) != (out.op == "trust")) return false;
  if (!blob(f[3], out.image)) return false;
  if (!f[2].seen && !f[3].seen) return true;
  return out.op == "boot-previous-slot" && is_label(out.job, kMaxJob) && out.image.size() == 32;
}

std::string encode_again(const Offer& o) {
  JsonWriter w;
  w.text("job", o.job).text("v", o.version).number("n", o.size).text("sha", base64(o.sha256.data(), o.sha256.size())).text("p", o.path);
  if (o.spread != 0) w.number("in", o.spread);
  return w.done();
}

std::string encode_again(const CertOrder& o) {
  static const char* const ops[] = {"renew", "cert", "part", "no"};
  JsonWriter w;
  w.text("op", ops[static_cast<int>(o.op)]);
  if (!o.serial.empty()) w.text("ser", o.serial);
  if (!o.chain.empty()) {
    std::vector<std::string> chain;
    for (const Bytes& der : o.chain) chain.push_back(base64(der.data(), der.size()));
    w.list("crt", chain);
  }
  if (!o.password.empty()) w.text("pw", o.password);
  if (!o.tag.empty()) w.text("t", o.tag);
  if (o.index != 0) w.number("i", o.index);
  if (o.count != 0) w.number("of", o.count);
  if (!o.data.empty()) w.text("d", base64(o.data.data(), o.data.size()));
  if (!o.why.empty()) w.text("why", o.why);
  if (o.retry != 0) w.number("in", o.retry);
  if (o.by != 0) w.number("by", o.by);
  return w.done();
}

std::string encode_again(const Cmd& c) {
  JsonWriter w;
  w.text("op", c.op);
  if (c.time != 0) w.number("t", c.time);
  if (!c.job.empty()) w.text("job", c.job);
  if (!c.image.empty()) w.text("img", base64(c.image.data(), c.image.size()));
  if (c.bundle != 0) w.number("tb", c.bundle);
  return w.done();
}

void Assembler::clear() { *this = Assembler(); }

Assembler::Result Assembler::add(Crypto& crypto, const CertOrder& part, CertOrder& whole) {
  const size_t count = static_cast<size_t>(part.count), index = static_cast<size_t>(part.index);
  if (part.tag != tag_ || parts_.size() != count) {
    clear();
    tag_ = part.tag;
    parts_.resize(count);
  }
  if (parts_[index].empty()) have_++;
  size_ += part.data.size();
  size_ -= parts_[index].size();
  parts_[index] = part.data;
  if (size_ > kMaxPayload) {
    clear();
    return Result::bad;
  }
  if (have_ < count) return Result::more;
  std::string all;
  all.reserve(size_);
  for (const Bytes& one : parts_) all.append(one.begin(), one.end());
  const std::string tag = tag_;
  clear();
  uint8_t sum[32];
  crypto.sha256(reinterpret_cast<const uint8_t*>(all.data()), all.size(), sum);
  if (hex(sum, kTag / 2) != tag || !decode_cert_order(all, whole) || whole.op != CertOrder::Op::cert) return Result::bad;
  return Result::done;
}

}  // namespace muster
