#!/usr/bin/env bash
# Builds the programs for Linux into bin/linux-ARCH: build-linux.sh amd64|arm64...
# The machine's own architecture needs nothing; the other one needs its Rust standard library and a C cross compiler.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

PROGRAMS=(hypervisor-server hypervisor-agent hypervisor-ctl)

machine_of() {
  case $1 in
    amd64) printf 'x86_64' ;;
    arm64) printf 'aarch64' ;;
    *) die "unknown architecture '$1': amd64 or arm64" ;;
  esac
}

# Says what a build for the machine lacks here, nothing where it can be done.
missing_for() {
  local machine=$1 target=$2
  [ "$machine" != "$(uname -m)" ] || return 0
  [ -d "$(rustc --print target-libdir --target "$target")" ] || printf ' the Rust target (rustup target add %s)' "$target"
  have "$machine-linux-gnu-gcc" ||
    printf ' a C cross compiler (apt-get install gcc-%s-linux-gnu)' "${machine//_/-}"
}

build_for() {
  local arch=$1 machine target missing program linker
  machine=$(machine_of "$arch")
  target=$machine-unknown-linux-gnu
  missing=$(missing_for "$machine" "$target")
  if [ -n "$missing" ]; then
    warn "linux-$arch cannot be built here, missing:$missing"
    return 1
  fi
  if [ "$machine" != "$(uname -m)" ]; then
    linker=CARGO_TARGET_$(tr '[:lower:]-' '[:upper:]_' <<<"$target")_LINKER
    export "$linker=$machine-linux-gnu-gcc" "CC_${target//-/_}=$machine-linux-gnu-gcc"
  fi
  cargo build --release --target "$target" "${PROGRAMS[@]/#/--package=}" || return 1
  mkdir -p "bin/linux-$arch"
  for program in "${PROGRAMS[@]}"; do
    install -m 755 "$TARGET/$target/release/$program" "bin/linux-$arch/$program"
    say "bin/linux-$arch/$program"
  done
}

main() {
  local arch failed=()
  [ $# -gt 0 ] || die "usage: hack/build-linux.sh amd64|arm64..."
  for arch in "$@"; do
    machine_of "$arch" >/dev/null
  done
  for arch in "$@"; do
    build_for "$arch" || failed+=("linux-$arch")
  done
  [ ${#failed[@]} -eq 0 ] || die "not built: ${failed[*]}"
}

main "$@"
