#!/usr/bin/env bash
# Runs a command in the lab: a Debian machine with hardware-virtualised KVM (AMD-V), emulated by
# QEMU, so that it exists on hosts that have none.
#
# usage: lab.sh MODE [NAME=FILE...] [-- COMMAND [ARGUMENT...]]
#
#   MODE        threads   two CPUs that run at the same time: for correctness
#               counting  one CPU whose clock counts instructions, one a nanosecond, and whose random
#                         numbers are the same each time: its times repeat, whatever else this machine
#                         does: for measurements
#   NAME=FILE   puts a file or folder into the lab as /lab/NAME; links are followed
#   COMMAND     is run there, with /lab as folder, ALCOVE=/lab/alcove and ALCOVE_GUEST=/lab/guest;
#               without one a shell opens on the terminal
#
# Standard output is what the command prints on either stream, and the exit status is its own. A lab
# that dies or does not end in time is told with the last lines of its console and has the status 125.
#
#   ALCOVE_LAB_CONSOLE     file that gets the lab's console; default: none
#   ALCOVE_LAB_DEADLINE_S  seconds that a command may take; default: 1800
#
# To measure: the clock of the counting mode is CLOCK_MONOTONIC in the lab. A program that prints it
# in nanoseconds, execs alcove and prints it for each line that it reads from there gives times that
# depend on nothing but the instructions executed. Put it into the lab as NAME=FILE.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
deadline_s=${ALCOVE_LAB_DEADLINE_S:-1800}
tail_lines=40 # of the console, for a lab that died
lab_died=125

die() {
    printf 'lab: %s\n' "$*" >&2
    exit "$lab_died"
}

# Adds to the stage what the lab gets as /lab.
add() {
    local name=${1%%=*} file=${1#*=}
    [ "$name" != "$1" ] || die "$1 is not NAME=FILE"
    [ -e "$file" ] || die "there is no $file, which should become /lab/$name"
    mkdir -p "$(dirname "$stage/lab/$name")"
    cp --recursive --dereference "$file" "$stage/lab/$name"
}

# The image's initramfs, followed by the payload's archive. The same files always make the same bytes, in
# any folder and at any time: what the lab's kernel does in its start depends on them, down to its random
# numbers.
pack() {
    cat "$image/initramfs.cpio"
    cd "$stage"
    find lab -exec touch --no-dereference --date @0 {} +
    find lab -print0 | LC_ALL=C sort --zero-terminated |
        cpio --create --null --quiet --reproducible --format newc --owner 0:0
}

[ $# -ge 1 ] || die 'usage: lab.sh threads|counting [NAME=FILE...] [-- COMMAND [ARGUMENT...]]'
case "$1" in
    # Five-level paging only costs time.
    threads) machine=(-accel 'tcg,thread=multi' -smp 2 -cpu 'max,-la57') ;;
    counting)
        machine=(-accel tcg -icount 'shift=0,sleep=off' -smp 1 -cpu max)
        machine+=(-rtc 'base=2026-01-01,clock=vm' -seed 1)
        ;;
    *) die "there is no mode $1; use threads or counting" ;;
esac
shift
image=$("$root/scripts/cached.sh" lab "$root/scripts/lab-image.sh" "$root"/resources/lab/{init,modules,hold.c})
emulator=$("$root/scripts/cached.sh" qemu "$root/scripts/lab-qemu.sh")
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT
stage=$work/stage console=${ALCOVE_LAB_CONSOLE:-$work/console}
mkdir -p "$stage/lab"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    add "$1"
    shift
done
if [ $# -gt 1 ]; then
    shift
    printf '%q ' "$@" >"$stage/lab/.command"
fi
(pack) >"$work/initramfs.cpio"

qemu=(
    "$emulator/qemu-system-x86_64" -L /usr/share/qemu -L /usr/share/seabios
    -nodefaults -no-user-config -no-reboot -display none
    -M 'q35,vmport=off,smbus=off,sata=off,usb=off' "${machine[@]}"
    # q35 keeps up to 2.75 GiB below 4 GiB. More would give guests that are not in long mode pages of
    # the lab past 4 GiB, which QEMU 7.2 is suspected to address with 32 bits.
    -m 2560M
    -kernel "$image/vmlinuz" -initrd "$work/initramfs.cpio"
    # oops and panic end QEMU at once; the guests in the lab are what is to be looked at, not the
    # lab's own defences.
    -append 'console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off nokaslr random.trust_cpu=on audit=0'
)
if [ ! -e "$stage/lab/.command" ]; then
    "${qemu[@]}" -serial mon:stdio
    exit
fi
: >"$console"
qemu+=(-chardev "file,id=console,path=$console" -serial chardev:console)
qemu+=(-chardev 'stdio,id=output,signal=off' -serial chardev:output)
timeout --foreground --kill-after 5 "$deadline_s" "${qemu[@]}" </dev/null &
lab=$!
trap 'stopped=yes; kill "$lab"' HUP INT TERM
# A signal ends a wait, not what is waited for.
while kill -0 "$lab" 2>/dev/null; do
    ended=0
    wait "$lab" || ended=$?
done
status=$(sed -n 's/^lab: status \([0-9]*\)\r*$/\1/p' "$console" | tail -n 1)
[ -z "$status" ] || exit "$status"
tail -n "$tail_lines" "$console" >&2
[ -z "${stopped-}" ] || die 'it was stopped by a signal; above, its console'
[ "$ended" != 124 ] || die "it did not end within $deadline_s s; above, its console"
die 'it died; above, its console'
