#!/usr/bin/env bash
# Makes the lab's kernel and initramfs: Debian's newest cloud kernel of the 6.12 series with the
# modules that the lab needs, busybox and our programs. Nothing is installed on this machine.
#
# usage: lab-image.sh OUTPUT_DIRECTORY INIT MODULES HOLD_C
#        lab-image.sh --identity
set -euo pipefail

# Prints the name of the newest package; the list of packages may have to be fetched first.
newest() {
    apt-cache search --names-only '^linux-image-6\.12\.[0-9].*-cloud-amd64$' |
        cut -d ' ' -f 1 | sort --version-sort | tail -n 1
}

update() {
    local as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get --quiet --quiet update >&2
}

package=$(newest)
if [ -z "$package" ]; then
    update
    package=$(newest)
fi
if [ -z "$package" ]; then
    echo 'lab-image: apt knows no linux-image-6.12.*-cloud-amd64; add Debian'\''s security suite to its sources' >&2
    exit 1
fi

if [ "${1-}" = --identity ]; then
    apt-cache show --no-all-versions "$package" | sed -n 's/^\(Package\|Version\): //p'
    dpkg-query --show busybox-static cpio gcc kmod libc6-dev
    exit
fi

output=$(realpath "$1") init=$(realpath "$2") modules=$(realpath "$3") hold=$(realpath "$4")
work=$output/work root=$output/root

# A list of packages that is too old names files that the mirror no longer has.
download() {
    apt-get --quiet --quiet --option APT::Sandbox::User=root download "$package" && return
    update
    package=$(newest)
    apt-get --quiet --quiet --option APT::Sandbox::User=root download "$package"
}

# Copies the listed modules and what they depend on, unpacked, and writes their order for insmod.
copy_modules() {
    local version name file
    version=$(basename "$work"/lib/modules/*)
    depmod --basedir "$work" "$version"
    sed 's/ *#.*//; /^$/d' "$modules" | while read -r name; do
        modprobe --dirname "$work" --set-version "$version" --show-depends "$name"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
        name=$(basename "$file" .xz)
        case "$file" in
            *.xz) xz --decompress --stdout "$file" >"$root/lib/modules/$name" ;;
            *) cp "$file" "$root/lib/modules/$name" ;;
        esac
        echo "/lib/modules/$name" >>"$root/lib/modules.order"
    done
}

mkdir -p "$work" "$root"/{bin,dev,etc,lab,lib/modules,proc,root,run,sbin,sys,tmp,usr/bin,usr/sbin}
cd "$work"
download
dpkg-deb --extract ./*.deb .
install -m 644 boot/vmlinuz-* "$output/vmlinuz"
copy_modules
install -m 755 /bin/busybox "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
install -m 755 "$init" "$root/init"
gcc -O2 -Wall -Wextra -Werror -static -s -o "$root/sbin/hold" "$hold"
find "$root" -exec touch --no-dereference --date @0 {} +
cd "$root"
find . -mindepth 1 -print0 | LC_ALL=C sort --zero-terminated |
    cpio --create --null --quiet --format newc --reproducible --owner 0:0 >"$output/initramfs.cpio"
rm -rf "$root" "$work"
