#!/usr/bin/env bash
# Collects Debian's QEMU for the machine type microvm, with the libraries and firmware that it loads, for
# the lab, where `alcove bench --vs qemu` starts it. Nothing is installed on this machine.
#
# usage: bench-peer.sh OUTPUT_DIRECTORY
#        bench-peer.sh --identity
set -euo pipefail

pattern='^qemu-system-x86$'
package=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/debian-package.sh

if [ "${1-}" = --identity ]; then
    "$package" name "$pattern"
    dpkg-query --show libc6 qemu-system-data seabios
    exit
fi

output=$(realpath "$1")
work=$output/work
mkdir -p "$work" "$output"/{bin,lib,share/qemu}
cd "$work"
"$package" extract "$pattern"
install -m 755 usr/bin/qemu-system-x86_64-microvm "$output/bin/"
# All of them belong to packages that the lab's own QEMU is built with.
ldd "$output/bin/qemu-system-x86_64-microvm" | sed -n 's/.*[[:space:]]\(\/[^ ]*\) (.*/\1/p' |
    xargs cp --dereference --target-directory "$output/lib"
# It looks for them beside itself.
cp --dereference /usr/share/seabios/bios-microvm.bin /usr/share/qemu/{linuxboot_dma,pvh}.bin "$output/share/qemu/"
rm -rf "$work"
