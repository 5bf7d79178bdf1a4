// Package brokerauth is the backend that RabbitMQ's http auth plugin asks at every decision (DESIGN §5): an Index of all
// credentials in memory, a Limiter for fallback logins, and a Server that puts the two before admission.Decide.
//
// # Protocol
//
// RabbitMQ sends a POST with a form to one of four paths (/user, /vhost, /resource, /topic) over a few connections that
// it keeps open, and takes status 200 with the body "allow" or "deny <reason>". Everything that is a question gets
// status 200, whatever is wrong with it: the broker takes any other status for an outage. Only requests that are no
// question get 400, 404 or 405: another method, path or content type. The reason is one of admission's closed set; the
// broker logs it and does not show it to the client (auth_http.authorization_failure_disclosure stays off).
//
// No answer grants a tag, so no device credential opens the management API, and a login over AMQP is refused because it
// comes without vhost and client id.
package brokerauth
