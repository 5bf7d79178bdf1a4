package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"

	"muster/internal/config"
)

// healthTime is how long a health check may take; healthSize how much of the answer is shown, in bytes.
const (
	healthTime = 4 * time.Second
	healthSize = 4 << 10
)

func healthCommand(s *settings, out io.Writer) *cobra.Command {
	var live bool
	cmd := &cobra.Command{
		Use: "health", Short: "ask the running musterd whether it is ready (--live: whether it is there); exit code 1 if not", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.load()
			if err != nil {
				return err
			}
			path := "/readyz"
			if live {
				path = "/livez"
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), healthTime)
			defer cancel()
			return askHealth(ctx, &c, path, out)
		},
	}
	cmd.Flags().BoolVar(&live, "live", false, "ask /livez: answers as long as the process does")
	return cmd
}

// askHealth asks listen.ops. It trusts the very certificate that the settings name for that listener, whoever signed it.
func askHealth(ctx context.Context, c *config.Config, path string, out io.Writer) error {
	_, port, err := net.SplitHostPort(c.Listen.Ops)
	if err != nil {
		return err
	}
	trust, err := opsTrust(c)
	if err != nil {
		return err
	}
	host, _, _ := net.SplitHostPort(c.Listen.Ops)
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+net.JoinHostPort(host, port)+path, nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{TLSClientConfig: trust, DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("musterd does not answer: %w", err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(out, io.LimitReader(res.Body, healthSize)); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", path, res.Status)
	}
	return nil
}

func opsTrust(c *config.Config) (*tls.Config, error) {
	file := c.Path(c.TLS.OpsCert)
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(raw)
	leaf, err := firstCertificate(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	t := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	switch {
	case len(leaf.DNSNames) > 0:
		t.ServerName = leaf.DNSNames[0]
	case len(leaf.IPAddresses) > 0:
		t.ServerName = leaf.IPAddresses[0].String()
	default:
		return nil, errors.New(file + ": the certificate names no host")
	}
	return t, nil
}

func firstCertificate(raw []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}
