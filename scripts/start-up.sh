#!/usr/bin/env bash
# Measures in the lab's counting mode how long alcove takes to start a guest and what memory it
# holds, twice over; the figures of docs/performance.md.
#
# usage: start-up.sh [--trace]
#
# Fails when a limit is passed: 15 ms to the first output, 2600 KiB, and 1 % between both runs.
#
#   --trace  says instead which system calls of a start take longest, by the lab's kernel
#
# Needs what `make guest static` leaves. One nanosecond is one instruction.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT

gcc -O2 -static -s -o "$work/stopwatch" resources/lab/stopwatch.c
# One segment at 2 MiB, where kernels may be loaded.
gcc -nostdlib -static -Wl,-Ttext=0x200000,--build-id=none,-N,--no-warn-rwx-segments -s -o "$work/print" resources/lab/print.S

flags='--memory 128M --cpus 1'
cat >"$work/measure" <<EOF
print() { stopwatch ! alcove run $flags --kernel print; }
boot() { stopwatch 'alcove-guest: init' alcove run $flags --kernel vmlinux --initrd initramfs.cpio; }
# The first runs, 0, bring the host's caches into the state that they then keep.
for round in 0 0 1 2; do
    print | sed -n "s/^marker-ns /\$round print /p; s/^resident-kib /\$round resident /p"
    boot | sed -n "s/^marker-ns /\$round boot /p"
done
EOF
cat >"$work/trace" <<EOF
alcove run $flags --kernel print
cd /sys/kernel && mount -t tracefs none tracing && cd tracing
echo mono >trace_clock
echo 1 >options/record-tgid
echo 20000 >buffer_size_kb
echo 1 >events/raw_syscalls/enable
/lab/alcove run $flags --kernel /lab/print
echo 0 >tracing_on
grep -e alcove -e vcpu trace
EOF

# Prints the 20 longest calls of a trace and when they began, counted from the exec.
longest() {
    awk '
        { match($0, /[0-9]+\.[0-9]+: /); time = substr($0, RSTART, RLENGTH - 2); thread = $1 }
        /sys_enter: NR 59 / { start = time }
        /sys_enter: / { sub(/.*sys_enter: /, ""); entered[thread] = time; call[thread] = $0 }
        /sys_exit: / && thread in entered {
            microseconds = (time - entered[thread]) * 1000000
            printf "%6d us at %6d us  %-12s %s\n", microseconds,
                (entered[thread] - start) * 1000000, thread, substr(call[thread], 1, 50)
            delete entered[thread]
        }' | sort --numeric-sort --reverse | head -n 20
}

files=(alcove=target/x86_64-unknown-linux-gnu/release/alcove stopwatch="$work/stopwatch"
    print="$work/print" vmlinux=target/guest/vmlinux initramfs.cpio=target/guest/initramfs.cpio)
case "${1-}" in
    '')
        scripts/lab.sh counting "${files[@]}" measure="$work/measure" -- sh measure >"$work/figures"
        awk '
            { figure[$2, $1] = $3 }
            END {
                printf "exec to first output  %.2f ms, %.2f ms\n", figure["print", 1] / 1e6, figure["print", 2] / 1e6
                printf "exec to init          %.1f ms, %.1f ms\n", figure["boot", 1] / 1e6, figure["boot", 2] / 1e6
                printf "resident besides RAM  %d KiB, %d KiB\n", figure["resident", 1], figure["resident", 2]
                for (key in figure) {
                    split(key, part, SUBSEP)
                    ratio = figure[part[1], 1] / figure[part[1], 2]
                    if (ratio > 1.01 || ratio < 0.99) failed = "the runs differ by more than 1 %"
                }
                if (figure["print", 1] > 15e6) failed = "the first output takes more than 15 ms"
                if (figure["resident", 1] > 2600) failed = "more than 2600 KiB are resident"
                if (failed) { print "start-up: " failed; exit 1 }
            }' "$work/figures"
        ;;
    --trace) scripts/lab.sh counting "${files[@]}" trace="$work/trace" -- sh trace | longest ;;
    *)
        echo 'usage: start-up.sh [--trace]' >&2
        exit 1
        ;;
esac
