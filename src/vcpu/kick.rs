//! Gets a vCPU thread out of KVM_RUN.
#![expect(unsafe_code, reason = "maps the kvm_run page and sends a signal to a thread")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

/// The real-time signal, counted from SIGRTMIN, that interrupts KVM_RUN.
const KICK_SIGNAL: i32 = 0;

/// Installs the handler of the signal that interrupts KVM_RUN. To be called once, before the first
/// vCPU thread starts.
pub fn prepare_signal() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN() + KICK_SIGNAL, ignore)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // Whoever started alcove may have left it blocked.
    unblock_signal(SIGRTMIN() + KICK_SIGNAL).map_err(|e| io::Error::other(format!("{e:?}")))
}

/// A second view of a vCPU's `immediate_exit` flag, for other threads than the vCPU's own.
///
/// With the flag set KVM_RUN first finishes the access that the last exit left open, then returns
/// EINTR without entering the guest, so that a kick is never lost between the check and the entry.
pub struct ImmediateExit {
    page: NonNull<kvm_run>,
}

// SAFETY: the page is shared memory that outlives every user; only the one flag is touched, and
// that atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the flag of `vcpu`.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new shared mapping of the vCPU's first page, checked below.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(address.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { page })
    }

    /// Sets or clears the flag.
    pub fn set(&self, on: bool) {
        // SAFETY: the field lies within the mapping, which lives as long as self.
        let field = unsafe { &raw mut (*self.page.as_ptr()).immediate_exit };
        // SAFETY: a byte is always aligned, and KVM and both views treat it as one shared byte.
        let flag = unsafe { AtomicU8::from_ptr(field) };
        flag.store(on.into(), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this size and nobody else holds it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

/// Interrupts whatever system call `thread` is in. Does nothing to a thread that has ended.
pub fn signal_thread<T>(thread: &JoinHandle<T>) {
    if thread.is_finished() {
        return;
    }
    // SAFETY: the thread has not been joined, since its handle is here, so its id is valid.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN() + KICK_SIGNAL) };
}
