#include "https.h"

#include <esp_http_client.h>
#include <esp_random.h>
#include <freertos/FreeRTOS.h>
#include <freertos/task.h>
#include <mbedtls/md.h>

#include <strings.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "muster/download.h"
#include "muster/est.h"

namespace {

constexpr size_t kPiece = 4096;

// Request is one GET; what it holds ends with it.
class Request {
 public:
  Request(const Https::Way& way, const std::string& path, const std::string& range) {
    const std::string url = "https://" + way.address + path;
    esp_http_client_config_t c = {};
    c.url = url.c_str();
    c.cert_pem = way.roots.c_str();
    if (!way.key.empty()) {
      c.client_cert_pem = way.cert.c_str();
      c.client_key_pem = way.key.c_str();
    }
    c.timeout_ms = 10000;
    c.disable_auto_redirect = true;  // muster never redirects
    c.buffer_size = kPiece;
    c.event_handler = header;
    c.user_data = this;
    client_ = esp_http_client_init(&c);
    if (client_ == nullptr) return;
    if (!way.authorization.empty()) esp_http_client_set_header(client_, "Authorization", way.authorization.c_str());
    if (!range.empty()) esp_http_client_set_header(client_, "Range", range.c_str());
  }
  ~Request() {
    if (client_ != nullptr) esp_http_client_cleanup(client_);
  }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  // answer sends the request, with a body if there is one, and reads the header.
  const muster::Answer& answer(const std::string& body = "") {
    const int size = static_cast<int>(body.size());
    if (client_ != nullptr && size > 0) {
      esp_http_client_set_method(client_, HTTP_METHOD_POST);
      esp_http_client_set_header(client_, "Content-Type", "application/pkcs10");
    }
    if (client_ == nullptr || esp_http_client_open(client_, size) != ESP_OK) return answer_;
    if (size > 0 && esp_http_client_write(client_, body.data(), size) != size) return answer_;
    const int64_t length = esp_http_client_fetch_headers(client_);
    answer_.status = length < 0 ? 0 : esp_http_client_get_status_code(client_);
    answer_.length = esp_http_client_is_chunked_response(client_) ? -1 : length;
    return answer_;
  }
  // read returns how many bytes came; 0: there are no more, or the line broke.
  size_t read(std::vector<char>& into) {
    const int n = esp_http_client_read(client_, into.data(), static_cast<int>(into.size()));
    return n > 0 ? static_cast<size_t>(n) : 0;
  }

 private:
  static esp_err_t header(esp_http_client_event_t* e) {
    if (e->event_id != HTTP_EVENT_ON_HEADER) return ESP_OK;
    muster::Answer& a = static_cast<Request*>(e->user_data)->answer_;
    if (strcasecmp(e->header_key, "Content-Range") == 0) a.range = e->header_value;
    if (strcasecmp(e->header_key, "Retry-After") == 0) a.retry_after = std::strtol(e->header_value, nullptr, 10);
    return ESP_OK;
  }
  esp_http_client_handle_t client_ = nullptr;
  muster::Answer answer_;
};

// Sum is a SHA-256 that grows with the download.
class Sum {
 public:
  Sum() {
    mbedtls_md_init(&c_);
    ok_ = mbedtls_md_setup(&c_, mbedtls_md_info_from_type(MBEDTLS_MD_SHA256), 0) == 0;
    begin();
  }
  ~Sum() { mbedtls_md_free(&c_); }
  Sum(const Sum&) = delete;
  Sum& operator=(const Sum&) = delete;
  void begin() { ok_ = ok_ && mbedtls_md_starts(&c_) == 0; }
  void add(const uint8_t* data, size_t size) { ok_ = ok_ && mbedtls_md_update(&c_, data, size) == 0; }
  muster::Bytes end() {
    muster::Bytes out(32);
    if (!ok_ || mbedtls_md_finish(&c_, out.data()) != 0) out.clear();
    return out;
  }

 private:
  mbedtls_md_context_t c_;
  bool ok_ = false;
};

}  // namespace

bool Https::begin() { return xTaskCreate(run, "https", 10240, this, 5, nullptr) == pdPASS; }

void Https::run(void* self) {
  Https& h = *static_cast<Https*>(self);
  for (;;) {
    Job j;
    {
      std::unique_lock<std::mutex> hold(h.lock_);
      h.more_.wait(hold, [&h] { return !h.jobs_.empty(); });
      j = std::move(h.jobs_.front());
      h.jobs_.pop_front();
    }
    if (h.over(j)) continue;
    if (j.kind == Event::Kind::image) {
      h.image(j);
    } else if (j.kind == Event::Kind::enrolled) {
      h.enrolment(std::move(j));
    } else {
      h.document(j);
    }
  }
}

