# muster. `make help` lists the targets; each installs what it needs and says so.
SHELL := /bin/bash
GO    ?= go
BIN   := bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 30s
LIVES ?= 400
DEVICES ?= 2000
OUTAGE ?= 5m
# how many packages test at once: many wait for a broker more than they compute
PACKAGES ?= 3

.DEFAULT_GOAL := help
.PHONY: help build pkcs11 broker demo test test-unit lint bench fuzz soak stampede generate tools clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build musterd, muster and devicesim into bin/ (static, no cgo)
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

pkcs11: tools ## build musterd-pkcs11 and muster-pkcs11, for CA keys in an HSM: with cgo, so gcc and this machine's libc
	@mkdir -p $(BIN)
	@for p in musterd muster; do CGO_ENABLED=1 $(GO) build -trimpath -tags pkcs11 -ldflags '$(LDFLAGS)' -o $(BIN)/$$p-pkcs11 ./cmd/$$p || exit 1; done
	@echo "made $(BIN)/musterd-pkcs11 and $(BIN)/muster-pkcs11: they need this libc, and the PKCS #11 module of your HSM (module-path=...)"

broker: tools ## run a private RabbitMQ for the musterd of CONFIG=muster/musterd.yaml, until Ctrl-C
	@mkdir -p $(BIN)/test && $(GO) build -o $(BIN)/test/ ./test/broker
	@exec $(BIN)/test/broker -config '$(CONFIG)'

demo: tools build ## show a fleet live: 25 devices, rollouts, renewals, recovery (ONCE=1 ends by itself)
	@mkdir -p $(BIN)/test && $(GO) build -o $(BIN)/test/ ./test/demo
	@exec $(BIN)/test/demo -bin $(BIN)

test: tools ## run everything: unit, property, fuzz seeds and scenarios on a real RabbitMQ, with the race detector
	$(GO) run ./test/prepare
	$(GO) vet ./...
	$(GO) test -race -p $(PACKAGES) -timeout 540s ./...
	CGO_ENABLED=1 $(GO) test -tags pkcs11 -timeout 180s ./test/pkcs11

test-unit: ## run what needs no RabbitMQ
	$(GO) test -race $$($(GO) list ./... | grep -v -e /test/ -e /internal/broker$$ -e /internal/devbroker)

lint: ## gofmt, go vet, staticcheck and govulncheck
	@test/lint.sh

bench: tools ## measure; a line `ratio <name> <value> aim <aim>` for each (docs/performance.md)
	@for b in auth uplink issue renew revoke ota rollout esp provision; do echo "== $$b"; $(GO) run ./test/bench/$$b || exit 1; done

fuzz: ## fuzz every target for FUZZTIME (30s) each
	@test/fuzz.sh $(FUZZTIME)

soak: ## let 400 random fleets live under random plans, with kills and clock jumps (LIVES=n)
	$(GO) test -race -timeout 2h -run TestLivesUnderAnyPolicy ./internal/dispatch -lives $(LIVES)
	$(GO) test -race -timeout 2h -run 'TestWalks|Twin' ./internal/rollout -rapid.checks=20000

stampede: tools build ## take the auth backend away from 2000 connected devices for 5 minutes (DEVICES=n OUTAGE=d)
	@mkdir -p $(BIN)/test && $(GO) build -o $(BIN)/test/ ./test/stampede
	@$(BIN)/test/stampede -musterd $(abspath $(BIN)/musterd) -devices $(DEVICES) -outage $(OUTAGE)

generate: ## make the generated code afresh from api/openapi.yaml
	$(GO) generate ./...

tools: ## install the Debian packages that tests and demo use, where they are missing
	@test/tools.sh

clean: ## remove what was built
	rm -rf $(BIN)
