#!/usr/bin/env bash
# Runs a builder unless its result is already in the cache, and prints the result's directory.
#
# usage: cached.sh NAME BUILDER INPUT...
#
# `BUILDER OUTPUT_DIRECTORY INPUT...` makes the result; `BUILDER --identity` prints what else it
# depends on, such as versions of packages. A result is kept by the hash of all of these in
# $ALCOVE_CACHE (default: alcove in the user's cache directory), appears there whole or not at all,
# and is built once even when several ask for it at the same time.
set -euo pipefail

name=$1 builder=$2
shift 2
cache=${ALCOVE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/alcove}
unused_days=30 # after which a result of the same name is removed

identity=$("$builder" --identity)
key=$({ cat -- "$builder" "$@" && echo "$identity"; } | sha256sum | cut -d ' ' -f 1)
result=$cache/$name-$key

build() {
    local work
    work=$(mktemp --directory "$cache/$name.building.XXXXXX")
    # shellcheck disable=SC2064  # expand now: $work is local
    trap "rm -rf -- '$work'" EXIT
    "$builder" "$work" "$@" >&2
    chmod 755 "$work"
    find "$cache" -maxdepth 1 -name "$name-*" -mtime "+$unused_days" -exec rm -rf -- {} +
    mv --no-target-directory -- "$work" "$result"
}

mkdir -p -- "$cache"
exec 9>"$cache/$name.lock"
flock 9
rm -rf -- "$cache/$name.building."* # of builds that were killed
if [ ! -d "$result" ]; then
    build "$@"
fi
touch -- "$result"
echo "$result"
