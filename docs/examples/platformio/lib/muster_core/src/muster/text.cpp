#include "muster/text.h"

namespace muster {
namespace {

const char kStd[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

int digit64(char c, bool url) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  if (c == (url ? '-' : '+')) return 62;
  if (c == (url ? '_' : '/')) return 63;
  return -1;
}

bool decode64(const char* text, size_t size, bool url, Bytes& out) {
  out.clear();
  if (size % 4 == 1) return false;
  out.reserve(size / 4 * 3 + 2);
  uint32_t bits = 0;
  int have = 0;
  for (size_t i = 0; i < size; i++) {
    int d = digit64(text[i], url);
    if (d < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(d);
    have += 6;
    if (have >= 8) {
      have -= 8;
      out.push_back(static_cast<uint8_t>(bits >> have));
      bits &= (1u << have) - 1;
    }
  }
  return bits == 0;  // what is left over must be zero
}

bool lower_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

// step returns the length of the UTF-8 sequence at s[i], 0 if it is none, and its code point.
size_t step(const std::string& s, size_t i, uint32_t& point) {
  auto b = [&](size_t k) { return k < s.size() ? static_cast<uint8_t>(s[k]) : 0u; };
  uint32_t first = b(i);
  if (first < 0x80) {
    point = first;
    return 1;
  }
  size_t n = first >= 0xF0 && first <= 0xF4 ? 4 : first >= 0xE0 && first < 0xF0 ? 3 : first >= 0xC2 && first < 0xE0 ? 2 : 0;
  if (n == 0) return 0;
  point = first & (0x7Fu >> n);
  for (size_t k = 1; k < n; k++) {
    if ((b(i + k) & 0xC0) != 0x80) return 0;
    point = point << 6 | (b(i + k) & 0x3F);
  }
  const bool overlong = (n == 3 && point < 0x800) || (n == 4 && point < 0x10000);
  if (overlong || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return 0;
  return n;
}

bool printable(uint32_t p) {
  if (p < 0x20 || (p >= 0x7F && p < 0xA0)) return false;
  return !(p >= 0x200B && p <= 0x200F) && !(p >= 0x2028 && p <= 0x202E) && !(p >= 0x2060 && p <= 0x206F) && p != 0xFEFF;
}

}  // namespace

std::string base64(const uint8_t* data, size_t size) {
  std::string out;
  out.reserve((size + 2) / 3 * 4);
  for (size_t i = 0; i < size; i += 3) {
    const size_t n = size - i < 3 ? size - i : 3;
    uint32_t v = static_cast<uint32_t>(data[i]) << 16;
    if (n > 1) v |= static_cast<uint32_t>(data[i + 1]) << 8;
    if (n > 2) v |= data[i + 2];
    out += kStd[v >> 18];
    out += kStd[v >> 12 & 63];
    out += n > 1 ? kStd[v >> 6 & 63] : '=';
    out += n > 2 ? kStd[v & 63] : '=';
  }
  return out;
}

bool base64_decode(const std::string& text, Bytes& out) {
  out.clear();
  if (text.size() % 4 != 0) return false;
  size_t size = text.size();
  for (int i = 0; i < 2 && size > 0 && text[size - 1] == '='; i++) size--;
  return decode64(text.data(), size, false, out);
}

bool base64url_decode(const std::string& text, Bytes& out) { return decode64(text.data(), text.size(), true, out); }

std::string hex(const uint8_t* data, size_t size) {
  static const char digits[] = "0123456789abcdef";
  std::string out;
  out.reserve(2 * size);
  for (size_t i = 0; i < size; i++) {
    out += digits[data[i] >> 4];
    out += digits[data[i] & 15];
  }
  return out;
}

bool hex_decode(const std::string& text, Bytes& out) {
  out.clear();
  if (text.size() % 2 != 0) return false;
  auto value = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  for (size_t i = 0; i < text.size(); i += 2) {
    if (!lower_hex(text[i]) || !lower_hex(text[i + 1])) return false;
    out.push_back(static_cast<uint8_t>(value(text[i]) << 4 | value(text[i + 1])));
  }
  return true;
}

bool pem_decode(const std::string& text, const std::string& kind, std::vector<Bytes>& out) {
  out.clear();
  const std::string begin = "-----BEGIN " + kind + "-----", end = "-----END " + kind + "-----";
  for (size_t at = 0; (at = text.find(begin, at)) != std::string::npos;) {
    at += begin.size();
    const size_t stop = text.find(end, at);
    if (stop == std::string::npos) return false;
    std::string body;
    for (size_t i = at; i < stop; i++) {
      if (text[i] != '\n' && text[i] != '\r') body += text[i];
    }
    Bytes der;
    if (!base64_decode(body, der) || der.empty()) return false;
    out.push_back(std::move(der));
    at = stop + end.size();
  }
  return !out.empty();
}

std::string pem_encode(const char* kind, const Bytes& der) {
  const std::string body = base64(der.data(), der.size());
  std::string out = std::string("-----BEGIN ") + kind + "-----\n";
  for (size_t i = 0; i < body.size(); i += 64) out += body.substr(i, 64) + "\n";
  return out + "-----END " + kind + "-----\n";
}

bool is_label(const std::string& s, size_t max) {
  if (s.empty() || s.size() > max || s.front() == '-' || s.back() == '-') return false;
  for (char c : s) {
    if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-')) return false;
  }
  return true;
}

bool is_hash(const std::string& s) {
  if (s.size() != 64) return false;
  for (char c : s) {
    if (!lower_hex(c)) return false;
  }
  return true;
}

bool is_serial(const std::string& s) {
  if (s.empty() || s.size() > 40 || s.front() == '0') return false;
  for (char c : s) {
    if (!lower_hex(c)) return false;
  }
  return true;
}

bool is_utf8(const std::string& s) {
  uint32_t point = 0;
  for (size_t i = 0; i < s.size();) {
    const size_t n = step(s, i, point);
    if (n == 0) return false;
    i += n;
  }
  return true;
}

bool is_plain(const std::string& s) {
  if (s.size() > 128) return false;
  uint32_t point = 0;
  for (size_t i = 0; i < s.size();) {
    const size_t n = step(s, i, point);
    if (n == 0 || !printable(point)) return false;
    i += n;
  }
  return true;
}

std::string cut(const std::string& s) {
  std::string out;
  uint32_t point = 0;
  for (size_t i = 0; i < s.size();) {
    size_t n = step(s, i, point);
    if (n != 0 && out.size() + n > 128) break;
    if (n != 0 && printable(point)) out.append(s, i, n);
    i += n == 0 ? 1 : n;
  }
  return out;
}

}  // namespace muster
