# What a user or developer types. `make help` lists the targets. The work is done by cargo and the scripts in hack/.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
PROGRAMS := hypervisor-server hypervisor-agent hypervisor-ctl
DOCKER ?= docker
VERSION ?= dev

# Builds one or more programs in release mode, with further flags if given, and copies them to bin/.
define build_programs
	cargo build --release $(addprefix --package ,$(1)) $(2)
	@mkdir -p bin
	@for program in $(1); do install -m 755 $(TARGET_DIR)/release/$$program bin/$$program; echo "bin/$$program"; done
endef

# A target whose part of the project comes later: says so and fails.
define comes_later
	@echo "make $@: $(1)" >&2; exit 2
endef

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: all
all: build ## Build the programs (same as build)

.PHONY: all-with-libvirt
all-with-libvirt: ## Build the programs in release mode, the agent with the libvirt driver
	$(call build_programs,$(PROGRAMS),--features hypervisor-agent/libvirt)

.PHONY: deps
deps: ## Install what is missing (packages need root) and fetch the crates
	hack/setup.sh all
	cargo fetch --locked

.PHONY: proto-deps
proto-deps: ## Install what compiling contracts needs
	hack/setup.sh packages
	@echo "api/proto is compiled by the build itself (protox); protoc is for the etcd client's own contracts"

.PHONY: proto proto-gen
proto: proto-gen ## Compile the contracts in api/proto (same as proto-gen)
proto-gen: ## Compile the contracts in api/proto; the generated code is part of the build, not of the repository
	cargo build --package hv-proto
	@echo "the generated code is in $(TARGET_DIR)/debug/build/hv-proto-*/out"

.PHONY: build build-server build-agent build-ctl
build: ## Build the programs in release mode into bin/
	$(call build_programs,$(PROGRAMS))
build-server: ## Build hypervisor-server into bin/
	$(call build_programs,hypervisor-server)
build-agent: ## Build hypervisor-agent into bin/
	$(call build_programs,hypervisor-agent)
build-ctl: ## Build hypervisor-ctl into bin/
	$(call build_programs,hypervisor-ctl)

.PHONY: build-linux
build-linux: ## Build for Linux on amd64 and arm64 into bin/linux-*
	hack/build-linux.sh amd64 arm64

.PHONY: run-server run-agent
run-server: ## Run a server with the embedded store on this machine
	hack/run.sh server
run-agent: ## Run an agent that joins the server of run-server
	hack/run.sh agent

.PHONY: demo
demo: ## Run a virtual machine, a container and a microVM through the whole system (KEEP=1 leaves them running)
	KEEP=$(KEEP) hack/demo.sh

.PHONY: test-libvirt
test-libvirt: ## Run the suite of the libvirt driver against a libvirtd of its own (needs root; installs libvirt)
	hack/setup.sh libvirt
	cargo nextest run --package hv-driver-libvirt --features libvirt

.PHONY: bench
bench: ## Measure every bar and print one table (ROWS="lists watchers" for some groups only)
	hack/bench.sh $(ROWS)

.PHONY: chaos
chaos: ## Kill, freeze and cut off real processes for long (CHAOS="storm 10", "cut-off 200", "leader 10" or "etcd 10")
	hack/chaos.sh $(or $(CHAOS),storm 10)

.PHONY: simulate
simulate: ## Run random histories of simulated clusters (SEEDS=1000000 for more than 10000)
	hack/simulate.sh $(or $(SEEDS),10000)

.PHONY: test test-short test-coverage
test: ## Install what is missing and run every suite
	@hack/test.sh
test-short: ## Run the unit tests only
	@hack/test.sh --short
test-coverage: ## Run the tests with coverage, report in coverage/
	@command -v cargo-tarpaulin >/dev/null || cargo install --locked cargo-tarpaulin
	cargo tarpaulin --workspace --skip-clean --engine llvm --out Html --out Lcov --output-dir coverage

.PHONY: lint fmt vet
lint: ## Check format, lints, dependencies and the layering
	@hack/lint.sh
fmt: ## Format the code
	cargo fmt --all
vet: ## Run clippy alone
	cargo clippy --workspace --all-targets --locked -- -D warnings

.PHONY: clib clib-clean
clib: ## Build the libraries with a C ABI (comes later)
	$(call comes_later,the libraries with a C ABI (clib/: guest drivers, eBPF and OVS-DPDK networks, Windows host) are not part of this version)
clib-clean: ## Remove what clib built (comes later)
	$(call comes_later,there is no clib/ in this version, so nothing to remove)

.PHONY: docker docker-server docker-agent
docker: docker-server docker-agent ## Build the container images of server and agent
docker-server: ## Build the container image of the server
	hack/docker.sh server "$(DOCKER)" "$(VERSION)"
docker-agent: ## Build the container image of the agent
	hack/docker.sh agent "$(DOCKER)" "$(VERSION)"

.PHONY: clean
clean: ## Remove what was built (the cache directory with images and tools stays)
	cargo clean
	rm -rf bin coverage
