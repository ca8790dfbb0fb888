#!/usr/bin/env bash
# Runs `alcove bench` in the lab's counting mode, with Debian's QEMU beside it, prints its table and leaves
# target/bench/bench.json and bench.html. What was there before becomes before.json, and is compared.
#
# usage: bench.sh [ARGUMENT...]     of alcove bench, such as start boot --runs 5
#
# Needs what `make guest static` leaves. A nanosecond is an instruction of the whole lab.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT
peer=$(scripts/cached.sh peer scripts/bench-peer.sh)
alcove=target/x86_64-unknown-linux-gnu/release/alcove

cat >"$work/measure" <<EOF
export LD_LIBRARY_PATH=/lab/peer/lib PATH=/lab/peer/bin:\$PATH
alcove bench --guest guest --vs qemu --json bench.json --html bench.html "\$@" 2>errors ||
    { cat errors; exit 1; }
echo files:
tar cz bench.json bench.html | base64
EOF

scripts/lab.sh counting alcove="$alcove" peer="$peer" measure="$work/measure" \
    guest/vmlinux=target/guest/vmlinux guest/initramfs.cpio=target/guest/initramfs.cpio \
    guest/programs=target/guest/programs -- sh measure "$@" | tee "$work/output" | sed '/^files:/,$d'

results=target/bench
mkdir -p "$results"
sed '1,/^files:/d' "$work/output" | base64 --decode | tar xz -C "$work"
[ ! -f "$results/bench.json" ] || mv "$results/bench.json" "$results/before.json"
mv "$work"/bench.{json,html} "$results/"
if [ -f "$results/before.json" ]; then
    echo
    "$alcove" bench compare "$results/before.json" "$results/bench.json"
fi
echo "bench: $results/bench.html has the plots"
