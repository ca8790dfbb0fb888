//! Which system calls a thread may make.
//!
//! The rules are data, resources/seccomp; build.rs makes a filter of them for each kind of thread.
#![expect(unsafe_code, reason = "a signal handler, and what it calls")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::mem;
use std::ptr;
use std::sync::OnceLock;

use seccompiler::sock_filter;

include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// The exit status after a violation: alcove itself failed.
const FAILED: c_int = 125;
/// Longest name of a thread in a message, bytes.
const NAME_BYTES: usize = 16;

/// What a thread is there for, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The event loop's thread.
    Main,
    /// A vCPU's thread.
    Vcpu,
    /// The thread of a disk's queue.
    Disk,
    /// The thread of a network's pair of queues.
    Net,
    /// The process outside of a jail ([`super::jail`]).
    Keeper,
    /// The process that removes a socket ([`super::janitor`]).
    Janitor,
}

impl Kind {
    fn filter(self) -> &'static [sock_filter] {
        match self {
            Self::Main => &MAIN,
            Self::Vcpu => &VCPU,
            Self::Disk => &DISK,
            Self::Net => &NET,
            Self::Keeper => &KEEPER,
            Self::Janitor => &JANITOR,
        }
    }
}

thread_local! {
    /// What a violation calls the thread.
    static NAME: Cell<[u8; NAME_BYTES]> = const { Cell::new([0; NAME_BYTES]) };
}

/// What runs before a violation ends the process.
static LAST_WISH: OnceLock<fn()> = OnceLock::new();

/// Whether this host has filters that can name what they refuse.
///
/// # Errors
/// What the host says.
pub fn is_available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads one 32-bit number.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            ptr::from_ref(&action).cast::<c_void>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a violation tell who did what on standard error, after `last_wish`, which is called from a
/// signal handler, and end the process with status 125. For the whole process, once.
///
/// # Errors
/// What the host says.
pub fn tell_violations(last_wish: fn()) -> io::Result<()> {
    let _ = LAST_WISH.set(last_wish);
    // SAFETY: all zeroes are a valid value: no flags, no signals.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_violation;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler calls nothing but what may be called from one.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Restricts the calling thread, for ever, to what threads of `kind` may do. `name` is what a
/// violation calls it.
///
/// # Errors
/// What the host says.
pub fn install(kind: Kind, name: &str) -> io::Result<()> {
    let mut bytes = [0; NAME_BYTES];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    NAME.set(bytes);
    let mut filter = kind.filter().to_vec();
    let id = std::process::id();
    filter.iter_mut().filter(|step| step.k == SELF).for_each(|step| step.k = id);
    seccompiler::apply_filter(&filter).map_err(|error| match error {
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
        error => io::Error::other(error),
    })
}

/// Ends the process at once: it could not be restricted and must not go on.
pub fn give_up(name: &str, error: &io::Error) -> ! {
    let text = format!(
        "alcove: thread {name} cannot be restricted: {error}; --sandbox off runs without\n"
    );
    say(text.as_bytes());
    // SAFETY: ends the process, whatever state it is in.
    unsafe { libc::_exit(FAILED) }
}

/// The name of a system call, as in the kernel's table.
pub fn name_of(number: usize) -> Option<&'static str> {
    let end = |number: usize| NAME_ENDS.get(number).map(|end| usize::from(*end));
    let start = number.checked_sub(1).map_or(Some(0), end)?;
    NAMES.get(start..end(number)?).filter(|name| !name.is_empty())
}

/// Where the kernel puts what a filter refused (struct siginfo, `_sigsys`).
#[repr(C)]
struct Refusal {
    _signal_error_code: [c_int; 3],
    _padding: c_int,
    _address: *const c_void,
    call: c_int,
    _architecture: u32,
}

/// Runs on the thread that made the call, in its place.
extern "C" fn on_violation(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a siginfo over, which is larger than the part that is looked at.
    let call = unsafe { (*info.cast::<Refusal>()).call };
    // SAFETY: with SA_SIGINFO the context is a ucontext.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let register = |index: c_int| registers.get(index as usize).copied().unwrap_or(0) as u64;
    if let Some(last_wish) = LAST_WISH.get() {
        last_wish();
    }
    let name = NAME.get();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut line = Line::default();
    line.add(b"alcove: thread ");
    line.add(name);
    line.add(b": the sandbox refused the system call ");
    let known = usize::try_from(call).ok().and_then(name_of);
    line.add(known.unwrap_or("number").as_bytes());
    line.add(b" ");
    line.add_number(u64::from(call.unsigned_abs()), 10);
    for argument in [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX] {
        line.add(b" 0x");
        line.add_number(register(argument), 16);
    }
    line.add(
        b"; if no guest is to blame, it is a fault of alcove's (--sandbox off runs without)\n",
    );
    say(line.text());
    // SAFETY: ends the process, whatever state it is in.
    unsafe { libc::_exit(FAILED) }
}

/// Writes to standard error, as far as it takes it.
fn say(text: &[u8]) {
    // SAFETY: the bytes are there; the call is allowed in a signal handler.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

/// A line that is put together without memory of the heap.
struct Line {
    bytes: [u8; Self::MAX_BYTES],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; Self::MAX_BYTES], len: 0 }
    }
}

impl Line {
    const MAX_BYTES: usize = 320;

    fn add(&mut self, text: &[u8]) {
        let room = self.bytes.get_mut(self.len..).unwrap_or_default();
        for (to, from) in room.iter_mut().zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn add_number(&mut self, value: u64, base: u64) {
        const MOST_DIGITS: usize = 20;
        let mut digits = [0; MOST_DIGITS];
        let mut first = MOST_DIGITS;
        let mut rest = value;
        for (at, digit) in digits.iter_mut().enumerate().rev() {
            *digit = *b"0123456789abcdef".get((rest % base) as usize).unwrap_or(&b'?');
            first = at;
            rest /= base;
            if rest == 0 {
                break;
            }
        }
        self.add(digits.get(first..).unwrap_or_default());
    }

    fn text(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_are_named_by_their_number() {
        assert_eq!(name_of(0), Some("read"));
        assert_eq!(name_of(libc::SYS_openat as usize), Some("openat"));
        assert_eq!(name_of(libc::SYS_execve as usize), Some("execve"));
        assert_eq!(name_of(400), None, "a gap in the table");
        assert_eq!(name_of(100_000), None);
    }

    #[test]
    fn a_line_holds_numbers_and_is_cut_off_at_its_end() {
        let mut line = Line::default();
        line.add(b"x ");
        line.add_number(0, 10);
        line.add(b" ");
        line.add_number(u64::MAX, 10);
        line.add(b" ");
        line.add_number(0xae80, 16);
        assert_eq!(line.text(), b"x 0 18446744073709551615 ae80");

        line.add(&[b'y'; 1000]);
        assert_eq!(line.text().len(), Line::MAX_BYTES);
    }

    #[test]
    fn the_own_process_stands_in_filters_that_send_signals_only() {
        let mentions = |kind: Kind| kind.filter().iter().any(|step| step.k == SELF);
        for kind in [Kind::Main, Kind::Vcpu, Kind::Disk, Kind::Net] {
            assert!(mentions(kind), "{kind:?}");
        }
        assert!(!mentions(Kind::Keeper) && !mentions(Kind::Janitor));
    }
}
