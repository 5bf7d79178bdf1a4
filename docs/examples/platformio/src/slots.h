// The two OTA slots, and what the bootloader says of them.
#pragma once

#include <esp_ota_ops.h>

#include <string>

#include "muster/client.h"

// read_facts fills in what the chip and the bootloader know: image, slots, chip, secure version, reason of the start.
void read_facts(muster::Facts& f);

// SlotWriter writes an image to the slot that does not run.
class SlotWriter {
 public:
  ~SlotWriter() { abandon(); }
  bool begin(std::string& why);  // also starts afresh
  bool write(const uint8_t* data, size_t size, std::string& why);
  void abandon();
  // finish has the bootloader's check done: checksum, hash, and the signature where Secure Boot is on.
  bool finish(std::string& image, std::string& why);

 private:
  const esp_partition_t* slot_ = nullptr;
  esp_ota_handle_t handle_ = 0;
  bool open_ = false;
};

bool select_other_slot(std::string& why);
