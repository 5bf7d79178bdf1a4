// One MQTT session after another, over esp-mqtt, which receives messages of any size in pieces. When to connect again is
// muster::Client's decision, so the library's own reconnection is off.
#pragma once

#include <mqtt_client.h>

#include <atomic>
#include <string>

#include "events.h"
#include "muster/vault.h"

class MqttLink {
 public:
  // kReceive is the largest packet that is put together, and what hello says of it.
  static constexpr size_t kReceive = 4096;

  explicit MqttLink(Events& e) : events_(e) {}

  // open begins an attempt: with a certificate, or with a password where identity is null. entered or closed follows.
  bool open(const std::string& address, const std::string& id, const muster::Identity* identity, const std::string& password,
            const std::vector<muster::Bytes>& roots);
  void close();  // waits for the library's task; never called by it
  bool publish(const std::string& topic, const std::string& payload);
  uint32_t session() const { return session_; }
  bool idle() const { return unacknowledged_ <= 0; }  // the broker has all that was said

 private:
  static void handle(void* self, esp_event_base_t base, int32_t id, void* data);
  void on(const esp_mqtt_event_t& e, esp_mqtt_event_id_t id);
  void on_data(const esp_mqtt_event_t& e);
  void on_error(const esp_mqtt_event_t& e);

  Events& events_;
  esp_mqtt_client_handle_t client_ = nullptr;
  std::atomic<uint32_t> session_{0};
  std::atomic<int> unacknowledged_{0};
  // esp-mqtt keeps pointers to these.
  std::string filter_, roots_, cert_, key_;
  // Of the library's task, while there is one.
  muster::Outcome outcome_ = muster::Outcome::unreachable;
  std::string topic_, payload_;
  bool whole_ = false;
};
