#!/usr/bin/env bash
# Builds the guest's kernel from Debian's source package: vmlinux (stripped) and bzImage.
#
# usage: guest-kernel.sh OUTPUT_DIRECTORY CONFIG_FRAGMENT
#        guest-kernel.sh --identity
set -euo pipefail

package=linux-source-6.12

if [ "${1-}" = --identity ]; then
    dpkg-query --show "$package" gcc binutils lz4
    exit
fi

output=$(realpath "$1") fragment=$(realpath "$2")
log=$output/build.log
tree=$output/tree

# Says what went wrong with the end of the log, which holds all that the steps print.
at_exit() {
    local status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$log" >&3
        echo 'guest-kernel: the build failed, see above' >&3
    fi
}

# Other architectures, documents and the code of drivers that no guest has are most of the archive.
# Their Kconfig files stay, because the others refer to them.
unpack() {
    mkdir "$tree"
    tar --extract --file "/usr/src/$package.tar.xz" --directory "$tree" --strip-components 1 \
        --exclude "$package/arch/[a-wyz]*/*.[chS]" \
        --exclude "$package/arch/[a-wyz]*/*.dts*" \
        --exclude "$package/Documentation/*/*" \
        --exclude "$package/tools/testing/*" \
        --exclude "$package/drivers/gpu/*.[ch]" \
        --exclude "$package/drivers/media/*.[ch]" \
        --exclude "$package/drivers/net/ethernet/*.[ch]" \
        --exclude "$package/drivers/net/wireless/*.[ch]" \
        --exclude "$package/drivers/staging/*.[ch]" \
        --exclude "$package/sound/*.[ch]"
}

# tinyconfig with the fragment over it. A line of the fragment that Kconfig drops is an error: it
# would otherwise be noticed only by what the guest lacks.
configure() {
    local line
    cd "$tree"
    make tinyconfig
    scripts/kconfig/merge_config.sh -m .config "$fragment"
    make olddefconfig
    while read -r line; do
        case "$line" in
            CONFIG_*) grep -qxF -- "$line" .config ;;
            '# CONFIG_'*' is not set') ! grep -q "^$(cut -d ' ' -f 2 <<<"$line")=" .config ;;
        esac || {
            echo "Kconfig did not take: $line"
            return 1
        }
    done <"$fragment"
}

# The names and the date that the kernel carries are fixed, so that equal inputs give equal files.
compile() {
    cd "$tree"
    unset MAKEFLAGS MFLAGS # of the make that runs this script
    make -j "$(nproc)" \
        KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' \
        KBUILD_BUILD_USER=alcove KBUILD_BUILD_HOST=alcove KBUILD_BUILD_VERSION=1 \
        vmlinux bzImage
}

echo 'guest-kernel: building the kernel of the guest, about five minutes on two CPUs'
trap at_exit EXIT
exec 3>&1 >"$log" 2>&1
unpack
configure
compile
strip --output-file "$output/vmlinux" "$tree/vmlinux"
install -m 644 "$tree/arch/x86/boot/bzImage" "$tree/System.map" "$tree/.config" "$output/"
rm -rf "$tree" "$log"
