#!/usr/bin/env bash
# Measures every bar of the project with release programs and prints one table: docs/BENCHMARKS.md. bench.sh [GROUP...]
# measures only these groups. BENCH_JSON names the file of the raw figures, BENCH_DIR where stores are measured,
# BENCH_ROUNDS the number of rounds with guests.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

json=${BENCH_JSON:-$TARGET/bench/$(date -u +%Y-%m-%dT%H%M%SZ).json}
rows=$(IFS=, && printf '%s' "$*")

step "what is missing" hack/setup.sh demo
step "build" cargo build --release --locked --package hypervisor-server --package hypervisor-agent --package hypervisor-ctl
# On its own: the programs are to be measured as they are shipped, not with what the bench needs.
step "build the bench" cargo build --release --locked --package hv-testkit --features bench --bin hypervisor-bench
step "build the scheduler's bench" cargo build --release --locked --package hv-scheduler --example bench
# Other crates have an example of this name too.
cp "$TARGET/release/examples/bench" "$TARGET/release/scheduler-bench"
export BENCH_SCHEDULER=$TARGET/release/scheduler-bench
step "build the direct client of containerd" cargo build --release --locked --package hv-driver-containerd --example direct
export BENCH_DIRECT=$TARGET/release/examples/direct
step "measure" env TESTKIT_PROGRAMS="$TARGET/release" "$TARGET/release/hypervisor-bench" --json "$json" ${rows:+--rows "$rows"}
