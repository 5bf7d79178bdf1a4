#pragma once
#include <cstdint>
extern "C" uint32_t esp_efuse_read_secure_version(void);
