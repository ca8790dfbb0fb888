#!/usr/bin/env bash
# Takes the bzImages of Debian's newest cloud kernels from their packages: 6.1 and 6.12.
#
# usage: debian-kernels.sh OUTPUT_DIRECTORY
#        debian-kernels.sh --identity
set -euo pipefail

series=(6.1 6.12)
package=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/debian-package.sh

pattern() {
    echo "^linux-image-${1/./\\.}\\.[0-9].*-cloud-amd64\$"
}

if [ "${1-}" = --identity ]; then
    for number in "${series[@]}"; do
        "$package" name "$(pattern "$number")"
    done
    exit
fi

output=$(realpath "$1")
for number in "${series[@]}"; do
    mkdir "$output/work"
    cd "$output/work"
    "$package" extract "$(pattern "$number")"
    install -m 644 boot/vmlinuz-* "$output/debian-$number"
    cd "$output"
    rm -rf "$output/work"
done
