//! What this host offers.
#![expect(unsafe_code, reason = "asks the kernel by bare system calls and the processor by CPUID")]

use std::io;
use std::ops::Range;
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

/// Whether this host's processor is a program that translates instructions: QEMU's TCG, by its
/// signature in CPUID leaf 4000_0000h.
pub fn is_translated() -> bool {
    const HYPERVISOR: u32 = 1 << 31;
    const SIGNATURE: u32 = 0x4000_0000;
    use std::arch::x86_64::__cpuid;
    if __cpuid(1).ecx & HYPERVISOR == 0 {
        return false;
    }
    let leaf = __cpuid(SIGNATURE);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).as_flattened() == b"TCGTCGTCGTCG"
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
    for pages in unwritten_pages() {
        let start = std::ptr::with_exposed_provenance_mut(pages.start);
        // SAFETY: the kernel has mapped them from a file, privately, and neither the loader nor anything
        // since has written to them, so that what is read there later is what was there before. That is
        // so as long as nobody packs the program or moves its code to memory of another kind.
        unsafe { libc::madvise(start, pages.len(), libc::MADV_DONTNEED) };
    }
    // SAFETY: the call has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// The addresses of the whole pages of this program's file that are mapped and never written to.
///
/// They are those of the segments that the loader neither writes nor relocates (PT_LOAD without PF_W).
/// What lies between two segments is not the program's: the kernel may put any mapping there.
fn unwritten_pages() -> Vec<Range<usize>> {
    const PAGE_BYTES: usize = 4096;

    unsafe extern "C" fn add(
        object: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        found: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: dl_iterate_phdr(3) lends the object and its headers.
        let object = unsafe { &*object };
        // SAFETY: it passes `found` on, which nobody else uses meanwhile.
        let found = unsafe { &mut *found.cast::<Vec<Range<usize>>>() };
        // SAFETY: the headers are the object's.
        let headers =
            unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
        let base = object.dlpi_addr as usize;
        let is_unwritten =
            |h: &&libc::Elf64_Phdr| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0;
        found.extend(headers.iter().filter(is_unwritten).map(|header| {
            let start = base + header.p_vaddr as usize;
            let end = start + header.p_memsz as usize;
            let start = start.next_multiple_of(PAGE_BYTES);
            start..(end / PAGE_BYTES * PAGE_BYTES).max(start)
        }));
        // The program is the first object; libraries are left alone.
        1
    }

    let mut found = Vec::new();
    // SAFETY: `add` is called during this call only, with the pointer to `found`.
    unsafe { libc::dl_iterate_phdr(Some(add), (&raw mut found).cast()) };
    found
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_of_this_program_and_never_written_to() {
        let program = std::env::current_exe().unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mappings: Vec<(Range<usize>, &str)> = maps
            .lines()
            .filter(|line| line.ends_with(program.to_str().unwrap()))
            .map(|line| {
                let (addresses, rest) = line.split_once(' ').unwrap();
                let (start, end) = addresses.split_once('-').unwrap();
                let number = |hex| usize::from_str_radix(hex, 16).unwrap();
                (number(start)..number(end), rest)
            })
            .collect();
        let given_back = unwritten_pages();
        assert!(given_back.iter().map(ExactSizeIterator::len).sum::<usize>() > 1 << 20);
        for pages in given_back {
            let (_, mode) = mappings
                .iter()
                .find(|(mapped, _)| mapped.start <= pages.start && pages.end <= mapped.end)
                .expect("each range lies within one mapping");
            assert!(!mode.starts_with("rw"), "{pages:x?} is {mode}");
        }
    }
}
