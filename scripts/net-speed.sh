#!/usr/bin/env bash
# Counts in the lab's counting mode what a network costs: nanoseconds, which are instructions of the
# whole lab, guest, alcove, host and the program at the other end together; the figures of docs/networks.md.
#
# usage: net-speed.sh [OPTION...]     options of --net tap=…, such as mtu=9000
#
# Needs what `make guest static` leaves.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
options=$(printf ',%s' "$@")
[ $# -gt 0 ] || options=
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT

cat >"$work/measure" <<EOF
# The shell has an ip of its own, which knows no tap.
/sbin/ip tuntap add tap0 mode tap
ip addr add 10.9.0.1/24 dev tap0
ip link set tap0 up
NETBENCH_UNCHECKED=y ./netbench serve 5000 &
mkdir -p extra/etc/alcove extra/bin
cp netbench extra/bin/
cat >extra/etc/alcove/run <<'RUN'
ip link set eth0 up
ip addr add 10.9.0.2/24 dev eth0
for case in 'send 20971520' 'receive 20971520' 'echo 2000'; do
    NETBENCH_UNCHECKED=y bin/netbench \${case% *} 10.9.0.1 5000 \${case#* }
done
RUN
(cd extra && find . | cpio -o -H newc) 2>/dev/null >extra.cpio
cat initramfs.cpio extra.cpio >both.cpio
alcove run --memory 128M --kernel vmlinux --initrd both.cpio --net 'tap=tap0$options' --log info --timeout 60s
EOF

scripts/lab.sh counting alcove=target/x86_64-unknown-linux-gnu/release/alcove \
    vmlinux=target/guest/vmlinux initramfs.cpio=target/guest/initramfs.cpio \
    netbench=target/guest/programs/netbench measure="$work/measure" -- sh measure |
    tee "${ALCOVE_NET_SPEED_LOG:-/dev/null}" |
    sed -n 's/^.*netbench: \([^ ]*\) \([0-9]*\).*/\1 \2/p' | awk '
        { unit = $1 == "echo" ? "round trip" : "MiB"
          printf "%-8s %12.1f thousand instructions per %s\n", $1, $2 / 1000, unit; cases++ }
        END { if (cases != 3) { print "net-speed: the guest did not finish"; exit 1 } }'
