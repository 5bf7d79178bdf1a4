#pragma once
#define CONFIG_IDF_TARGET "esp32"
