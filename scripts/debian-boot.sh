#!/usr/bin/env bash
# Boots one of Debian's cloud kernels, as it is packaged, on this machine's /dev/kvm with the tests'
# initramfs, and says how long it took. On a software KVM it takes so long that it is no test; how far it
# was seen to come is in docs/software-kvm.md.
#
# usage: debian-boot.sh [6.1|6.12]
#
# Needs what `make guest lab` leaves.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
series=${1-6.12}
cargo build --quiet --release
SECONDS=0
# Periodic ticks that are late become one; with timers of high resolution they pile up until an
# interpreted kernel does nothing else. The watchdogs would take it for hung. What is left out is the
# list of trace points, which waits for itself for minutes, and the self-tests of ciphers, each of
# which the kernel gives up after a minute.
trace=trace_eval_init,trace_eval_sync,tracer_init_tracefs,init_kprobe_trace,init_uprobe_trace,init_dynamic_event
target/release/alcove run --kernel "target/guest/debian-$series" \
    --initrd target/guest/initramfs.cpio --memory 256M \
    --append "nohz=off highres=off nowatchdog nokaslr cryptomgr.notests initcall_blacklist=$trace" </dev/null
echo "debian-boot: $series took $SECONDS s"
