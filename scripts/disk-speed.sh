#!/usr/bin/env bash
# Counts in the lab's counting mode what a request to a disk costs: nanoseconds, which are instructions
# of the whole lab, guest, alcove and host together; the figures of docs/disks.md.
#
# usage: disk-speed.sh [OPTION...]     options of --disk, such as engine=sync
#
# Needs what `make guest static` leaves. The image lies in the lab's tmpfs.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
options=$(printf ',%s' "$@")
[ $# -gt 0 ] || options=
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT

cat >"$work/measure" <<EOF
dd if=/dev/zero of=/tmp/disk bs=1048576 count=64 2>/dev/null
mkdir -p extra/etc/alcove extra/bin
cp diskbench extra/bin/
echo 'exec bin/diskbench /dev/vda' >extra/etc/alcove/run
(cd extra && find . | cpio -o -H newc) 2>/dev/null >extra.cpio
cat initramfs.cpio extra.cpio >both.cpio
alcove run --memory 128M --kernel vmlinux --initrd both.cpio --disk '/tmp/disk$options' --log info
EOF

scripts/lab.sh counting alcove=target/x86_64-unknown-linux-gnu/release/alcove \
    vmlinux=target/guest/vmlinux initramfs.cpio=target/guest/initramfs.cpio \
    diskbench=target/guest/programs/diskbench measure="$work/measure" -- sh measure |
    sed -n 's/^.*diskbench: \([^ ]*\) \([0-9]*\).*/\1 \2/p' | awk '
        { printf "%-18s %12.1f thousand instructions\n", $1, $2 / 1000; cases++ }
        END { if (cases != 8) { print "disk-speed: the guest did not finish"; exit 1 } }'
