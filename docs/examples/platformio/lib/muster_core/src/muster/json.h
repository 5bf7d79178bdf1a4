// The little JSON that the protocol needs: one flat object with texts, whole numbers and lists of texts. It is as strict as
// muster's own reader: exact names, none twice and none unknown, no null, valid UTF-8, nothing after the value.
#pragma once

#include <string>
#include <vector>

#include "muster/port.h"

namespace muster {

// Field binds a member to where its value goes. Exactly one of the pointers is set.
struct Field {
  const char* name;
  std::string* text = nullptr;
  int64_t* number = nullptr;
  std::vector<std::string>* list = nullptr;
  bool seen = false;

  Field(const char* n, std::string& v) : name(n), text(&v) {}
  Field(const char* n, int64_t& v) : name(n), number(&v) {}
  Field(const char* n, std::vector<std::string>& v) : name(n), list(&v) {}
};

// json_read reads text into the fields; those that are not there keep their value, with seen false.
bool json_read(const std::string& text, std::vector<Field>& fields);

// JsonWriter writes one flat object. Members come in the order of the calls.
class JsonWriter {
 public:
  JsonWriter& text(const char* name, const std::string& value);
  JsonWriter& number(const char* name, int64_t value);
  JsonWriter& list(const char* name, const std::vector<std::string>& values);
  std::string done() const { return out_ + "}"; }

 private:
  void member(const char* name);
  std::string out_ = "{";
};

}  // namespace muster
