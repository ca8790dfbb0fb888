//! What a process holds: privileges, descriptors, resources. All of it is given up for ever.
#![expect(unsafe_code, reason = "system calls that have no safe form")]

use std::ffi::{c_int, c_ulong};
use std::fs;
use std::io;
use std::os::fd::RawFd;

/// Version 3 of `struct __user_cap_header_struct` (linux/capability.h).
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// The capability to change the bounding set (linux/capability.h).
const CAP_SETPCAP: u32 = 8;
/// Descriptors that may be opened besides those that are open: a console's clients, timers.
const SPARE_DESCRIPTORS: libc::rlim_t = 64;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    process: c_int,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// No program that is executed from now on gets more privileges than this process has.
///
/// # Errors
/// What the host says.
pub fn renounce_new_privileges() -> io::Result<()> {
    control(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// No other process of the user may look into this one or trace it, and it leaves no core dump.
///
/// # Errors
/// What the host says.
pub fn hide() -> io::Result<()> {
    control(libc::PR_SET_DUMPABLE, 0)
}

/// Gives up every capability, where there are any; for the calling thread and those it starts.
///
/// # Errors
/// What the host says.
pub fn drop_capabilities() -> io::Result<()> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, process: 0 };
    let mut words = [CapabilityWord::default(); 2];
    // SAFETY: version 3 of the interface fills two words.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) })?;
    if words.iter().all(|word| word.permitted == 0) {
        return Ok(());
    }
    if words.iter().any(|word| word.inheritable != 0) {
        // Ambient capabilities are inheritable ones.
        control(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong)?;
    }
    if words[0].effective >> CAP_SETPCAP & 1 != 0 {
        // The kernel has as many capabilities as it takes the numbers of.
        (0..).take_while(|number| control(libc::PR_CAPBSET_DROP, *number).is_ok()).for_each(drop);
    }
    let none = [CapabilityWord::default(); 2];
    // SAFETY: version 3 of the interface reads two words.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })
}

/// All threads allocate from one heap. The C library otherwise gives each a heap of its own, and opens
/// a file under /proc when one of them gets smaller.
pub fn share_heap() {
    // SAFETY: no other thread allocates yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// The descriptors past standard error that are open. Without /proc, none are known of.
pub fn open_descriptors() -> Vec<RawFd> {
    let Ok(folder) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // The folder's own descriptor is closed by now.
    let found: Vec<RawFd> = numbers.filter(|fd| *fd > libc::STDERR_FILENO).collect();
    // SAFETY: asks for a flag only.
    found.into_iter().filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0).collect()
}

/// Closes `stray`, which whoever started alcove left open and nothing here owns.
pub fn close(stray: &[RawFd]) {
    for fd in stray {
        // SAFETY: nobody here owns the descriptor, as the caller promises.
        unsafe { libc::close(*fd) };
    }
}

/// Closes every descriptor but those in `kept`, which is sorted. Only for a process that uses no
/// other any more and ends without running destructors.
pub fn close_all_but(kept: &[RawFd]) {
    let mut from = 0;
    for fd in kept {
        close_range(from, fd.saturating_sub(1));
        from = fd.saturating_add(1);
    }
    close_range(from, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: the process uses none of them any more, as the caller promises. A kernel before
        // Linux 5.9 does not know the call and leaves them to the filter.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Lowers the limits of what the process may yet use: no core dump, a few descriptors more than are
/// open, no locked memory, no message queues, no real-time priority.
///
/// The number of processes is not limited: KVM and io_uring start threads of the kernel's in the
/// process's name, of which KVM_RUN would fail. A filter keeps the process itself from it.
///
/// # Errors
/// What the host says.
pub fn limit_resources() -> io::Result<()> {
    let descriptors = lowest_free_descriptor()?.saturating_add(SPARE_DESCRIPTORS);
    for (resource, most) in [
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_RTPRIO, 0),
        (libc::RLIMIT_NOFILE, descriptors),
    ] {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the call fills one rlimit.
        check(unsafe { libc::getrlimit(resource, &raw mut limit) }.into())?;
        let most = most.min(limit.rlim_max);
        let limit = libc::rlimit { rlim_cur: most.min(limit.rlim_cur), rlim_max: most };
        // SAFETY: the call reads one rlimit.
        check(unsafe { libc::setrlimit(resource, &raw const limit) }.into())?;
    }
    Ok(())
}

/// Descriptors are handed out from the lowest number on, so that there are about as many.
fn lowest_free_descriptor() -> io::Result<libc::rlim_t> {
    // SAFETY: makes a descriptor of its own.
    let fd = unsafe { libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, 3) };
    check(fd.into())?;
    // SAFETY: it was made above and is nobody else's.
    unsafe { libc::close(fd) };
    Ok(fd as libc::rlim_t)
}

fn control(what: c_int, argument: c_ulong) -> io::Result<()> {
    // SAFETY: none of the operations used here takes a pointer.
    check(unsafe { libc::prctl(what, argument, 0 as c_ulong, 0 as c_ulong, 0 as c_ulong) }.into())
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
