#!/usr/bin/env bash
# Mends QEMU's AMD-V for the lab: writes a copy of this machine's qemu-system-x86_64 in which one
# instruction is left out.
#
# usage: lab-qemu.sh OUTPUT
#
# When a hypervisor has VMRUN inject an interrupt (EVENTINJ), QEMU's helper_vmrun delivers it and also
# leaves its vector in the CPU's exception_index. The next #VMEXIT overwrites that; but when QEMU's main
# loop comes round first, for a timer or another CPU, it delivers the vector once more, as an exception
# and also with IF clear. Guests then take a lock twice, or fault three times: one in some ten thousand
# interrupts. Without the store to exception_index nothing is delivered twice.
#
# The store is found by the code around it. A QEMU whose code differs is copied as it is, and the lab
# says so when it is made.
set -euo pipefail

qemu=$(command -v qemu-system-x86_64)
# test %edx,%edx (the type of an interrupt); jne; movzbl %r12b,%esi; mov %r13d,error_code; then
# mov %esi,exception_index; movl $0,exception_is_int; movq $-1,exception_next_eip; testb $..,loglevel
if perl -e '
    local $/;
    binmode STDIN;
    binmode STDOUT;
    $_ = <STDIN>;
    my $count = s/\x85\xd2\x0f\x85....\x41\x0f\xb6\xf4\x44\x89\xab....\K\x89\xb3....(?=\xc7\x83....\0{4}\x48\xc7\x83....\xff{4}\xf6\x05)/\x66\x0f\x1f\x44\0\0/sg;
    exit 1 unless $count == 1;
    print;
' <"$qemu" >"$1"; then
    chmod 755 "$1"
else
    echo "lab-qemu: $qemu is not as expected and is used as it is: guests may be hit by interrupts twice" >&2
    ln -sf "$qemu" "$1"
fi
