package provision

import (
	"fmt"
	"slices"
	"strings"

	"muster/internal/esp"
	"muster/internal/fleet"
)

// Step burns eFuses by one call of espefuse. It cannot be undone.
type Step struct {
	ID     string   `json:"id"`
	Title  string   `json:"title"`
	Blocks []string `json:"blocks,omitempty"` // of a key: the eFuse blocks, as espefuse's summary names them, that must be free
	Args   []string `json:"args"`             // of espefuse
	Last   bool     `json:"last,omitempty"`   // nothing can be burnt after it
}

// Command returns the call as a person would type it, without the port.
func (s Step) Command() string { return "espefuse " + strings.Join(s.Args, " ") }

// fuses is what differs between the chips (ESP-IDF's security-features-enablement-workflows.rst and
// flash_encryption_secure_features.c of each chip).
type fuses struct {
	encrypt    []string // name and value, of what turns flash encryption on for good
	download   []string // of what keeps the download mode from encrypting and reading through the cache
	jtag       []string // of what shuts JTAG and other ways to start foreign code
	protect    string   // write-protecting this one protects the two lists above, and DIS_CACHE or DIS_ICACHE, which would brick the chip
	secureBoot string   // turns Secure Boot v2 on
	close      string   // closes the download mode, or most of it
}

var xtsOn = []string{"SPI_BOOT_CRYPT_CNT", "7"}

var fusesOf = map[string]fuses{
	"esp32": {
		// FLASH_CRYPT_CONFIG is 0 in a new chip, and the key would not be tweaked at all (esp32.md §3.1).
		encrypt:  []string{"FLASH_CRYPT_CONFIG", "0xF", "FLASH_CRYPT_CNT", "127"},
		download: []string{"DISABLE_DL_ENCRYPT", "1", "DISABLE_DL_DECRYPT", "1", "DISABLE_DL_CACHE", "1"},
		jtag:     []string{"JTAG_DISABLE", "1"},
		protect:  "DIS_CACHE", secureBoot: "ABS_DONE_1", close: "UART_DOWNLOAD_DIS",
	},
	"esp32s2": {
		encrypt: xtsOn, download: []string{"DIS_DOWNLOAD_MANUAL_ENCRYPT", "1", "DIS_DOWNLOAD_ICACHE", "1", "DIS_DOWNLOAD_DCACHE", "1"},
		jtag:    []string{"HARD_DIS_JTAG", "1", "DIS_BOOT_REMAP", "1", "DIS_LEGACY_SPI_BOOT", "1"},
		protect: "DIS_ICACHE", secureBoot: "SECURE_BOOT_EN", close: "ENABLE_SECURITY_DOWNLOAD",
	},
	"esp32s3": {
		encrypt: xtsOn, download: []string{"DIS_DOWNLOAD_MANUAL_ENCRYPT", "1", "DIS_DOWNLOAD_ICACHE", "1", "DIS_DOWNLOAD_DCACHE", "1"},
		jtag:    []string{"DIS_PAD_JTAG", "1", "DIS_USB_JTAG", "1", "DIS_DIRECT_BOOT", "1"},
		protect: "DIS_ICACHE", secureBoot: "SECURE_BOOT_EN", close: "ENABLE_SECURITY_DOWNLOAD",
	},
	"esp32c3": riscv("DIS_DOWNLOAD_MANUAL_ENCRYPT", "1", "DIS_DOWNLOAD_ICACHE", "1"),
	"esp32c6": riscv("DIS_DOWNLOAD_MANUAL_ENCRYPT", "1", "DIS_DOWNLOAD_ICACHE", "1"),
	"esp32h2": riscv("DIS_DOWNLOAD_MANUAL_ENCRYPT", "1"),
}

func riscv(download ...string) fuses {
	return fuses{
		encrypt: xtsOn, download: download, jtag: []string{"DIS_PAD_JTAG", "1", "DIS_USB_JTAG", "1", "DIS_DIRECT_BOOT", "1"},
		protect: "DIS_ICACHE", secureBoot: "SECURE_BOOT_EN", close: "ENABLE_SECURITY_DOWNLOAD",
	}
}

// Blocks for keys. All chips but the ESP32 have BLOCK_KEY0 to BLOCK_KEY5, of which the last takes no flash-encryption key
// (SOC_EFUSE_BLOCK9_KEY_PURPOSE_QUIRK).
const (
	keyBlocks = 6
	lastXTS   = 4
)

func keyBlock(i int) string { return fmt.Sprintf("BLOCK_KEY%d", i) }

