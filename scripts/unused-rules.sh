#!/usr/bin/env bash
# Lists the rules of resources/seccomp that no test needs.
#
# usage: unused-rules.sh [FILTER...]
#
#   FILTER  of the tests that run guests, on this host's /dev/kvm; default: all of them
#
# Traces alcove in every test (strace, which takes its time) and looks for each rule among what
# threads of its kind did once they were restricted. Not traced: tests of a user that is not root,
# and what ends alcove in a test on purpose. A rule that is listed may still be needed: by the lab's
# KVM, by another C library, by what no test provokes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v strace >/dev/null || { echo 'unused-rules: strace is missing; apt-get install strace' >&2; exit 1; }
work=$(mktemp --directory)
trap 'rm -rf -- "$work"' EXIT

cargo build --quiet
cat >"$work/alcove" <<EOF
#!/bin/sh
exec strace -D -f --decode-pids=comm -qq -o "$work/trace.\$\$" "$PWD/target/debug/alcove" "\$@"
EOF
chmod +x "$work/alcove"
[ $# -gt 0 ] || set -- ''
for filter in "$@"; do
    ALCOVE=$work/alcove cargo test --quiet --package alcove --test machine -- "$filter" --skip lab:: --skip sandbox:: >&2 ||
        echo 'unused-rules: some tests failed, perhaps since tracing makes them slow' >&2
done

# Prints "KIND CALL FIRST-WORDS" for what restricted threads did.
calls() {
    cat "$work"/trace.* | awk '
        {
            thread = $1
            name = thread; sub(/^[0-9]+</, "", name); sub(/>$/, "", name)
            kind = "main"
            if (name ~ /^vcpu/) kind = "vcpu"
            else if (name ~ /^vd.*-q/) kind = "disk"
            else if (name ~ /^net.*-q/) kind = "net"
            text = $0; sub(/^[^ ]+ +/, "", text)
            if (text ~ /^seccomp\(SECCOMP_SET_MODE_FILTER/) { restricted[thread] = 1; next }
            if (!(thread in restricted) || text !~ /^[a-z0-9_]+\(/) next
            call = text; sub(/\(.*/, "", call)
            print kind, call, substr(text, 1, 100)
        }'
}
calls | sort -u >"$work/calls"

status=0
for kind in main vcpu disk net all; do
    while IFS= read -r line; do
        rule=${line%%#*}
        rule=${rule%"${rule##*[! ]}"}
        [ -n "$rule" ] || continue
        call=${rule%%:*}
        who=$kind
        [ "$kind" != all ] || who='[a-z]*'
        # strace writes a request of ioctl, a command of fcntl and a signal by their names.
        what=$(sed -nE 's/.*== ([A-Z][A-Z0-9_]+)$/\1/p' <<<"$rule")
        case "$call" in
            ioctl | fcntl) pattern="^$who $call .*[ (|]${what}[,) ]" ;;
            *) pattern="^$who $call " ;;
        esac
        if ! grep -qE -- "$pattern" "$work/calls"; then
            echo "$kind.rules: $rule"
            status=1
        fi
    done <"resources/seccomp/$kind.rules"
done
exit "$status"
