//! The life of a vCPU, as its owner sees it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use devices::thread_start::FirstAct;

use super::kick::{ImmediateExit, signal_thread};
use super::run_loop::Vcpu;

/// Where a vCPU stands.
///
/// Created → Running ⇄ Paused; from any of them → Stopped, which is final.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// The thread exists and has not entered the guest yet.
    Created,
    /// In the guest, or serving one of its exits.
    Running,
    /// Parked outside the guest with no access left open.
    Paused,
    /// The thread has left its loop.
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    Wait,
    Run,
    Stop,
}

struct Control {
    request: Request,
    state: VcpuState,
}

/// What the owner and the vCPU's thread share. `control` is a leaf lock: nothing else is taken
/// while it is held.
pub(super) struct Gate {
    control: Mutex<Control>,
    changed: Condvar,
    immediate_exit: ImmediateExit,
    /// The guest has started the vCPU, which waited for it.
    woken: AtomicBool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by the vCPU's thread before it first enters the guest and whenever KVM_RUN was
    /// interrupted: parks as long as the owner wants it parked. False: leave the loop.
    pub(super) fn pass(&self) -> bool {
        self.immediate_exit.set(false);
        let mut control = self.lock();
        loop {
            match control.request {
                Request::Stop => return false,
                Request::Run => {
                    control.state = VcpuState::Running;
                    self.changed.notify_all();
                    return true;
                }
                Request::Wait => {
                    if control.state == VcpuState::Running {
                        control.state = VcpuState::Paused;
                        self.changed.notify_all();
                    }
                    control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Called by the vCPU's thread when the guest has started a vCPU that waited for it.
    pub(super) fn woken(&self) {
        self.woken.store(true, Ordering::Relaxed);
    }

    fn stopped(&self) {
        self.lock().state = VcpuState::Stopped;
        self.changed.notify_all();
    }
}

/// The owner's end of one vCPU. Dropping it stops the vCPU and joins its thread.
pub struct VcpuHandle {
    gate: Arc<Gate>,
    /// None once joined.
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Starts the thread `vcpu<index>`, which calls `first` and waits for [`VcpuHandle::resume`].
    pub fn spawn(vcpu: Vcpu, first: FirstAct) -> io::Result<Self> {
        let gate = Arc::new(Gate {
            control: Mutex::new(Control { request: Request::Wait, state: VcpuState::Created }),
            changed: Condvar::new(),
            immediate_exit: vcpu.immediate_exit()?,
            woken: AtomicBool::new(false),
        });
        let inner = Arc::clone(&gate);
        let thread =
            thread::Builder::new().name(format!("vcpu{}", vcpu.index())).spawn(move || {
                first();
                vcpu.run(&inner);
                inner.stopped();
            })?;
        Ok(Self { gate, thread: Some(thread) })
    }

    /// Where the vCPU stands now.
    pub fn state(&self) -> VcpuState {
        self.gate.lock().state
    }

    /// Whether the guest has started this vCPU (INIT and SIPI). Never true of the boot CPU, which
    /// does not wait for it.
    pub fn was_woken(&self) -> bool {
        self.gate.woken.load(Ordering::Relaxed)
    }

    /// Lets the vCPU enter the guest; nothing happens to one that runs or has stopped.
    pub fn resume(&self) {
        self.request(Request::Run);
    }

    /// Asks the vCPU to park; [`VcpuHandle::wait_paused`] tells when it has.
    pub fn pause(&self) {
        self.request(Request::Wait);
        self.kick();
    }

    /// Waits until the vCPU is out of the guest: paused, never started, or stopped.
    ///
    /// Precondition: [`VcpuHandle::pause`] was called, and whatever its devices wait for goes on.
    pub fn wait_paused(&self) {
        let mut control = self.gate.lock();
        while control.state == VcpuState::Running && control.request == Request::Wait {
            control = self.gate.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks the vCPU to leave its loop for good.
    pub fn stop(&self) {
        self.request(Request::Stop);
        self.kick();
    }

    fn request(&self, request: Request) {
        let mut control = self.gate.lock();
        if control.request != Request::Stop {
            control.request = request;
            self.gate.changed.notify_all();
        }
    }

    fn kick(&self) {
        self.gate.immediate_exit.set(true);
        if let Some(thread) = &self.thread {
            signal_thread(thread);
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook already.
            let _ = thread.join();
        }
    }
}
