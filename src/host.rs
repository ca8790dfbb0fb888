//! What this host offers.
#![expect(unsafe_code, reason = "asks the kernel by bare system calls and the processor by CPUID")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

/// Whether the KVM of this host uses VT-x or AMD-V, so that every guest instruction runs on the
/// processor itself.
///
/// False for a KVM that interprets guest kernels: on a processor without either, or with the PVM
/// module in place of the vendors' own.
pub fn has_hardware_virtualisation() -> bool {
    let module = |name: &str| Path::new("/sys/module").join(name).exists();
    let vendor_module = module("kvm_intel") || module("kvm_amd");
    (vendor_module || !module("kvm_pvm")) && processor_virtualises()
}

/// CPUID: leaf 1 ECX bit 5 (VMX), leaf 8000_0001h ECX bit 2 (SVM).
fn processor_virtualises() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const EXTENDED: u32 = 0x8000_0000;
    use std::arch::x86_64::__cpuid;
    let extended_leaves = __cpuid(EXTENDED).eax;
    let svm = extended_leaves > EXTENDED && __cpuid(EXTENDED + 1).ecx & SVM != 0;
    __cpuid(1).ecx & VMX != 0 || svm
}

/// The version of the Landlock interface; none where Landlock is missing or switched off.
pub fn landlock_abi() -> Option<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_ulong = 1;
    // SAFETY: with this flag the call takes no pointer and creates nothing.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    (version > 0).then_some(version)
}

/// Whether this process may make network interfaces (CAP_NET_ADMIN, capabilities(7)).
pub fn may_administer_networks() -> bool {
    const CAP_NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> CAP_NET_ADMIN & 1 != 0)
}

/// Whether `name` can be started by its name alone.
pub fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Gives the host back the pages of this program's own code and constants, and what its heap does not
/// use. What runs from now on is brought in again page by page, from the file or the host's cache of
/// it; what only the start needed is not.
pub fn release_start() {
    unsafe extern "C" {
        // Of the linker's (ld(1), PROVIDE in its default script): where the program begins, and where
        // its code ends. What lies between is read-only and as it is in the file: what the loader
        // relocates comes after it.
        static __executable_start: u8;
        static etext: u8;
    }
    const PAGE_BYTES: usize = 4096;
    let start = (&raw const __executable_start).addr();
    let end = (&raw const etext).addr() / PAGE_BYTES * PAGE_BYTES;
    // SAFETY: the pages are private mappings of a file that nobody has written to, so that what is
    // read there later is what was there before.
    unsafe {
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(start),
            end.saturating_sub(start),
            libc::MADV_DONTNEED,
        );
    }
    // SAFETY: the call has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// Sets up an io_uring and drops it.
pub fn io_uring_works() -> io::Result<()> {
    /// Bytes of struct io_uring_params.
    const PARAMS_BYTES: usize = 120;
    let mut params = [0u64; PARAMS_BYTES / 8];
    // SAFETY: the kernel reads and fills the zeroed parameters, which are of its size.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, params.as_mut_ptr()) };
    match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the descriptor is new and nobody else's.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    }
}
