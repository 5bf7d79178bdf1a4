// What is fetched over HTTPS: the trust bundle, a release's manifest, an image. One task does one after another.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>

#include "events.h"
#include "muster/vault.h"
#include "muster/wire.h"
#include "slots.h"

class Https {
 public:
  // Way is how a request reaches muster.
  struct Way {
    std::string address;        // host:port
    std::string roots;          // PEM
    std::string cert, key;      // PEM; empty: none is presented
    std::string authorization;  // header; empty: none
  };

  Https(Events& e, SlotWriter& w) : events_(e), writer_(w) {}
  bool begin();  // starts the task
  void fetch_document(Event::Kind kind, Way way, std::string path, size_t max);
  void fetch_image(Way way, const muster::Offer& o, int64_t delay_ms);
  // enrol asks for a first certificate by EST; enrolled follows, without text if there was no answer.
  void enrol(Way way, std::string request);
  void stop();  // forgets what waits, ends what is under way soon
  uint32_t life() const { return life_; }  // in the session of each event; what an older life says is void

 private:
  struct Job {
    Event::Kind kind = Event::Kind::trust;
    Way way;
    std::string path;
    size_t max = 0;
    std::string body;  // of a POST; empty: GET
    muster::Offer offer;
    int64_t delay_ms = 0;
    uint32_t life = 0;  // stop ends it
  };
  static void run(void* self);
  void add(Job j);
  void document(const Job& j);
  std::string fetch(const Job& j);
  void enrolment(Job j);
  void image(const Job& j);
  bool pass(const Job& j, int64_t ms) const;  // false: stopped meanwhile
  bool over(const Job& j) const { return j.life != life_; }
  void ended(const Job& j, bool ok, const std::string& why, const muster::Bytes& sha256);

  Events& events_;
  SlotWriter& writer_;
  std::atomic<uint32_t> life_{0};
  std::mutex lock_;
  std::condition_variable more_;
  std::deque<Job> jobs_;
};
