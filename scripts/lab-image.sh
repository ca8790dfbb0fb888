#!/usr/bin/env bash
# Makes what the lab boots: Debian's newest cloud kernel of the 6.12 series with the modules that the lab
# needs, an initramfs with busybox, programs for file systems and networks and ours. Nothing is installed on this
# machine.
#
# usage: lab-image.sh OUTPUT_DIRECTORY INIT MODULES HOLD_C
#        lab-image.sh --identity
set -euo pipefail

pattern='^linux-image-6\.12\.[0-9].*-cloud-amd64$'
package=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/debian-package.sh

if [ "${1-}" = --identity ]; then
    "$package" name "$pattern"
    dpkg-query --show busybox-static cpio e2fsprogs gcc iproute2 kmod libc6 libc6-dev passt
    exit
fi

output=$(realpath "$1") init=$(realpath "$2") modules=$(realpath "$3") hold=$(realpath "$4")
work=$output/work root=$output/root

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

# Copies programs of this machine with the libraries that they load, to the same places.
copy_programs() {
    local program file
    for program in mke2fs e2fsck debugfs ip passt; do
        program=$(command -v "$program")
        cp "$program" "$root/sbin/"
        ldd "$program" | sed -n 's/.*[[:space:]]\(\/[^ ]*\) (.*/\1/p' | while read -r file; do
            mkdir -p "$root$(dirname "$file")"
            cp --dereference --update "$file" "$root$file"
        done
    done
    : >"$root/etc/mtab"
    # passt run by root becomes nobody, and hands on a name server that nobody asks here.
    printf '%s\n' 'root:x:0:0::/root:/bin/sh' 'nobody:x:65534:65534::/:/bin/false' >"$root/etc/passwd"
    echo 'nameserver 192.0.2.53' >"$root/etc/resolv.conf"
}

mkdir -p "$work" "$root"/{bin,dev,etc,lab,lib/modules,mnt,proc,root,run,sbin,sys,tmp,usr/bin,usr/sbin}
cd "$work"
"$package" extract "$pattern"
install -m 644 boot/vmlinuz-* "$output/vmlinuz"
copy_modules
install -m 755 /bin/busybox "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
install -m 755 "$init" "$root/init"
gcc -O2 -Wall -Wextra -Werror -static -s -o "$root/sbin/hold" "$hold"
copy_programs
find "$root" -exec touch --no-dereference --date @0 {} +
cd "$root"
find . -mindepth 1 -print0 | LC_ALL=C sort --zero-terminated |
    cpio --create --null --quiet --format newc --reproducible --owner 0:0 >"$output/initramfs.cpio"
rm -rf "$root" "$work"
