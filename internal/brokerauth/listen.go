package brokerauth

import (
	"context"
	"crypto/tls"
	"net"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"

	"muster/internal/fleet"
)

// SocketName is the FileDescriptorName of the systemd socket that Listen takes over.
const SocketName = "musterd-broker-auth"

// ListenConfig says where RabbitMQ reaches the Server.
type ListenConfig struct {
	Address string // host:port; unused if systemd hands a socket over

	// TLS, if not nil, must demand and verify a client certificate: the broker's. Without it, only a loopback address
	// is accepted, since whoever reaches the listener can ask whether a device's password is right.
	TLS *tls.Config
}

// inherited are the sockets of systemd by name (sd_listen_fds(3)). The environment can be read once only.
var inherited = sync.OnceValues(activation.ListenersWithNames)

// Listen returns the listener for Serve: the socket called SocketName that systemd hands over, which keeps the queue of
// connections while musterd restarts, else a new one. It refuses to be reached from outside without mutual TLS.
func Listen(ctx context.Context, c ListenConfig) (net.Listener, error) {
	if c.TLS != nil && (c.TLS.ClientAuth != tls.RequireAndVerifyClientCert || c.TLS.ClientCAs == nil) {
		return nil, fleet.Errorf(fleet.Invalid, "broker auth: TLS must require and verify the broker's client certificate")
	}
	l, err := open(ctx, c.Address)
	if err != nil {
		return nil, err
	}
	if c.TLS == nil {
		if !loopback(l.Addr()) {
			_ = l.Close()
			return nil, fleet.Errorf(fleet.Invalid, "broker auth: %s can be reached from outside; listen on 127.0.0.1 or [::1], or set up mutual TLS with the broker", l.Addr())
		}
		return l, nil
	}
	conf := c.TLS.Clone()
	conf.NextProtos = []string{"http/1.1"}
	return tls.NewListener(l, conf), nil
}

func open(ctx context.Context, address string) (net.Listener, error) {
	sockets, err := inherited()
	if err != nil {
		return nil, fleet.Wrap(fleet.Invalid, err, "broker auth: take over the socket from systemd")
	}
	if l := sockets[SocketName]; len(l) > 0 && l[0] != nil {
		return l[0], nil
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fleet.Wrap(fleet.Unavailable, err, "broker auth: listen on %s", address)
	}
	return l, nil
}

// loopback reports whether only this machine reaches a.
func loopback(a net.Addr) bool {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	}
	return false
}
