#!/usr/bin/env bash
# Runs a virtual machine, a container and a microVM through the whole system, and removes them again: installs what is
# missing, builds, starts a server with the embedded store and two agents, and does everything else with hypervisor-ctl.
# What cannot run on this machine is left out, and said. KEEP=1 leaves it running; `demo.sh end` ends it then.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# shellcheck source=hack/demo_remains.sh
. "$REPO/hack/demo_remains.sh"

cd "$REPO"

KEEP=${KEEP:-}
PROGRAMS=$TARGET/release
# One for each type that can run here.
instances=()
containers=no
microvms=no
pids=()
started=$SECONDS
finished=no
# Of what a step does, in letters.
width=44

# Milliseconds since some moment.
now_ms() { printf '%s\n' "$(($(date +%s%N) / 1000000))"; }

# do_step "what" command...: runs it quietly, says how long it took; shows its output only if it fails. Not in a
# subshell: what a step starts must be known to clean_up.
do_step() {
  local what=$1 from to output status=0
  shift
  printf '  %-*s ' "$width" "$what"
  from=$(now_ms)
  "$@" >"$output_file" 2>&1 || status=$?
  to=$(now_ms)
  output=$(tr -d '\0' <"$output_file")
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
  rm -f "$output_file"
  [ "$finished" = no ] || return "$status"
  say "the demo did not finish; the logs' ends:"
  tail -n 8 "$DEMO_DIR"/*.log 2>/dev/null || true
  [ ${#instances[@]} -eq 0 ] || ctl instance delete "${instances[@]}" --timeout 20s >/dev/null 2>&1 || true
  end_programs
  return "$status"
}

end_programs() {
  end_all "${pids[@]}"
  remove_remains
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

# wait_for PID COMMAND...: tries the command until it succeeds, for 30 s, while the process lives.
wait_for() {
  local pid=$1 tries=0
  shift
  until "$@" >/dev/null 2>&1; do
    kill -0 "$pid" 2>/dev/null || return 1
    tries=$((tries + 1))
    [ "$tries" -lt 600 ] || return 1
    sleep 0.05
  done
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
  wait_for "$pid" test -s "$file"
}

start_server() {
  start server hypervisor-server --dev --data-dir "$DEMO_DIR/server" --grpc-address 127.0.0.1:0 \
    --http-address 127.0.0.1:0 --heartbeat-interval 1s --heartbeat-timeout 10s
}

# A containerd of the demo's own: it neither needs nor touches one that runs as a service.
start_containerd() {
  local dir=$DEMO_DIR/containerd pid
  mkdir -p "$dir"
  [ "$(cat $FORWARDS)" = 1 ] || touch "$DEMO_DIR/did-not-forward"
  cat >"$dir/config.toml" <<TOML
version = 2
root = "$dir/root"
state = "$dir/run"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing"]
[grpc]
address = "$CONTAINERD"
[ttrpc]
address = "$CONTAINERD.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "$dir/opt"
TOML
  containerd --config "$dir/config.toml" >"$DEMO_DIR/containerd.log" 2>&1 </dev/null &
  pid=$!
  pids+=("$pid")
  wait_for "$pid" ctr --address "$CONTAINERD" version
}

# start_agent NAME DRIVERS: what the drivers do not use they do not look at.
start_agent() {
  HYPERVISOR_AGENT_HOSTNAME=$1 HYPERVISOR_AGENT_IP=127.0.0.1 HYPERVISOR_IMAGES_FILE_DIRS="[$CACHE/images]" \
    HYPERVISOR_CONTAINERD_ADDRESS=$CONTAINERD HYPERVISOR_CONTAINERD_CGROUP_PARENT=/$CGROUP \
    HYPERVISOR_CONTAINERD_BRIDGE=$BRIDGE HYPERVISOR_CONTAINERD_SUBNET=$SUBNET HYPERVISOR_CONTAINERD_MASQUERADE=false \
    HYPERVISOR_FIRECRACKER_BINARY_PATH=${FIRECRACKER_BIN:-$FIRECRACKER} \
    start "$1" hypervisor-agent --server-addr "$(address server grpc)" --node-id "$1" --drivers "$2" \
    --state-dir "$DEMO_DIR/$1" --image-dir "$CACHE/images" --grpc-address 127.0.0.1:0 --http-address 127.0.0.1:0
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
  local left
  [ -z "$(ctl instance list -o name)" ] || die "an instance is left"
  left=$(guests)
  [ -z "$left" ] || die "a process of an instance is left: $left"
}

# What keeps containers from running here; nothing if they can.
why_no_containers() {
  local program
  [ "$(id -u)" -eq 0 ] || { say "only root can run them"; return; }
  for program in containerd ctr runc; do
    have "$program" || { say "$program is not installed"; return; }
  done
  [ -e /sys/fs/cgroup/cgroup.controllers ] || [ -e /sys/fs/cgroup/freezer ] || { say "there are no control groups in /sys/fs/cgroup"; return; }
  unshare --mount --net true 2>/dev/null || { say "namespaces cannot be made here"; return; }
  [ -s "$CACHE/images/hello-container.tar" ] || say "its image was not built"
}

# What keeps microVMs from running here; nothing if they can.
why_no_microvms() {
  [ "$(uname -m)" = x86_64 ] || { say "their image is for x86_64 only"; return; }
  [ -x "${FIRECRACKER_BIN:-$FIRECRACKER}" ] || { say "Firecracker is not installed"; return; }
  [ -e /dev/kvm ] || { say "this machine has no /dev/kvm"; return; }
  { : <>/dev/kvm; } 2>/dev/null || { say "/dev/kvm cannot be opened; run this as root, or as a member of the group kvm"; return; }
  [ -s "$CACHE/images/hello-microvm.elf" ] || say "its image was not built"
}

choose() {
  local why
  why=$(why_no_containers)
  [ -n "$why" ] && say "Left out: the container, because $why." || containers=yes
  why=$(why_no_microvms)
  [ -n "$why" ] && say "Left out: the microVM, because $why." || microvms=yes
}

# pull TYPE: makes the nodes that run the type fetch its image.
pull() { ctl image pull --type "$1" --name "hello-$1" "file://$CACHE/images/hello-$1.$2"; }

# create TYPE IMAGE: the same command for each.
create() {
  local command=(instance create "demo-$1" --type "$1" --image "$2") width=$width
  instances+=("demo-$1")
  width=88
  do_step "hypervisor-ctl ${command[*]}" ctl "${command[@]}"
}

greeting() {
  do_step "the console of $1" ctl instance console "$1" --until 'hello' --timeout 120s
  show "$(grep -a hello <<<"$last_output" | tail -n 1 | tr -d '\r')"
}

run_instances() {
  local name
  say "The same command starts each; type and image change, and the name:"
  create vm tiny
  [ "$containers" = no ] || create container hello-container
  [ "$microvms" = no ] || create microvm hello-microvm
  for name in "${instances[@]}"; do
    greeting "$name"
  done
  [ "$microvms" = no ] ||
    say "  (The microVM's guest is a small bare-metal program of ours, not Linux, as not every /dev/kvm can run Linux.)"
  do_step "list instances" ctl instance list
  show "$last_output"
  do_step "their statistics" ctl instance stats "${instances[@]}"
  show "$last_output"
  do_step "stop them (each shuts down by itself)" ctl instance stop "${instances[@]}"
  do_step "start them again" ctl instance start "${instances[@]}"
}

keep() {
  finished=yes
  touch "$DEMO_DIR/kept"
  disown -a
  say "It is left running. Reach it with:"
  say "  export HYPERVISOR_CTL_SERVER=$(address server grpc) PATH=$PROGRAMS:\$PATH"
  say "  hypervisor-ctl instance list"
  say "End it with:"
  say "  hack/demo.sh end"
}

run_demo() {
  local and_containers='' and_microvms=''
  say "Hypervisor demo: one server, two agents; a virtual machine, a container and a microVM"
  refuse_second
  remove_remains
  # These show their own progress: on a new machine they take minutes.
  step "what is missing" hack/setup.sh demo
  step "build" build
  choose
  mkdir -p "$DEMO_DIR"
  output_file=$(mktemp)
  trap clean_up EXIT
  say "$$" >"$DEMO_DIR/pid"
  do_step "start the server" start_server
  if [ "$containers" = yes ]; then
    and_containers=,containerd
    do_step "start a containerd of the demo's own" start_containerd
  fi
  [ "$microvms" = no ] || and_microvms=,firecracker
  do_step "start agent node-1 (qemu$and_microvms)" start_agent node-1 "qemu$and_microvms"
  do_step "start agent node-2 (qemu$and_containers)" start_agent node-2 "qemu$and_containers"
  do_step "wait until both nodes are ready" nodes_ready
  [ "$containers" = no ] || do_step "give the container's image to its node" pull container tar
  [ "$microvms" = no ] || do_step "give the microVM's image to its node" pull microvm elf
  run_instances
  if [ -n "$KEEP" ]; then
    keep
    return
  fi
  do_step "delete them" ctl instance delete "${instances[@]}"
  do_step "look that nothing is left" nothing_is_left
  do_step "end the programs" end_programs
  finished=yes
  say "The demo took $((SECONDS - started)) s."
}

case ${1:-run} in
  run) run_demo ;;
  end) remove_remains && say "No demo runs in $DEMO_DIR any more." ;;
  *) die "usage: hack/demo.sh [run|end]" ;;
esac
