#pragma once
#include "FreeRTOS.h"
typedef void (*TaskFunction_t)(void*);
typedef struct tskTaskControlBlock* TaskHandle_t;
extern "C" BaseType_t xTaskCreate(TaskFunction_t code, const char* name, uint32_t stack_depth, void* parameters, UBaseType_t priority, TaskHandle_t* created);
extern "C" void vTaskDelay(TickType_t ticks);
