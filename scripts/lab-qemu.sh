#!/usr/bin/env bash
# Builds the QEMU that the lab runs on: Debian 12's source, for one machine and without what the lab
# does not use, with its emulation of AMD-V mended. It takes about three minutes on two CPUs. Nothing
# is installed on this machine, and its lists of packages stay as they are.
#
# usage: lab-qemu.sh OUTPUT_DIRECTORY
#        lab-qemu.sh --identity
#
# Newer versions have the same faults. This one is kept because it counts each turn of a repeated
# string instruction, which QEMU 10 does not: a boot to init is 24 % shorter by its clock, and all
# figures in docs/ would have to be taken again.
set -euo pipefail

release=bookworm

if [ "${1-}" = --identity ]; then
    dpkg-query --show gcc libc6 libfdt-dev libglib2.0-dev libpixman-1-dev meson ninja-build zlib1g-dev
    exit
fi

output=$(realpath "$1")
work=$output/work

# The mirror that this machine takes Debian from.
mirror() {
    # shellcheck disable=SC2016  # apt expands it
    apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' |
        grep --invert-match --max-count 1 security || echo http://deb.debian.org/debian
}

# Fetches and unpacks QEMU's source, as Debian signs it, by a list of sources of its own.
fetch() {
    local key=/usr/share/keyrings/debian-archive-keyring.gpg
    local apt=(apt-get --quiet --quiet --option APT::Sandbox::User=root --option Dir::Cache="$work/cache"
        --option Dir::Etc::SourceList="$work/sources.list" --option Dir::Etc::SourceParts=/dev/null
        --option Dir::State::Lists="$work/lists")
    echo "deb-src [target=Sources signed-by=$key] $(mirror) $release main" >"$work/sources.list"
    mkdir -p "$work"/{lists,cache/archives}/partial
    "${apt[@]}" update
    "${apt[@]}" source "qemu/$release"
    mv qemu-*/ qemu
}

# edit FILE EXPRESSION: changes one place in a file by an expression of Perl's.
edit() {
    perl -0777 -i -pe "$2 or die qq(lab-qemu: there is nothing to mend in $1\\n)" "qemu/$1"
}

# shellcheck disable=SC2016  # Perl expands what stands in the expressions
mend() {
    local svm=target/i386/tcg/sysemu/svm_helper.c
    # VMRUN delivers an injected interrupt and also leaves its vector in exception_index. When the main
    # loop comes round before the next #VMEXIT overwrites that, it delivers the vector once more, as an
    # exception and with IF clear too: one in some ten thousand interrupts.
    edit $svm 's/(case SVM_EVTINJ_TYPE_INTR:\s+)cs->exception_index = vector;\s+/$1/'

    # Each FXRSTOR, on any CPU, clears a flag (IGNNE) in hflags2 of the first one by reading and writing
    # it all. What that CPU does to its other flags in the meantime is undone, such as whether nested
    # paging is in force and interrupts are let in: guests fault three times, and their hosts end a run
    # twice. The flag is never set here, so it need not be cleared.
    edit target/i386/tcg/sysemu/fpu_helper.c \
        's/(cpu_clear_ignne\(void\)\s*\{[^}]*?)(env->hflags2 &= ~HF2_IGNNE_MASK;)/$1if (env->hflags2 & HF2_IGNNE_MASK) $2/'

    # VMRUN requests the guest's interrupt window without the lock of such requests: other CPUs'
    # requests get lost, or this one.
    edit $svm 's/(cs->interrupt_request \|= CPU_INTERRUPT_VIRQ;)/qemu_mutex_lock_iothread(); $1 qemu_mutex_unlock_iothread();/'
    edit $svm 's/#include "qemu\/log.h"\n/$&#include "qemu\/main-loop.h"\n/'

    # VMRUN does not restore the interrupt shadow: a guest is interrupted between STI and HLT, and sleeps
    # although it was just woken.
    edit $svm 's/\n(?=    nested_ctl = )/
    env->hflags &= ~HF_INHIBIT_IRQ_MASK;
    if (x86_ldl_phys(cs, env->vm_vmcb + offsetof(struct vmcb, control.int_state)) & SVM_INTERRUPT_SHADOW_MASK)
        env->hflags |= HF_INHIBIT_IRQ_MASK;
/'
}

build() {
    echo CONFIG_Q35=y >configs/devices/x86_64-softmmu/lab.mak
    mkdir build
    cd build
    PATH=/usr/sbin:/usr/bin:/sbin:/bin
    ../configure --target-list=x86_64-softmmu --without-default-features --enable-tcg --enable-fdt=system \
        --without-default-devices --with-devices-x86_64=lab --meson=/usr/bin/meson \
        --disable-docs --disable-tools --disable-guest-agent --disable-debug-info --disable-werror
    ninja qemu-system-x86_64
}

mkdir "$work"
cd "$work"
echo 'lab-qemu: building the QEMU of the lab, about three minutes on two CPUs' >&2
trap 'tail -n 30 "$work/log" >&2' ERR
fetch >log 2>&1
mend
(cd qemu && build) >>log 2>&1
strip -o "$output/qemu-system-x86_64" qemu/build/qemu-system-x86_64
rm -rf "$work"
