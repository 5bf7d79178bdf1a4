package partition

import (
	"cmp"
	"fmt"
	"slices"

	"muster/internal/esp"
)

// Check says what is wrong with the table for a device of that layout: as errors what gen_esp32part.py refuses, as
// warnings what a device or an operator will stumble over. The offset of a finding is that of the partition in flash.
func (t Table) Check(l Layout) esp.Findings {
	c := checker{l: l}
	for _, p := range t.Partitions {
		c.partition(p)
	}
	c.names(t)
	c.overlaps(t)
	c.single(t, OTAData, "otadata")
	c.single(t, TEEOTA, "TEE otadata")
	c.updates(t)
	if need := t.FlashSize(); l.FlashSize > 0 && need > l.FlashSize {
		c.add(esp.Error, "esp_partition_flash", need, "make partitions smaller, or take a larger flash",
			"the partitions need %d bytes of flash, there are %d", need, l.FlashSize)
	}
	return c.found
}

type checker struct {
	l     Layout
	found esp.Findings
}

func (c *checker) add(s esp.Severity, code string, offset int64, hint, format string, a ...any) {
	c.found = append(c.found, esp.Finding{Severity: s, Code: code, Offset: offset, Message: fmt.Sprintf(format, a...), Hint: hint})
}

// partition judges a row by itself.
func (c *checker) partition(p Partition) {
	at := int64(p.Offset)
	if align := offsetAlign(p.Type); at%align != 0 {
		c.add(esp.Error, "esp_partition_offset", at, fmt.Sprintf("use 0x%x", (at+align-1)/align*align), "the offset of partition %s must be a multiple of 0x%x", p.Name, align)
	}
	if align := c.sizeAlign(); p.Type == App && int64(p.Size)%align != 0 {
		c.add(esp.Error, "esp_partition_size", at, fmt.Sprintf("use 0x%x", int64(p.Size)/align*align), "the size of app %s, 0x%x, must be a multiple of 0x%x", p.Name, p.Size, align)
	}
	if p.Size == 0 {
		c.add(esp.Warning, "esp_partition_empty", at, "", "partition %s has no bytes", p.Name)
	}
	if len(p.Name) > nameSize {
		c.add(esp.Warning, "esp_partition_name", at, fmt.Sprintf("firmware finds it as %s only", stored(p.Name)), "the name %s has more than %d bytes", p.Name, nameSize)
	}
	if unknown := p.Flags &^ (Encrypted | ReadOnly); unknown != 0 {
		c.add(esp.Warning, "esp_partition_flags", at, "", "partition %s has the flags 0x%x, which muster does not know", p.Name, unknown)
	}
	c.nameOfOther(p)
	if p.Type == Data {
		c.data(p)
	}
}

func (c *checker) sizeAlign() int64 {
	if c.l.SecureBootV1 {
		return appAlign
	}
	return sector
}

// data judges a partition of data.
func (c *checker) data(p Partition) {
	at := int64(p.Offset)
	if (p.Subtype == OTAData || p.Subtype == CoreDump) && p.Flags&ReadOnly != 0 {
		c.add(esp.Error, "esp_partition_readonly", at, "take the flag away", "partition %s (%s) is always written to and cannot be readonly", p.Name, p.Type.SubtypeName(p.Subtype))
	}
	if p.Subtype != NVS {
		return
	}
	if p.Size < minRWNVS && p.Flags&ReadOnly == 0 {
		c.add(esp.Error, "esp_partition_nvs_size", at, "make it larger, or flag it readonly", "NVS partition %s has 0x%x bytes: to be written to it needs 0x%x", p.Name, p.Size, minRWNVS)
	}
	if p.Flags&Encrypted != 0 {
		c.add(esp.Warning, "esp_partition_nvs_encrypted", at, "take the flag away: only nvs_keys has it, NVS is encrypted with the keys in there", "NVS partition %s is flagged encrypted, which devices refuse", p.Name)
	}
}

// nameOfOther warns of a name that is the word for something else.
func (c *checker) nameOfOther(p Partition) {
	if v, ok := valueIn(typeWords, p.Name); ok && v != uint8(p.Type) {
		c.add(esp.Warning, "esp_partition_named", int64(p.Offset), "", "partition %s has the name of a type that it is not", p.Name)
	}
	for _, words := range subtypeWords {
		if _, ok := valueIn(words, p.Name); !ok {
			continue
		}
		if v, ok := valueIn(subtypeWords[p.Type], p.Name); !ok || v != uint8(p.Subtype) {
			c.add(esp.Warning, "esp_partition_named", int64(p.Offset), "", "partition %s has the name of a subtype that it is not", p.Name)
		}
		return
	}
}

func (c *checker) names(t Table) {
	seen := map[string]bool{}
	for _, p := range t.Partitions {
		name := stored(p.Name)
		if seen[name] {
			c.add(esp.Error, "esp_partition_twice", int64(p.Offset), "rename one", "two partitions are called %s", name)
		}
		seen[name] = true
	}
}

func (c *checker) overlaps(t Table) {
	all := slices.SortedStableFunc(slices.Values(t.Partitions), func(a, b Partition) int { return cmp.Compare(a.Offset, b.Offset) })
	free := int64(c.l.Table) + Size
	for i, p := range all {
		if int64(p.Offset) < free && !p.anchored() {
			c.add(esp.Error, "esp_partition_below", int64(p.Offset), fmt.Sprintf("use 0x%x or higher", free), "partition %s begins before the end of the partition table, 0x%x", p.Name, free)
		}
		if i > 0 && int64(p.Offset) < all[i-1].End() {
			c.add(esp.Error, "esp_partition_overlap", int64(p.Offset), fmt.Sprintf("begin at 0x%x", all[i-1].End()), "partition %s overlaps %s, which takes 0x%x to 0x%x", p.Name, all[i-1].Name, all[i-1].Offset, all[i-1].End()-1)
		}
	}
}

// single checks a kind of partition that there is at most once, with two sectors.
func (c *checker) single(t Table, s Subtype, name string) {
	n := 0
	for _, p := range t.Partitions {
		if !p.Is(Data, s) {
			continue
		}
		if n++; n > 1 {
			c.add(esp.Error, "esp_partition_otadata", int64(p.Offset), "leave one", "there is more than one %s partition", name)
		}
		if p.Size != otaSize {
			c.add(esp.Error, "esp_partition_otadata", int64(p.Offset), fmt.Sprintf("give it 0x%x", otaSize), "%s partition %s has 0x%x bytes", name, p.Name, p.Size)
		}
	}
}

// updates warns of what would keep a device from being updated over the air.
func (c *checker) updates(t Table) {
	slots := t.OTASlots()
	all := 0
	for _, p := range t.Partitions {
		if p.Type == App && p.Subtype >= OTA0 && p.Subtype < OTA0+MaxOTA {
			all++
		}
	}
	switch _, data := t.FindType(Data, OTAData); {
	case all == 0:
		return
	case len(slots) < all:
		c.add(esp.Warning, "esp_partition_slots", 0, "number them ota_0, ota_1 and so on", "of %d OTA slots devices see the first %d only", all, len(slots))
	case !data:
		c.add(esp.Warning, "esp_partition_no_otadata", 0, "add otadata, data, ota, , 0x2000", "there are OTA slots but no otadata partition: no update can be booted")
	}
	for _, p := range slots {
		if p.Size != slots[0].Size {
			c.add(esp.Warning, "esp_partition_slots", int64(p.Offset), "", "the OTA slots differ in size: an image must fit the smallest")
			return
		}
	}
}
