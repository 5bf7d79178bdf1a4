#pragma once
#include <cstddef>
#include <cstdint>
#define SET_LOOP_TASK_STACK_SIZE(sz) size_t getArduinoLoopTaskStackSize() { return sz; }
extern "C" void delay(uint32_t ms);
void setup();
void loop();
