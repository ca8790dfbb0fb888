//! The host mappings behind guest RAM.
#![expect(unsafe_code, reason = "madvise on the mappings, which KVM gets by address")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::layout::{HIGH_RAM_START, LOW_RAM_LIMIT, MIB, PAGE_BYTES};

/// Why guest RAM cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// No memory at all.
    #[error("leaves the guest no memory; give {} MiB or more", GuestRam::MIN_BYTES / MIB)]
    Zero,
    /// Below [`GuestRam::MIN_BYTES`].
    #[error("{size_bytes} bytes are too few, a guest needs {} MiB or more", GuestRam::MIN_BYTES / MIB)]
    TooSmall {
        /// What was asked for.
        size_bytes: u64,
    },
    /// Not a whole number of pages.
    #[error(
        "{size_bytes} bytes are not a multiple of {PAGE_BYTES}, the page size; give whole MiB, such as 256M"
    )]
    NotPageMultiple {
        /// What was asked for.
        size_bytes: u64,
    },
    /// Part of the RAM would lie above what the guest's processor can address.
    #[error(
        "{} MiB are more than the {address_bits} address bits of this processor reach, which is \
         {} MiB; give less",
        size_bytes / MIB, limit_bytes / MIB
    )]
    BeyondAddressSpace {
        /// What was asked for.
        size_bytes: u64,
        /// The largest size that fits.
        limit_bytes: u64,
        /// Physical address bits of the guest's processor.
        address_bits: u8,
    },
    /// The host refused the mapping: its address space or an rlimit is too small.
    #[error("the host cannot reserve {} MiB; give less", size_bytes / MIB)]
    Map {
        /// The size of the mapping that failed.
        size_bytes: u64,
        /// The host's answer.
        source: MmapRegionError,
    },
}

/// A contiguous range of guest RAM, as KVM_SET_USER_MEMORY_REGION takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// KVM memory slot, counted from 0.
    pub slot: u32,
    /// First guest physical address.
    pub guest_phys: u64,
    /// Length in bytes, a multiple of the page size.
    pub size_bytes: u64,
    /// Where the range starts in this process; page aligned.
    pub host_addr: u64,
}

/// The guest's RAM: one range up to [`LOW_RAM_LIMIT`], and one from [`HIGH_RAM_START`] with what
/// does not fit below.
///
/// The mappings are private, anonymous and not reserved (MAP_NORESERVE): a page costs memory when
/// the guest, or alcove on its behalf, first writes it, and reads as zero until then. They are
/// left out of core dumps (MADV_DONTDUMP), which would otherwise hold the guest's secrets and
/// gigabytes of zeroes. Above the first MiB the host's setting in
/// /sys/kernel/mm/transparent_hugepage decides on huge pages; below, where alcove writes a few pages
/// before the guest starts, there are none (MADV_NOHUGEPAGE), since the first write to a huge page
/// zeroes 2 MiB, a third of the time that a start takes.
///
/// A clone shares the mappings; they go with the last clone.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap<()>,
    size_bytes: u64,
    low_end: u64,
}

impl GuestRam {
    /// The least memory a guest may have, bytes.
    pub const MIN_BYTES: u64 = 16 * MIB;

