// The vault's store: namespace "muster" of the partition "nvs". docs/esp32.md, "What is in NVS", lists the keys.
#pragma once

#include <nvs.h>

#include <string>

#include "muster/port.h"

class NvsStore : public muster::Store {
 public:
  NvsStore() = default;
  ~NvsStore() override;
  NvsStore(const NvsStore&) = delete;
  NvsStore& operator=(const NvsStore&) = delete;

  // open is called after nvs_flash_init, which the Arduino core does before setup().
  bool open();
  bool read(const char* name, muster::Bytes& out) override;
  bool write(const char* name, const muster::Bytes& value) override;
  bool erase(const char* name) override;
  std::string text(const char* name);  // empty: there is none

 private:
  nvs_handle_t nvs_ = 0;
};
