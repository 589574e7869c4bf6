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
  return 0
}

build_for() {
  local arch=$1 machine target program linker
  machine=$(machine_of "$arch")
  target=$machine-unknown-linux-gnu
  if [ "$machine" != "$(uname -m)" ]; then
    linker=CARGO_TARGET_$(tr '[:lower:]-' '[:upper:]_' <<<"$target")_LINKER
    export "$linker=$machine-linux-gnu-gcc" "CC_${target//-/_}=$machine-linux-gnu-gcc"
  fi
  cargo build --release --target "$target" "${PROGRAMS[@]/#/--package=}"
  mkdir -p "bin/linux-$arch"
  for program in "${PROGRAMS[@]}"; do
    install -m 755 "$TARGET/$target/release/$program" "bin/linux-$arch/$program"
    say "bin/linux-$arch/$program"
  done
}

main() {
  local arch machine missing possible=() impossible=()
  [ $# -gt 0 ] || die "usage: hack/build-linux.sh amd64|arm64..."
  for arch in "$@"; do
    machine=$(machine_of "$arch")
    missing=$(missing_for "$machine" "$machine-unknown-linux-gnu")
    if [ -z "$missing" ]; then
      possible+=("$arch")
    else
      impossible+=("linux-$arch")
      warn "linux-$arch cannot be built here, missing:$missing"
    fi
  done
  for arch in "${possible[@]}"; do
    build_for "$arch"
  done
  [ ${#impossible[@]} -eq 0 ] || die "not built: ${impossible[*]}"
}

main "$@"
