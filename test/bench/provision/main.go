// Command provision measures `muster provision` over a CSV file of devices, against a whole muster: registration, keys, certificates,
// passwords, NVS partitions and files, two times:
//
//	ratio provision <value> aim 0.05        bare cost / the run, encrypted NVS by HMAC and no firmware
//	ratio provision-sealed <value> aim 0.25 the same with an application of 1.5 MiB, encrypted for each device
//	ratio provision-30s <value> aim 1       30 s / the first run, scaled to 1000 devices
//
// The bare cost is, on every core and in the same process: a key and a signed certificate for each device, AES and SHA-256 over the
// bytes that are encrypted, and the same bytes written to files that are synced.
package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/esp"
	"muster/internal/esp/image"
	"muster/test/world"
)

func main() {
	n := flag.Int("devices", 1000, "devices in the CSV file")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := run(ctx, *n); err != nil {
		fmt.Fprintln(os.Stderr, "bench provision:", err)
		os.Exit(1)
	}
}

const nvsSize = 0x5000

func run(ctx context.Context, n int) (err error) {
	dir, err := os.MkdirTemp("", "muster-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	w, err := world.Start(ctx, world.Options{Dir: filepath.Join(dir, "world"), Say: func(s string) { fmt.Println(s) }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop(context.Background())) }()
	boot, app, table, err := firmware(dir)
	if err != nil {
		return err
	}
	light, err := measure(ctx, w, dir, "light", n, nvsSize, "--chip", "esp32s3", "--nvs-encryption", "hmac")
	if err != nil {
		return err
	}
	if _, err := measure(ctx, w, dir, "sealed", n, nvsSize+3<<19, "--bootloader", boot, "--app", app, "--partitions", table, "--flash-encryption", "on", "--nvs-encryption", "keys"); err != nil {
		return err
	}
	whole := light.Seconds() * 1000 / float64(n)
	fmt.Printf("1000 devices in %.1f s\nratio provision-30s %.2f aim 1\n", whole, 30/whole)
	return nil
}

// firmware writes the images of a product with an application of 1.5 MiB.
func firmware(dir string) (boot, app, table string, err error) {
	c, _ := esp.ChipByName("esp32s3")
	desc, err := image.AppDesc{ProjectName: "bench", Version: "1.0.0", IDFVersion: "v5.3.1"}.Bytes()
	if err != nil {
		return "", "", "", err
	}
	boot, app, table = filepath.Join(dir, "boot.bin"), filepath.Join(dir, "app.bin"), filepath.Join(dir, "table.csv")
	for path, parts := range map[string][]image.Part{boot: {{Load: 0x3fce2820, Data: make([]byte, 20<<10)}}, app: {{Load: 0x3c000020, Data: desc}, {Load: 0x3fc90000, Data: make([]byte, 3<<19-4096)}}} {
		var out bytes.Buffer
		if err := errors.Join(image.Write(&out, image.NewHeader(c.ID), parts), os.WriteFile(path, out.Bytes(), 0o600)); err != nil {
			return "", "", "", err
		}
	}
	csv := "nvs,data,nvs,0x9000,0x5000\notadata,data,ota,0xe000,0x2000\napp0,app,ota_0,0x10000,0x180000\napp1,app,ota_1,0x190000,0x180000\nnvs_key,data,nvs_keys,0x310000,0x1000,encrypted\n"
	return boot, app, table, os.WriteFile(table, []byte(csv), 0o600)
}

// measure provisions n devices, and does the bare work for as many.
func measure(ctx context.Context, w *world.World, dir, name string, n, size int, flags ...string) (time.Duration, error) {
	out := filepath.Join(dir, name)
	var csv strings.Builder
	csv.WriteString("id,product,label:site\n")
	for i := range n {
		fmt.Fprintf(&csv, "%s-%05d,%s,berlin\n", name, i, name)
	}
	file := filepath.Join(dir, name+".csv")
	if err := os.WriteFile(file, []byte(csv.String()), 0o600); err != nil {
		return 0, err
	}
	begin := time.Now()
	if said, err := w.Muster(ctx, append([]string{"provision", "--from", file, "--out", out}, flags...)...); err != nil {
		return 0, fmt.Errorf("%w: %s", err, said)
	}
	took := time.Since(begin)
	if err := os.RemoveAll(out); err != nil {
		return 0, err
	}
	begin = time.Now()
	if err := bare(dir, n, size); err != nil {
		return 0, err
	}
	base := time.Since(begin)
	line := map[string]struct{ suffix, aim string }{"light": {"", "0.05"}, "sealed": {"-sealed", "0.25"}}[name]
	fmt.Printf("%s: %d devices in %.2f s, bare %.2f s\nratio provision%s %.2f aim %s\n", name, n, took.Seconds(), base.Seconds(), line.suffix, base.Seconds()/took.Seconds(), line.aim)
	return took, nil
}

// bare is what cannot be left out.
func bare(dir string, n, size int) error {
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bare"}, NotAfter: time.Now().Add(time.Hour)}
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range n {
		g.Go(func() error {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return err
			}
			if _, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(int64(i) + 2)}, parent, key.Public(), ca); err != nil {
				return err
			}
			data := make([]byte, size)
			for at := 0; at+aes.BlockSize <= size; at += aes.BlockSize {
				block.Encrypt(data[at:], data[at:])
			}
			sha256.Sum256(data)
			f, err := os.CreateTemp(dir, "bare")
			if err != nil {
				return err
			}
			_, err = f.Write(data)
			return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
		})
	}
	return g.Wait()
}
