#include "mqtt_link.h"

#include <esp_idf_version.h>
#include <mbedtls/ssl.h>

#include <cstdlib>

#include "muster/text.h"
#include "muster/wire.h"
#include "pem.h"

namespace {

// settings is the same in the words of two generations of esp-mqtt.
esp_mqtt_client_config_t settings(const std::string& uri, const std::string& id, const std::string& roots, const std::string& cert,
                                  const std::string& key, const std::string& password) {
  esp_mqtt_client_config_t c = {};
#if ESP_IDF_VERSION_MAJOR >= 5
  c.broker.address.uri = uri.c_str();
  c.broker.verification.certificate = roots.c_str();
  c.credentials.client_id = id.c_str();
  if (!key.empty()) {
    c.credentials.authentication.certificate = cert.c_str();
    c.credentials.authentication.key = key.c_str();
  } else {
    c.credentials.username = id.c_str();
    c.credentials.authentication.password = password.c_str();
  }
  c.session.keepalive = 60;
  c.session.protocol_ver = MQTT_PROTOCOL_V_3_1_1;
  c.network.disable_auto_reconnect = true;
  c.network.timeout_ms = 20000;
  c.buffer.size = 1024;
  c.buffer.out_size = 1024;
  c.task.stack_size = 8192;
#else
  c.uri = uri.c_str();
  c.cert_pem = roots.c_str();
  c.client_id = id.c_str();
  if (!key.empty()) {
    c.client_cert_pem = cert.c_str();
    c.client_key_pem = key.c_str();
  } else {
    c.username = id.c_str();
    c.password = password.c_str();
  }
  c.keepalive = 60;
  c.protocol_ver = MQTT_PROTOCOL_V_3_1_1;
  c.disable_auto_reconnect = true;
  c.network_timeout_ms = 20000;
  c.buffer_size = 1024;
  c.out_buffer_size = 1024;
  c.task_stack = 8192;
#endif
  return c;
}

}  // namespace

bool MqttLink::open(const std::string& address, const std::string& id, const muster::Identity* identity, const std::string& password,
                    const std::vector<muster::Bytes>& roots) {
  close();
  session_++;
  unacknowledged_ = 0;
  outcome_ = muster::Outcome::unreachable;
  whole_ = false;
  filter_ = muster::down_filter(id);
  roots_ = roots_pem(roots);
  cert_ = identity == nullptr ? "" : roots_pem(identity->chain);
  key_ = identity == nullptr ? "" : key_pem(identity->key);
  const std::string uri = "mqtts://" + address;
  const esp_mqtt_client_config_t c = settings(uri, id, roots_, cert_, key_, password);
  client_ = esp_mqtt_client_init(&c);
  if (client_ == nullptr) return false;
  esp_mqtt_client_register_event(client_, MQTT_EVENT_ANY, handle, this);
  return esp_mqtt_client_start(client_) == ESP_OK;
}

void MqttLink::close() {
  if (client_ == nullptr) return;
  esp_mqtt_client_disconnect(client_);
  esp_mqtt_client_stop(client_);
  esp_mqtt_client_destroy(client_);
  client_ = nullptr;
  session_++;  // what the old one still has in the queue is void
}

bool MqttLink::publish(const std::string& topic, const std::string& payload) {
  if (client_ == nullptr) return false;
  unacknowledged_++;
  if (esp_mqtt_client_enqueue(client_, topic.c_str(), payload.data(), static_cast<int>(payload.size()), 1, 0, true) >= 0) return true;
  unacknowledged_--;
  return false;
}

void MqttLink::handle(void* self, esp_event_base_t, int32_t id, void* data) {
  static_cast<MqttLink*>(self)->on(*static_cast<esp_mqtt_event_t*>(data), static_cast<esp_mqtt_event_id_t>(id));
}

void MqttLink::on(const esp_mqtt_event_t& e, esp_mqtt_event_id_t id) {
  Event out;
  out.session = session_;
  switch (id) {
    case MQTT_EVENT_CONNECTED:
      if (esp_mqtt_client_subscribe(e.client, filter_.c_str(), 1) < 0) esp_mqtt_client_disconnect(e.client);
      return;
    case MQTT_EVENT_SUBSCRIBED:
      out.kind = Event::Kind::entered;
      return events_.put(std::move(out));
    case MQTT_EVENT_PUBLISHED: unacknowledged_--; return;
    case MQTT_EVENT_DATA: return on_data(e);
    case MQTT_EVENT_ERROR: return on_error(e);
    case MQTT_EVENT_DISCONNECTED:
      out.kind = Event::Kind::closed;
      out.outcome = outcome_;
      return events_.put(std::move(out));
    default: return;
  }
}

// on_data puts the pieces of a message together; the topic comes with the first.
void MqttLink::on_data(const esp_mqtt_event_t& e) {
  if (e.current_data_offset == 0) {
    topic_.assign(e.topic, static_cast<size_t>(e.topic_len));
    payload_.clear();
    whole_ = e.total_data_len >= 0 && topic_.size() + static_cast<size_t>(e.total_data_len) + 7 <= kReceive;
  }
  if (!whole_ || static_cast<size_t>(e.current_data_offset) != payload_.size()) {
    whole_ = false;
    return;
  }
  payload_.append(e.data, static_cast<size_t>(e.data_len));
  if (payload_.size() != static_cast<size_t>(e.total_data_len)) return;
  Event out;
  out.kind = Event::Kind::message;
  out.session = session_;
  out.topic = topic_;
  out.text = std::move(payload_);
  payload_.clear();
  events_.put(std::move(out));
}

// on_error learns from an attempt that failed whether somebody said no to the credential.
void MqttLink::on_error(const esp_mqtt_event_t& e) {
  if (e.error_handle == nullptr) return;
  const esp_mqtt_error_codes_t& err = *e.error_handle;
  if (err.error_type == MQTT_ERROR_TYPE_CONNECTION_REFUSED) {
    const bool denied = err.connect_return_code == MQTT_CONNECTION_REFUSE_BAD_USERNAME || err.connect_return_code == MQTT_CONNECTION_REFUSE_NOT_AUTHORIZED;
    outcome_ = denied ? muster::Outcome::denied : muster::Outcome::unreachable;
  } else if (err.error_type == MQTT_ERROR_TYPE_TCP_TRANSPORT && std::abs(err.esp_tls_stack_err) == -MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE) {
    outcome_ = muster::Outcome::refused;  // Client believes the second of them
  }
}
