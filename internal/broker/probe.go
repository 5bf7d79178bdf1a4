package broker

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// ProbeConfig names the listeners that are probed.
type ProbeConfig struct {
	MQTT     string      // host:port, mutual TLS
	Fallback string      // host:port, password
	TLS      *tls.Config // trusts the broker; presents no certificate
}

// Probe tries at each listener what it must refuse, as a stranger would: configuration texts have been ignored before
// (rollouts.md 4.F-84). The error has a line for each thing that was let in, or that could not be tried.
func Probe(ctx context.Context, c ProbeConfig) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tries := []struct {
		what string
		try  func(context.Context) error
	}{
		{"a client without certificate on " + c.MQTT, func(ctx context.Context) error { return c.connect(ctx, c.MQTT, "muster-probe", "", "") }},
		{"a password on " + c.MQTT, func(ctx context.Context) error {
			return c.connect(ctx, c.MQTT, "muster-probe", "muster-probe", "none")
		}},
		{"no password on " + c.Fallback, func(ctx context.Context) error { return c.connect(ctx, c.Fallback, "muster-probe", "", "") }},
		{"a wrong password on " + c.Fallback, func(ctx context.Context) error {
			return c.connect(ctx, c.Fallback, "muster-probe", "muster-probe", "wrong")
		}},
		{"a user name with a vhost on " + c.Fallback, func(ctx context.Context) error {
			return c.connect(ctx, c.Fallback, "muster-probe", "devices:muster-probe", "wrong")
		}},
	}
	errs := make(chan error, len(tries))
	for _, t := range tries {
		go func() { // a refused login costs 3 s of the broker's patience, so all at once
			err := t.try(ctx)
			switch {
			case err == nil:
				err = fmt.Errorf("the broker lets in %s: apply the configuration that musterd broker-config renders", t.what)
			case errors.Is(err, errRefused):
				err = nil
			default:
				err = fmt.Errorf("the broker could not be probed with %s: %w", t.what, err)
			}
			errs <- err
		}()
	}
	var all []error
	for range tries {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

var errRefused = errors.New("refused")

// connect sends an MQTT 3.1.1 CONNECT (§3.1) and returns nil if it is accepted, errRefused if the broker says no.
func (c ProbeConfig) connect(ctx context.Context, addr, clientID, user, password string) error {
	conf := c.TLS.Clone()
	if conf.ServerName == "" {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return err
		}
		conf.ServerName = host
	}
	conn, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(d); err != nil {
			return err
		}
	}
	if _, err := conn.Write(connectPacket(clientID, user, password)); err != nil {
		return err
	}
	var answer [4]byte
	_, err = io.ReadFull(bufio.NewReader(conn), answer[:])
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errRefused // closed without a word
	case err != nil:
		if _, ok := errors.AsType[tls.AlertError](err); ok {
			return errRefused
		}
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
			return errRefused
		}
		return err
	case answer[0] != 0x20:
		return fmt.Errorf("the answer is no CONNACK")
	case answer[3] == 0:
		return nil
	}
	return errRefused
}

// connectPacket encodes CONNECT with a clean session; without user there is neither user name nor password.
func connectPacket(clientID, user, password string) []byte {
	text := func(b []byte, s string) []byte {
		return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
	}
	flags := byte(0x02)
	if user != "" {
		flags |= 0xc0
	}
	body := text(nil, "MQTT")
	body = append(body, 4, flags, 0, 30)
	body = text(body, clientID)
	if user != "" {
		body = text(text(body, user), password)
	}
	return append([]byte{0x10, byte(len(body))}, body...) // short: the remaining length fits one byte
}
