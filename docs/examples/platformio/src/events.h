// What the tasks of the radio tell the main loop, which alone calls muster::Client.
#pragma once

#include <deque>
#include <mutex>
#include <string>

#include "muster/doors.h"
#include "muster/port.h"

struct Event {
  enum class Kind { entered, message, closed, trust, manifest, progress, image, enrolled } kind = Kind::closed;
  uint32_t session = 0;  // of the link, or life of Https; an event of one that is over is dropped
  muster::Outcome outcome = muster::Outcome::unreachable;  // of closed
  bool ok = false;       // of image
  int percent = 0;       // of progress
  std::string topic;     // of message; of enrolled: the certificates of the CA
  std::string text;      // payload, document, or why it failed
  muster::Bytes sha256;  // of image
};

// Events is the queue between them. It holds at most kMax messages of the broker: muster says again what was lost.
class Events {
 public:
  void put(Event e) {
    const std::lock_guard<std::mutex> hold(lock_);
    if (e.kind == Event::Kind::message && all_.size() >= kMax) return;
    all_.push_back(std::move(e));
  }
  bool take(Event& e) {
    const std::lock_guard<std::mutex> hold(lock_);
    if (all_.empty()) return false;
    e = std::move(all_.front());
    all_.pop_front();
    return true;
  }

 private:
  static constexpr size_t kMax = 32;
  std::mutex lock_;
  std::deque<Event> all_;
};
