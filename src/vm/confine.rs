//! When the machine gives up what: the order of the sandbox's barriers.
//!
//! First everything is opened that the flags name ([`super::open`]), then the process leaves what it
//! can do without ([`Intent::enter`]), then the machine is built, whose threads each restrict
//! themselves before they serve ([`Confinement::thread_start`]), and the main thread last, before
//! the guest's first instruction ([`Confinement::seal`]).

use std::ffi::c_int;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use devices::backend::console::Backend;
use devices::backend::terminal;
use devices::thread_start::{ThreadStart, nothing_first};
use tracing::{info, warn};

use super::{VmError, control};
use crate::config::{SandboxConfig, SandboxMode, VmConfig};
use crate::sandbox::cgroup::{Group, Limits};
use crate::sandbox::janitor::Janitor;
use crate::sandbox::landlock::{self, Enforced};
use crate::sandbox::seccomp::Kind;
use crate::sandbox::{attempt, jail, process, seccomp};

/// How the machine is going to be confined, before anything is opened.
pub struct Intent<'a> {
    config: &'a SandboxConfig,
    /// What whoever started alcove left open. The flags may name it (/dev/fd/N) until all is open.
    stray: Vec<RawFd>,
}

impl<'a> Intent<'a> {
    /// Checks that this host can do what `machine` asks for.
    pub fn new(machine: &'a VmConfig) -> Result<Self, VmError> {
        let config = &machine.sandbox;
        if config.mode == SandboxMode::Off {
            warn!("--sandbox off: a guest that takes over alcove can do what its user can");
            return Ok(Self { config, stray: Vec::new() });
        }
        process::share_heap();
        seccomp::is_available().map_err(sandbox("filter system calls"))?;
        match config.root_only_flag() {
            Some(flag) if !rustix::process::geteuid().is_root() => Err(VmError::RootOnly { flag }),
            _ => Ok(Self { config, stray: stray(machine) }),
        }
    }

    /// Leaves behind what the machine does not need from now on. The process must have one thread
    /// only, which in a jail is the only one to return from here.
    pub fn enter(self, serial: &mut Backend) -> Result<Confinement, VmError> {
        if self.config.mode == SandboxMode::Off {
            return Ok(Confinement::default());
        }
        process::close(&self.stray);
        let janitor = serial.take_socket_name().map(|name| Janitor::start(&name)).transpose();
        let janitor = janitor.map_err(sandbox("look after the console's socket"))?;
        let passed_signals = if self.config.jail { Some(self.enter_jail()?) } else { None };
        process::renounce_new_privileges().map_err(sandbox("renounce privileges"))?;
        process::drop_capabilities().map_err(sandbox("drop capabilities"))?;
        process::hide().map_err(sandbox("hide from other processes"))?;
        match landlock::open_nothing_more().map_err(sandbox("restrict itself by Landlock"))? {
            Enforced::All => {}
            Enforced::Part => info!("this host's Landlock is an old one; see alcove doctor"),
            Enforced::Nothing => info!("this host has no Landlock; see alcove doctor"),
        }
        seccomp::tell_violations(terminal::restore).map_err(sandbox("handle violations"))?;
        Ok(Confinement { is_on: true, passed_signals, _janitor: janitor, ..Confinement::default() })
    }

    fn enter_jail(&self) -> Result<OwnedFd, VmError> {
        let SandboxConfig { uid, gid, cpu_quota, memory_max, .. } = *self.config;
        let limits = Limits { cpu_percent: cpu_quota, memory_bytes: memory_max.map(|size| size.0) };
        let group = match limits == Limits::default() {
            true => None,
            false => Some(Group::create(&limits).map_err(VmError::ControlGroup)?),
        };
        let signals = control::signals().map_err(sandbox("tell its signals"))?;
        let signals = signals.iter().map(|signal| signal as c_int).collect();
        jail::enter(jail::Plan { uid, gid, group, signals }).map_err(VmError::Jail)
    }
}

/// The descriptors that whoever started alcove left open, but for those that are networks.
fn stray(machine: &VmConfig) -> Vec<RawFd> {
    let mut stray = process::open_descriptors();
    stray.retain(|fd| !machine.nets.iter().any(|net| net.fd == u32::try_from(*fd).ok()));
    stray
}

/// A process that has left what it does not need.
#[derive(Default)]
pub struct Confinement {
    is_on: bool,
    unrestricted: Arc<Unrestricted>,
    passed_signals: Option<OwnedFd>,
    /// Removes the console's socket when this is dropped.
    _janitor: Option<Janitor>,
}

impl Confinement {
    /// Where signals come from if they are not the process's own, which in a jail they are not.
    pub fn take_passed_signals(&mut self) -> Option<OwnedFd> {
        self.passed_signals.take()
    }

    /// What threads of `kind` do first: they restrict themselves.
    pub fn thread_start(&self, kind: Kind) -> ThreadStart {
        if !self.is_on {
            return nothing_first();
        }
        let unrestricted = Arc::clone(&self.unrestricted);
        Arc::new(move || {
            *unrestricted.lock() += 1;
            let unrestricted = Arc::clone(&unrestricted);
            Box::new(move || {
                let thread = thread::current();
                let name = thread.name().unwrap_or("?");
                if let Err(error) = restrict(kind, name) {
                    seccomp::give_up(name, &error);
                }
                *unrestricted.lock() -= 1;
                unrestricted.changed.notify_one();
            })
        })
    }

    /// Waits until every thread has restricted itself, then restricts the calling one, which must be
    /// the main one and all others started.
    pub fn seal(&self) -> Result<(), VmError> {
        if !self.is_on {
            return Ok(());
        }
        let mut count = self.unrestricted.lock();
        while *count > 0 {
            count = self.unrestricted.changed.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        drop(count);
        process::limit_resources().map_err(sandbox("limit resources"))?;
        restrict(Kind::Main, "main").map_err(sandbox("filter system calls"))
    }
}

/// How many threads have not restricted themselves yet. A leaf lock.
#[derive(Default)]
struct Unrestricted {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Unrestricted {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn restrict(kind: Kind, name: &str) -> io::Result<()> {
    if !attempt::is_left_out("seccomp") {
        seccomp::install(kind, name)?;
    }
    attempt::if_asked(name);
    Ok(())
}

fn sandbox(call: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Sandbox { call, source }
}
