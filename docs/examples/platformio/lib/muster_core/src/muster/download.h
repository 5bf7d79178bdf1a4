// How a download goes on: what a request asks for, what an answer means, and how long to wait. The ESP32 brings the bytes.
#pragma once

#include <cstdint>
#include <string>

namespace muster {

struct Answer {
  int status = 0;          // of HTTP; 0: there was none
  int64_t length = -1;     // Content-Length; -1: not said
  std::string range;       // Content-Range
  int64_t retry_after = 0;  // seconds; 0: not said
};

class Download {
 public:
  // tries in a row that brought nothing end it; so do busy_tries answers of a server that wants it later.
  Download(int64_t size, int tries = 5, int busy_tries = 60) : size_(size), tries_(tries), busy_tries_(busy_tries) {}

  int64_t have() const { return have_; }
  bool complete() const { return have_ == size_; }
  int percent() const { return static_cast<int>(100 * have_ / size_); }
  std::string range() const;  // value of the Range header; empty: leave it out

  enum class Verdict {
    take,     // read the body from here on
    restart,  // read the body, which begins at 0: forget what was written
    wait,     // try again after wait_ms
    fail,     // why says why
  };
  Verdict answer(const Answer& a, uint32_t random);
  void took(int64_t bytes);          // of the body
  Verdict broke(uint32_t random);    // the line broke: wait or fail
  int64_t wait_ms() const { return wait_ms_; }
  const std::string& why() const { return why_; }

 private:
  Verdict again(int64_t least_s, uint32_t random);
  int64_t size_, have_ = 0, wait_ms_ = 0;
  int tries_, busy_tries_, failures_ = 0, busy_ = 0;
  std::string why_;
};

// backoff returns a random time below base << failures, at most cap: a fleet that lost its broker does not come back as one.
int64_t backoff_ms(int failures, int64_t base_ms, int64_t cap_ms, uint32_t random);

}  // namespace muster