void Https::add(Job j) {
  {
    const std::lock_guard<std::mutex> hold(lock_);
    j.life = life_;
    jobs_.push_back(std::move(j));
  }
  more_.notify_one();
}

void Https::fetch_document(Event::Kind kind, Way way, std::string path, size_t max) {
  Job j;
  j.kind = kind;
  j.way = std::move(way);
  j.path = std::move(path);
  j.max = max;
  add(std::move(j));
}

void Https::fetch_image(Way way, const muster::Offer& o, int64_t delay_ms) {
  Job j;
  j.kind = Event::Kind::image;
  j.way = std::move(way);
  j.path = o.path;
  j.offer = o;
  j.delay_ms = delay_ms;
  add(std::move(j));
}

void Https::enrol(Way way, std::string request) {
  Job j;
  j.kind = Event::Kind::enrolled;
  j.way = std::move(way);
  j.max = muster::kMaxEst;
  j.body = std::move(request);
  add(std::move(j));
}

void Https::stop() {
  life_++;
  const std::lock_guard<std::mutex> hold(lock_);
  jobs_.clear();
}

bool Https::pass(const Job& j, int64_t ms) const {
  for (; ms > 0 && !over(j); ms -= 200) vTaskDelay(pdMS_TO_TICKS(200));
  return !over(j);
}

// fetch returns a small document whole; empty if it could not.
std::string Https::fetch(const Job& j) {
  std::string text;
  Request r(j.way, j.path, "");
  const muster::Answer& a = r.answer(j.body);
  if (a.status != 200) return "";
  std::vector<char> piece(512);
  for (size_t n; text.size() <= j.max && (n = r.read(piece)) > 0;) text.append(piece.data(), n);
  if (text.size() > j.max || a.length != static_cast<int64_t>(text.size())) text.clear();
  return text;
}

void Https::document(const Job& j) {
  Event e;
  e.kind = j.kind;
  e.session = j.life;
  e.text = fetch(j);
  if (!over(j)) events_.put(std::move(e));
}

void Https::enrolment(Job j) {
  Event e;
  e.kind = j.kind;
  e.session = j.life;
  std::string request;
  std::swap(request, j.body);
  j.path = muster::kEstCerts;
  e.topic = fetch(j);
  j.path = muster::kEstEnroll;
  j.body = request;
  if (!e.topic.empty()) e.text = fetch(j);
  if (!over(j)) events_.put(std::move(e));
}

// image loads an image into the slot, from where it broke off, until it is whole or there is no hope.
void Https::image(const Job& j) {
  std::string why;
  muster::Download d(j.offer.size);
  Sum sum;
  std::vector<char> piece(kPiece);
  if (!pass(j, j.delay_ms)) return;
  if (!writer_.begin(why)) return ended(j, false, why, {});
  for (int said = 0; !d.complete();) {
    muster::Download::Verdict v;
    {
      Request r(j.way, j.path, d.range());
      v = d.answer(r.answer(), esp_random());
      if (v == muster::Download::Verdict::restart) {
        sum.begin();
        if (!writer_.begin(why)) return ended(j, false, why, {});
      }
      if (v == muster::Download::Verdict::take || v == muster::Download::Verdict::restart) {
        for (size_t n; !d.complete() && (n = r.read(piece)) > 0;) {
          if (over(j)) return writer_.abandon();
          n = std::min<size_t>(n, static_cast<size_t>(j.offer.size - d.have()));
          const uint8_t* data = reinterpret_cast<const uint8_t*>(piece.data());
          if (!writer_.write(data, n, why)) return ended(j, false, why, {});
          sum.add(data, n);
          d.took(static_cast<int64_t>(n));
          if (d.percent() / 10 > said / 10 && !d.complete()) {
            Event e;
            e.kind = Event::Kind::progress;
            e.session = j.life;
            e.percent = said = d.percent();
            events_.put(std::move(e));
          }
        }
        if (d.complete()) break;
        v = d.broke(esp_random());
      }
    }  // the connection is closed before the pause
    if (v == muster::Download::Verdict::fail) return ended(j, false, d.why(), {});
    if (!pass(j, d.wait_ms())) return writer_.abandon();
  }
  ended(j, true, "", sum.end());
}

void Https::ended(const Job& j, bool ok, const std::string& why, const muster::Bytes& sha256) {
  if (!ok) writer_.abandon();
  if (over(j)) return;
  Event e;
  e.kind = Event::Kind::image;
  e.session = j.life;
  e.ok = ok;
  e.text = why;
  e.sha256 = sha256;
  events_.put(std::move(e));
}
