#pragma once
#include <cstddef>

#include "esp_event.h"
#include "esp_idf_version.h"
typedef struct esp_mqtt_client* esp_mqtt_client_handle_t;
typedef enum {
  MQTT_EVENT_ANY = -1, MQTT_EVENT_ERROR = 0, MQTT_EVENT_CONNECTED, MQTT_EVENT_DISCONNECTED, MQTT_EVENT_SUBSCRIBED, MQTT_EVENT_UNSUBSCRIBED,
  MQTT_EVENT_PUBLISHED, MQTT_EVENT_DATA, MQTT_EVENT_BEFORE_CONNECT, MQTT_EVENT_DELETED,
} esp_mqtt_event_id_t;
typedef enum {
  MQTT_CONNECTION_ACCEPTED = 0, MQTT_CONNECTION_REFUSE_PROTOCOL, MQTT_CONNECTION_REFUSE_ID_REJECTED, MQTT_CONNECTION_REFUSE_SERVER_UNAVAILABLE,
  MQTT_CONNECTION_REFUSE_BAD_USERNAME, MQTT_CONNECTION_REFUSE_NOT_AUTHORIZED,
} esp_mqtt_connect_return_code_t;
typedef enum { MQTT_ERROR_TYPE_NONE = 0, MQTT_ERROR_TYPE_TCP_TRANSPORT, MQTT_ERROR_TYPE_CONNECTION_REFUSED } esp_mqtt_error_type_t;
typedef enum { MQTT_PROTOCOL_UNDEFINED = 0, MQTT_PROTOCOL_V_3_1, MQTT_PROTOCOL_V_3_1_1 } esp_mqtt_protocol_ver_t;
typedef struct {
  esp_err_t esp_tls_last_esp_err;
  int esp_tls_stack_err, esp_tls_cert_verify_flags;
  esp_mqtt_error_type_t error_type;
  esp_mqtt_connect_return_code_t connect_return_code;
  int esp_transport_sock_errno;
} esp_mqtt_error_codes_t;
typedef struct {
  esp_mqtt_event_id_t event_id;
  esp_mqtt_client_handle_t client;
  char* data;
  int data_len, total_data_len, current_data_offset;
  char* topic;
  int topic_len, msg_id, session_present;
  esp_mqtt_error_codes_t* error_handle;
  bool retain;
  int qos;
  bool dup;
} esp_mqtt_event_t;
#if ESP_IDF_VERSION_MAJOR >= 5
typedef struct {
  struct {
    struct { const char* uri; } address;
    struct { const char* certificate; size_t certificate_len; } verification;
  } broker;
  struct {
    const char *username, *client_id;
    struct { const char *password, *certificate; size_t certificate_len; const char* key; size_t key_len; } authentication;
  } credentials;
  struct { int keepalive; bool disable_keepalive; esp_mqtt_protocol_ver_t protocol_ver; } session;
  struct { int reconnect_timeout_ms, timeout_ms; bool disable_auto_reconnect; } network;
  struct { int priority, stack_size; } task;
  struct { int size, out_size; } buffer;
} esp_mqtt_client_config_t;
#else
typedef struct {
  const char *host, *uri;
  uint32_t port;
  const char *client_id, *username, *password;
  int keepalive;
  bool disable_auto_reconnect;
  int task_prio, task_stack, buffer_size;
  const char *cert_pem, *client_cert_pem, *client_key_pem;
  esp_mqtt_protocol_ver_t protocol_ver;
  int out_buffer_size, network_timeout_ms;
} esp_mqtt_client_config_t;
#endif
extern "C" {
esp_mqtt_client_handle_t esp_mqtt_client_init(const esp_mqtt_client_config_t* config);
esp_err_t esp_mqtt_client_start(esp_mqtt_client_handle_t client);
esp_err_t esp_mqtt_client_stop(esp_mqtt_client_handle_t client);
esp_err_t esp_mqtt_client_disconnect(esp_mqtt_client_handle_t client);
esp_err_t esp_mqtt_client_destroy(esp_mqtt_client_handle_t client);
int esp_mqtt_client_subscribe(esp_mqtt_client_handle_t client, const char* topic, int qos);
int esp_mqtt_client_enqueue(esp_mqtt_client_handle_t client, const char* topic, const char* data, int len, int qos, int retain, bool store);
esp_err_t esp_mqtt_client_register_event(esp_mqtt_client_handle_t client, esp_mqtt_event_id_t event, esp_event_handler_t event_handler, void* event_handler_arg);
}
