//! Removes a socket's name once the machine is gone, which the machine itself may not.
//!
//! A confined process that could remove its socket could as well remove what lies beside it. So a
//! small process is left outside that knows one name and waits for the other end of a pipe to be
//! closed, whatever closes it.
#![expect(unsafe_code, reason = "a fork, and what is allowed after one")]

use std::ffi::{CString, c_int};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::process;
use super::seccomp::{self, Kind};

/// A process that waits to remove a name. Dropping it has the name removed, and returns when it is.
#[derive(Debug)]
pub struct Janitor {
    /// The janitor waits for its end. None once closed.
    order: Option<OwnedFd>,
    /// Ends when the janitor has ended.
    done: OwnedFd,
}

impl Janitor {
    /// Starts a process that will remove `path`, provided that it is then the same file as now. The
    /// calling process must have one thread only.
    ///
    /// # Errors
    /// The host has no pipe or no process left, or no file of this name.
    pub fn start(path: &Path) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let now = identity(&name).ok_or_else(io::Error::last_os_error)?;
        let (ordered, order) = io::pipe()?;
        let (done, at_work) = io::pipe()?;
        // SAFETY: there is one thread, so that no lock is held in the child.
        match unsafe { libc::fork() } {
            ..0 => Err(io::Error::last_os_error()),
            0 => serve(&name, now, ordered.as_raw_fd(), at_work.as_raw_fd()),
            _ => Ok(Self { order: Some(order.into()), done: done.into() }),
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.order.take());
        // Nothing is ever written: this waits for the end.
        let _ = read_one(self.done.as_raw_fd());
    }
}

/// The janitor's life.
fn serve(name: &CString, then: (u64, u64), ordered: c_int, at_work: c_int) -> ! {
    let mut kept = [ordered, at_work];
    kept.sort_unstable();
    process::close_all_but(&kept);
    // Signals for alcove's group are not for this process.
    // SAFETY: no preconditions.
    unsafe { libc::setsid() };
    let confined = process::renounce_new_privileges()
        .and_then(|()| process::hide())
        .and_then(|()| seccomp::install(Kind::Janitor, "janitor"));
    // Unconfined it would be no danger either, but rather leave the name there than break a promise.
    if confined.is_ok() {
        while read_one(ordered) == 1 {}
        if identity(name) == Some(then) {
            // SAFETY: the name is a string.
            unsafe { libc::unlink(name.as_ptr()) };
        }
    }
    // SAFETY: ends the process without anything that belongs to alcove.
    unsafe { libc::_exit(0) }
}

/// Device and inode number of what `name` stands for.
fn identity(name: &CString) -> Option<(u64, u64)> {
    // SAFETY: all zeroes are a valid value.
    let mut found: libc::stat = unsafe { mem::zeroed() };
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the name is a string, and the call fills one stat.
    let result = unsafe { libc::fstatat(libc::AT_FDCWD, name.as_ptr(), &raw mut found, flags) };
    (result == 0).then_some((found.st_dev, found.st_ino))
}

/// Reads a byte; how many there were, or less than 0.
fn read_one(fd: c_int) -> isize {
    let mut byte = [0u8];
    loop {
        // SAFETY: one byte is there to be filled.
        let count = unsafe { libc::read(fd, byte.as_mut_ptr().cast(), 1) };
        if count >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return count;
        }
    }
}
