#pragma once
#include "esp_err.h"
typedef struct {
  int type, subtype;
  uint32_t address, size;
  char label[17];
  bool encrypted;
} esp_partition_t;
extern "C" esp_err_t esp_partition_get_sha256(const esp_partition_t* partition, uint8_t* sha_256);