    /// Maps `size_bytes` of RAM for a guest whose processor has `max_physical_address_bits`
    /// (CPUID 8000_0008h EAX bits 7 to 0).
    ///
    /// The size is a multiple of the page size and at least [`GuestRam::MIN_BYTES`]; nothing is
    /// rounded.
    pub fn new(size_bytes: u64, max_physical_address_bits: u8) -> Result<Self, MemoryError> {
        check_size(size_bytes, max_physical_address_bits)?;
        let low_end = size_bytes.min(LOW_RAM_LIMIT);
        let high_bytes = size_bytes - low_end;
        let low = map(0, low_end)?;
        advise(&low, MIB, libc::MADV_NOHUGEPAGE);
        let mut regions = vec![low];
        if high_bytes > 0 {
            regions.push(map(HIGH_RAM_START, high_bytes)?);
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .unwrap_or_else(|_| unreachable!("low RAM ends before high RAM starts"));
        Ok(Self { memory, size_bytes, low_end })
    }

    /// The memory as device models and loaders access it.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// The size of all RAM, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Where low RAM ends: the first address after it, at most [`LOW_RAM_LIMIT`].
    pub fn low_end(&self) -> u64 {
        self.low_end
    }

    /// The size of the RAM from [`HIGH_RAM_START`] on, bytes; 0 when all of it fits below.
    pub fn high_bytes(&self) -> u64 {
        self.size_bytes - self.low_end
    }

    /// The ranges to hand to KVM, one or two, by ascending address.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        (0u32..).zip(self.memory.iter()).map(|(slot, region)| RamRegion {
            slot,
            guest_phys: region.start_addr().raw_value(),
            size_bytes: region.len(),
            host_addr: region.as_ptr() as u64,
        })
    }

    /// Makes all of it the memory of `vm`, a slot a range.
    ///
    /// # Errors
    /// KVM's answer.
    ///
    /// # Safety
    /// The mappings must stay, in this or a clone, until the last vCPU of `vm` has stopped.
    pub unsafe fn give_to(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.regions().try_for_each(|region| {
            let region = kvm_userspace_memory_region {
                slot: region.slot,
                guest_phys_addr: region.guest_phys,
                memory_size: region.size_bytes,
                userspace_addr: region.host_addr,
                flags: 0,
            };
            // SAFETY: the range is a mapping of this RAM, which stays, as the caller promises.
            unsafe { vm.set_user_memory_region(region) }
        })
    }
}

fn check_size(size_bytes: u64, address_bits: u8) -> Result<(), MemoryError> {
    if size_bytes == 0 {
        return Err(MemoryError::Zero);
    }
    if size_bytes < GuestRam::MIN_BYTES {
        return Err(MemoryError::TooSmall { size_bytes });
    }
    if !size_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MemoryError::NotPageMultiple { size_bytes });
    }
    let address_limit = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    let limit_bytes = match address_limit.checked_sub(HIGH_RAM_START) {
        Some(high_bytes) => LOW_RAM_LIMIT + high_bytes,
        None => address_limit.min(LOW_RAM_LIMIT),
    };
    if size_bytes > limit_bytes {
        return Err(MemoryError::BeyondAddressSpace { size_bytes, limit_bytes, address_bits });
    }
    Ok(())
}

/// Reserves `size_bytes` of host memory for the guest address `start`.
fn map(start: u64, size_bytes: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    let host_bytes = usize::try_from(size_bytes).unwrap_or(usize::MAX);
    let mapping: MmapRegion<()> = MmapRegionBuilder::new(host_bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(|source| MemoryError::Map { size_bytes, source })?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(start))
        .unwrap_or_else(|| unreachable!("check_size keeps RAM within the address space"));
    advise(&region, size_bytes, libc::MADV_DONTDUMP);
    Ok(region)
}

