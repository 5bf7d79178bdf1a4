package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"muster/internal/fleet"
)

// ManagementConfig says how the management API is reached. Two users, so that the one that polls cannot change anything.
type ManagementConfig struct {
	URL             string // https://host:port
	TLS             *tls.Config
	Roots           func() *x509.CertPool // if set, what the next connection trusts, in place of TLS.RootCAs
	MonitorUser     string
	MonitorPassword string
	AdminUser       string
	AdminPassword   string
}

// Management speaks to RabbitMQ's management API.
type Management struct {
	c    ManagementConfig
	http *http.Client
}

// maxAnswer bounds an answer of the API, in bytes; a page of 500 connections has about 1 MB.
const maxAnswer = 16 << 20

// NewManagement returns a client. Close it when it is not needed any more.
func NewManagement(c ManagementConfig) *Management {
	transport := &http.Transport{TLSClientConfig: c.TLS, MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute}
	if c.Roots != nil {
		transport.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conf := c.TLS.Clone()
			conf.RootCAs = c.Roots()
			return (&tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: conf}).DialContext(ctx, network, addr)
		}
	}
	return &Management{c: c, http: &http.Client{Timeout: 15 * time.Second, Transport: transport}}
}

// Close lets go of idle connections.
func (m *Management) Close() { m.http.CloseIdleConnections() }

// call does one request. A nil out reads nothing.
func (m *Management) call(ctx context.Context, method, path, user, password, reason string, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, m.c.URL+path, nil)
	if err != nil {
		return err
	}
	req.SetBasicAuth(user, password)
	if reason != "" {
		req.Header.Set("X-Reason", reason)
	}
	res, err := m.http.Do(req)
	if err != nil {
		return fleet.Wrap(fleet.Unavailable, err, "the broker's management API cannot be reached")
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fleet.Wrap(fleet.Unavailable, err, "the broker's management API broke off")
	case len(body) > maxAnswer:
		return fmt.Errorf("broker: %s answers with more than %d bytes", path, maxAnswer)
	case res.StatusCode == http.StatusNotFound && method == http.MethodDelete:
		return nil // gone already
	case res.StatusCode/100 != 2:
		return fleet.Wrap(fleet.Unavailable, fmt.Errorf("%s %s: %s", method, path, res.Status), "the broker's management API refused a request")
	case out == nil:
		return nil
	}
	return json.Unmarshal(body, out)
}

// Connection is a live connection as RabbitMQ lists it. It shows up there a few seconds after it began.
type Connection struct {
	Name        string
	Vhost       string
	User        string
	ClientID    string
	Protocol    string
	Peer        string
	Serial      fleet.Serial
	ConnectedAt time.Time
}

// Connections returns all live connections.
func (m *Management) Connections(ctx context.Context) ([]Connection, error) {
	var out []Connection
	for page := 1; ; page++ {
		var answer struct {
			PageCount int `json:"page_count"`
			Items     []struct {
				Name        string         `json:"name"`
				Vhost       string         `json:"vhost"`
				User        string         `json:"user"`
				Protocol    string         `json:"protocol"`
				PeerHost    string         `json:"peer_host"`
				Serial      string         `json:"peer_cert_serial_number"`
				ConnectedAt int64          `json:"connected_at"` // ms
				Properties  map[string]any `json:"client_properties"`
				Variable    map[string]any `json:"variable_map"`
			} `json:"items"`
		}
		q := url.Values{"page": {strconv.Itoa(page)}, "page_size": {"500"}, "pagination": {"true"}}
		if err := m.call(ctx, http.MethodGet, "/api/connections?"+q.Encode(), m.c.MonitorUser, m.c.MonitorPassword, "", &answer); err != nil {
			// The last page may have gone while the ones before it were read.
			if page > 1 && strings.Contains(err.Error(), "400") {
				return out, nil
			}
			return nil, err
		}
		for _, i := range answer.Items {
			id, _ := i.Properties["client_id"].(string)
			if id == "" {
				id, _ = i.Variable["client_id"].(string)
			}
			if i.User == "" {
				continue // not logged in yet
			}
			out = append(out, Connection{
				Name: i.Name, Vhost: i.Vhost, User: i.User, ClientID: id, Protocol: i.Protocol, Peer: i.PeerHost,
				Serial: certSerial(i.Serial), ConnectedAt: time.UnixMilli(i.ConnectedAt),
			})
		}
		if page >= answer.PageCount {
			return out, nil
		}
	}
}

// UserConnected reports whether a user has a live connection, by the broker's tracking, which shows it at once.
func (m *Management) UserConnected(ctx context.Context, user string) (bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	err := m.call(ctx, http.MethodGet, "/api/connections/username/"+url.PathEscape(user), m.c.MonitorUser, m.c.MonitorPassword, "", &list)
	return len(list) > 0, err
}

// CloseUser closes every connection of a user. It works before the list shows them, and it is no error if there is none.
func (m *Management) CloseUser(ctx context.Context, user, reason string) error {
	return m.call(ctx, http.MethodDelete, "/api/connections/username/"+url.PathEscape(user), m.c.AdminUser, m.c.AdminPassword, reason, nil)
}

// Version returns RabbitMQ's version.
func (m *Management) Version(ctx context.Context) (string, error) {
	var answer struct {
		Version string `json:"rabbitmq_version"`
	}
	err := m.call(ctx, http.MethodGet, "/api/overview", m.c.MonitorUser, m.c.MonitorPassword, "", &answer)
	return answer.Version, err
}

// CheckVersion returns an error if RabbitMQ is older than 4.1: those send the password "none" for certificate logins, so
// a client could type it (rabbitmq.md §4.2).
func (m *Management) CheckVersion(ctx context.Context) error {
	v, err := m.Version(ctx)
	if err != nil {
		return err
	}
	if !newEnough(v) {
		return fmt.Errorf("RabbitMQ %s is too old: muster needs 4.1 or newer, since older ones let a client pretend a certificate login", v)
	}
	return nil
}

func newEnough(version string) bool {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	x, err1 := strconv.Atoi(major)
	y, err2 := strconv.Atoi(minor)
	return err1 == nil && err2 == nil && (x > 4 || x == 4 && y >= 1)
}
