#!/usr/bin/env bash
# Leaves the programs that the lab runs in target/lab, linked statically: alcove as released, and
# machine, the tests.
#
# usage: lab-programs.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=x86_64-unknown-linux-gnu
export RUSTFLAGS='-C target-feature=+crt-static'

# Puts program $1 into target/lab under the name $2, whole.
leave() {
    mkdir -p target/lab
    if ! cmp --silent "$1" "target/lab/$2"; then
        cp --reflink=auto "$1" "target/lab/$2.new"
        mv "target/lab/$2.new" "target/lab/$2"
    fi
}

# Prints the path of the test binary.
build_tests() {
    cargo test --quiet --no-run --profile lab-tests --target "$target" --test machine --message-format json |
        sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p'
}

cargo build --quiet --release --target "$target"
leave "${CARGO_TARGET_DIR:-target}/$target/release/alcove" alcove
machine=$(build_tests)
leave "$machine" machine
