// A device of muster on an ESP32: Wi-Fi, MQTT and HTTPS over mutual TLS, updates, recovery. What to do is decided in
// lib/muster_core; this file is its hands. All of Client is called from loop(), the Arduino task.
#include <Arduino.h>
#include <WiFi.h>
#include <esp_log.h>
#include <esp_ota_ops.h>
#include <esp_random.h>
#include <esp_system.h>
#include <esp_timer.h>
#include <sys/time.h>

#include <memory>

#include "events.h"
#include "https.h"
#include "mqtt_link.h"
#include "muster/client.h"
#include "muster/mbedtls_crypto.h"
#include "muster/text.h"
#include "nvs_store.h"
#include "pem.h"
#include "product.h"
#include "slots.h"

// The Arduino core would confirm a new image before setup() runs, which makes the rollback worthless. With this it stays on
// probation until muster has answered (Client::confirm).
extern "C" bool verifyRollbackLater() { return true; }

SET_LOOP_TASK_STACK_SIZE(16 * 1024);  // certificates are checked in loop()

namespace {

constexpr const char* kTag = "muster";
constexpr int64_t kAttemptMs = 90 * 1000;  // from the attempt until the subscription is confirmed
constexpr int64_t kFarewellMs = 5 * 1000;  // for the last words before a restart or the end of a session
constexpr int64_t kStateMs = 5 * 60 * 1000;
constexpr int64_t kEnrolMs = 5 * 60 * 1000;  // between two tries to get a first certificate

int64_t now_ms() { return esp_timer_get_time() / 1000; }

class Device : public muster::Platform {
 public:
  explicit Device(NvsStore& store) : store_(store), vault_(store, crypto_), link_(events_), https_(events_, writer_) {}

  bool begin(std::string& why);
  void loop();

  int64_t ms() override { return now_ms(); }
  uint32_t random() override { return esp_random(); }
  bool publish(const std::string& topic, const std::string& payload) override { return link_.publish(topic, payload); }
  void leave() override { farewell(Farewell::leave); }
  void set_clock(int64_t seconds) override {
    timeval t = {};
    t.tv_sec = static_cast<time_t>(seconds);
    settimeofday(&t, nullptr);
  }
  void confirm_image() override { esp_ota_mark_app_valid_cancel_rollback(); }
  void restart(const char* why) override {
    ESP_LOGI(kTag, "restart: %s", why);
    farewell(Farewell::restart);
  }
  void fetch_trust(bool recovery) override { https_.fetch_document(Event::Kind::trust, way(recovery), "/trust", muster::kMaxBundle); }
  void fetch_manifest(const muster::Offer& o, bool recovery) override {
    https_.fetch_document(Event::Kind::manifest, way(recovery), o.path + ".jws", muster::kMaxManifest);
  }
  void fetch_image(const muster::Offer& o, bool recovery, int64_t delay_ms) override { https_.fetch_image(way(recovery), o, delay_ms); }
  void stop_fetching() override { https_.stop(); }
  bool install(std::string& image, std::string& why) override { return writer_.finish(image, why); }
  bool select(std::string& why) override { return select_other_slot(why); }
  bool select_previous(std::string& why) override { return select_other_slot(why); }
  void command(const std::string& op) override { ESP_LOGI(kTag, "command %s: not of this product", op.c_str()); }
  void log(const std::string& line) override { ESP_LOGI(kTag, "%s", line.c_str()); }

 private:
  enum class Stage { waiting, enrolling, trying, in_session };
  enum class Farewell { none, leave, restart };

  void farewell(Farewell f) {
    if (farewell_ == Farewell::restart) return;
    farewell_ = f;
    farewell_at_ = now_ms() + kFarewellMs;
  }
  Https::Way way(bool recovery) const;
  Https::Way way_by_password(const std::string& password) const;
  bool enrol();
  void attempt();
  void pause(int64_t ms);
  void hear(const Event& e);
  void say_state();

