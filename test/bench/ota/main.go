// Command ota measures downloads of a firmware image from muster's device API against nginx and Apache httpd serving the
// same file, all over mutual TLS with the same certificates on 127.0.0.1, by the same client, in turns. A download is what
// a device does: connect, handshake (TLS 1.2, ECDHE-ECDSA with AES-128-GCM on P-256, as ESP32 clients do), one GET, the whole body,
// close. It prints, besides a table of CPU time for each download,
//
//	ratio ota-vs-nginx <value> aim 0.95
//	ratio ota-vs-apache <value> aim 1.1
//
// where value is the median over the rounds of ours / theirs in downloads per second. muster runs as a process of its own
// with its real store, grants and admission; nginx and Apache decide nothing but whether the certificate is good. Missing
// servers are installed from Debian if the bench runs as root.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"
)

type options struct {
	clients int
	size    int
	rounds  int
	length  time.Duration
	tls13   bool
}

func main() {
	var o options
	serve := flag.String("serve", "", "internal: serve muster's device API from this directory")
	flag.IntVar(&o.clients, "clients", 32, "downloads at the same time")
	flag.IntVar(&o.size, "size", 3<<19, "bytes of the image")
	flag.IntVar(&o.rounds, "rounds", 7, "rounds; each measures all servers, in another order")
	flag.DurationVar(&o.length, "length", 1500*time.Millisecond, "length of one measurement")
	flag.BoolVar(&o.tls13, "tls13", false, "TLS 1.3 instead of 1.2")
	flag.Parse()
	var err error
	if *serve != "" {
		err = serveMuster(*serve, os.Stdin, os.Stdout)
	} else {
		err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench ota:", err)
		os.Exit(1)
	}
}

// figures of one server over all rounds.
type figures struct {
	rates     []float64 // downloads per second, one a round
	downloads int
	serverCPU time.Duration
	clientCPU time.Duration
}

func run(o options) error {
	if err := install("nginx", "nginx-light"); err != nil {
		return err
	}
	if err := install("apache2", "apache2"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-ota-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) // the servers must go too
	defer stop()
	shared, err := newSite(dir, o)
	if err != nil {
		return err
	}
	servers := []*server{}
	defer func() {
		for _, s := range servers {
			s.stop()
		}
	}()
	for _, start := range []func(*site) (*server, error){startMuster, startNginx, startApache} {
		s, err := start(shared)
		if err != nil {
			return err
		}
		servers = append(servers, s)
	}
	got := make([]figures, len(servers))
	for _, s := range servers { // warm up, and see that each serves the right bytes
		if _, err := measure(shared, s, o.length/3, true); err != nil {
			return err
		}
	}
	for round := range o.rounds {
		for i := range servers {
			if err := interrupted.Err(); err != nil {
				return err
			}
			at := (i + round) % len(servers)
			if err := got[at].add(shared, servers[at], o.length); err != nil {
				return err
			}
		}
	}
	report(o, servers, got)
	return nil
}

func (f *figures) add(on *site, s *server, length time.Duration) error {
	serverCPU, clientCPU := s.cpu(), ownCPU()
	began := time.Now()
	n, err := measure(on, s, length, false)
	if err != nil {
		return err
	}
	f.rates = append(f.rates, float64(n)/time.Since(began).Seconds())
	f.downloads += n
	f.serverCPU += s.cpu() - serverCPU
	f.clientCPU += ownCPU() - clientCPU
	return nil
}

func report(o options, servers []*server, got []figures) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "server\tdownloads/s\tMiB/s\tserver CPU ms/download\tclient CPU ms/download\t\n")
	for i, f := range got {
		rate, n := median(f.rates), float64(max(1, f.downloads))
		fmt.Fprintf(w, "%s\t%.0f\t%.0f\t%.2f\t%.2f\t\n", servers[i].name, rate, rate*float64(o.size)/(1<<20),
			f.serverCPU.Seconds()*1000/n, f.clientCPU.Seconds()*1000/n)
	}
	w.Flush()
	fmt.Println("client and server share the machine's CPUs: the sum of the two columns is what bounds the rate")
	for i, aim := range map[int]string{1: "0.95", 2: "1.1"} {
		ratios := make([]float64, len(got[0].rates))
		for r := range ratios {
			ratios[r] = got[0].rates[r] / got[i].rates[r]
		}
		fmt.Printf("ratio ota-vs-%s %.2f aim %s\n", servers[i].name, median(ratios), aim)
	}
}

func median(all []float64) float64 {
	s := slices.Sorted(slices.Values(all))
	return (s[len(s)/2] + s[(len(s)-1)/2]) / 2
}
