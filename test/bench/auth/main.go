// Command auth measures decisions per second of the broker auth backend against an echo handler that always allows, in
// the same process, over the same kind of loopback connections and by the same client, in turns. It prints the line
//
//	ratio auth-decisions <value> aim 0.8
//
// where value is the median over the rounds of ours / baseline. The questions are what RabbitMQ 4.3 asks for one connect
// with a subscription and a first publication: seven by certificate, spread over an index of -devices devices.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"muster/internal/admission"
	"muster/internal/brokerauth"
	"muster/internal/fleet"
	"muster/internal/wire"
)

func main() {
	devices := flag.Int("devices", 100_000, "devices in the index")
	conns := flag.Int("connections", 4, "kept-alive connections, as the broker's http client has")
	rounds := flag.Int("rounds", 75, "rounds; each measures both servers, in alternating order")
	length := flag.Duration("length", 100*time.Millisecond, "length of one measurement")
	flag.Parse()
	if err := run(*devices, *conns, *rounds, *length); err != nil {
		fmt.Fprintln(os.Stderr, "bench auth:", err)
		os.Exit(1)
	}
}

func run(devices, conns, rounds int, length time.Duration) error {
	ours, err := serveOurs(devices)
	if err != nil {
		return err
	}
	defer ours.stop()
	base, err := serveBaseline()
	if err != nil {
		return err
	}
	defer base.stop()
	questions := requests(devices)
	for _, s := range []*served{ours, base} { // warm up
		if _, err := measure(s.addr, questions, conns, 5*length); err != nil {
			return err
		}
	}
	var a, b, ratios []float64
	for i := range rounds {
		order := []*served{ours, base}
		if i%2 == 1 {
			slices.Reverse(order)
		}
		rate := map[*served]float64{}
		for _, s := range order {
			if rate[s], err = measure(s.addr, questions, conns, length); err != nil {
				return err
			}
		}
		a, b, ratios = append(a, rate[ours]), append(b, rate[base]), append(ratios, rate[ours]/rate[base])
	}
	fmt.Printf("auth decisions per second, %d devices, %d connections, median of %d rounds: muster %.0f, echo that always allows %.0f\n",
		devices, conns, rounds, median(a), median(b))
	fmt.Printf("ratio auth-decisions %.2f aim 0.8\n", median(ratios))
	return nil
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// served is a server on a loopback port.
type served struct {
	addr string
	stop func()
}

func serveOurs(devices int) (*served, error) {
	index := brokerauth.NewIndex()
	records := make([]admission.Record, devices)
	for i := range records {
		id, serial := device(i)
		records[i] = admission.Record{
			Device:       id,
			Certificates: [2]admission.Certificate{{Serial: serial, NotAfter: time.Now().Add(24 * time.Hour)}},
			Passwords:    []fleet.Hash{fleet.HashOf(sha256.Sum256([]byte(id)))},
		}
	}
	index.Load(records)
	s, err := brokerauth.New(brokerauth.Config{Index: index, Log: slog.New(slog.DiscardHandler), OnRefusal: func(brokerauth.Refusal) {}})
	if err != nil {
		return nil, err
	}
	l, err := brokerauth.Listen(context.Background(), brokerauth.ListenConfig{Address: "127.0.0.1:0"})
	if err != nil {
		return nil, err
	}
	return start(l, s.Serve, s.Shutdown), nil
}

// serveBaseline serves the least that an echo handler can do to let everyone in.
func serveBaseline() (*served, error) {
	e := echo.New()
	allow := func(c echo.Context) error { return c.String(http.StatusOK, "allow") }
	for _, p := range []string{brokerauth.UserPath, brokerauth.VhostPath, brokerauth.ResourcePath, brokerauth.TopicPath} {
		e.POST(p, allow)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &http.Server{Handler: e}
	return start(l, s.Serve, s.Shutdown), nil
}

func start(l net.Listener, serve func(net.Listener) error, shutdown func(context.Context) error) *served {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			fmt.Fprintln(os.Stderr, "bench auth:", err)
		}
	}()
	return &served{l.Addr().String(), func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = shutdown(ctx)
		<-done
	}}
}

func device(i int) (fleet.DeviceID, fleet.Serial) {
	return fleet.DeviceID(fmt.Sprintf("device-%07d", i)), fleet.Serial(fmt.Sprintf("1%031x", i))
}

// requests returns whole HTTP requests, ready to be written.
func requests(devices int) [][]byte {
	var out [][]byte
	for n := range 512 {
		id, serial := device(n * 7919 % devices)
		user := strings.ReplaceAll(wire.CertUser(id, serial), ":", "%3A")
		head := "username=" + user + "&vhost=devices"
		queue := head + "&resource=queue&name=mqtt-subscription-" + string(id) + "qos1&permission="
		tail := "&tags=&client_id=" + string(id)
		topic := func(permission, key string) string {
			return head + "&resource=topic&name=amq.topic&permission=" + permission + "&tags=&routing_key=" + key +
				"&variable_map.client_id=" + string(id) + "&variable_map.username=" + user + "&variable_map.vhost=devices"
		}
		for _, q := range [][2]string{
			{brokerauth.UserPath, head + "&client_id=" + string(id)},
			{brokerauth.VhostPath, head + "&ip=127.0.0.1" + tail},
			{brokerauth.ResourcePath, queue + "configure" + tail},
			{brokerauth.ResourcePath, queue + "write" + tail},
			{brokerauth.ResourcePath, head + "&resource=exchange&name=amq.topic&permission=read" + tail},
			{brokerauth.TopicPath, topic("read", "d."+string(id)+".dn.%23")},
			{brokerauth.TopicPath, topic("write", "d."+string(id)+".up.hello")},
		} {
			out = append(out, fmt.Appendf(nil, "POST %s HTTP/1.1\r\ncontent-type: application/x-www-form-urlencoded\r\ncontent-length: %d\r\nhost: 127.0.0.1\r\nconnection: keep-alive\r\n\r\n%s",
				q[0], len(q[1]), q[1]))
		}
	}
	return out
}

// measure sends the questions one after another on each of conns connections for about length, and returns answers per
// second. Every answer must be allow.
func measure(addr string, questions [][]byte, conns int, length time.Duration) (float64, error) {
	var wg sync.WaitGroup
	counts, errs := make([]int, conns), make([]error, conns)
	begin := time.Now()
	for c := range conns {
		wg.Go(func() { counts[c], errs[c] = askUntil(addr, questions, c*97, begin.Add(length)) })
	}
	wg.Wait()
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(total) / time.Since(begin).Seconds(), errors.Join(errs...)
}

func askUntil(addr string, questions [][]byte, first int, end time.Time) (int, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(end.Add(10 * time.Second)); err != nil {
		return 0, err
	}
	r := bufio.NewReader(conn)
	n := 0
	for ; n%64 != 0 || time.Now().Before(end); n++ {
		if _, err := conn.Write(questions[(first+n)%len(questions)]); err != nil {
			return n, err
		}
		if err := readAllow(r); err != nil {
			return n, err
		}
	}
	return n, nil
}

// readAllow reads one response, which both servers send with a length, and checks that it is 200 allow. It is as small
// as it can be: the client shares the machine with the server that it measures.
func readAllow(r *bufio.Reader) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(line), "HTTP/1.1 200 ") {
		return fmt.Errorf("answer %q", line)
	}
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return err
		}
		if len(line) == 2 {
			break
		}
	}
	var body [5]byte
	if _, err := io.ReadFull(r, body[:]); err != nil {
		return err
	}
	if string(body[:]) != "allow" {
		return fmt.Errorf("answer %q", body)
	}
	return nil
}
