#!/usr/bin/env bash
# Every check that needs no test run: format, clippy, shell, layering, licences and bans.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

failures=()

check() {
  local name=$1
  shift
  step "$name" "$@" || failures+=("$name")
}

# check_with TOOL NAME COMMAND...: a check whose tool is not part of the set-up; says so where it is not there.
check_with() {
  local tool=$1 name=$2
  shift 2
  if have "$tool"; then
    check "$name" "$@"
  else
    say "== $name: skipped, $tool is not installed"
  fi
}

main() {
  check "format" cargo fmt --all --check
  check "clippy" cargo clippy --workspace --all-targets --color never -- -D warnings
  check "layers" python3 hack/check_layers.py
  check "drivers" python3 hack/drivers_table.py check
  check_with shellcheck "shell" shellcheck --severity=warning --external-sources --source-path=SCRIPTDIR/.. .ci/run hack/*.sh \
    hack/guest/{init,guest-agent,power-button,shutdown,udhcpc.script}
  check_with cargo-deny "licences and bans" cargo deny --color never check bans licenses sources
  if [ ${#failures[@]} -gt 0 ]; then
    die "lint: failed: ${failures[*]}"
  fi
  say "lint: ok"
}

main
