#!/usr/bin/env bash
# Boots a real virtual machine through the whole system, and removes it again: installs what is missing, builds, starts
# a server with the embedded store and two agents, and does everything else with hypervisor-ctl. KEEP=1 leaves it running.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

KEEP=${KEEP:-}
DEMO_DIR=${DEMO_DIR:-$CACHE/demo}
VM=demo-vm
pids=()
started=$SECONDS
finished=no

# Milliseconds since some moment.
now_ms() { printf '%s\n' "$(($(date +%s%N) / 1000000))"; }

# do_step "what" command...: runs it quietly, says how long it took; shows its output only if it fails. Not in a
# subshell: what a step starts must be known to clean_up.
do_step() {
  local what=$1 from to output status=0
  shift
  printf '  %-44s ' "$what"
  from=$(now_ms)
  "$@" >"$DEMO_DIR/step.out" 2>&1 || status=$?
  to=$(now_ms)
  output=$(tr -d '\0' <"$DEMO_DIR/step.out")
  if [ "$status" -ne 0 ]; then
    printf 'FAILED\n%s\n' "$output"
    return "$status"
  fi
  printf '%d.%01d s\n' $(((to - from) / 1000)) $(((to - from) % 1000 / 100))
  last_output=$output
}

show() { sed 's/^/      | /' <<<"$1"; }

# What the demo cannot leave behind, however it ends.
clean_up() {
  local status=$?
  if [ "$finished" = yes ] && [ -n "$KEEP" ]; then
    return
  fi
  if [ "$finished" = no ]; then
    say "the demo did not finish; the logs' ends:"
    tail -n 8 "$DEMO_DIR"/*.log 2>/dev/null || true
  fi
  ctl instance delete "$VM" --timeout 20s >/dev/null 2>&1 || true
  local pid
  for pid in "${pids[@]}"; do
    kill "$pid" 2>/dev/null || true
  done
  for pid in "${pids[@]}"; do
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$DEMO_DIR"
  return "$status"
}

ctl() { "$PROGRAMS/hypervisor-ctl" --server "$(address server grpc)" "$@"; }

# address NAME KEY: where a program that was started here listens, from its ready file.
address() { sed -n "s/.*\"$2\": *\"\([^\"]*\)\".*/\1/p" "$DEMO_DIR/$1/$(ready_file "$1")" 2>/dev/null; }

ready_file() {
  case $1 in
    server) say server.json ;;
    *) say agent.json ;;
  esac
}

# start NAME PROGRAM FLAG...: starts a program in the background and waits until it listens.
start() {
  local name=$1 program=$2 file pid
  shift 2
  mkdir -p "$DEMO_DIR/$name"
  file=$DEMO_DIR/$name/$(ready_file "$name")
  rm -f "$file"
  env -u HYPERVISOR_CACHE "$PROGRAMS/$program" "$@" >"$DEMO_DIR/$name.log" 2>&1 </dev/null &
  pid=$!
  pids+=("$pid")
  local tries=0
  until [ -s "$file" ]; do
    kill -0 "$pid" 2>/dev/null || return 1
    tries=$((tries + 1))
    [ "$tries" -lt 600 ] || return 1
    sleep 0.05
  done
}

start_server() {
  start server hypervisor-server --dev --data-dir "$DEMO_DIR/server" --grpc-address 127.0.0.1:0 \
    --http-address 127.0.0.1:0 --heartbeat-interval 1s --heartbeat-timeout 10s
}

start_agent() {
  HYPERVISOR_AGENT_HOSTNAME=$1 HYPERVISOR_AGENT_IP=127.0.0.1 start "$1" hypervisor-agent --server-addr "$(address server grpc)" --node-id "$1" \
    --state-dir "$DEMO_DIR/$1" --image-dir "$CACHE/images" --grpc-address 127.0.0.1:0 \
    --http-address 127.0.0.1:0 --drivers qemu
}

nodes_ready() {
  local tries=0
  until [ "$(ctl node list -o json | grep -c '"NODE_STATUS_READY"')" -eq 2 ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 200 ] || die "the nodes do not become ready"
    sleep 0.1
  done
}

build() { cargo build --release --locked --package hypervisor-server --package hypervisor-agent --package hypervisor-ctl; }

nothing_is_left() {
  ! pgrep -f "qemu-system.*guest=$VM," >/dev/null || die "a QEMU process is left"
  [ -z "$(ctl instance list -o name)" ] || die "an instance is left"
}

# Whether the process's command line names the demo's directory.
is_of_demo() { tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -q "hypervisor-[a-z]* .*$DEMO_DIR/"; }

# A demo that was kept or still runs is left alone; what one that was killed has left is removed.
clear_remains() {
  [ -e "$DEMO_DIR" ] || return 0
  local process
  for process in /proc/[0-9]*; do
    ! is_of_demo "${process#/proc/}" || die "a demo runs in $DEMO_DIR (process ${process#/proc/}): end it first"
  done
  for process in /proc/[0-9]*; do
    # A virtual machine runs in its own directory.
    case $(readlink "$process/cwd" 2>/dev/null) in
      "$DEMO_DIR"/*) kill -9 "${process#/proc/}" 2>/dev/null || true ;;
    esac
  done
  rm -rf "$DEMO_DIR"
}

run_machine() {
  do_step "create a virtual machine and wait for it" ctl instance create --name "$VM" --type vm --image tiny \
    --cpus 1 --memory 256
  do_step "wait for the guest's greeting" ctl instance console "$VM" --until 'hypervisor-guest: hello' --timeout 120s
  show "$(grep -a 'hypervisor-guest: hello' <<<"$last_output" | tail -n 1 | tr -d '\r')"
  do_step "list instances" ctl instance list
  show "$last_output"
  do_step "its statistics" ctl instance stats "$VM"
  show "$last_output"
  do_step "stop it (ACPI, the guest shuts down)" ctl instance stop "$VM"
  do_step "start it again" ctl instance start "$VM"
}

main() {
  say "Hypervisor demo: one server, two agents, one virtual machine"
  clear_remains
  # These show their own progress: on a new machine they take minutes.
  step "what is missing" hack/setup.sh demo
  step "build" build
  PROGRAMS=$TARGET/release
  mkdir -p "$DEMO_DIR"
  trap clean_up EXIT
  do_step "start the server" start_server
  do_step "start agent node-1" start_agent node-1
  do_step "start agent node-2" start_agent node-2
  do_step "wait until both nodes are ready" nodes_ready
  run_machine
  if [ -n "$KEEP" ]; then
    finished=yes
    say "It is left running. Reach it with:"
    say "  export HYPERVISOR_CTL_SERVER=$(address server grpc)"
    say "  $PROGRAMS/hypervisor-ctl instance console $VM"
    say "End it with:"
    say "  $PROGRAMS/hypervisor-ctl --server $(address server grpc) instance delete $VM && kill ${pids[*]} && rm -rf $DEMO_DIR"
    disown -a
    return
  fi
  do_step "delete it" ctl instance delete "$VM"
  do_step "look that nothing is left" nothing_is_left
  finished=yes
  say "The demo took $((SECONDS - started)) s."
}

main
