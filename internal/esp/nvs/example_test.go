package nvs_test

import (
	"bytes"
	"fmt"
	"strings"

	"muster/internal/esp/nvs"
)

// A device's partition as the factory writes it, and as support reads it from a returned device.
func Example() {
	entries := []nvs.Entry{
		nvs.NewString("muster", "id", "dev-000001"),
		nvs.NewNumber("muster", "port", uint16(8883)),
		nvs.NewBlob("muster", "salt", []byte{1, 2, 3}),
	}
	keys, err := nvs.GenerateKeys(bytes.NewReader(make([]byte, 64))) // crypto/rand.Reader outside of examples
	if err != nil {
		fmt.Println(err)
		return
	}
	image, err := nvs.Encode(entries, nvs.Options{Size: 0x3000, Keys: &keys})
	if err != nil {
		fmt.Println(err)
		return
	}

	fromDevice, err := nvs.ParseKeyPartition(keys.Partition())
	if err != nil {
		fmt.Println(err)
		return
	}
	p, err := nvs.Decode(image, &fromDevice)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, it := range p.Items {
		if it.Type != nvs.Namespace {
			fmt.Printf("0x%04x %s:%s %s %s\n", it.Offset, it.Namespace, it.Key, it.Type, it.Text())
		}
	}
	fmt.Println(len(p.Findings), "findings")
	// Output:
	// 0x0060 muster:id string dev-000001
	// 0x00a0 muster:port u16 8883
	// 0x00c0 muster:salt blob 010203
	// 0 findings
}

// A line of CSV that cannot be read is named; its value is not.
func ExampleParseCSV() {
	_, err := nvs.ParseCSV(strings.NewReader("key,type,encoding,value\nwifi,namespace,,\nchannel,data,u8,300\n"), nvs.CSVOptions{})
	fmt.Println(err)
	// Output: line 3: key "channel": not a number, or not one of u8: write it in decimal
}
