//! What a process sees: nothing. Namespaces of its own and an empty root.
//!
//! [`enter`] splits the process: the calling one stays outside as the keeper, which passes signals in
//! and the exit status out, and its child goes on within.
#![expect(unsafe_code, reason = "system calls that have no safe form")]

use std::ffi::{CStr, c_int, c_long, c_ulong};
use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use super::cgroup::Group;
use super::process;
use super::seccomp::{self, Kind};

/// The status when the keeper itself fails.
const FAILED: c_int = 125;
/// Every namespace that a guest has no business in.
const NAMESPACES: c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;
/// A folder that is there and is to be hidden: the empty root is mounted on it at first.
const STEPPING_STONE: &CStr = c"/dev";
const HOST_NAME: &[u8] = b"alcove";
const MOUNT_FLAGS: c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// What a jail is like.
#[derive(Debug, Default)]
pub struct Plan {
    /// Who the process becomes; itself if not given. Root's choice only.
    pub uid: Option<u32>,
    /// Its group likewise.
    pub gid: Option<u32>,
    /// The control group that it joins.
    pub group: Option<Group>,
    /// The signals that the keeper passes in. They are blocked within.
    pub signals: Vec<c_int>,
}

/// What the host refused on the way into a jail.
#[derive(Debug)]
pub struct Refused {
    /// What was asked for.
    pub step: &'static str,
    /// The host's answer.
    pub source: io::Error,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the host refused to {}", self.step)
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Goes on as the only process of a new jail, in which no file has a name. The result is where the
/// numbers of the signals come from that the keeper passes in; it ends when the keeper does.
///
/// The calling process must have one thread only. It does not return from here: it ends with the
/// status of the process within.
///
/// # Errors
/// In either process, and then only there, what the host refuses.
pub fn enter(plan: Plan) -> Result<OwnedFd, Refused> {
    let (mut go, mut ready) = pipe()?;
    let (passed, pass) = pipe()?;
    let signals = block(&plan.signals).map_err(refused("block signals"))?;
    let side = split().map_err(refused("make namespaces (CLONE_NEWUSER and others)"))?;
    let Side::Keeper { child, has_user_namespace } = side else {
        drop((ready, pass, signals));
        go.read_exact(&mut [0]).map_err(refused("admit the process to the jail"))?;
        unblock_children();
        lock_up(&plan)?;
        return Ok(passed.into());
    };
    if has_user_namespace {
        map_ids(child, &plan).map_err(refused("map user and group ids (/proc/PID/uid_map)"))?;
    }
    if let Some(group) = &plan.group {
        group.add(child).map_err(refused("move a process into a control group"))?;
    }
    ready.write_all(&[1]).map_err(refused("admit the process to the jail"))?;
    keep(child, &signals, &OwnedFd::from(pass), plan.group)
}

/// Tries what [`enter`] needs, in a process of its own.
///
/// # Errors
/// What the host refuses.
pub fn probe() -> Result<(), Refused> {
    let (mut go, mut ready) = pipe()?;
    let plan = Plan::default();
    match split().map_err(refused("make namespaces (CLONE_NEWUSER and others)"))? {
        Side::Prisoner => {
            drop(ready);
            let admitted = go.read_exact(&mut [0]).is_ok();
            let done = admitted && lock_up(&plan).is_ok();
            // SAFETY: ends the process without anything that belongs to the other.
            unsafe { libc::_exit(c_int::from(!done)) }
        }
        Side::Keeper { child, has_user_namespace } => {
            let mapped = if has_user_namespace { map_ids(child, &plan) } else { Ok(()) };
            if mapped.is_ok() {
                let _ = ready.write_all(&[1]);
            }
            drop(ready);
            let status = wait(child);
            mapped.map_err(refused("map user and group ids (/proc/PID/uid_map)"))?;
            match status {
                Ok(0) => Ok(()),
                _ => Err(refused("mount an empty root")(io::ErrorKind::PermissionDenied.into())),
            }
        }
    }
}

enum Side {
    Keeper { child: c_int, has_user_namespace: bool },
    Prisoner,
}

/// Forks into new namespaces. Root goes without a user namespace where there is none to be had.
fn split() -> io::Result<Side> {
    let clone = |flags: c_int| -> c_long {
        let flags = c_long::from(flags | libc::SIGCHLD);
        // SAFETY: without a stack and shared memory it is a fork, and there is one thread only, so
        // that no lock is held in the child.
        unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) }
    };
    let mut has_user_namespace = true;
    let mut child = clone(NAMESPACES | libc::CLONE_NEWUSER);
    // SAFETY: no preconditions.
    if child < 0 && unsafe { libc::geteuid() } == 0 {
        has_user_namespace = false;
        child = clone(NAMESPACES);
    }
    match c_int::try_from(child) {
        Ok(0) => Ok(Side::Prisoner),
        Ok(child) if child > 0 => Ok(Side::Keeper { child, has_user_namespace }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the one user and the one group that the jail knows those that `plan` names.
fn map_ids(child: c_int, plan: &Plan) -> io::Result<()> {
    // SAFETY: no preconditions.
    let own_uid = unsafe { libc::geteuid() };
    // SAFETY: no preconditions.
    let own_gid = unsafe { libc::getegid() };
    let write = |file: &str, text: &str| fs::write(format!("/proc/{child}/{file}"), text);
    if own_uid != 0 {
        // Else the kernel lets a plain user map no group.
        write("setgroups", "deny")?;
    }
    let (uid, gid) = (plan.uid.unwrap_or(own_uid), plan.gid.unwrap_or(own_gid));
    write("uid_map", &format!("{uid} {uid} 1"))?;
    write("gid_map", &format!("{gid} {gid} 1"))
}

/// Within: leaves an empty root and changes to the user that `plan` names.
fn lock_up(plan: &Plan) -> Result<(), Refused> {
    empty_root()?;
    // SAFETY: the name is as long as is said.
    let named = unsafe { libc::sethostname(HOST_NAME.as_ptr().cast(), HOST_NAME.len()) };
    check(named).map_err(refused("name the jail"))?;
    if let Some(gid) = plan.gid {
        // SAFETY: an empty list needs no memory.
        check(unsafe { libc::setgroups(0, ptr::null()) }).map_err(refused("leave its groups"))?;
        // SAFETY: no preconditions.
        check(unsafe { libc::setresgid(gid, gid, gid) }).map_err(refused("become --gid"))?;
    }
    if let Some(uid) = plan.uid {
        // SAFETY: no preconditions.
        check(unsafe { libc::setresuid(uid, uid, uid) }).map_err(refused("become --uid"))?;
    }
    // Last, since a change of user takes it back. The process ends with its keeper.
    // SAFETY: the operation takes a number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong) })
        .map_err(refused("end with the keeper"))
}

/// Changes to a root that is empty and stays so; the old one is gone from this mount namespace.
fn empty_root() -> Result<(), Refused> {
    let private = mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE, None);
    private.map_err(refused("keep mounts to itself"))?;
    let options = Some(c"size=4k,nr_inodes=1,mode=0555");
    let tmpfs = Some(c"tmpfs");
    mount(Some(c"alcove"), STEPPING_STONE, tmpfs, MOUNT_FLAGS, options)
        .map_err(refused("mount an empty root"))?;
    change_folder(STEPPING_STONE).map_err(refused("enter an empty root"))?;
    let here = c".".as_ptr();
    // SAFETY: both names are strings.
    if unsafe { libc::syscall(libc::SYS_pivot_root, here, here) } == 0 {
        // The old root lies on top of the new one.
        // SAFETY: the name is a string.
        check(unsafe { libc::umount2(here, libc::MNT_DETACH) })
            .map_err(refused("leave the old root"))?;
    } else {
        // An initramfs cannot be put aside; it can be covered.
        mount(Some(c"."), c"/", None, libc::MS_MOVE, None).map_err(refused("cover the root"))?;
        // SAFETY: the name is a string.
        check(unsafe { libc::chroot(here) }).map_err(refused("change to an empty root"))?;
    }
    change_folder(c"/").map_err(refused("enter an empty root"))?;
    let read_only = libc::MS_REMOUNT | libc::MS_RDONLY | MOUNT_FLAGS;
    mount(None, c"/", None, read_only, None).map_err(refused("write-protect an empty root"))
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: c_ulong,
    options: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
    let data = pointer(options).cast();
    // SAFETY: all are strings or absent.
    check(unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, data) })
}

