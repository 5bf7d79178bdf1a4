// Command prepare makes sure that there is a RabbitMQ for the tests, before they start: the first call on a machine
// fetches one (about 20 s), which would otherwise count against the time of whichever test comes first.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"muster/internal/devbroker"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	where, err := devbroker.Prepare(ctx, func(s string) { fmt.Println(s) })
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	fmt.Println("RabbitMQ for the tests:", where)
	return 0
}
