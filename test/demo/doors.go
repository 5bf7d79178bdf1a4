package main

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"muster/internal/fleet"
)

// refusedByHTTPS tries the HTTPS doors with the credentials that a device was made with: a stolen copy of its flash.
func (d *demo) refusedByHTTPS(id fleet.DeviceID) error {
	dir := d.credentials(id)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		return err
	}
	password, err := os.ReadFile(filepath.Join(dir, "fallback-password"))
	if err != nil {
		return err
	}
	get := func(addr string, certs []tls.Certificate, password string) (int, error) {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: d.w.Trust, Certificates: certs},
		}}
		req, err := http.NewRequestWithContext(d.ctx, http.MethodGet, "https://"+addr+"/trust-bundle", nil)
		if err != nil {
			return 0, err
		}
		if password != "" {
			req.SetBasicAuth(string(id), password)
		}
		res, err := client.Do(req)
		if err != nil {
			return 0, err
		}
		return res.StatusCode, res.Body.Close()
	}
	status, err := get(d.w.Config.Public.HTTPS, []tls.Certificate{pair}, "")
	if err == nil && status < 400 {
		return fmt.Errorf("%s is let in on the device API: %d", id, status)
	}
	status, err = get(d.w.Config.Public.RecoveryHTTPS, nil, strings.TrimSpace(string(password)))
	if err != nil {
		return err
	}
	if status < 400 {
		return fmt.Errorf("%s is let in on the recovery API: %d", id, status)
	}
	return nil
}
