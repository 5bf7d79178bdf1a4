// PEM for the libraries of ESP-IDF: several certificates in one text, which DER cannot hold.
#pragma once

#include <string>
#include <vector>

#include "muster/text.h"

inline std::string roots_pem(const std::vector<muster::Bytes>& certs) {
  std::string out;
  for (const muster::Bytes& der : certs) out += muster::pem_encode("CERTIFICATE", der);
  return out;
}

// key_pem names the block by what is in it: PKCS #8 begins with version 0, SEC 1 (RFC 5915) with version 1.
inline std::string key_pem(const muster::Bytes& der) {
  const size_t header = der.size() > 1 && der[1] == 0x81 ? 3 : 2;
  const bool sec1 = der.size() > header + 2 && der[header + 2] == 1;
  return muster::pem_encode(sec1 ? "EC PRIVATE KEY" : "PRIVATE KEY", der);
}
