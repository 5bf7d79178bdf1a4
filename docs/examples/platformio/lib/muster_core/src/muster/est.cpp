#include "muster/est.h"

#include "muster/text.h"

namespace muster {
namespace {

// Der walks over the elements of a value in DER (X.690). It never leaves its bounds.
class Der {
 public:
  Der(const uint8_t* at, size_t size) : at_(at), left_(size) {}
  bool done() const { return left_ == 0; }
  uint8_t tag() const { return left_ == 0 ? 0 : at_[0]; }

  // next steps over one element; whole is all of it, inner what it holds.
  bool next(Der& inner, Bytes* whole = nullptr) {
    if (left_ < 2 || (at_[0] & 0x1F) == 0x1F) return false;
    size_t head = 2, size = at_[1];
    if (size >= 0x80) {
      const size_t n = size & 0x7F;
      if (n == 0 || n > 3 || left_ < 2 + n) return false;
      size = 0;
      for (size_t i = 0; i < n; i++) size = size << 8 | at_[2 + i];
      head += n;
    }
    if (left_ - head < size) return false;
    if (whole != nullptr) whole->assign(at_, at_ + head + size);
    inner = Der(at_ + head, size);
    at_ += head + size;
    left_ -= head + size;
    return true;
  }
  bool next_as(uint8_t tag, Der& inner) { return this->tag() == tag && next(inner); }

 private:
  const uint8_t* at_;
  size_t left_;
};

constexpr uint8_t kSequence = 0x30, kContext0 = 0xA0;

}  // namespace

bool read_est_certs(const std::string& body, std::vector<Bytes>& out) {
  out.clear();
  if (body.size() > kMaxEst) return false;
  std::string packed;
  for (char c : body) {
    if (c != '\n' && c != '\r' && c != ' ' && c != '\t') packed += c;
  }
  Bytes der;
  if (!base64_decode(packed, der)) return false;
  Der all(der.data(), der.size()), message(nullptr, 0), wrapped(nullptr, 0), data(nullptr, 0), skip(nullptr, 0), certs(nullptr, 0);
  // ContentInfo { type, [0] { SignedData { version, algorithms, content, [0] certificates, ... } } }
  if (!all.next_as(kSequence, message) || !all.done() || !message.next(skip) || !message.next_as(kContext0, wrapped) || !wrapped.next_as(kSequence, data)) return false;
  for (int i = 0; i < 3; i++) {
    if (!data.next(skip)) return false;
  }
  if (!data.next_as(kContext0, certs)) return false;
  while (!certs.done()) {
    Bytes one;
    if (certs.tag() != kSequence || !certs.next(skip, &one)) return false;
    out.push_back(std::move(one));
  }
  return !out.empty();
}

}  // namespace muster
