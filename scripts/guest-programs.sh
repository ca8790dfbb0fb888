#!/usr/bin/env bash
# Compiles the tests' programs for the guest, each of one C file, without shared libraries.
#
# usage: guest-programs.sh OUTPUT_DIRECTORY SOURCE...
#        guest-programs.sh --identity
set -euo pipefail

if [ "${1-}" = --identity ]; then
    dpkg-query --show gcc libc6-dev
    exit
fi

output=$1
shift
for source; do
    gcc -O2 -Wall -Wextra -Werror -static -s -o "$output/$(basename "$source" .c)" "$source"
done
