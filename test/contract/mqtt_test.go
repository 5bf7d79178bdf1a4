package contract

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// MQTT control packets (MQTT 5 §2.1.2).
const (
	ptConnect    = 1
	ptConnack    = 2
	ptPublish    = 3
	ptPuback     = 4
	ptSubscribe  = 8
	ptSuback     = 9
	ptPingreq    = 12
	ptPingresp   = 13
	ptDisconnect = 14
)

// Protocol levels.
const (
	v311 = 4
	v5   = 5
)

var versions = map[string]byte{"3.1.1": v311, "5": v5}

// answerTime is how long an answer of the broker may take: it holds a refused login back for three seconds.
const answerTime = 30 * time.Second

// client is a small MQTT client that sends what libraries refuse to send. It reads a packet only when asked for one.
type client struct {
	conn     net.Conn
	r        *bufio.Reader
	version  byte
	packetID uint16
	strays   int // messages that came while it waited for something else
}

// dial connects to a port of the broker, with a certificate or without.
func dial(port int, trust *tls.Config, cert *tls.Certificate, version byte) (*client, error) {
	conf := trust.Clone()
	if cert != nil { // presented whatever CAs the server names
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: answerTime}, Config: conf}
	conn, err := d.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	return &client{conn: conn, r: bufio.NewReader(conn), version: version}, nil
}

func (c *client) close() { _ = c.conn.Close() }

// login is a CONNECT. A nil user or password is left out; an empty one is sent.
type login struct {
	clientID       string
	user, password *string
	willTopic      string
	willPayload    string
}

func text(s string) *string { return &s }

// connect sends l and returns the code of the CONNACK: 0 is accepted.
func (c *client) connect(l login) (byte, error) {
	flags := byte(0x02) // clean session
	body := append(str("MQTT"), c.version, 0, 0x02, 0x58)
	if c.version == v5 {
		body = append(body, 0) // no properties
	}
	body = append(body, str(l.clientID)...)
	if l.willTopic != "" {
		flags |= 0x04 | 0x08 // QoS 1
		if c.version == v5 {
			body = append(body, 0)
		}
		body = append(append(body, str(l.willTopic)...), str(l.willPayload)...)
	}
	if l.user != nil {
		flags |= 0x80
		body = append(body, str(*l.user)...)
	}
	if l.password != nil {
		flags |= 0x40
		body = append(body, str(*l.password)...)
	}
	body[7] = flags
	if err := c.send(ptConnect, 0, body); err != nil {
		return 0, err
	}
	p, err := c.await(ptConnack)
	if err != nil {
		return 0, err
	}
	return p[1], nil
}

// subscribe asks for one filter with QoS 1 and returns the code of the SUBACK: 0x80 and above is refused.
func (c *client) subscribe(filter string) (byte, error) {
	c.packetID++
	body := binary.BigEndian.AppendUint16(nil, c.packetID)
	if c.version == v5 {
		body = append(body, 0)
	}
	body = append(append(body, str(filter)...), 1)
	if err := c.send(ptSubscribe, 0x02, body); err != nil {
		return 0, err
	}
	p, err := c.await(ptSuback)
	if err != nil {
		return 0, err
	}
	return p[len(p)-1], nil
}

// publish sends a message with QoS 1 and returns the code of the PUBACK; MQTT 3.1.1 has none, so it is 0. In MQTT 5,
// properties are sent before the payload.
func (c *client) publish(topic, payload string, properties ...byte) (byte, error) {
	c.packetID++
	body := binary.BigEndian.AppendUint16(str(topic), c.packetID)
	if c.version == v5 {
		body = append(append(body, varint(len(properties))...), properties...)
	}
	if err := c.send(ptPublish, 0x02, append(body, payload...)); err != nil {
		return 0, err
	}
	p, err := c.await(ptPuback)
	if err != nil || len(p) == 2 {
		return 0, err
	}
	return p[2], nil
}

// ping asks for a sign of life. Every message that was on its way is read by then.
func (c *client) ping() error {
	if err := c.send(ptPingreq, 0, nil); err != nil {
		return err
	}
	_, err := c.await(ptPingresp)
	return err
}

// disconnected is the end of a session by the broker's own word (MQTT 5 §3.14).
type disconnected byte

func (d disconnected) Error() string { return fmt.Sprintf("DISCONNECT 0x%02X", byte(d)) }

// await reads packets until one of the wanted type comes and returns its body. The end of the session is an error.
func (c *client) await(want byte) ([]byte, error) {
	for {
		typ, body, err := c.read()
		switch {
		case err != nil:
			return nil, err
		case typ == want && (len(body) >= 2 || want == ptPingresp):
			return body, nil
		case typ == ptPublish:
			c.strays++
		case typ == ptDisconnect && len(body) > 0:
			return nil, disconnected(body[0])
		default:
			return nil, fmt.Errorf("packet of type %d while waiting for %d", typ, want)
		}
	}
}

func (c *client) read() (byte, []byte, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(answerTime)); err != nil {
		return 0, nil, err
	}
	head, err := c.r.ReadByte()
	if err != nil {
		return 0, nil, err
	}
	n, err := binary.ReadUvarint(c.r) // MQTT's variable byte integer is the same
	if err != nil || n > 1<<20 {
		return 0, nil, errors.Join(err, fmt.Errorf("packet of %d bytes", n))
	}
	body := make([]byte, n)
	_, err = io.ReadFull(c.r, body)
	return head >> 4, body, err
}

func (c *client) send(typ, flags byte, body []byte) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	p := append([]byte{typ<<4 | flags}, varint(len(body))...)
	_, err := c.conn.Write(append(p, body...))
	return err
}

// ended reports whether err is the broker ending the session, and not a broker that does not answer.
func ended(err error) bool {
	var timeout net.Error
	return err != nil && !(errors.As(err, &timeout) && timeout.Timeout())
}

func str(s string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...)
}

func varint(n int) []byte { return binary.AppendUvarint(nil, uint64(n)) }

// userProperties returns about n bytes of MQTT 5 user properties (§3.3.2.3.7).
func userProperties(n int) []byte {
	var p []byte
	for len(p) < n {
		p = append(p, 0x26)
		p = append(p, str(fmt.Sprintf("key-%d", len(p)))...)
		p = append(p, str(string(make([]byte, 1000)))...)
	}
	return p
}
