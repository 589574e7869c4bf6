#!/usr/bin/env bash
# Runs random histories of whole simulated clusters, as many as given (10000), on all processors. A failure prints the
# last of its history and the seed; `hack/simulate.sh --seed S --trace` lives it again.
# usage: hack/simulate.sh [COUNT [FROM]] | hack/simulate.sh --option...

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

main() {
  local options=("$@")
  case ${1:-} in
    -*) ;;
    *) options=(--seeds "${1:-10000}" --from "${2:-0}" --jobs "$(nproc)") ;;
  esac
  cargo build --quiet --profile simulation -p hv-testkit --features simulation --example simulate
  "$TARGET/simulation/examples/simulate" "${options[@]}"
}

main "$@"
