#!/usr/bin/env bash
# Leaves the guest for tests and demo in target/guest: vmlinux, bzImage, initramfs.cpio and the
# tests' programs, from the cache when nothing they are made of has changed.
#
# usage: guest.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
guest=resources/guest
kernel=$(scripts/cached.sh kernel scripts/guest-kernel.sh "$guest/kernel.config")
initramfs=$(scripts/cached.sh initramfs scripts/guest-initramfs.sh "$guest/init" "$guest/fstab")
programs=$(scripts/cached.sh programs scripts/guest-programs.sh "$guest"/programs/*.c)

mkdir -p target/guest/programs
for file in "$programs"/*; do
    install --compare "$file" target/guest/programs
done
for file in "$kernel"/{vmlinux,bzImage,System.map} "$initramfs/initramfs.cpio"; do
    target=target/guest/$(basename "$file")
    if ! cmp --silent "$file" "$target"; then
        cp --reflink=auto "$file" "$target.new"
        mv "$target.new" "$target"
    fi
done