  NvsStore& store_;
  muster::MbedtlsCrypto crypto_;
  muster::Vault vault_;
  Events events_;
  MqttLink link_;
  SlotWriter writer_;
  Https https_;
  std::unique_ptr<muster::Client> client_;
  muster::Door door_;
  Stage stage_ = Stage::waiting;
  Farewell farewell_ = Farewell::none;
  int64_t farewell_at_ = 0, next_at_ = 0, tick_at_ = 0, state_at_ = 0, enrol_at_ = 0;
};

// begin must run when the radio is on: only then are the chip's random numbers fit for keys.
bool Device::begin(std::string& why) {
  if (!crypto_.ready() || !https_.begin()) {
    why = "no entropy, or no memory for the HTTPS task";
    return false;
  }
  if (!vault_.load(why)) return false;
  muster::Facts facts;
  facts.version = FIRMWARE_VERSION;
  facts.hardware = HARDWARE;
  facts.buffer = MqttLink::kReceive;
  read_facts(facts);
  client_ = std::make_unique<muster::Client>(vault_, crypto_, *this, facts);
  return true;
}

void Device::loop() {
  const int64_t t = now_ms();
  for (Event e; events_.take(e);) hear(e);
  if (farewell_ != Farewell::none && (t >= farewell_at_ || stage_ != Stage::in_session || link_.idle())) {
    const bool restarts = farewell_ == Farewell::restart;
    farewell_ = Farewell::none;
    link_.close();
    if (restarts) esp_restart();
    if (stage_ == Stage::in_session) pause(client_->left());
  }
  if (t >= tick_at_) {
    tick_at_ = t + 1000;
    client_->tick();
    say_state();
  }
  if (stage_ == Stage::enrolling && t >= next_at_) {
    https_.stop();
    pause(0);
  }
  if (stage_ == Stage::trying && t >= next_at_) {
    link_.close();
    pause(client_->failed(muster::Outcome::unreachable));
  }
  // Without a network nothing is learnt about the credentials, so that is no attempt.
  if (stage_ == Stage::waiting && t >= next_at_ && WiFi.status() == WL_CONNECTED) attempt();
}

// enrol asks for a first certificate, if there is none and a password for it. Between its tries the fallback has its turn.
bool Device::enrol() {
  std::string request;
  if (!client_->enrols() || now_ms() < enrol_at_ || !client_->enrol_request(request)) return false;
  enrol_at_ = now_ms() + kEnrolMs + esp_random() % kEnrolMs;
  stage_ = Stage::enrolling;
  next_at_ = now_ms() + kAttemptMs;
  https_.enrol(way_by_password(vault_.enrol_password()), request);
  return true;
}

void Device::attempt() {
  if (enrol()) return;
  door_ = client_->next();
  if (door_.slot == 0) return pause(60 * 1000);
  const muster::Identity* id = door_.fallback ? nullptr : vault_.identity(door_.slot);
  const std::string address = vault_.endpoint(door_.fallback ? muster::names::fallback : muster::names::mqtt);
  stage_ = Stage::trying;
  next_at_ = now_ms() + kAttemptMs;
  if (!link_.open(address, vault_.id(), id, door_.fallback ? vault_.password(door_.slot) : "", vault_.roots())) {
    link_.close();
    pause(client_->failed(muster::Outcome::unreachable));
  }
}

void Device::pause(int64_t ms) {
  stage_ = Stage::waiting;
  next_at_ = now_ms() + ms;
}

Https::Way Device::way(bool recovery) const {
  const muster::Identity* id = recovery ? nullptr : vault_.identity(door_.slot);
  if (id == nullptr) return way_by_password(vault_.password(door_.slot));
  Https::Way w;
  w.roots = roots_pem(vault_.roots());
  w.address = vault_.endpoint(muster::names::https);
  w.cert = roots_pem(id->chain);
  w.key = key_pem(id->key);
  return w;
}

Https::Way Device::way_by_password(const std::string& password) const {
  Https::Way w;
  w.roots = roots_pem(vault_.roots());
  w.address = vault_.endpoint(muster::names::recovery);
  const std::string who = vault_.id() + ":" + password;
  w.authorization = "Basic " + muster::base64(reinterpret_cast<const uint8_t*>(who.data()), who.size());
  return w;
}

void Device::hear(const Event& e) {
  const bool of_link = e.kind == Event::Kind::entered || e.kind == Event::Kind::message || e.kind == Event::Kind::closed;
  if (e.session != (of_link ? link_.session() : https_.life())) return;
  switch (e.kind) {
    case Event::Kind::entered:
      if (stage_ != Stage::trying) return;
      stage_ = Stage::in_session;
      return client_->entered();
    case Event::Kind::message: return client_->message(e.topic, e.text);
    case Event::Kind::closed:
      link_.close();
      return pause(stage_ == Stage::in_session ? client_->left() : client_->failed(e.outcome));
    case Event::Kind::trust: return client_->trust_fetched(e.text);
    case Event::Kind::manifest: return client_->manifest_fetched(e.text);
    case Event::Kind::progress: return client_->progressed(e.percent);
    case Event::Kind::enrolled:
      if (stage_ != Stage::enrolling) return;
      if (!client_->enrolled(e.topic, e.text)) ESP_LOGI(kTag, "no certificate yet");
      return pause(0);
    case Event::Kind::image: return client_->downloaded(e.ok, e.text, e.sha256);
  }
}

// say_state is what a product adds: here how long it runs and how well it hears the access point.
void Device::say_state() {
  if (!client_->online() || now_ms() < state_at_) return;
  state_at_ = now_ms() + kStateMs;
  client_->state("{\"uptime\":" + std::to_string(now_ms() / 1000) + ",\"rssi\":" + std::to_string(WiFi.RSSI()) + "}");
}

NvsStore store;
std::unique_ptr<Device> device;

}  // namespace

void setup() {
  if (!store.open()) {
    ESP_LOGE(kTag, "NVS cannot be opened: is it encrypted, and this build not made for that?");
    return;
  }
  WiFi.persistent(false);
  WiFi.mode(WIFI_STA);
  WiFi.setAutoReconnect(true);
  const std::string ssid = store.text("wifi_ssid"), psk = store.text("wifi_psk");
  WiFi.begin(ssid.c_str(), psk.empty() ? nullptr : psk.c_str());
  auto d = std::make_unique<Device>(store);
  std::string why;
  if (d->begin(why)) {
    device = std::move(d);
  } else {
    ESP_LOGE(kTag, "%s", why.c_str());
  }
}

void loop() {
  if (device) device->loop();
  delay(20);
}
