# shellcheck shell=bash
# Sourced by the scripts of this directory: where things are, and how a script speaks and fails.

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${HYPERVISOR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hypervisor}
# Where cargo puts what it builds.
TARGET=${CARGO_TARGET_DIR:-$REPO/target}
export REPO CACHE TARGET

# A toolchain that rustup has just installed is not in the PATH of the running shell.
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
  PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
fi

say() { printf '%s\n' "$*"; }

warn() { printf 'warning: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root: directly, or through sudo where there is one. Otherwise says what to run.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif have sudo; then
    say "root is needed for: $*"
    sudo "$@"
  else
    die "root is needed and there is no sudo; as root, run: $*"
  fi
}

# step NAME COMMAND...: runs the command and says how long it took; the status is the command's.
step() {
  local name=$1 started=$SECONDS status=0
  shift
  say "== $name"
  "$@" || status=$?
  if [ "$status" -eq 0 ]; then
    say "== $name: done in $((SECONDS - started)) s"
  else
    say "== $name: FAILED with status $status after $((SECONDS - started)) s"
  fi
  return "$status"
}
