package devbroker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// EnvServer names a rabbitmq-server program to be used before anything else.
const EnvServer = "MUSTER_RABBITMQ_SERVER"

// Image is what a Docker engine runs.
const Image = "rabbitmq:4-management"

// source is where RabbitMQ comes from.
type source struct {
	kind   string // root, path, docker
	root   string // root: folder of the private root
	server string // path: the program
	image  string // docker
}

// find returns the first source that is usable: the one named in the environment, a Docker engine, rabbitmq-server on
// the PATH if it is new enough, a private root with Debian's package, which it makes if needed.
func find(ctx context.Context, say func(string)) (source, error) {
	if p := os.Getenv(EnvServer); p != "" {
		if v, err := serverVersion(ctx, p); err != nil || !enough(v) {
			return source{}, fmt.Errorf("devbroker: %s=%s: want a rabbitmq-server of 4.2 or newer, found %q (%v)", EnvServer, p, v, err)
		}
		return source{kind: "path", server: p}, nil
	}
	if dockerAnswers(ctx) {
		return source{kind: "docker", image: Image}, nil
	}
	if p, err := exec.LookPath("rabbitmq-server"); err == nil {
		if v, err := serverVersion(ctx, p); err == nil && enough(v) {
			return source{kind: "path", server: p}, nil
		}
	}
	root, err := PrivateRoot(ctx, say)
	return source{kind: "root", root: root}, err
}

func dockerAnswers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return exec.CommandContext(ctx, "docker", "info", "--format", "{{.ServerVersion}}").Run() == nil
}

// serverVersion asks the rabbitmqctl beside a server for its version.
func serverVersion(ctx context.Context, server string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	resolved, err := filepath.EvalSymlinks(server)
	if err != nil {
		return "", err
	}
	ctl := filepath.Join(filepath.Dir(resolved), "rabbitmqctl")
	if _, err := os.Stat(ctl); err != nil {
		ctl = "rabbitmqctl"
	}
	out, err := exec.CommandContext(ctx, ctl, "version").Output()
	lines := strings.Fields(string(out))
	if err != nil || len(lines) == 0 {
		return "", fmt.Errorf("rabbitmqctl version: %w", errors.Join(err, errors.New("no answer")))
	}
	return lines[len(lines)-1], nil
}

// enough reports whether version is 4.2 or newer: the configuration uses keys that older ones refuse.
func enough(version string) bool {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	x, err1 := strconv.Atoi(major)
	y, err2 := strconv.Atoi(minor)
	return err1 == nil && err2 == nil && (x > 4 || x == 4 && y >= 2)
}

// PrivateRoot returns a folder with Debian's RabbitMQ 4.3 and everything below it, outside of any work tree, and makes
// it at the first call on a machine. Several processes may call it at once.
func PrivateRoot(ctx context.Context, say func(string)) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("devbroker: no place for the private RabbitMQ: set XDG_CACHE_HOME or HOME: %w", err)
	}
	cache = filepath.Join(cache, "muster")
	root := filepath.Join(cache, "rabbitmq-forky")
	if complete(root) {
		return root, nil
	}
	if os.Geteuid() != 0 {
		return "", errors.New("devbroker: no RabbitMQ 4.2 or newer was found, and making a private one needs root\n" +
			"hint: run as root once, or start a Docker engine, or install rabbitmq-server ≥ 4.2, or name one in " + EnvServer)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(ctx, root+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if complete(root) {
		return root, nil // somebody else made it meanwhile
	}
	if err := ensureMmdebstrap(ctx, say); err != nil {
		return "", err
	}
	say("making a private RabbitMQ 4.3 from Debian's packages in " + root + " (once, 230 MB, about 20 s)")
	part := root + ".part"
	if err := os.RemoveAll(part); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", "--quiet", `--aptopt=Acquire::Check-Valid-Until "false"`, "--variant=essential",
		"--include=rabbitmq-server,ca-certificates", "forky", part)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("devbroker: mmdebstrap failed (does this machine reach a Debian mirror?): %w\n%s", err, tail(string(out), 12))
	}
	if !complete(part) {
		return "", fmt.Errorf("devbroker: %s holds no RabbitMQ", part)
	}
	return root, os.Rename(part, root)
}

func complete(root string) bool {
	found, err := filepath.Glob(filepath.Join(root, "usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server"))
	return err == nil && len(found) > 0
}

func ensureMmdebstrap(ctx context.Context, say func(string)) error {
	if _, err := exec.LookPath("mmdebstrap"); err == nil {
		return nil
	}
	say("installing mmdebstrap from Debian")
	for _, args := range [][]string{{"update"}, {"install", "-y", "--no-install-recommends", "mmdebstrap"}} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("devbroker: apt-get %s: %w\n%s\nhint: install mmdebstrap by hand", args[0], err, tail(string(out), 5))
		}
	}
	return nil
}

// lock waits for the file lock on path. The lock ends with the process, however that ends.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Prepare finds or makes the RabbitMQ that Start will use, and says in words which one it is.
func Prepare(ctx context.Context, say func(string)) (string, error) {
	src, err := find(ctx, say)
	if err != nil {
		return "", err
	}
	switch src.kind {
	case "docker":
		return "the Docker image " + src.image, nil
	case "path":
		return src.server, nil
	}
	return "the private root " + src.root, nil
}
