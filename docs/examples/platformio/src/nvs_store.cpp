#include "nvs_store.h"

NvsStore::~NvsStore() {
  if (nvs_ != 0) nvs_close(nvs_);
}

bool NvsStore::open() { return nvs_open("muster", NVS_READWRITE, &nvs_) == ESP_OK; }

// The factory writes strings, the device blobs; no name is used by both.
bool NvsStore::read(const char* name, muster::Bytes& out) {
  size_t size = 0;
  if (nvs_get_blob(nvs_, name, nullptr, &size) == ESP_OK) {
    out.resize(size);
    return size == 0 || nvs_get_blob(nvs_, name, out.data(), &size) == ESP_OK;
  }
  if (nvs_get_str(nvs_, name, nullptr, &size) != ESP_OK || size == 0) return false;
  out.resize(size);
  if (nvs_get_str(nvs_, name, reinterpret_cast<char*>(out.data()), &size) != ESP_OK) return false;
  out.resize(size - 1);  // without the NUL
  return true;
}

// NVS writes the new value before it erases the old, so there is always one of them.
bool NvsStore::write(const char* name, const muster::Bytes& value) {
  return nvs_set_blob(nvs_, name, value.data(), value.size()) == ESP_OK && nvs_commit(nvs_) == ESP_OK;
}

bool NvsStore::erase(const char* name) {
  const esp_err_t err = nvs_erase_key(nvs_, name);
  return err == ESP_ERR_NVS_NOT_FOUND || (err == ESP_OK && nvs_commit(nvs_) == ESP_OK);
}

std::string NvsStore::text(const char* name) {
  muster::Bytes b;
  if (!read(name, b)) return "";
  return std::string(b.begin(), b.end());
}
