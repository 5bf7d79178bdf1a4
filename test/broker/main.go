// Command broker runs a private RabbitMQ for a musterd on this machine, with the configuration that musterd renders from
// its settings, until Ctrl-C: for a desk without a RabbitMQ of its own. Data stays in the data directory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"muster/internal/app"
	"muster/internal/config"
	"muster/internal/devbroker"
)

func main() {
	file := flag.String("config", "", "settings file of musterd")
	flag.Parse()
	if err := run(*file); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(file string) error {
	if file == "" {
		return errors.New("name the settings file with -config (make broker CONFIG=muster/musterd.yaml)")
	}
	c, err := config.Load(file, os.Environ(), nil)
	if err != nil {
		return err
	}
	conf, err := app.BrokerConf(&c)
	if err != nil {
		return err
	}
	dir := filepath.Join(c.DataDir, "rabbitmq")
	conf.Definitions = filepath.Join(dir, "conf", "definitions.json")
	conf.DiskFreeLimit = "50MB" // a desk is no broker's machine
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b, err := devbroker.Start(ctx, devbroker.Options{Dir: dir, Conf: conf, Bind: []string{c.Path(c.Broker.TLSDir)}, Say: func(s string) { fmt.Println(s) }})
	if err != nil {
		return err
	}
	fmt.Printf("RabbitMQ runs: MQTT %d, fallback %d, management %d; log %s; Ctrl-C ends it\n", b.Conf.MQTTPort, b.Conf.FallbackPort, b.Conf.ManagementPort, b.Log())
	<-ctx.Done()
	stop()
	within, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return b.Stop(within)
}
