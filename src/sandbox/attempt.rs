//! What a guest that owns alcove would try: for the tests, in debug builds only.
//!
//! `ALCOVE_TEST_ATTEMPT=THREAD:WHAT` has the thread of this name try one thing and tell how it went.
#![cfg_attr(debug_assertions, expect(unsafe_code, reason = "does what no one should"))]

/// Which barrier stays away in a debug build, so that those behind it can be seen:
/// `ALCOVE_TEST_WITHOUT=seccomp`.
#[cfg(debug_assertions)]
pub fn is_left_out(barrier: &str) -> bool {
    std::env::var_os("ALCOVE_TEST_WITHOUT").is_some_and(|given| given == barrier)
}

/// In a release build every barrier stands.
#[cfg(not(debug_assertions))]
pub fn is_left_out(_barrier: &str) -> bool {
    false
}

/// Tries nothing in a release build.
#[cfg(not(debug_assertions))]
pub fn if_asked(_thread: &str) {}

#[cfg(debug_assertions)]
pub use debug::if_asked;

#[cfg(debug_assertions)]
mod debug {
    use std::ffi::c_long;
    use std::io::{self, Write};
    use std::net::{Ipv4Addr, SocketAddr, TcpStream};
    use std::ptr;
    use std::time::Duration;

    /// Tries what the environment asks of `thread`, if anything.
    pub fn if_asked(thread: &str) {
        let asked = std::env::var("ALCOVE_TEST_ATTEMPT").unwrap_or_default();
        let Some(what) = asked.strip_prefix(thread).and_then(|rest| rest.strip_prefix(':')) else {
            return;
        };
        let result = attempt(what);
        let mut err = io::stderr();
        let _ = match result {
            Ok(()) => writeln!(err, "attempt: {what} succeeded"),
            Err(error) => writeln!(err, "attempt: {what} failed: {error}"),
        };
    }

    fn attempt(what: &str) -> io::Result<()> {
        const PAGE: usize = 4096;
        match what {
            "open" => std::fs::File::open("/etc/passwd").map(drop),
            "create" => std::fs::File::create("/tmp/alcove-attempt").map(drop),
            "connect" => {
                let discard = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
                TcpStream::connect_timeout(&discard, Duration::from_secs(1)).map(drop)
            }
            "exec" => {
                let (name, none) = (c"/bin/true".as_ptr(), [ptr::null()]);
                // SAFETY: the name is a string and the lists are empty ones.
                check(unsafe { libc::execve(name, none.as_ptr(), none.as_ptr()) }.into())
            }
            // SAFETY: a second process, if there is one, goes on as this one does.
            "fork" => check(unsafe { libc::syscall(libc::SYS_fork) }),
            // SAFETY: no memory is involved.
            "ptrace" => check(unsafe { libc::ptrace(libc::PTRACE_TRACEME) }),
            // SAFETY: no memory is involved.
            "userns" => check(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into()),
            // SAFETY: no memory is involved.
            "signal" => check(unsafe { libc::kill(1, 0) }.into()),
            "ring" => {
                let mut parameters = [0u64; 15];
                let pointer = parameters.as_mut_ptr();
                // SAFETY: the parameters are as long as the kernel's.
                check(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, pointer) })
            }
            "execmem" => {
                let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let null = ptr::null_mut();
                // SAFETY: a new mapping, away from all others.
                let page = unsafe { libc::mmap(null, PAGE, rights, flags, -1, 0) };
                check(if page == libc::MAP_FAILED { -1 } else { 0 })
            }
            "execheap" => {
                let page = vec![0u8; 2 * PAGE];
                let start = page.as_ptr().map_addr(|start| start.next_multiple_of(PAGE));
                let rights = libc::PROT_READ | libc::PROT_EXEC;
                // SAFETY: the page lies within memory that is not written any more.
                check(unsafe { libc::mprotect(start.cast_mut().cast(), PAGE, rights) }.into())
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn check(result: c_long) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