/// Tells the host what to do about the first `size_bytes` of `region`. It is a wish: a kernel that
/// refuses MADV_DONTDUMP writes larger core dumps, one that refuses MADV_NOHUGEPAGE has no huge pages.
fn advise(region: &GuestRegionMmap<()>, size_bytes: u64, advice: i32) {
    let host_bytes = usize::try_from(size_bytes).unwrap_or(usize::MAX).min(region.size());
    // SAFETY: the range lies within a mapping that is ours, and neither advice touches its contents
    // or access rights.
    let _ = unsafe { libc::madvise(region.as_ptr().cast(), host_bytes, advice) };
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::memory::layout::GIB;

    const ADDRESS_BITS: u8 = 46;

    fn ranges(size_bytes: u64) -> Vec<(u32, u64, u64)> {
        let ram = GuestRam::new(size_bytes, ADDRESS_BITS).unwrap();
        ram.regions().map(|r| (r.slot, r.guest_phys, r.size_bytes)).collect()
    }

    #[test]
    fn ram_up_to_the_hole_takes_one_slot() {
        for size_bytes in [16 * MIB, 64 * MIB, 3 * GIB - PAGE_BYTES, 3 * GIB] {
            assert_eq!(ranges(size_bytes), [(0, 0, size_bytes)]);
        }
    }

    #[test]
    fn ram_beyond_the_hole_continues_at_4_gib() {
        for high_bytes in [PAGE_BYTES, 5 * GIB, 13 * GIB] {
            let expected = [(0, 0, 3 * GIB), (1, 4 * GIB, high_bytes)];
            assert_eq!(ranges(3 * GIB + high_bytes), expected);
        }
    }

    #[test]
    fn first_and_last_byte_of_each_range_belong_to_the_guest() {
        let ram = GuestRam::new(8 * GIB, ADDRESS_BITS).unwrap();
        for address in [0, 3 * GIB - 1, 4 * GIB, 9 * GIB - 1] {
            ram.memory().write_obj(0x5au8, GuestAddress(address)).unwrap();
            assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(address)).unwrap(), 0x5a);
        }
        for address in [3 * GIB, 4 * GIB - 1, 9 * GIB] {
            ram.memory().write_obj(0x5au8, GuestAddress(address)).unwrap_err();
        }
    }

    #[test]
    fn a_host_address_reaches_the_bytes_of_its_region() {
        let ram = GuestRam::new(4 * GIB, ADDRESS_BITS).unwrap();
        for region in ram.regions() {
            let host = ram.memory().get_host_address(GuestAddress(region.guest_phys)).unwrap();
            assert_eq!(region.host_addr, host as u64);
            assert_eq!(region.host_addr % PAGE_BYTES, 0);
        }
    }

    #[test]
    fn mapping_does_not_touch_the_memory() {
        let resident_kib = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let before = resident_kib();
        let ram = GuestRam::new(16 * GIB, ADDRESS_BITS).unwrap();
        assert_eq!(ram.size_bytes(), 16 * GIB);
        assert!(resident_kib() - before < 1024, "16 GiB of guest RAM must cost next to nothing");
    }

    #[test]
    fn sizes_that_no_guest_can_have_are_refused_by_kind() {
        let refuse = |size_bytes, bits| GuestRam::new(size_bytes, bits).unwrap_err();
        assert!(matches!(refuse(0, ADDRESS_BITS), MemoryError::Zero));
        assert!(matches!(refuse(1, ADDRESS_BITS), MemoryError::TooSmall { size_bytes: 1 }));
        let below = 16 * MIB - PAGE_BYTES;
        assert!(matches!(refuse(below, ADDRESS_BITS), MemoryError::TooSmall { .. }));
        let odd = 16 * MIB + 1;
        assert!(matches!(refuse(odd, ADDRESS_BITS), MemoryError::NotPageMultiple { .. }));
        let last_page = u64::MAX - PAGE_BYTES + 1;
        assert!(matches!(refuse(last_page, 64), MemoryError::BeyondAddressSpace { .. }));
    }

    #[test]
    fn the_hole_counts_against_the_address_space() {
        let limit_bytes = (1 << 36) - GIB;
        GuestRam::new(limit_bytes, 36).unwrap();
        let refused = GuestRam::new(limit_bytes + PAGE_BYTES, 36).unwrap_err();
        let MemoryError::BeyondAddressSpace { limit_bytes: limit, address_bits: 36, .. } = refused
        else {
            panic!("unexpected {refused}");
        };
        assert_eq!(limit, limit_bytes);
    }

    #[test]
    fn a_processor_without_addresses_above_the_hole_is_limited_to_low_ram() {
        GuestRam::new(3 * GIB, 32).unwrap();
        let refused = GuestRam::new(3 * GIB + PAGE_BYTES, 32).unwrap_err();
        assert!(matches!(refused, MemoryError::BeyondAddressSpace { .. }));
    }

    #[test]
    fn a_host_without_the_address_space_says_so() {
        let refused = GuestRam::new(1 << 50, 52).unwrap_err();
        assert!(matches!(refused, MemoryError::Map { .. }), "{refused}");
    }
}
