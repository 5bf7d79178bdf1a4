#include "slots.h"

#include <esp_chip_info.h>
#include <esp_idf_version.h>
#include <esp_system.h>
#include <sdkconfig.h>

#ifdef CONFIG_BOOTLOADER_APP_ANTI_ROLLBACK
#include <esp_efuse.h>
#endif

#include "muster/text.h"

namespace {

// image_hash is the appended SHA-256 of the image in a slot; empty if there is none.
std::string image_hash(const esp_partition_t* slot) {
  uint8_t sum[32];
  if (slot == nullptr || esp_partition_get_sha256(slot, sum) != ESP_OK) return "";
  return muster::hex(sum, sizeof sum);
}

const char* boot_reason() {
  switch (esp_reset_reason()) {
    case ESP_RST_POWERON: return "power-on";
    case ESP_RST_SW: return "software";
    case ESP_RST_PANIC: return "panic";
    case ESP_RST_INT_WDT:
    case ESP_RST_TASK_WDT:
    case ESP_RST_WDT: return "watchdog";
    case ESP_RST_DEEPSLEEP: return "deep-sleep";
    case ESP_RST_BROWNOUT: return "brownout";
    default: return "other";
  }
}

int64_t chip_revision() {
  esp_chip_info_t info;
  esp_chip_info(&info);
#if ESP_IDF_VERSION_MAJOR >= 5
  return info.revision;
#else
  return info.full_revision;
#endif
}

std::string failure(const char* what, esp_err_t err) { return std::string(what) + ": " + esp_err_to_name(err); }

}  // namespace

void read_facts(muster::Facts& f) {
  const esp_partition_t* running = esp_ota_get_running_partition();
  const esp_partition_t* other = esp_ota_get_next_update_partition(nullptr);
  f.image = image_hash(running);
  f.chip = CONFIG_IDF_TARGET;
  f.revision = chip_revision();
  f.boot = boot_reason();
  f.slot_size = other == nullptr ? 0 : other->size;
#ifdef CONFIG_BOOTLOADER_APP_ANTI_ROLLBACK
  f.secure_version = esp_efuse_read_secure_version();
#endif
  esp_ota_img_states_t state;
  f.must_verify = esp_ota_get_state_partition(running, &state) == ESP_OK && state == ESP_OTA_IMG_PENDING_VERIFY;
  f.failed_image = image_hash(esp_ota_get_last_invalid_partition());
  esp_app_desc_t desc;
  if (other != nullptr && esp_ota_get_partition_description(other, &desc) == ESP_OK && image_hash(other) != f.failed_image) {
    f.previous = image_hash(other);
    f.previous_secure_version = desc.secure_version;
  }
}

bool SlotWriter::begin(std::string& why) {
  abandon();
  slot_ = esp_ota_get_next_update_partition(nullptr);
  if (slot_ == nullptr) {
    why = "the partition table has no second OTA slot";
    return false;
  }
  const esp_err_t err = esp_ota_begin(slot_, OTA_WITH_SEQUENTIAL_WRITES, &handle_);
  open_ = err == ESP_OK;
  if (!open_) why = failure("esp_ota_begin", err);
  return open_;
}

bool SlotWriter::write(const uint8_t* data, size_t size, std::string& why) {
  const esp_err_t err = esp_ota_write(handle_, data, size);
  if (err != ESP_OK) why = failure("esp_ota_write", err);
  return err == ESP_OK;
}

void SlotWriter::abandon() {
  if (open_) esp_ota_abort(handle_);
  open_ = false;
}

bool SlotWriter::finish(std::string& image, std::string& why) {
  if (!open_) {
    why = "nothing was written";
    return false;
  }
  open_ = false;  // esp_ota_end frees the handle, whatever it finds
  const esp_err_t err = esp_ota_end(handle_);
  if (err != ESP_OK) {
    why = failure("esp_ota_end", err);
    return false;
  }
  image = image_hash(slot_);
  if (image.empty()) why = "the image has no hash";
  return !image.empty();
}

bool select_other_slot(std::string& why) {
  const esp_err_t err = esp_ota_set_boot_partition(esp_ota_get_next_update_partition(nullptr));
  if (err != ESP_OK) why = failure("esp_ota_set_boot_partition", err);
  return err == ESP_OK;
}
