// Text forms that the protocol uses: base64, hex, PEM, and which texts are names.
#pragma once

#include <string>

#include "muster/port.h"

namespace muster {

std::string base64(const uint8_t* data, size_t size);
// The two decoders are strict: no white space, right padding (none in base64url), no stray bits at the end.
bool base64_decode(const std::string& text, Bytes& out);
bool base64url_decode(const std::string& text, Bytes& out);

std::string hex(const uint8_t* data, size_t size);
bool hex_decode(const std::string& text, Bytes& out);  // lower case only

// pem_decode returns the DER of every block of the kind, such as "CERTIFICATE". False if there is none, or one is broken.
bool pem_decode(const std::string& text, const std::string& kind, std::vector<Bytes>& out);
std::string pem_encode(const char* kind, const Bytes& der);

bool is_label(const std::string& s, size_t max);  // a-z, 0-9 and -, neither first nor last a -
bool is_hash(const std::string& s);               // 64 lower-case hex digits
bool is_serial(const std::string& s);             // 1 to 40 lower-case hex digits, no leading zero
bool is_utf8(const std::string& s);
bool is_plain(const std::string& s);  // at most 128 bytes of UTF-8 without control characters

// cut makes of s what fits into the err of a message.
std::string cut(const std::string& s);

}  // namespace muster
