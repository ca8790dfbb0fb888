#!/usr/bin/env bash
# Installs what `make run` and `make test` need and the machine lacks: Debian packages through apt
# (as root or through sudo) and, for the tests, cargo-nextest. Silent when all is there.
#
# usage: packages.sh run|test
set -euo pipefail

run_packages=(
    gcc               # links the Rust program, compiles the guest's kernel
    libc6-dev         # its headers and start files
    make              # Makefile and Kbuild
    linux-source-6.12 # the guest's kernel
    bison             # Kconfig's parser
    flex              # Kconfig's scanner
    bc                # computes kernel/time/timeconst.h
    libelf-dev        # the kernel's objtool
    xz-utils          # unpacks linux-source
    lz4               # compresses the bzImage
    busybox-static    # the guest's user space
    cpio              # packs the initramfs
)
test_packages=(
    acpica-tools     # iasl, which checks the ACPI tables
    iproute2         # ip, which makes the networks of test guests
    passt            # a network for guests of plain users
    e2fsprogs        # makes and checks the disks of test guests
    shellcheck       # checks these scripts
    kmod             # depmod and modprobe: which modules the lab needs, in order
    seabios          # the firmware of the lab, a machine with hardware-virtualised KVM
    qemu-system-data # loads the lab's kernel
    dpkg-dev         # unpacks the source of the lab's QEMU
    meson            # configures it
    ninja-build      # builds it
    pkg-config       # finds its libraries:
    libfdt-dev       # device trees
    libglib2.0-dev   # data structures
    libpixman-1-dev  # pictures
    zlib1g-dev       # compression
)

die() {
    printf 'packages: %s\n' "$*" >&2
    exit 1
}

# Prints the packages among the arguments that are not installed, one a line.
missing() {
    local package installed
    installed=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
    for package in "$@"; do
        grep -qxF "installed $package" <<<"$installed" || echo "$package"
    done
}

# Installs the packages; the first attempt may fail for want of a (fresh) package list.
install() {
    local log as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null ||
            die "missing: $*; as root, run: apt-get install --no-install-recommends $*"
        as_root=(sudo)
    fi
    as_root+=(env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes)
    echo "packages: installing $*" >&2
    log=$(mktemp)
    if ! "${as_root[@]}" install --no-install-recommends "$@" >"$log" 2>&1 &&
        ! { "${as_root[@]}" update && "${as_root[@]}" install --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: $*"
    fi
    rm -f "$log"
}

case "${1-}" in
    run) wanted=("${run_packages[@]}") ;;
    test) wanted=("${run_packages[@]}" "${test_packages[@]}") ;;
    *) die "usage: packages.sh run|test" ;;
esac

command -v dpkg-query >/dev/null || die "this needs Debian or a system with its packages: ${wanted[*]}"
mapfile -t absent < <(missing "${wanted[@]}")
if [ "${#absent[@]}" -gt 0 ]; then
    install "${absent[@]}"
fi

command -v cargo >/dev/null || die "cargo is missing; install Rust from https://rustup.rs, then run this again"
if [ "$1" = test ] && ! command -v cargo-nextest >/dev/null; then
    echo 'packages: installing cargo-nextest' >&2
    cargo install --quiet --locked cargo-nextest
fi
