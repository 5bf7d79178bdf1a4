package httpapi_test

import (
	"crypto/tls"
	"net"
	"net/http"
)

// tlsClient begins TLS as client trusts it, for HTTP/1.1.
func tlsClient(conn net.Conn, client *http.Client) *tls.Conn {
	c := client.Transport.(*http.Transport).TLSClientConfig.Clone()
	c.ServerName, c.NextProtos = "example.com", []string{"http/1.1"}
	return tls.Client(conn, c)
}
