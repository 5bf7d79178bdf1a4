#include "muster/doors.h"

#include <algorithm>

namespace muster {

Doors::Doors(Policy p, std::vector<Slot> slots, std::vector<Slot> passwords) : policy_(p), slots_(std::move(slots)), passwords_(std::move(passwords)) {}

Door Doors::next() const {
  if (!passwords_.empty() && (slots_.empty() || (recovering_ && probes_.empty()))) return {true, passwords_[password_ % passwords_.size()]};
  if (!probes_.empty()) return {false, probes_.front()};
  for (Slot s : slots_) {
    if (!bad(s)) return {false, s};
  }
  return {false, slots_.empty() ? Slot(0) : slots_.front()};
}

bool Doors::note(int64_t at_ms, Door d, Outcome o) {
  if (d.fallback) {
    note_fallback(o);
    return false;
  }
  if (o == Outcome::opened) {
    // A certificate opened the door: whatever was before is over.
    front(d.slot);
    *this = Doors(policy_, slots_, passwords_);
    return false;
  }
  if (recovering_) {
    note_probe(d.slot, o);
    return false;
  }
  if (o == Outcome::refused) return note_refused(d.slot);
  if (o == Outcome::denied) return note_denied(at_ms, d.slot);
  return false;
}

bool Doors::note_refused(Slot s) {
  bad_[s == 'b'] = true;
  fresh_over(s);
  if (std::any_of(slots_.begin(), slots_.end(), [this](Slot one) { return !bad(one); })) return false;  // the other one first
  if (passwords_.empty()) {
    bad_[0] = bad_[1] = false;
    return false;
  }
  return recover();
}

bool Doors::note_denied(int64_t at_ms, Slot s) {
  if (denials_ == 0) since_ = at_ms;
  denials_++;
  if (fresh_ == s) fresh_fails_++;
  if (fresh_ != s || fresh_fails_ >= policy_.new_tries) {
    fresh_over(s);
    back(s);
  }
  if (denials_ < policy_.refusals || at_ms - since_ < policy_.after_ms || passwords_.empty()) return false;
  return recover();
}

bool Doors::recover() {
  recovering_ = true;
  probes_.clear();
  fails_ = 0;
  denials_ = 0;
  fresh_ = 0;
  return true;
}

void Doors::note_probe(Slot s, Outcome o) {
  if (!probes_.empty()) probes_.erase(probes_.begin());
  if (o == Outcome::refused) probes_.erase(std::remove(probes_.begin(), probes_.end(), s), probes_.end());
}

// Certificates are tried again between two visits, because what was wrong may have been put right.
void Doors::note_fallback(Outcome o) {
  if (o == Outcome::opened) {
    fails_ = 0;
    return;
  }
  if (o == Outcome::refused || o == Outcome::denied) {
    password_++;
    fails_++;
    if (fails_ % std::max<size_t>(passwords_.size(), 1) != 0) return;  // the other password first
  }
  if (o == Outcome::unreachable) {
    fails_++;
    if (fails_ % 3 != 0) return;
  }
  recovering_ = true;
  probes_ = slots_;
}

void Doors::stored(Slot s) {
  front(s);
  bad_[s == 'b'] = false;
  fresh_ = s;
  fresh_fails_ = 0;
  if (recovering_) probes_.assign(static_cast<size_t>(std::max(policy_.new_tries, 1)), s);
}

void Doors::set_passwords(std::vector<Slot> p) {
  passwords_ = std::move(p);
  password_ = 0;
}

void Doors::fresh_over(Slot s) {
  if (fresh_ != s) return;
  fresh_ = 0;
  fresh_fails_ = 0;
}

void Doors::front(Slot s) {
  slots_.erase(std::remove(slots_.begin(), slots_.end(), s), slots_.end());
  slots_.insert(slots_.begin(), s);
}

void Doors::back(Slot s) {
  slots_.erase(std::remove(slots_.begin(), slots_.end(), s), slots_.end());
  slots_.push_back(s);
}

}  // namespace muster
