package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is a server in a process group of its own.
type server struct {
	name string
	addr string
	cmd  *exec.Cmd
	out  *bytes.Buffer // what it wrote to standard error
}

// install makes sure that a program is there, from a Debian package if the bench may.
func install(program, pkg string) error {
	if _, err := exec.LookPath(program); err == nil {
		return nil
	}
	if os.Getuid() != 0 {
		return fmt.Errorf("%s is missing; install the Debian package %s, or run this as root", program, pkg)
	}
	fmt.Fprintf(os.Stderr, "bench ota: installing %s\n", pkg)
	for _, args := range [][]string{{"update", "-q"}, {"install", "-y", "-q", "--no-install-recommends", pkg}} {
		cmd := exec.Command("apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1") // 1: do not start it
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
		}
	}
	return nil
}

func startNginx(s *site) (*server, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`daemon off;
worker_processes auto;
%spid %[2]s/nginx.pid;
error_log stderr;
events { worker_connections 1024; }
http {
	access_log off;
	sendfile on;
	tcp_nopush on;
	default_type application/octet-stream;
	client_body_temp_path %[2]s/nginx-body; proxy_temp_path %[2]s/nginx-proxy; fastcgi_temp_path %[2]s/nginx-fcgi;
	uwsgi_temp_path %[2]s/nginx-uwsgi; scgi_temp_path %[2]s/nginx-scgi;
	open_file_cache max=100;
	server {
		listen %[3]s ssl backlog=1024;
		ssl_certificate %[2]s/%[4]s;
		ssl_certificate_key %[2]s/%[5]s;
		ssl_protocols TLSv1.2 TLSv1.3;
		ssl_client_certificate %[2]s/%[6]s;
		ssl_verify_client on;
		ssl_verify_depth 3;
		root %[2]s/%[7]s;
	}
}
`, userLine("user www-data;\n"), s.dir, addr, fileChain, fileKey, fileCA, dirContent)
	file := filepath.Join(s.dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	return startProcess("nginx", addr, exec.Command("nginx", "-p", s.dir, "-e", "stderr", "-c", file))
}

func startApache(s *site) (*server, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`ServerRoot %[1]s
ServerName localhost
PidFile %[1]s/apache.pid
DefaultRuntimeDir %[1]s
%[2]sErrorLog /dev/stderr
LogLevel error
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule socache_shmcb_module /usr/lib/apache2/modules/mod_socache_shmcb.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
Mutex file:%[1]s default
Listen %[3]s https
ListenBacklog 1024
DocumentRoot %[1]s/%[7]s
SSLEngine on
SSLCertificateFile %[1]s/%[4]s
SSLCertificateKeyFile %[1]s/%[5]s
SSLProtocol -all +TLSv1.2 +TLSv1.3
SSLCACertificateFile %[1]s/%[6]s
SSLVerifyClient require
SSLVerifyDepth 3
<Directory %[1]s/%[7]s>
	Require all granted
</Directory>
`, s.dir, userLine("User www-data\nGroup www-data\n"), addr, fileChain, fileKey, fileCA, dirContent)
	file := filepath.Join(s.dir, "apache.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	return startProcess("apache", addr, exec.Command("apache2", "-D", "FOREGROUND", "-f", file))
}

// userLine returns line if the servers start as root and must become somebody else.
func userLine(line string) string {
	if os.Getuid() == 0 {
		return line
	}
	return ""
}

func startMuster(s *site) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-serve", s.dir)
	in, err := cmd.StdinPipe() // closed when this process ends, however it does
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	srv, err := launch("muster", "", cmd)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintln(in, len(s.conf)); err != nil {
		srv.stop()
		return nil, err
	}
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		srv.stop()
		return nil, fmt.Errorf("muster did not start: %w: %s", err, srv.out)
	}
	srv.addr = strings.TrimSpace(addr)
	return srv, nil
}

func launch(name, addr string, cmd *exec.Cmd) (*server, error) {
	s := &server{name: name, addr: addr, cmd: cmd, out: new(bytes.Buffer)}
	cmd.Stderr = s.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return s, cmd.Start()
}

// startProcess launches cmd and waits until it listens.
func startProcess(name, addr string, cmd *exec.Cmd) (*server, error) {
	s, err := launch(name, addr, cmd)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			return s, c.Close()
		}
	}
	s.stop()
	return nil, fmt.Errorf("%s does not listen on %s: %s", name, addr, s.out)
}

// stop ends the server's whole process group.
func (s *server) stop() {
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGTERM) // it may be gone already
	done := make(chan struct{})
	go func() {
		_ = s.cmd.Wait() // ended by a signal: always an error
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
		<-done
	}
}

// cpu returns the CPU time that the processes of the server's group have used so far (proc(5): stat, fields 5, 14, 15; a
// hundredth of a second each).
func (s *server) cpu() time.Duration {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0
	}
	var ticks int64
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		field := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(field) < 13 || field[2] != strconv.Itoa(s.cmd.Process.Pid) {
			continue
		}
		for _, f := range field[11:13] {
			n, err := strconv.ParseInt(f, 10, 64)
			if err == nil {
				ticks += n
			}
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
