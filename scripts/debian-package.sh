#!/usr/bin/env bash
# The newest of Debian's packages whose names match a regular expression of POSIX.
#
# usage: debian-package.sh name REGEX       prints its name and version
#        debian-package.sh extract REGEX    unpacks it into the current directory
set -euo pipefail

newest() {
    apt-cache search --names-only "$1" | cut -d ' ' -f 1 | sort --version-sort | tail -n 1
}

update() {
    local as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get --quiet --quiet update >&2
}

# A list of packages that is too old names files that the mirror no longer has.
download() {
    apt-get --quiet --quiet --option APT::Sandbox::User=root download "$package" && return
    update
    package=$(newest "$1")
    apt-get --quiet --quiet --option APT::Sandbox::User=root download "$package"
}

command=$1 regex=$2
package=$(newest "$regex")
if [ -z "$package" ]; then
    update
    package=$(newest "$regex")
fi
if [ -z "$package" ]; then
    echo "debian-package: apt knows no $regex; add Debian's security suite to its sources" >&2
    exit 1
fi
case "$command" in
    name) apt-cache show --no-all-versions "$package" | sed -n 's/^\(Package\|Version\): //p' ;;
    extract)
        download "$regex"
        dpkg-deb --extract ./"${package}"_*.deb .
        rm ./"${package}"_*.deb
        ;;
esac
