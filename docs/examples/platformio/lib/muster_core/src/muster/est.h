// A first certificate by EST (RFC 7030 §4.2), for a device that was made with an enrolment password and no certificate.
#pragma once

#include <string>
#include <vector>

#include "muster/port.h"

namespace muster {

constexpr size_t kMaxEst = 16 << 10;  // bytes of an answer
constexpr const char* kEstCerts = "/.well-known/est/cacerts";
constexpr const char* kEstEnroll = "/.well-known/est/simpleenroll";

// read_est_certs reads the certificates of an answer: base64 with line breaks, of a CMS message that holds nothing else
// (RFC 5652 §5.1, certs-only). False for anything else.
bool read_est_certs(const std::string& body, std::vector<Bytes>& out);

}  // namespace muster