// planSteps plans what is burnt, in the only order that works: keys that must not be readable first, then what turns the
// features on, then what protects them; RD_DIS after the last key that needs read protection; the download mode last.
func (pl *Plan) planSteps() error {
	if pl.p.Flash == "" && pl.p.NVS != HMAC && len(pl.p.SecureBoot) == 0 {
		return nil
	}
	f, known := fusesOf[pl.p.Chip.Name]
	if !known {
		return fleet.Coded(fleet.Unprocessable, CodeChip, "muster does not know the eFuses of the %s well enough to burn them: leave flash encryption, Secure Boot and HMAC to ESP-IDF's own first boot", pl.p.Chip.Name)
	}
	if err := pl.keySteps(); err != nil {
		return err
	}
	if pl.p.Flash != "" {
		pl.burn("encryption", "turn flash encryption on, for good", f.encrypt...)
		pl.burn("download-encrypt", "keep the download mode from encrypting, and from reading through the cache", f.download...)
	}
	if len(pl.p.SecureBoot) > 0 {
		pl.burn("secure-boot", "turn Secure Boot on: from now on only signed bootloaders start", f.secureBoot, "1")
	}
	if pl.p.Flash != "" || len(pl.p.SecureBoot) > 0 {
		pl.burn("jtag", "shut JTAG, and starting without the bootloader", f.jtag...)
	}
	if n := len(pl.p.SecureBoot); n > 0 && pl.p.Chip.Revocable && n < pl.p.Chip.KeySlots {
		var unused []string
		for i := n; i < pl.p.Chip.KeySlots; i++ {
			unused = append(unused, fmt.Sprintf("SECURE_BOOT_KEY_REVOKE%d", i), "1")
		}
		pl.burn("revoke-unused", "revoke the key slots that stay empty, so that nobody can fill them", unused...)
	}
	if pl.p.Flash != "" {
		pl.add("protect", "write-protect these settings", "write-protect-efuse", f.protect)
	}
	if len(pl.p.SecureBoot) > 0 {
		pl.add("protect-digest", "see to it that the key digest can always be read; no key can be read-protected any more", "write-protect-efuse", "RD_DIS")
	}
	if !pl.p.KeepDownload && (pl.p.Flash != "" || len(pl.p.SecureBoot) > 0) {
		title := "restrict the download mode for good: no eFuse can be burnt any more"
		if f.close == "UART_DOWNLOAD_DIS" {
			title = "shut the download mode for good: esptool cannot reach the chip any more (chip revision v3.0 or later)"
		}
		pl.burn("close", title, f.close, "1")
		pl.steps[len(pl.steps)-1].Last = true
	}
	return nil
}

func (pl *Plan) add(id, title string, args ...string) {
	pl.steps = append(pl.steps, Step{ID: id, Title: title, Args: args})
}

func (pl *Plan) burn(id, title string, fuses ...string) {
	pl.add(id, title, append([]string{"burn-efuse"}, fuses...)...)
}

func (pl *Plan) key(id, title string, blocks []string, args ...string) {
	pl.steps = append(pl.steps, Step{ID: id, Title: title, Blocks: blocks, Args: append([]string{"burn-key"}, args...)})
}

// keySteps finds a block for each key.
func (pl *Plan) keySteps() error {
	if pl.p.Chip.Name == "esp32" {
		if pl.p.Flash != "" {
			pl.key("flash-key", "burn the flash-encryption key; nobody can read it back", []string{"BLOCK1"}, "flash_encryption", flashKeyFile)
		}
		if len(pl.p.SecureBoot) > 0 {
			pl.key("secure-boot-key-0", "burn the digest of the Secure Boot key: it can never be changed", []string{"BLOCK2"}, "secure_boot_v2", digestFile(0))
		}
		return nil
	}
	free := make([]bool, keyBlocks)
	for i := range free {
		free[i] = pl.p.NVS != HMAC || i != pl.p.HMACBlock
	}
	take := func(n, last int) (at int, ok bool) { // n blocks in a row
		for at := 0; at+n-1 <= last; at++ {
			if !slices.Contains(free[at:at+n], false) {
				for i := range n {
					free[at+i] = false
				}
				return at, true
			}
		}
		return 0, false
	}
	noRoom := fleet.Coded(fleet.Unprocessable, CodeChip, "the %s has not enough key blocks left for these keys: use another --hmac-block, or fewer Secure Boot keys", pl.p.Chip.Name)
	switch pl.p.Flash {
	case esp.CipherXTS128:
		at, ok := take(1, lastXTS)
		if !ok {
			return noRoom
		}
		pl.key("flash-key", "burn the flash-encryption key; nobody can read it back", []string{keyBlock(at)}, keyBlock(at), flashKeyFile, "XTS_AES_128_KEY")
	case esp.CipherXTS256:
		// espefuse puts the second half into the next free block.
		at, ok := take(2, lastXTS)
		if !ok {
			return noRoom
		}
		pl.key("flash-key", "burn the flash-encryption key into two blocks; nobody can read it back", []string{keyBlock(at), keyBlock(at + 1)}, keyBlock(at), flashKeyFile, "XTS_AES_256_KEY")
	}
	if pl.p.NVS == HMAC {
		b := keyBlock(pl.p.HMACBlock)
		pl.key("hmac-key", "burn the key from which the chip derives its NVS keys; nobody can read it back", []string{b}, b, hmacKeyFile, "HMAC_UP")
	}
	for i := range pl.p.SecureBoot {
		at, ok := take(1, keyBlocks-1)
		if !ok {
			return noRoom
		}
		pl.key(fmt.Sprintf("secure-boot-key-%d", i), fmt.Sprintf("burn the digest of Secure Boot key %d: it can never be changed", i), []string{keyBlock(at)},
			keyBlock(at), digestFile(i), fmt.Sprintf("SECURE_BOOT_DIGEST%d", i))
	}
	return nil
}
