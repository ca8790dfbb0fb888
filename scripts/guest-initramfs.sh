#!/usr/bin/env bash
# Packs the guest's initramfs, an uncompressed newc archive: busybox and our init.
#
# usage: guest-initramfs.sh OUTPUT_DIRECTORY INIT FSTAB
#        guest-initramfs.sh --identity
set -euo pipefail

if [ "${1-}" = --identity ]; then
    dpkg-query --show busybox-static cpio
    exit
fi

output=$(realpath "$1") init=$2 fstab=$3
root=$output/root

# The kernel brings /dev, /dev/console and /root itself. busybox's shell finds its applets without
# links; /bin/sh is for scripts. Each entry costs the kernel 30,000 instructions to unpack.
mkdir -p "$root"/{bin,etc,proc,run,sys,tmp}
install -m 755 /bin/busybox "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
install -m 755 "$init" "$root/init"
install -m 644 "$fstab" "$root/etc/fstab"
find "$root" -exec touch --no-dereference --date @0 {} +

cd "$root"
find . -mindepth 1 -print0 | LC_ALL=C sort --zero-terminated |
    cpio --create --null --quiet --format newc --reproducible --owner 0:0 >"$output/initramfs.cpio"
rm -rf "$root"
