#!/usr/bin/env bash
# Holds in the lab's counting mode how long alcove takes to start a guest, and what memory it holds,
# against limits: 15 ms to the first output, 2600 KiB besides the guest's RAM at its init, and 1 %
# between two runs. The figures are those of `alcove bench start boot`.
#
# usage: start-up.sh [--trace]
#
#   --trace  says instead which system calls of a start take longest, by the lab's kernel
#
# Needs what `make guest static` leaves. One nanosecond is one instruction.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT
alcove=target/x86_64-unknown-linux-gnu/release/alcove

cat >"$work/trace" <<'EOF'
alcove run --memory 128M --kernel print
cd /sys/kernel && mount -t tracefs none tracing && cd tracing
echo mono >trace_clock
echo 1 >options/record-tgid
echo 20000 >buffer_size_kb
echo 1 >events/raw_syscalls/enable
/lab/alcove run --memory 128M --kernel /lab/print
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

case "${1-}" in
    '')
        scripts/lab.sh counting alcove="$alcove" guest/vmlinux=target/guest/vmlinux \
            guest/initramfs.cpio=target/guest/initramfs.cpio \
            -- sh -c 'alcove bench start boot --guest guest --runs 2 2>errors || { cat errors; exit 1; }' |
            tee "$work/table" | grep --text -E '^(start|boot) '
        awk -F '   *' '
            { gsub(/\r|,/, "") }
            / exec to first output / { start = $4 + 0 }
            / resident at init/ { resident = $4 + 0 }
            /^(start|boot) / { figures++; if ($7 + 0 > 1) failed = "the runs differ by more than 1 %" }
            END {
                if (figures != 3) failed = "there are no figures"
                if (start > 15) failed = "the first output takes more than 15 ms"
                if (resident > 2600) failed = "more than 2600 KiB are resident"
                if (failed) { print "start-up: " failed; exit 1 }
            }' "$work/table"
        ;;
    --trace)
        # One segment at 2 MiB, where kernels may be loaded.
        gcc -nostdlib -static -Wl,-Ttext=0x200000,--build-id=none,-N,--no-warn-rwx-segments -s \
            -o "$work/print" resources/lab/print.S
        scripts/lab.sh counting alcove="$alcove" print="$work/print" trace="$work/trace" -- sh trace | longest
        ;;
    *)
        echo 'usage: start-up.sh [--trace]' >&2
        exit 1
        ;;
esac