fn change_folder(path: &CStr) -> io::Result<()> {
    // SAFETY: the path is a string.
    check(unsafe { libc::chdir(path.as_ptr()) })
}

/// Outside: waits for the process within. Holds no privilege and no descriptor that it does not
/// need, and ends the way the other did.
fn keep(child: c_int, signals: &OwnedFd, pass: &OwnedFd, group: Option<Group>) -> ! {
    let mut kept = [libc::STDERR_FILENO, signals.as_raw_fd(), pass.as_raw_fd()];
    kept.sort_unstable();
    process::close_all_but(&kept);
    let name = "keeper";
    let confined = process::renounce_new_privileges()
        .and_then(|()| process::drop_capabilities())
        .and_then(|()| process::hide())
        .and_then(|()| seccomp::install(Kind::Keeper, name));
    if let Err(error) = confined {
        seccomp::give_up(name, &error);
    }
    let status = loop {
        match next_signal(signals) {
            Some(libc::SIGCHLD) => {
                if let Some(status) = has_ended(child) {
                    break status;
                }
            }
            Some(number) => {
                let byte = [number as u8];
                // SAFETY: one byte is there. It fails when the other has ended, which SIGCHLD tells.
                unsafe { libc::write(pass.as_raw_fd(), byte.as_ptr().cast(), 1) };
            }
            None => break FAILED,
        }
    };
    if let Some(group) = group {
        group.remove();
    }
    // SAFETY: ends the process; nothing of what alcove has here is its to clean up.
    unsafe { libc::_exit(status) }
}

