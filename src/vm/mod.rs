//! The machine: owner of all its parts, and its states from built to ended.

pub mod bare_loop;
mod builder;
mod confine;
mod control;
mod error;
mod legacy;
mod mailbox;
mod open;
mod outcome;
mod virtio;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use devices::legacy::serial::Console;
use kvm_ioctls::VmFd;
use tracing::warn;

use confine::Confinement;
pub use error::VmError;
use virtio::Virtio;

pub use mailbox::Mailbox;
pub use outcome::Outcome;

use crate::config::VmConfig;
use crate::event_loop::EventLoop;
use crate::host;
use crate::memory::GuestRam;
use crate::vcpu::VcpuHandle;

/// How long a guest's last words may take to reach whoever reads the console.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// The same for a guest that was ended.
const FLUSH_LIMIT_IN_A_HURRY: Duration = Duration::from_millis(200);

/// What the kernel prints first when it panics.
const PANIC_MESSAGE: &[u8] = b"Kernel panic - not syncing";

/// A built machine. Fields are dropped in order: vCPUs stop before what they use goes away.
pub struct Machine {
    vcpus: Vec<VcpuHandle>,
    /// Its threads end before guest RAM goes away.
    virtio: Virtio,
    event_loop: EventLoop,
    console: Console,
    console_path: Option<PathBuf>,
    confinement: Confinement,
    mailbox: Arc<Mailbox>,
    /// Outlives the vCPUs and devices, which map it.
    _ram: GuestRam,
    _vm: Arc<VmFd>,
}

impl Drop for Machine {
    /// A vCPU that waits for a slow console would otherwise be joined for ever.
    fn drop(&mut self) {
        self.console.close();
    }
}

/// What is left of a machine whose run has ended.
#[derive(Debug)]
pub struct Ended {
    /// Why it ended.
    pub outcome: Outcome,
    /// The last 16 KiB at most that the guest wrote to its console.
    pub console_tail: Vec<u8>,
}

impl Machine {
    /// Builds the machine that `config` describes, its kernel loaded, its vCPUs parked.
    pub fn build(config: &VmConfig) -> Result<Self, VmError> {
        builder::build(config)
    }

    /// The pseudo-terminal that the serial port leads to, if it leads to one.
    pub fn console_path(&self) -> Option<&Path> {
        self.console_path.as_deref()
    }

    /// Lets every vCPU enter the guest, or go on after [`Machine::pause`].
    pub fn resume(&self) {
        self.virtio.resume();
        self.vcpus.iter().for_each(VcpuHandle::resume);
    }

    /// Parks every vCPU outside the guest, with no port or MMIO access left open, and the devices
    /// with no I/O in flight.
    pub fn pause(&self) {
        self.vcpus.iter().for_each(VcpuHandle::pause);
        self.vcpus.iter().for_each(VcpuHandle::wait_paused);
        self.virtio.pause();
    }

    /// Runs the guest until it ends, or is ended, and says how. The terminal is as it was before
    /// when this returns.
    pub fn run(mut self) -> Result<Ended, VmError> {
        self.confinement.seal()?;
        host::release_start();
        self.resume();
        while !self.mailbox.has_ended() {
            self.event_loop.turn().map_err(VmError::EventLoop)?;
        }
        self.console.close();
        self.tell_unused_vcpus();
        self.vcpus.clear();
        let mut outcome = self.mailbox.take().unwrap_or(Outcome::Quit);
        let limit = match outcome {
            Outcome::TimedOut | Outcome::Signalled(_) => FLUSH_LIMIT_IN_A_HURRY,
            _ => FLUSH_LIMIT,
        };
        self.console.flush_at_end(limit);
        let console_tail = self.console.tail();
        if matches!(outcome, Outcome::Reset) && has_panicked(&console_tail) {
            outcome = Outcome::Panicked;
        }
        Ok(Ended { outcome, console_tail })
    }

    /// A kernel that finds one CPU only runs all the same, slower than its user thinks.
    fn tell_unused_vcpus(&self) {
        let all = self.vcpus.len();
        // The boot CPU is not woken.
        let unused = self.vcpus.iter().skip(1).filter(|vcpu| !vcpu.was_woken()).count();
        if unused > 0 {
            warn!(
                "the guest started {} of the {all} vCPUs of --cpus: its kernel finds them by ACPI \
                 (CONFIG_ACPI, CONFIG_SMP, no acpi=off)",
                all - unused
            );
        }
    }
}

/// Whether the console ends with a kernel's panic: how a guest without a pvpanic driver tells.
fn has_panicked(tail: &[u8]) -> bool {
    tail.split(|b| *b == b'\n').any(|line| {
        let message = match line.iter().position(|b| *b == b']') {
            Some(stamp) if line.starts_with(b"[") => line[stamp + 1..].trim_ascii_start(),
            _ => line,
        };
        message.starts_with(PANIC_MESSAGE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_by_the_line_that_starts_with_it() {
        assert!(has_panicked(b"x\r\n[    1.5] Kernel panic - not syncing: sysrq\r\nCPU: 0\r\n"));
        assert!(has_panicked(b"Kernel panic - not syncing: Attempted to kill init!\r\n"));
        assert!(!has_panicked(b"# echo Kernel panic - not syncing\r\n"));
        assert!(!has_panicked(b""));
    }
}
