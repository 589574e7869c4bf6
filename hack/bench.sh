#!/usr/bin/env bash
# Measures what the system costs beside bare QEMU, with release programs. BENCH_ROUNDS sets the number of rounds.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

step "what is missing" hack/setup.sh demo
step "build" cargo build --release --locked --package hypervisor-server --package hypervisor-agent --package hypervisor-ctl
# On its own: the programs are to be measured as they are shipped, not with what the bench needs.
step "build the bench" cargo build --release --locked --package hv-testkit --example bench
step "measure" env TESTKIT_PROGRAMS="$TARGET/release" "$TARGET/release/examples/bench" "$TARGET/bench.json"
