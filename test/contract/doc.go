// Package contract holds scenario tests of the broker contract (DESIGN §5) on a real RabbitMQ with the production
// configuration: who is let in, by which door, and what he may touch there. In each of them somebody does what he must
// not, is refused, and two bystanders keep their connections and their way to muster's queue.
package contract
