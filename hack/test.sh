#!/usr/bin/env bash
# Runs every suite: installs what is missing, builds, unit and integration tests, doc tests. The last line is
# "N passed, N failed, N skipped"; before it, one line per reason for which tests were skipped.
# A test that cannot run here appends "suite: reason" to the file named by HYPERVISOR_SKIP_LOG and returns; one line
# is one skipped test. The conformance suites of the drivers write into the file named by HYPERVISOR_CONFORMANCE_LOG what
# came of each claim, which is printed as a table and held against docs/DRIVERS.md. --short runs the unit tests only.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

cd "$REPO"

passed=0
failed=0
skipped=0
setup_ok=yes

# Prints the sum of the numbers before the given words in the text: count_of "3 passed, 1 skipped" skipped -> 1.
count_of() {
  local text=$1 total=0 word number
  shift
  for word in "$@"; do
    number=$(grep -oE "[0-9]+ $word" <<<"$text" | head -n 1 | cut -d ' ' -f 1 || true)
    total=$((total + ${number:-0}))
  done
  printf '%s\n' "$total"
}

run_nextest() {
  local log=$work/nextest status=0 summary broken
  cargo nextest run --workspace --no-fail-fast --color never "$@" 2>&1 | tee "$log" || status=$?
  summary=$(grep -E '^ *Summary \[' "$log" | tail -n 1 || true)
  if [ -z "$summary" ]; then
    # It did not come to running tests: the build failed.
    failed=$((failed + 1))
    return
  fi
  summary=${summary#*\]}
  passed=$((passed + $(count_of "$summary" passed)))
  skipped=$((skipped + $(count_of "$summary" skipped)))
  broken=$(count_of "$summary" failed 'timed out' 'exec failed')
  # A status without a failed test (a set-up script, an interrupted run) still is a failure.
  [ "$status" -eq 0 ] || [ "$broken" -gt 0 ] || broken=1
  failed=$((failed + broken))
  grep -oE '^ *FLAKY .*' "$log" | sed -E 's/^.*\) +//' | sort -u >"$work/flaky" || true
}

run_doc_tests() {
  local log=$work/doc status=0 line broken=0
  cargo test --workspace --doc --no-fail-fast --color never 2>&1 | tee "$log" || status=$?
  while read -r line; do
    passed=$((passed + $(count_of "$line" passed)))
    broken=$((broken + $(count_of "$line" failed)))
    skipped=$((skipped + $(count_of "$line" ignored)))
  done < <(grep '^test result:' "$log" || true)
  [ "$status" -eq 0 ] || [ "$broken" -gt 0 ] || broken=1
  failed=$((failed + broken))
}

# Random histories of simulated clusters, HYPERVISOR_SIMULATIONS of them; together they count as one test.
run_simulation() {
  if "$REPO/hack/simulate.sh" "${HYPERVISOR_SIMULATIONS:-10000}"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
}

# Every line of the skip log was counted as a passed test by the runner.
account_for_skips() {
  local lines
  lines=$(wc -l <"$HYPERVISOR_SKIP_LOG")
  passed=$((passed - lines))
  skipped=$((skipped + lines))
  {
    cat "$HYPERVISOR_SKIP_LOG"
    # Those that the runner itself leaves out say why in the source.
    [ "$skipped" -eq "$lines" ] || grep -rhoP '#\[ignore = "\K[^"]+' crates --include='*.rs'
  } | sort | uniq -c | while read -r count reason; do
    say "skipped: $reason (tests: $count)"
  done
}

# The table of drivers and capabilities counts as one test: what it says is what docs/DRIVERS.md says.
show_drivers() {
  [ -s "$HYPERVISOR_CONFORMANCE_LOG" ] || return 0
  say "== drivers"
  python3 "$REPO/hack/drivers_table.py" print "$HYPERVISOR_CONFORMANCE_LOG"
  if python3 "$REPO/hack/drivers_table.py" check "$HYPERVISOR_CONFORMANCE_LOG"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
}

# Only where NEXTEST_RETRIES asks for second attempts, as .ci/run does.
show_flaky() {
  local name
  while read -r name; do
    say "passed at the second attempt only, a fault to be found: $name"
  done <"$work/flaky"
}

close() {
  show_drivers
  account_for_skips
  show_flaky
  [ "$setup_ok" = yes ] || say "the set-up is incomplete: see the errors of hack/setup.sh above"
  say "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" -eq 0 ]
}

main() {
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  export HYPERVISOR_SKIP_LOG=$work/skips
  : >"$HYPERVISOR_SKIP_LOG"
  export HYPERVISOR_CONFORMANCE_LOG=$work/conformance
  : >"$HYPERVISOR_CONFORMANCE_LOG"
  : >"$work/flaky"
  if [ "${1:-}" = --short ]; then
    run_nextest -E 'kind(lib) + kind(bin)' --no-tests pass
    close
    return
  fi
  # What cannot be installed makes its suites skip, visibly; the rest still runs.
  step "set-up" "$REPO/hack/setup.sh" all || setup_ok=no
  # The end-to-end suites start the programs themselves.
  if ! step "build" cargo build --workspace --color never; then
    failed=$((failed + 1))
    close
    return
  fi
  say "== tests"
  run_nextest
  say "== doc tests"
  run_doc_tests
  say "== simulation"
  run_simulation
  close
}

[ $# -eq 0 ] || [ "$*" = --short ] || die "usage: hack/test.sh [--short]"
main "$@"
