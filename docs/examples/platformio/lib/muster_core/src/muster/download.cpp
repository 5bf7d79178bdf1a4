#include "muster/download.h"

#include <algorithm>

namespace muster {

std::string Download::range() const { return have_ == 0 ? "" : "bytes=" + std::to_string(have_) + "-"; }

Download::Verdict Download::answer(const Answer& a, uint32_t random) {
  const bool from_zero = a.status == 200;
  if (a.status == 429 || a.status == 503) {  // others are downloading: no failure
    if (++busy_ >= busy_tries_) {
      why_ = "the server is busy";
      return Verdict::fail;
    }
    return again(std::min<int64_t>(std::max<int64_t>(a.retry_after, 0), 3600), random);
  }
  if (a.status == 404) {
    why_ = "no grant for this image";
    return Verdict::fail;
  }
  const std::string want = "bytes " + std::to_string(have_) + "-";
  if (!from_zero && !(a.status == 206 && a.range.compare(0, want.size(), want) == 0)) {
    why_ = a.status == 0 ? "no connection" : "the server answers " + std::to_string(a.status);
    return broke(random);
  }
  const int64_t rest = from_zero ? size_ : size_ - have_;
  if (a.length != rest) {
    why_ = "the server has another number of bytes";
    return broke(random);
  }
  if (!from_zero || have_ == 0) return Verdict::take;
  have_ = 0;
  return Verdict::restart;
}

void Download::took(int64_t bytes) {
  have_ += bytes;
  if (bytes > 0) failures_ = busy_ = 0;
}

Download::Verdict Download::broke(uint32_t random) {
  if (why_.empty()) why_ = "the line broke";
  if (++failures_ >= tries_) return Verdict::fail;
  return again(0, random);
}

// Jitter comes after all limits: a limit would make equal what jitter made different.
Download::Verdict Download::again(int64_t least_s, uint32_t random) {
  const int64_t ms = std::max(least_s * 1000, std::min<int64_t>(60000, int64_t{1000} << std::min(failures_ + busy_, 16)));
  wait_ms_ = ms + static_cast<int64_t>(random % static_cast<uint64_t>(ms / 2 + 1));
  return Verdict::wait;
}

int64_t backoff_ms(int failures, int64_t base_ms, int64_t cap_ms, uint32_t random) {
  const int64_t top = failures < 20 ? std::min(cap_ms, base_ms << failures) : cap_ms;
  return static_cast<int64_t>(random % static_cast<uint64_t>(std::max<int64_t>(top, 1)));
}

}  // namespace muster
