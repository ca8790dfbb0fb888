#!/usr/bin/env bash
# Runs fuzz targets, each from its seeds in fuzz/seeds and what earlier runs have found.
#
# usage: fuzz.sh [SECONDS [TARGET...]]
#
# SECONDS (default 60) is the processor time for each target; without a TARGET all of fuzz/targets run. An
# input that fails a target is kept in target/fuzz/found/TARGET: put it into fuzz/seeds/TARGET with the fix,
# where the tests replay it. A stable compiler will do. ALCOVE_FUZZ_SANITIZER=address also finds accesses
# past what is allocated; it makes use of a part of the compiler that is not stable.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-60}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(basename --suffix .rs --multiple fuzz/targets/*.rs)
fi
triple=x86_64-unknown-linux-gnu
sanitizer=${ALCOVE_FUZZ_SANITIZER-}
build=$PWD/target/fuzz/build${sanitizer:+-$sanitizer}

# What cargo-fuzz gives, too.
flags=(
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    --cfg=fuzzing
)
if [ -n "$sanitizer" ]; then
    flags+=("-Zsanitizer=$sanitizer")
    export RUSTC_BOOTSTRAP=1
fi
RUSTFLAGS="${flags[*]}" CARGO_TARGET_DIR=$build \
    cargo build --quiet --release --manifest-path fuzz/Cargo.toml --target "$triple"

# Seconds of processor time that process $1 has had so far; nothing once it has ended.
spent() {
    awk -v tick="$(getconf CLK_TCK)" '{ sub(/.*\) /, "") } $1 != "Z" { print int(($12 + $13) / tick) }' \
        "/proc/$1/stat" 2>/dev/null
}

# Runs a target until it has had its processor time. It ends in good order by SIGUSR1.
run() {
    "$@" &
    local fuzzer=$! time
    while time=$(spent "$fuzzer") && [ -n "$time" ] && [ "$time" -lt "$seconds" ]; do
        sleep 1
    done
    kill -USR1 "$fuzzer" 2>/dev/null || true
    wait "$fuzzer"
}

failed=()
for target in "${targets[@]}"; do
    corpus=target/fuzz/corpus/$target found=target/fuzz/found/$target
    mkdir -p "$corpus" "$found"
    # A leak of memory is told by the limit of it; who ends while threads run leaks.
    run "$build/$triple/release/$target" -max_len=4096 -timeout=20 -rss_limit_mb=1024 \
        -detect_leaks=0 -print_final_stats=1 "-artifact_prefix=$found/" \
        "$corpus" "fuzz/seeds/$target" >"target/fuzz/$target.log" 2>&1 || failed+=("$target")
    awk -v target="$target" '
        match($0, /cov: [0-9]+/) { coverage = substr($0, RSTART + 5, RLENGTH - 5) }
        /number_of_executed_units/ { runs = $2 }
        END { printf "%-14s %9d runs, coverage %d\n", target, runs, coverage }' "target/fuzz/$target.log"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "fuzz: ${failed[*]} failed; see target/fuzz/TARGET.log and target/fuzz/found" >&2
    exit 1
fi
