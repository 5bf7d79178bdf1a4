#include "muster/json.h"

#include "muster/text.h"

namespace muster {
namespace {

class Reader {
 public:
  explicit Reader(const std::string& s) : s_(s) {}

  bool object(std::vector<Field>& fields) {
    if (!sign('{')) return false;
    if (sign('}')) return end();
    do {
      std::string name;
      space();
      if (!text(name) || !sign(':')) return false;
      Field* f = nullptr;
      for (Field& one : fields) {
        if (name == one.name) f = &one;
      }
      if (f == nullptr || f->seen || !value(*f)) return false;
      f->seen = true;
    } while (sign(','));
    return sign('}') && end();
  }

 private:
  void space() {
    while (i_ < s_.size() && (s_[i_] == ' ' || s_[i_] == '\t' || s_[i_] == '\n' || s_[i_] == '\r')) i_++;
  }

  bool sign(char c) {
    space();
    if (i_ >= s_.size() || s_[i_] != c) return false;
    i_++;
    return true;
  }

  bool end() {
    space();
    return i_ == s_.size();
  }

  bool value(Field& f) {
    space();
    if (f.text != nullptr) return text(*f.text);
    if (f.number != nullptr) return number(*f.number);
    f.list->clear();
    if (!sign('[')) return false;
    if (sign(']')) return true;
    do {
      space();
      f.list->emplace_back();
      if (!text(f.list->back())) return false;
    } while (sign(','));
    return sign(']');
  }

  bool number(int64_t& out) {
    const bool minus = i_ < s_.size() && s_[i_] == '-';
    if (minus) i_++;
    const size_t first = i_;
    uint64_t v = 0;
    while (i_ < s_.size() && s_[i_] >= '0' && s_[i_] <= '9') {
      v = v * 10 + static_cast<uint64_t>(s_[i_++] - '0');
      if (v > static_cast<uint64_t>(INT64_MAX)) return false;
    }
    if (i_ == first || (s_[first] == '0' && i_ - first > 1)) return false;
    if (i_ < s_.size() && (s_[i_] == '.' || s_[i_] == 'e' || s_[i_] == 'E')) return false;
    out = minus ? -static_cast<int64_t>(v) : static_cast<int64_t>(v);
    return true;
  }

  bool text(std::string& out) {
    out.clear();
    if (i_ >= s_.size() || s_[i_] != '"') return false;
    for (i_++; i_ < s_.size(); i_++) {
      const unsigned char c = static_cast<unsigned char>(s_[i_]);
      if (c == '"') {
        i_++;
        return is_utf8(out);
      }
      if (c < 0x20) return false;
      if (c != '\\') {
        out += s_[i_];
        continue;
      }
      if (!escape(out)) return false;
    }
    return false;
  }

  // escape reads what follows a backslash; it leaves i_ at its last character.
  bool escape(std::string& out) {
    if (++i_ >= s_.size()) return false;
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    for (size_t k = 0; from[k] != 0; k++) {
      if (s_[i_] == from[k]) {
        out += to[k];
        return true;
      }
    }
    uint32_t p = 0;
    if (s_[i_] != 'u' || !four(p)) return false;
    if (p >= 0xDC00 && p < 0xE000) return false;
    if (p >= 0xD800 && p < 0xDC00) {
      uint32_t low = 0;
      if (i_ + 2 >= s_.size() || s_[i_ + 1] != '\\' || s_[i_ + 2] != 'u') return false;
      i_ += 2;
      if (!four(low) || low < 0xDC00 || low >= 0xE000) return false;
      p = 0x10000 + ((p - 0xD800) << 10) + (low - 0xDC00);
    }
    put(out, p);
    return true;
  }

  // four reads the four digits behind the u at i_, and leaves i_ at the last.
  bool four(uint32_t& p) {
    if (i_ + 4 >= s_.size()) return false;
    p = 0;
    for (int k = 0; k < 4; k++) {
      const char c = s_[++i_];
      const int d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (d < 0) return false;
      p = p << 4 | static_cast<uint32_t>(d);
    }
    return true;
  }

  static void put(std::string& out, uint32_t p) {
    if (p < 0x80) {
      out += static_cast<char>(p);
      return;
    }
    const int n = p < 0x800 ? 2 : p < 0x10000 ? 3 : 4;
    const uint32_t lead = n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0;
    out += static_cast<char>(lead | p >> (6 * (n - 1)));
    for (int k = n - 2; k >= 0; k--) out += static_cast<char>(0x80 | (p >> (6 * k) & 0x3F));
  }

  const std::string& s_;
  size_t i_ = 0;
};

void quote(std::string& out, const std::string& s) {
  static const char digits[] = "0123456789abcdef";
  out += '"';
  for (char c : s) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\b': out += "\\b"; break;
      case '\f': out += "\\f"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += "\\u00";
          out += digits[c >> 4];
          out += digits[c & 15];
        } else {
          out += c;
        }
    }
  }
  out += '"';
}

}  // namespace

bool json_read(const std::string& text, std::vector<Field>& fields) { return Reader(text).object(fields); }

void JsonWriter::member(const char* name) {
  if (out_.size() > 1) out_ += ',';
  quote(out_, name);
  out_ += ':';
}

JsonWriter& JsonWriter::text(const char* name, const std::string& value) {
  member(name);
  quote(out_, value);
  return *this;
}

JsonWriter& JsonWriter::number(const char* name, int64_t value) {
  member(name);
  out_ += std::to_string(value);
  return *this;
}

JsonWriter& JsonWriter::list(const char* name, const std::vector<std::string>& values) {
  member(name);
  out_ += '[';
  for (size_t i = 0; i < values.size(); i++) {
    if (i > 0) out_ += ',';
    quote(out_, values[i]);
  }
  out_ += ']';
  return *this;
}

}  // namespace muster
