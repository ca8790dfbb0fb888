//! Guest memory by linear address, through the guest's own page tables.
#![expect(unsafe_code, reason = "CMPXCHG16B and CMPXCHG on guest RAM")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileMemory};

use crate::assist::paging::{self, Access, AccessKind, Paging, PhysicalMemory};
use crate::assist::{Exception, Stop};
use crate::memory::GuestRam;

const PAGE_BYTES: u64 = 4096;

/// Guest RAM behind the page tables of one moment.
pub struct GuestView<'a> {
    ram: &'a GuestRam,
    paging: Paging,
}

const NOT_RAM: Stop = Stop::Unsupported("an operand that is not in RAM");

impl<'a> GuestView<'a> {
    /// Guest RAM as a vCPU with `sregs` and physical addresses of `physical_bits` sees it.
    pub fn new(ram: &'a GuestRam, sregs: &kvm_sregs, physical_bits: u8) -> Self {
        let &kvm_sregs { cr0, cr3, cr4, efer, .. } = sregs;
        Self { ram, paging: Paging { cr0, cr3, cr4, efer, physical_bits } }
    }

    /// Fills `bytes` from `linear` on, across pages if need be.
    pub fn read(&self, linear: u64, bytes: &mut [u8], access: Access) -> Result<(), Stop> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = linear.wrapping_add(done as u64);
            let count = in_page(at).min(rest.len());
            let physical = self.translate(at, access)?;
            let memory = self.ram.memory();
            memory.read_slice(&mut rest[..count], GuestAddress(physical)).map_err(not_ram)?;
            done += count;
        }
        Ok(())
    }

    /// Reads an array from `linear` on.
    pub fn read_array<const N: usize>(&self, linear: u64, access: Access) -> Result<[u8; N], Stop> {
        let mut bytes = [0; N];
        self.read(linear, &mut bytes, access)?;
        Ok(bytes)
    }

    /// Reads a little-endian quadword with supervisor rights.
    pub fn read_u64(&self, linear: u64) -> Result<u64, Stop> {
        self.read_array(linear, Access::implicit(AccessKind::Read)).map(u64::from_le_bytes)
    }

    /// Writes `bytes` from `linear` on: all of them, or none where a page faults or is no RAM.
    pub fn write(&self, linear: u64, bytes: &[u8], access: Access) -> Result<(), Stop> {
        let mut pages = [None; MAX_PAGES];
        let mut done = 0;
        for slot in &mut pages {
            let left = bytes.len() - done;
            if left == 0 {
                break;
            }
            let at = linear.wrapping_add(done as u64);
            let count = in_page(at).min(left);
            let physical = GuestAddress(self.translate(at, access)?);
            if !self.ram.memory().check_range(physical, count) {
                return Err(NOT_RAM);
            }
            *slot = Some((physical, done, count));
            done += count;
        }
        if done < bytes.len() {
            return Err(Stop::Unsupported("an operand of more than some pages"));
        }
        for (physical, start, count) in pages.into_iter().flatten() {
            let part = bytes.get(start..start + count).unwrap_or_default();
            self.ram.memory().write_slice(part, physical).map_err(not_ram)?;
        }
        Ok(())
    }

    /// CMPXCHG16B on the 16 bytes at `linear`, a multiple of 16; what was there.
    pub fn compare_exchange_16(
        &self,
        linear: u64,
        expected: u128,
        new: u128,
        access: Access,
    ) -> Result<u128, Stop> {
        const BYTES: usize = 16;
        if !linear.is_multiple_of(BYTES as u64) {
            return Err(Exception::general_protection().into());
        }
        let physical = self.translate(linear, access)?;
        if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
            return Err(Stop::Unsupported("this processor has no CMPXCHG16B"));
        }
        let slice = self.ram.memory().get_slice(GuestAddress(physical), BYTES).map_err(not_ram)?;
        let target = slice.ptr_guard_mut().as_ptr().cast::<u128>();
        // SAFETY: the slice is 16 bytes of mapped guest RAM, aligned since `linear` is and pages
        // are, and the processor has the instruction.
        let found = unsafe { locked_cmpxchg16b(target, expected, new) };
        Ok(found)
    }

    fn translate(&self, linear: u64, access: Access) -> Result<u64, Stop> {
        if self.paging.efer & paging::efer::LMA != 0 && !self.is_canonical(linear) {
            return Err(Exception::general_protection().into());
        }
        paging::translate(&mut Tables(self.ram), &self.paging, linear, access)
            .map(|translation| translation.physical)
    }

    /// Whether bits 63 to 47 (56 with five levels) are alike (Intel SDM vol. 1, 3.3.7.1).
    fn is_canonical(&self, linear: u64) -> bool {
        const CR4_LA57: u64 = 1 << 12;
        let unused = if self.paging.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
        (linear as i64) << unused >> unused == linear as i64
    }
}

/// # Safety
///
/// `target` is 16 bytes of mapped memory, aligned to 16, and the processor has CMPXCHG16B.
unsafe fn locked_cmpxchg16b(target: *mut u128, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: the instruction accesses only `target`, which the caller vouches for and which is
    // pinned to RDI: a register chosen by the compiler could be RBX, which holds `new` meanwhile
    // and is put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") target,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

/// The largest operand is an XSAVE area, which takes three pages at most.
const MAX_PAGES: usize = 4;

fn in_page(linear: u64) -> usize {
    (PAGE_BYTES - linear % PAGE_BYTES) as usize
}

fn not_ram(_: GuestMemoryError) -> Stop {
    NOT_RAM
}

/// Page tables in guest RAM.
struct Tables<'a>(&'a GuestRam);

impl PhysicalMemory for Tables<'_> {
    fn read_u32(&mut self, physical: u64) -> Option<u32> {
        self.0.memory().load(GuestAddress(physical), Ordering::Relaxed).ok()
    }

    fn read_u64(&mut self, physical: u64) -> Option<u64> {
        self.0.memory().load(GuestAddress(physical), Ordering::Relaxed).ok()
    }

    fn compare_exchange_u32(&mut self, physical: u64, expected: u32, new: u32) -> Option<bool> {
        let slice = self.0.memory().get_slice(GuestAddress(physical), size_of::<u32>()).ok()?;
        let entry = slice.get_atomic_ref::<AtomicU32>(0).ok()?;
        Some(entry.compare_exchange(expected, new, Ordering::SeqCst, Ordering::Relaxed).is_ok())
    }

    fn compare_exchange_u64(&mut self, physical: u64, expected: u64, new: u64) -> Option<bool> {
        let slice = self.0.memory().get_slice(GuestAddress(physical), size_of::<u64>()).ok()?;
        let entry = slice.get_atomic_ref::<AtomicU64>(0).ok()?;
        Some(entry.compare_exchange(expected, new, Ordering::SeqCst, Ordering::Relaxed).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bytes_are_exchanged_when_equal_and_told_when_not() {
        #[repr(align(16))]
        struct Aligned([u128; 3]);
        let mut memory = Aligned([1, 2, 3]);
        let values: Vec<u128> = (0..8).map(|i| u128::MAX / 7 * i).collect();

        for (expected, new) in [(2, values[3]), (9, values[5]), (values[3], values[6])] {
            let before = memory.0[1];
            // SAFETY: an aligned element of the array; x86-64 test machines have the instruction.
            let found = unsafe { locked_cmpxchg16b(&raw mut memory.0[1], expected, new) };

            assert_eq!(found, before);
            assert_eq!(memory.0, [1, if before == expected { new } else { before }, 3]);
        }
    }
}