/// The exit status of `child` if it has ended; 128 and its number if a signal ended it.
fn has_ended(child: c_int) -> Option<c_int> {
    const SIGNAL_BASE: c_int = 128;
    let mut status = 0;
    // SAFETY: the call fills one int.
    if unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } != child {
        return None;
    }
    if libc::WIFEXITED(status) {
        return Some(libc::WEXITSTATUS(status));
    }
    let number = libc::WTERMSIG(status);
    let _ = writeln!(io::stderr(), "alcove: signal {number} killed the process in the jail");
    Some(SIGNAL_BASE + number)
}

fn wait(child: c_int) -> io::Result<c_int> {
    let mut status = 0;
    // SAFETY: the call fills one int.
    check(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    Ok(status)
}

/// Blocks `signals` and those of children; a descriptor that tells of them.
fn block(signals: &[c_int]) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let set = signal_set(signals.iter().copied().chain([libc::SIGCHLD]));
    // SAFETY: the set was made above; the old one is not asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) })?;
    // SAFETY: the set was made above.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
    check(fd)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Within there may be children too; the other signals stay blocked.
fn unblock_children() {
    let set = signal_set([libc::SIGCHLD].into_iter());
    // SAFETY: the set was made above. Nothing can be wrong with it.
    unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) };
}

fn signal_set(signals: impl Iterator<Item = c_int>) -> libc::sigset_t {
    // SAFETY: all zeroes are an empty set.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for number in signals {
        // SAFETY: the set is there; a number that is no signal's is refused.
        unsafe { libc::sigaddset(&raw mut set, number) };
    }
    set
}

/// Waits for a signal.
fn next_signal(signals: &OwnedFd) -> Option<c_int> {
    // SAFETY: all zeroes are a valid value.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let bytes = size_of::<libc::signalfd_siginfo>();
    loop {
        // SAFETY: there is room for as much as is asked for.
        let count = unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), bytes) };
        if count == bytes as isize {
            return c_int::try_from(info.ssi_signo).ok();
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

fn pipe() -> Result<(io::PipeReader, io::PipeWriter), Refused> {
    io::pipe().map_err(refused("make a pipe"))
}

fn refused(step: &'static str) -> impl FnOnce(io::Error) -> Refused {
    move |source| Refused { step, source }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
