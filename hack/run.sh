#!/usr/bin/env bash
# Runs the server or an agent for development, from the sources, on loopback, with its data below target/dev:
# run.sh server|agent [flag...]. Flags, and what is set in the environment (HYPERVISOR_...), go to the program.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

run_server() {
  exec cargo run --package hypervisor-server -- --dev --data-dir "$TARGET/dev/server" "$@"
}

run_agent() {
  "$REPO/hack/setup.sh" images
  export HYPERVISOR_AGENT_GRPC_ADDRESS=${HYPERVISOR_AGENT_GRPC_ADDRESS:-127.0.0.1:50052}
  export HYPERVISOR_AGENT_HTTP_ADDRESS=${HYPERVISOR_AGENT_HTTP_ADDRESS:-127.0.0.1:8081}
  export HYPERVISOR_AGENT_IP=${HYPERVISOR_AGENT_IP:-127.0.0.1}
  export HYPERVISOR_AGENT_STATE_DIR=${HYPERVISOR_AGENT_STATE_DIR:-$TARGET/dev/agent}
  export HYPERVISOR_DRIVERS_QEMU_IMAGE_DIR=${HYPERVISOR_DRIVERS_QEMU_IMAGE_DIR:-$CACHE/images}
  exec cargo run --package hypervisor-agent -- "$@"
}

part=${1:-}
[ $# -eq 0 ] || shift
mkdir -p "$TARGET/dev"
case $part in
  server) run_server "$@" ;;
  agent) run_agent "$@" ;;
  *) die "usage: hack/run.sh server|agent [flag...]" ;;
esac
