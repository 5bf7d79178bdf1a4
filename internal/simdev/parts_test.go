package simdev_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"muster/internal/fleet"
	"muster/internal/simdev"
)

func TestFlash(t *testing.T) {
	dir, err := simdev.NewDirFlash(filepath.Join(t.TempDir(), "dev-1"))
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]simdev.Flash{"memory": &simdev.MemFlash{}, "directory": dir} {
		t.Run(name, func(t *testing.T) {
			if _, err := f.Read("a"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("nothing: %v", err)
			}
			if err := f.Remove("a"); err != nil {
				t.Errorf("remove nothing: %v", err)
			}
			for _, want := range []string{"one", "two, longer", ""} {
				b := []byte(want)
				if err := f.Write("a", b); err != nil {
					t.Fatal(err)
				}
				if len(b) > 0 {
					b[0] = 'X' // the flash keeps its own copy
				}
				if got, err := f.Read("a"); err != nil || string(got) != want {
					t.Errorf("%q, %v", got, err)
				}
			}
			if err := f.Remove("a"); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Read("a"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("removed: %v", err)
			}
		})
	}
}

func TestDirFlashKeepsSecretsToItself(t *testing.T) {
	dir := t.TempDir()
	f, err := simdev.NewDirFlash(dir)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.Write("secret", []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v: only the file itself is left", files, err)
	}
	if info, err := files[0].Info(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestImages(t *testing.T) {
	a, again := simdev.MakeImage("1.1.0", simdev.Good, 4096, 7), simdev.MakeImage("1.1.0", simdev.Good, 4096, 7)
	if len(a) != 4096 || !bytes.Equal(a, again) || bytes.Equal(a, simdev.MakeImage("1.1.0", simdev.Good, 4096, 8)) {
		t.Error("an image does not follow from its arguments")
	}
	if !bytes.HasPrefix(a, []byte("MUSTERSIM1\n{\"version\":\"1.1.0\",\"behaviour\":\"good\"}\n")) {
		t.Errorf("%.60q", a)
	}
	if n := len(simdev.MakeImage("1", simdev.Good, 0, 1)); n < 40 || n > 60 {
		t.Errorf("the smallest image has %d bytes", n)
	}
	for _, b := range []string{simdev.Good, simdev.BootLoop, simdev.Mute, simdev.NoMQTT, simdev.CrashAfter + "30s"} {
		fw, err := simdev.ParseImage(simdev.MakeImage("2.0.0", b, 100, 1))
		if err != nil || fw.Behaviour != b || fw.Version != "2.0.0" {
			t.Errorf("%s: %+v, %v", b, fw, err)
		}
	}
	head := "MUSTERSIM1\n"
	for _, bad := range []string{
		"", "ELF", head, head + `{"version":"1"}`, head + `{"version":"1"}` + "\n", head + `{"behaviour":"good"}` + "\n", head + "{}\n", head + "x\n",
		head + `{"version":"1","behaviour":"explode"}` + "\n", head + `{"version":"1","behaviour":"crash-after=soon"}` + "\n", head + `{"version":"1","behaviour":"crash-after=-1s"}` + "\n",
		head + `{"version":"1","behaviour":"good","extra":1}` + "\n", head + strings.Repeat(" ", 600) + `{"version":"1","behaviour":"good"}` + "\n",
	} {
		if _, err := simdev.ParseImage([]byte(bad)); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

func FuzzParseImage(f *testing.F) {
	f.Add(simdev.MakeImage("1.0.0", simdev.Good, 64, 1))
	f.Add([]byte("MUSTERSIM1\n{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		fw, err := simdev.ParseImage(b)
		if err == nil && (fw.Version == "" || fw.Behaviour == "") {
			t.Fatalf("%+v", fw)
		}
		if err != nil && !fleet.Is(err, fleet.Invalid) {
			t.Fatal(err)
		}
	})
}

func TestFaultsAsText(t *testing.T) {
	for text, want := range map[string]simdev.Faults{
		"power-cut=3":          {PowerCut: simdev.Cut{Write: 3, Point: simdev.CutMiddle}},
		"power-cut=12:after":   {PowerCut: simdev.Cut{Write: 12, Point: simdev.CutAfter}},
		"corrupt-download=2":   {CorruptDownloads: 2},
		"corrupt-download=all": {CorruptDownloads: -1},
		"lie=installed":        {LieInstalled: true},
		"claim=dev-2":          {ClaimID: "dev-2"},
		"flood=100":            {FloodPerSecond: 100},
		"clock=1970":           {Clock1970: true},
		"boot-loop=on":         {BootLoop: true},
		"silent=on":            {Silent: true},
		"drop=30s":             {DropEvery: 30e9},
		"duplicates=on":        {Duplicates: true},
		"buffer=256":           {Buffer: 256},
		"lose-keys=on":         {LoseKeys: true},
	} {
		var f simdev.Faults
		if err := f.Set(text); err != nil || f != want {
			t.Errorf("%s: %+v, %v", text, f, err)
		}
		if name, _, _ := strings.Cut(text, "="); !strings.Contains(simdev.FaultHelp(), "  "+name+"=") {
			t.Errorf("%s is not explained", name)
		}
	}
	if n, fields := strings.Count(simdev.FaultHelp(), "\n"), reflect.TypeFor[simdev.Faults]().NumField(); n != fields {
		t.Errorf("%d faults are explained, there are %d", n, fields)
	}
	for _, bad := range []string{"", "nonsense", "power-cut", "power-cut=0", "power-cut=1:never", "corrupt-download=-1", "lie=all", "claim=Dev 2", "flood=x", "clock=now", "boot-loop", "silent=off", "drop=0s", "drop=fast", "buffer=-3", "lose-keys="} {
		var f simdev.Faults
		if err := f.Set(bad); !fleet.Is(err, fleet.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// good are credentials that need no bubble.
func good(t *testing.T) simdev.Credentials {
	t.Helper()
	return newWorldCredentials(t)
}

func TestCredentials(t *testing.T) {
	want := good(t)
	dir := filepath.Join(t.TempDir(), "dev-1")
	if err := want.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := simdev.LoadCredentials(dir)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, name := range []string{simdev.KeyFile, simdev.PasswordFile} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if _, err := simdev.New(simdev.Config{Credentials: got}); err != nil {
		t.Error(err)
	}
}

func TestCredentialsThatCannotWork(t *testing.T) {
	stranger := good(t)
	write := func(name, text string) func(string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600) }
	}
	remove := func(names ...string) func(string) error {
		return func(dir string) error {
			for _, n := range names {
				if err := os.Remove(filepath.Join(dir, n)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	endpoints := func(device, mqtt string) string {
		return `{"device":"` + device + `","mqtt":"` + mqtt + `","fallback_mqtt":"a:1","https":"a:2","recovery_https":"a:3"}`
	}
	for name, c := range map[string]struct {
		spoil func(dir string) error
		says  string
	}{
		"empty folder":    {remove(simdev.EndpointsFile), "not a credentials folder"},
		"no trust":        {remove(simdev.TrustFile), "trust nobody"},
		"trust is no PEM": {write(simdev.TrustFile, "hello"), "trust.pem is not PEM"},
		"trust is a key": {func(d string) error {
			return os.Rename(filepath.Join(d, simdev.KeyFile), filepath.Join(d, simdev.TrustFile))
		}, "no CERTIFICATE"},
		"trust of rubbish":       {write(simdev.TrustFile, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "no certificate"},
		"key without cert":       {remove(simdev.CertFile), "belong together"},
		"cert without key":       {remove(simdev.KeyFile), "belong together"},
		"no way in":              {remove(simdev.KeyFile, simdev.CertFile, simdev.PasswordFile), "no way in"},
		"key of another":         {func(d string) error { c := stranger; return saveKey(c, d) }, "does not fit the key"},
		"key that is none":       {write(simdev.KeyFile, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "not PKCS #8"},
		"endpoints are no JSON":  {write(simdev.EndpointsFile, "{"), "endpoints.json"},
		"endpoints with a typo":  {write(simdev.EndpointsFile, `{"mqqt":"a:1"}`), "endpoints.json"},
		"device is no id":        {write(simdev.EndpointsFile, endpoints("../etc", "a:1")), "not a device id"},
		"endpoint without port":  {write(simdev.EndpointsFile, endpoints("dev-1", "broker.test")), "mqtt is not host:port"},
		"endpoint that is a URL": {write(simdev.EndpointsFile, endpoints("dev-1", "mqtts://broker.test:8883")), "mqtt is not host:port"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := good(t).Save(dir); err != nil {
				t.Fatal(err)
			}
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			_, err := simdev.LoadCredentials(dir)
			if !fleet.Is(err, fleet.Invalid) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want it to say %q", err, c.says)
			}
		})
	}
}

func saveKey(c simdev.Credentials, dir string) error {
	tmp, err := os.MkdirTemp(dir, "other")
	if err != nil {
		return err
	}
	if err := c.Save(tmp); err != nil {
		return err
	}
	return os.Rename(filepath.Join(tmp, simdev.KeyFile), filepath.Join(dir, simdev.KeyFile))
}
