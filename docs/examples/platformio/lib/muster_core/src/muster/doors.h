// Which way in to try next: a certificate slot at the front door, or a password at the fallback. A device that goes to the
// fallback too soon turns an outage of muster into a storm of the whole fleet there; one that never goes stays out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace muster {

using Slot = char;  // 'a' or 'b'
constexpr Slot other(Slot s) { return s == 'a' ? 'b' : 'a'; }

struct Door {
  bool fallback = false;
  Slot slot = 0;  // of the certificate, or of the password; 0: there is no way in at all
};

enum class Outcome {
  opened,
  unreachable,  // nobody said anything about the credential: network, server, server's certificate
  refused,      // a TLS alert about the certificate: final, but for a mistake of the other side
  denied,       // the broker's "bad user name or password" or "not authorized": passing trouble until it lasts
  barren,       // of the fallback: a session that brought no certificate
};

struct Policy {
  int refusals = 10;                   // denied at least so often in a row,
  int64_t after_ms = 60 * 60 * 1000;   // over at least so long, with the broker reachable
  int new_tries = 3;                   // attempts with a new certificate before the old one is tried again
};

// Doors is a pure state machine: it starts nothing and reads no clock. at_ms never runs backwards.
class Doors {
 public:
  Doors(Policy p, std::vector<Slot> slots, std::vector<Slot> passwords);
  Door next() const;
  // note takes the outcome of an attempt. True: the device goes to the fallback now.
  bool note(int64_t at_ms, Door d, Outcome o);
  void stored(Slot s);                        // slot s holds a new certificate, which is tried next
  void set_passwords(std::vector<Slot> p);    // newest first
  bool recovering() const { return recovering_; }
  const std::vector<Slot>& slots() const { return slots_; }

 private:
  bool bad(Slot s) const { return bad_[s == 'b']; }
  void front(Slot s);
  void back(Slot s);
  void fresh_over(Slot s);
  bool recover();
  bool note_refused(Slot s);
  bool note_denied(int64_t at_ms, Slot s);
  void note_probe(Slot s, Outcome o);
  void note_fallback(Outcome o);

  Policy policy_;
  std::vector<Slot> slots_, passwords_, probes_;
  bool bad_[2] = {false, false};  // refused by an alert since the last success
  int denials_ = 0;               // in a row, of any slot
  int64_t since_ = 0;             // the first of them
  Slot fresh_ = 0;                // slot of a certificate that has not been used yet
  int fresh_fails_ = 0;
  bool recovering_ = false;  // sent to the fallback, and not let in by a certificate since
  size_t password_ = 0;      // index of the one to try next
  size_t fails_ = 0;         // of the fallback in a row
};

}  // namespace muster
