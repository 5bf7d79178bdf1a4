#pragma once
#include <cstdint>

#include "esp_idf_version.h"
typedef enum { CHIP_ESP32 = 1, CHIP_ESP32S2 = 2, CHIP_ESP32S3 = 9, CHIP_ESP32C3 = 5 } esp_chip_model_t;
typedef struct {
  esp_chip_model_t model;
  uint32_t features;
#if ESP_IDF_VERSION_MAJOR >= 5
  uint16_t revision;
  uint8_t cores;
#else
  uint16_t full_revision;
  uint8_t cores;
  uint8_t revision;
#endif
} esp_chip_info_t;
extern "C" void esp_chip_info(esp_chip_info_t* out_info);
