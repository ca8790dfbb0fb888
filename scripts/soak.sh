#!/usr/bin/env bash
# Lets hostile guests (tests/machine/hostile.rs) attack their devices for long: on this host's /dev/kvm
# and in the lab.
#
# usage: soak.sh [here|lab|both [MILLIONS]]
#
# MILLIONS (default 20) of operations on each side, in rounds of half a million by a guest with one CPU
# and by one whose second CPU comes on top. Each has a seed, and so a program, of its own. What fails
# ends it; the line with its ALCOVE_HOSTILE_SEED repeats it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
where=${1:-both} millions=${2:-20}
operations=500000 # of one guest
rounds=$((millions * 1000000 / operations / 2))
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT

# Runs all rounds; the arguments are what runs the test whose name follows. For any shell.
cat >"$work/soak" <<'END'
set -e
rounds=$1 ALCOVE_HOSTILE_OPERATIONS=$2
shift 2
export ALCOVE_HOSTILE_OPERATIONS
start=$(date +%s)
for round in $(seq "$rounds"); do
    for name in registers_and_rings_of_garbage_harm_nobody two_cpus_that_race_the_devices_harm_nobody; do
        echo "round $round of $rounds, $(($(date +%s) - start)) s: $name"
        "$@" "hostile::$name"
    done
done
echo "all passed after $(($(date +%s) - start)) s"
END

# What is on this host: the alcove that is released, and the tests.
here() {
    local machine
    cargo build --quiet --release
    machine=$(cargo test --quiet --no-run --test machine --message-format json |
        sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p')
    # Whatever is built meanwhile.
    cp "$machine" "$work/machine"
    cp target/release/alcove "$work/alcove"
    ALCOVE=$work/alcove ALCOVE_IN_LAB=1 sh "$work/soak" "$rounds" "$operations" "$work/machine" body
}

in_lab() {
    scripts/lab-programs.sh
    ALCOVE_LAB_DEADLINE_S=$((6 * 3600)) scripts/lab.sh threads alcove=target/lab/alcove \
        machine=target/lab/machine soak="$work/soak" -- sh soak "$rounds" "$operations" machine body
}

case "$where" in
    here) here ;;
    lab) in_lab ;;
    both)
        here
        in_lab
        ;;
    *)
        echo 'usage: soak.sh [here|lab|both [MILLIONS]]' >&2
        exit 1
        ;;
esac
