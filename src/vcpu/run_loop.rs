//! The loop of a vCPU's thread: enter the guest, serve the exit, enter again.

use std::io;
use std::sync::Arc;

use devices::bus::Bus;
use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
use kvm_ioctls::VcpuFd;
use tracing::info;

use super::crash::CrashReport;
use super::exit::{self, Exit, Instruction};
use super::handle::Gate;
use super::kick::ImmediateExit;
use super::recover::{Recovery, Unrecoverable};
use crate::log::RateLimit;

/// One vCPU, before and while its thread runs it.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    recovery: Option<Recovery>,
    on_crash: Box<dyn FnOnce(CrashReport) + Send>,
    unknown_access: RateLimit,
}

/// What to do after an exit.
enum Next {
    Enter,
    /// As [`Next::Enter`]; a vCPU that waits for the guest to start it stopped waiting.
    Woken,
    Interrupted,
    Crash(Unrecoverable),
}

impl Vcpu {
    /// A vCPU over `fd`, whose registers are set, with the machine's buses. `recovery` completes
    /// what a software KVM refuses; `on_crash` hears, on the vCPU's thread, why it stopped by
    /// itself.
    pub fn new(
        index: u32,
        fd: VcpuFd,
        ports: Arc<Bus>,
        mmio: Arc<Bus>,
        recovery: Option<Recovery>,
        on_crash: Box<dyn FnOnce(CrashReport) + Send>,
    ) -> Self {
        Self { index, fd, ports, mmio, recovery, on_crash, unknown_access: RateLimit::default() }
    }

    /// Counted from 0, the boot CPU.
    pub fn index(&self) -> u32 {
        self.index
    }

    pub(super) fn immediate_exit(&self) -> io::Result<ImmediateExit> {
        ImmediateExit::map(&self.fd)
    }

    /// Runs the guest until the owner stops it or it cannot go on.
    pub(super) fn run(mut self, gate: &Gate) {
        if !gate.pass() {
            return;
        }
        loop {
            match self.step() {
                Next::Enter => {}
                Next::Woken => {
                    if self.is_initialized() {
                        gate.woken();
                    }
                }
                Next::Interrupted => {
                    if !gate.pass() {
                        return;
                    }
                }
                Next::Crash(why) => {
                    let report = self.report(why);
                    (self.on_crash)(report);
                    return;
                }
            }
        }
    }

    fn step(&mut self) -> Next {
        match self.fd.run().map(drop) {
            Ok(()) => self.serve(),
            Err(e) if e.errno() == libc::EINTR => Next::Interrupted,
            // A vCPU that the guest has not started yet may be woken for nothing.
            Err(e) if e.errno() == libc::EAGAIN => Next::Woken,
            Err(e) => Next::Crash(Unrecoverable::new(format!("KVM_RUN failed: {e}"))),
        }
    }

    /// Whether the guest has sent this vCPU an INIT.
    fn is_initialized(&self) -> bool {
        self.fd.get_mp_state().is_ok_and(|state| state.mp_state != KVM_MP_STATE_UNINITIALIZED)
    }

    fn serve(&mut self) -> Next {
        match exit::decode(&mut self.fd) {
            Exit::PortWrite { port, width, data } => {
                for element in data.chunks(width) {
                    if !self.ports.write(port.into(), element) {
                        self.unknown_access.allow(|| info!("write to unknown port {port:#x}"));
                    }
                }
            }
            Exit::PortRead { port, width, data } => {
                for element in data.chunks_mut(width) {
                    if !self.ports.read(port.into(), element) {
                        self.unknown_access.allow(|| info!("read from unknown port {port:#x}"));
                    }
                }
            }
            Exit::MmioWrite { address, data } => {
                if !self.mmio.write(address, data) {
                    self.unknown_access.allow(|| info!("write to unknown address {address:#x}"));
                }
            }
            Exit::MmioRead { address, data } => {
                if !self.mmio.read(address, data) {
                    self.unknown_access.allow(|| info!("read from unknown address {address:#x}"));
                }
            }
            Exit::Interrupted => return Next::Interrupted,
            Exit::EmulationFailure { bytes } => return self.complete(bytes),
            Exit::Debug { dr6 } => return self.recover(|r, fd| r.breakpoint(fd, dr6)),
            Exit::MsrWrite { index, data } => {
                return self.recover(|r, fd| r.msr_write(fd, index, data));
            }
            Exit::Shutdown => return crash(self.triple_fault()),
            Exit::Halt => return crash("it halted with no interrupt controller to wake it"),
            Exit::FailEntry { reason } => {
                return crash(format!("the processor refused to enter it, reason {reason:#x}"));
            }
            Exit::InternalError { suberror } => {
                return crash(format!("KVM internal error, suberror {suberror}"));
            }
            Exit::Unknown(reason) => return crash(format!("KVM exit reason {reason}")),
        }
        match &mut self.recovery {
            Some(recovery) => settle(recovery.after_access(&mut self.fd)),
            None => Next::Enter,
        }
    }

    /// On AMD-V nothing is left of the state at a triple fault: KVM resets the vCPU.
    fn triple_fault(&self) -> &'static str {
        const RESET_RIP: u64 = 0xfff0;
        match self.fd.get_regs() {
            Ok(regs) if regs.rip == RESET_RIP => "triple fault; AMD-V resets the registers",
            _ => "triple fault",
        }
    }

    fn complete(&mut self, bytes: Instruction) -> Next {
        if self.recovery.is_none() {
            let why = "KVM could not emulate an instruction (--assist on may complete it)";
            return Next::Crash(Unrecoverable::at(why, bytes));
        }
        self.recover(|r, fd| r.emulation_failure(fd, bytes))
    }

    fn recover(
        &mut self,
        with: impl FnOnce(&mut Recovery, &mut VcpuFd) -> Result<(), Unrecoverable>,
    ) -> Next {
        match &mut self.recovery {
            Some(recovery) => settle(with(recovery, &mut self.fd)),
            None => crash("a debug exit that nobody asked for"),
        }
    }

    fn report(&self, why: Unrecoverable) -> CrashReport {
        CrashReport {
            vcpu: self.index,
            cause: why.cause,
            instruction: why.instruction,
            regs: self.fd.get_regs().ok(),
            sregs: self.fd.get_sregs().ok(),
        }
    }
}

fn crash(cause: impl Into<String>) -> Next {
    Next::Crash(Unrecoverable::new(cause))
}

fn settle(result: Result<(), Unrecoverable>) -> Next {
    match result {
        Ok(()) => Next::Enter,
        Err(why) => Next::Crash(why),
    }
}
