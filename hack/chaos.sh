#!/usr/bin/env bash
# Long runs of whole-process chaos with release programs: chaos.sh [storm MINUTES | cut-off ROUNDS | leader ROUNDS | etcd MINUTES].
# CHAOS_SEED repeats the choices of a run. Needs root for network namespaces.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

step "what is missing" hack/setup.sh packages
step "build" cargo build --release --locked --package hypervisor-server --package hypervisor-agent --package hypervisor-ctl
step "build chaos" cargo build --release --locked --package hv-testkit --features chaos --bin hypervisor-chaos
step "chaos" env TESTKIT_PROGRAMS="$TARGET/release" "$TARGET/release/hypervisor-chaos" "$@"
