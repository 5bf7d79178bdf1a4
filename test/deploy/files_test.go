package deploy_test

import (
	"context"
	"crypto/tls"
	"debug/elf"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"muster/internal/app"
	"muster/internal/brokerauth"
	"muster/internal/config"
)

const (
	repo    = "../../"
	dataDir = "/var/lib/muster"
	owner   = "10001:10001"
)

type compose struct {
	Services map[string]service `yaml:"services"`
	Volumes  map[string]any     `yaml:"volumes"`
}

type service struct {
	Image       string            `yaml:"image"`
	User        string            `yaml:"user"`
	Command     []string          `yaml:"command"`
	NetworkMode string            `yaml:"network_mode"`
	Environment map[string]string `yaml:"environment"`
	Ports       []string          `yaml:"ports"`
	Volumes     []string          `yaml:"volumes"`
	Restart     string            `yaml:"restart"`
	DependsOn   map[string]struct {
		Condition string `yaml:"condition"`
	} `yaml:"depends_on"`
	Healthcheck struct {
		Test []string `yaml:"test"`
	} `yaml:"healthcheck"`
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(repo + path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func readCompose(t *testing.T) compose {
	t.Helper()
	var c compose
	if err := yaml.Unmarshal([]byte(read(t, "deploy/compose.yaml")), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// initialised returns a folder made as the init service makes the volume.
func initialised(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "muster")
	c, err := config.Load("", nil, []string{"data_dir=" + dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := app.Init(t.Context(), c, []string{"iot.example"}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestComposeSharesOneLoopbackAndOneOwner(t *testing.T) {
	c := readCompose(t)
	for _, name := range []string{"musterd", "rabbitmq"} {
		s, ok := c.Services[name]
		if !ok {
			t.Fatalf("no service %s", name)
		}
		if s.NetworkMode != "service:net" {
			t.Errorf("%s is in network %q: the auth backend is on loopback", name, s.NetworkMode)
		}
		if s.Restart != "unless-stopped" || len(s.Healthcheck.Test) == 0 || s.Healthcheck.Test[0] != "CMD" {
			t.Errorf("%s: restart %q, health check %q (a shell is not in the image)", name, s.Restart, s.Healthcheck.Test)
		}
	}
	for name, s := range c.Services {
		if s.User != owner {
			t.Errorf("%s runs as %q: the rendered files belong to %s and nobody else reads them", name, s.User, owner)
		}
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			if _, ok := c.Volumes[from]; !ok {
				t.Errorf("%s: volume %s is not declared", name, from)
			}
		}
	}
	if got := c.Services["musterd"].DependsOn["init"].Condition; got != "service_completed_successfully" {
		t.Errorf("musterd starts when init is %q", got)
	}
	if !slices.Contains(c.Services["init"].Command, "--if-missing") {
		t.Error("init would fail at the second start")
	}
}

func TestComposePublishesWhatDevicesAndOperatorsUse(t *testing.T) {
	d := config.Default()
	var want []string
	for _, addr := range []string{d.Listen.Devices, d.Listen.Recovery, d.Listen.Ops} {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, port+":"+port)
	}
	for _, port := range []int{d.Broker.MQTTPort, d.Broker.FallbackPort} {
		want = append(want, fmt.Sprintf("%d:%[1]d", port))
	}
	got := slices.Clone(readCompose(t).Services["net"].Ports)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("published %v, the defaults say %v", got, want)
	}
	for name, s := range readCompose(t).Services {
		if name != "net" && len(s.Ports) > 0 {
			t.Errorf("%s publishes ports, but net holds the network", name)
		}
	}
}

// Every path below the data directory that the compose file and the drop-in of systemd name is made by init.
func TestPathsAreThoseThatInitMakes(t *testing.T) {
	dir := initialised(t)
	checked := 0
	check := func(where, path string) {
		rel, ok := strings.CutPrefix(path, dataDir+"/")
		if !ok {
			return
		}
		checked++
		if _, err := os.Stat(filepath.Join(dir, rel)); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	c := readCompose(t)
	for key, v := range c.Services["rabbitmq"].Environment {
		check("compose rabbitmq "+key, v)
	}
	for _, arg := range slices.Concat(c.Services["musterd"].Command, c.Services["musterd"].Healthcheck.Test) {
		check("compose musterd", arg)
	}
	for _, file := range []string{"musterd.service", "rabbitmq-server.conf"} {
		for _, word := range strings.FieldsFunc(read(t, "deploy/systemd/"+file), func(r rune) bool { return r == '=' || r == ' ' || r == '\n' }) {
			check(file, word)
		}
	}
	if checked < 9 {
		t.Errorf("only %d paths were found", checked)
	}
	if dataDir != config.Default().DataDir {
		t.Errorf("the default data directory is %s", config.Default().DataDir)
	}
}

// Whatever RabbitMQ reads exists, belongs to whoever ran init and is open to nobody else; its key fits its certificate.
func TestRenderedBrokerFilesNameFilesThatExist(t *testing.T) {
	dir := initialised(t)
	conf, err := os.ReadFile(filepath.Join(dir, "broker/rabbitmq.conf"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(conf)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " = ")
		if !strings.HasPrefix(value, dir) {
			continue
		}
		found++
		if _, err := os.Stat(value); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
	if found < 5 {
		t.Errorf("%d paths in rabbitmq.conf", found)
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "broker/tls/server.crt"), filepath.Join(dir, "broker/tls/server.key")); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"broker/rabbitmq.conf", "broker/definitions.json", "broker/tls/server.key"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

func TestNoSecretIsInTheDeployedFiles(t *testing.T) {
	for _, file := range []string{"deploy/compose.yaml", "Dockerfile"} {
		for line := range strings.Lines(read(t, file)) {
			lower := strings.ToLower(line)
			for _, word := range []string{"password:", "password=", "_pass=", "default_user", "token:", "begin "} {
				if strings.Contains(lower, word) {
					t.Errorf("%s: %s", file, line)
				}
			}
		}
	}
}

func TestDockerfileCopiesWhatExistsAndIsNotRoot(t *testing.T) {
	var stage string
	made := map[string]bool{}
	var user, entry bool
	for line := range strings.Lines(strings.ReplaceAll(read(t, "Dockerfile"), "\\\n", " ")) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		switch f[0] {
		case "FROM":
			stage = f[1]
		case "RUN":
			if strings.Contains(line, "go build") {
				for _, w := range f {
					if dir, ok := strings.CutPrefix(w, "./cmd/"); ok {
						if _, err := os.Stat(repo + "cmd/" + dir); err != nil {
							t.Error(err)
						}
						made["/out/"+dir] = true
					}
				}
			}
		case "COPY":
			fromBuild := strings.HasPrefix(f[1], "--from=build")
			for _, src := range f[1 : len(f)-1] {
				if strings.HasPrefix(src, "--") {
					continue
				}
				if _, err := os.Stat(repo + src); !fromBuild && err != nil {
					t.Errorf("COPY %s: %v", src, err)
				}
				if strings.HasPrefix(src, "/out/") && src != "/out/rootfs/" && !made[src] {
					t.Errorf("COPY %s: no stage makes it", src)
				}
			}
		case "USER":
			user = f[1] == owner
		case "ENTRYPOINT":
			entry = made["/out/"+filepath.Base(strings.Trim(f[1], `[]"`))]
		}
	}
	if stage != "scratch" || !user || !entry || len(made) != 3 {
		t.Errorf("last stage %q, user right %t, entry point made %t, programs %v", stage, user, entry, made)
	}
}

// The image is empty: a program that wants a dynamic loader would not start.
func TestProgramsAreStatic(t *testing.T) {
	out := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out+"/", "./cmd/musterd", "./cmd/muster", "./cmd/devicesim")
	cmd.Dir, cmd.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	for _, name := range []string{"musterd", "muster", "devicesim"} {
		f, err := elf.Open(filepath.Join(out, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				t.Errorf("%s wants a loader", name)
			}
		}
		_ = f.Close()
	}
	checkInit(t.Context(), t, filepath.Join(out, "musterd"))
}

// checkInit runs the init service's own command line twice, in another folder.
func checkInit(ctx context.Context, t *testing.T, musterd string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "muster")
	var args []string
	for _, a := range readCompose(t).Services["init"].Command {
		name, _, _ := strings.Cut(a, "${MUSTER_NAME:?")
		if name != a {
			a = name + "iot.example"
		}
		a = strings.ReplaceAll(a, "${MUSTER_NAME}", "iot.example")
		args = append(args, strings.ReplaceAll(a, dataDir, dir))
	}
	for i, want := range []string{"first admin token in", "nothing to do"} {
		out, err := exec.CommandContext(ctx, musterd, args...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Fatalf("run %d: %v\n%s", i+1, err, out)
		}
	}
	info, err := os.Stat(filepath.Join(dir, "secrets/first-admin-token"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the token: %v, %v", info, err)
	}
	c, err := config.Load(filepath.Join(dir, app.FileConfig), nil, nil)
	if err != nil || c.Public.MQTT != "iot.example:8883" {
		t.Errorf("%+v, %v", c.Public, err)
	}
}

func TestUnitsAgreeWithTheProgram(t *testing.T) {
	socket, unit := read(t, "deploy/systemd/musterd.socket"), read(t, "deploy/systemd/musterd.service")
	for _, want := range []string{"FileDescriptorName=" + brokerauth.SocketName, "ListenStream=" + config.Default().Listen.BrokerAuth} {
		if !strings.Contains(socket, "\n"+want+"\n") {
			t.Errorf("musterd.socket lacks %s", want)
		}
	}
	for _, want := range []string{"RestartPreventExitStatus=78", "Restart=always", "NoNewPrivileges=true", "ProtectSystem=strict", "User=muster"} {
		if !strings.Contains(unit, "\n"+want+"\n") {
			t.Errorf("musterd.service lacks %s", want)
		}
	}
	files := limitOf(t, unit)
	if files < 2*config.Default().Broker.FleetSize {
		t.Errorf("%d files are too few for the default fleet", files)
	}
}

func limitOf(t *testing.T, unit string) int {
	t.Helper()
	_, rest, _ := strings.Cut(unit, "LimitNOFILE=")
	number, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.Atoi(number)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
