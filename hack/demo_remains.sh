# shellcheck shell=bash
# shellcheck disable=SC2034  # its variables are for demo.sh
# Sourced by demo.sh: what a demo has outside of its processes' memory, and how all of it is found and removed again,
# also what one left behind that was killed. Everything carries the name of the demo's directory.

DEMO_DIR=${DEMO_DIR:-$CACHE/demo}
CONTAINERD=$DEMO_DIR/containerd/c.sock
FIRECRACKER=$CACHE/tools/firecracker-1.12.1/firecracker
# Of demos in other directories these differ.
NUMBER=$(printf '%s' "$DEMO_DIR" | cksum | cut -d ' ' -f 1)
CGROUP=hypervisor-demo-$NUMBER
BRIDGE=hvdemo$((NUMBER % 100000))
SUBNET=10.89.$((NUMBER % 256)).0/24
# Where the kernel is told to pass packets on, which the containers' bridge makes it do.
FORWARDS=/proc/sys/net/ipv4/ip_forward

# end_all PID...: ends processes of this shell, in order, and waits for them.
end_all() {
  local pid
  for pid in "$@"; do
    kill "$pid" 2>/dev/null || true
  done
  for pid in "$@"; do
    wait "$pid" 2>/dev/null || true
  done
}

# The processes whose command line names something in the demo's directory.
named() { { grep -alF "$DEMO_DIR/" /proc/[0-9]*/cmdline 2>/dev/null || true; } | cut -d / -f 3; }

# holding WHAT PATTERN: the processes whose working directory (cwd) or open file (fd/0) matches.
holding() { { find /proc/[0-9]*/"$1" -maxdepth 0 -lname "$2" 2>/dev/null || true; } | cut -d / -f 3; }

# of_programs NAME...: of the processes read those that run one of these programs.
of_programs() {
  local pid name running
  while read -r pid; do
    running=$(readlink "/proc/$pid/exe" 2>/dev/null) || continue
    for name in "$@"; do
      # A program whose file was replaced is called "... (deleted)".
      [[ ${running##*/} != "$name"* ]] || say "$pid"
    done
  done
}

# The processes that are instances, or look after one: a virtual machine works in its directory, a microVM has its lock
# as its standard input, a container is in a control group of the demo, with a shim beside it.
guests() {
  holding cwd "$DEMO_DIR/*/qemu/*"
  holding fd/0 "$DEMO_DIR/*/firecracker/*"
  named | of_programs containerd-shim
  find /sys/fs/cgroup -path "*/$CGROUP/*" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u
}

# The server, the agents, their fencers (which have their lock as their standard input) and containerd.
programs() { { named && holding fd/0 "$DEMO_DIR/*"; } | sort -u | of_programs hypervisor-server hypervisor-agent containerd; }

# A demo that still runs, or was kept, is left alone.
refuse_second() {
  local pid
  pid=$(cat "$DEMO_DIR/pid" 2>/dev/null) || return 0
  if [ -e "$DEMO_DIR/kept" ]; then
    [ -z "$(programs)" ] || die "a demo that was kept runs in $DEMO_DIR: end it with hack/demo.sh end"
  elif grep -qaF demo.sh "/proc/$pid/cmdline" 2>/dev/null; then
    die "a demo runs in $DEMO_DIR (process $pid)"
  fi
}

kill_all() {
  local pid
  for pid in "$@"; do
    kill -9 "$pid" 2>/dev/null || true
  done
}

# Removes all that is left, running or not. The agents go first: they would start again what ends.
remove_remains() {
  local left tries=0 mount group
  [ -e "$DEMO_DIR" ] || return 0
  while left=$(programs && guests) && [ -n "$left" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || die "these processes cannot be ended: ${left//$'\n'/ }"
    # What stands still does not die.
    for group in /sys/fs/cgroup/freezer/"$CGROUP"/*/freezer.state; do
      [ ! -e "$group" ] || printf 'THAWED\n' >"$group" || true
    done
    # shellcheck disable=SC2046  # they are numbers
    kill_all $(programs)
    # shellcheck disable=SC2046
    kill_all $(guests)
    sleep 0.05
  done
  while read -r _ mount _; do
    # A space is written \040 there.
    printf -v mount '%b' "$mount"
    [[ $mount != "$DEMO_DIR"/* ]] || umount -l "$mount" 2>/dev/null || true
  done </proc/mounts
  find /sys/fs/cgroup -depth -type d \( -name "$CGROUP" -o -path "*/$CGROUP/*" \) -exec rmdir {} + 2>/dev/null || true
  remove_network
  rm -rf "$DEMO_DIR"
}

remove_network() {
  ! ip link show "$BRIDGE" >/dev/null 2>&1 || ip link delete "$BRIDGE" 2>/dev/null || true
  [ ! -e "$DEMO_DIR/did-not-forward" ] || printf '0\n' >$FORWARDS
}
