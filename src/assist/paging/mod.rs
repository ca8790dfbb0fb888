//! Translates linear addresses as the processor does (SDM vol. 3 chapter 4).
//!
//! KVM_TRANSLATE does not heed permissions; this does, with the error code of the #PF, and sets
//! accessed and dirty bits. A shadow-paging KVM takes no notice of bits set from outside, and need
//! not: it treats an entry that it has not seen accessed or dirty as more restricted, and walks
//! the tables again.
//!
//! Not modelled: protection keys, shadow stacks, and the caching of PDPTEs under PAE (they are read
//! from memory each time). 1 GiB pages are taken to be supported.

#[cfg(test)]
mod tests;

use super::cpu::{cr0, cr4, rflags};
use super::{Exception, Stop};

/// EFER bits (SDM vol. 4).
pub mod efer {
    /// Long mode is active.
    pub const LMA: u64 = 1 << 10;
    /// Bit 63 of page-table entries forbids execution.
    pub const NXE: u64 = 1 << 11;
}

/// Page-table entry bits (SDM vol. 3 §4.5).
mod entry {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const PAGE_SIZE: u64 = 1 << 7;
    pub(super) const EXECUTE_DISABLE: u64 = 1 << 63;
    /// Bits 51:12, the widest address there can be.
    pub(super) const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    /// Bits 51:12 and below.
    pub(super) const ADDRESS_BITS: u32 = 52;
    /// Bit 12 of a large page's entry is PAT, not address.
    pub(super) const LARGE_LOW: u32 = 13;
    /// In a PAE page-directory pointer: bits 2:1 and 8:5.
    pub(super) const POINTER_RESERVED: u64 = 0x1E6;
    /// In a 4 MiB entry of 32-bit paging: bit 21.
    pub(super) const PSE_RESERVED: u64 = 1 << 21;
}

/// #PF error code bits (SDM vol. 3 §4.7).
pub mod fault {
    /// The page is present: a protection violation.
    pub const PRESENT: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The access was made at privilege level 3.
    pub const USER: u32 = 1 << 2;
    /// A reserved bit was set in an entry.
    pub const RESERVED: u32 = 1 << 3;
    /// The access was an instruction fetch.
    pub const FETCH: u32 = 1 << 4;
}

const PAGE_SHIFT: u32 = 12;
const MAX_LEVELS: u32 = 5;
/// How often a walk starts again because another processor changed an entry under it.
const MAX_RESTARTS: u32 = 64;

/// Guest-physical memory that holds page tables.
pub trait PhysicalMemory {
    /// The 4 bytes at `physical`, a multiple of 4; `None` if that is not RAM.
    fn read_u32(&mut self, physical: u64) -> Option<u32>;

    /// The 8 bytes at `physical`, a multiple of 8; `None` if that is not RAM.
    fn read_u64(&mut self, physical: u64) -> Option<u64>;

    /// Replaces the 4 bytes at `physical` by `new` if they are `expected`, atomically; whether they
    /// were. `None` if that is not RAM.
    fn compare_exchange_u32(&mut self, physical: u64, expected: u32, new: u32) -> Option<bool>;

    /// Replaces the 8 bytes at `physical` by `new` if they are `expected`, atomically; whether they
    /// were. `None` if that is not RAM.
    fn compare_exchange_u64(&mut self, physical: u64, expected: u64, new: u64) -> Option<bool>;
}

/// The registers that govern paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Width of physical addresses, CPUID 8000_0008H EAX bits 7:0; taken as 32 to 52.
    pub physical_bits: u8,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// An access to a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// A user-mode access: explicit, at privilege level 3.
    pub user: bool,
    /// RFLAGS.AC for explicit accesses, which lets the supervisor at user pages despite CR4.SMAP;
    /// false for implicit ones.
    pub alignment_check: bool,
}

impl Access {
    /// An access that an instruction makes to its operand, or its fetch.
    pub fn explicit(kind: AccessKind, cpl: u8, flags: u64) -> Self {
        Self { kind, user: cpl == 3, alignment_check: flags & rflags::AC != 0 }
    }

    /// An access to a system structure such as a descriptor table.
    pub fn implicit(kind: AccessKind) -> Self {
        Self { kind, user: false, alignment_check: false }
    }
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub physical: u64,
    /// Bytes of the page it is in: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 4 KiB without paging.
    pub page_bytes: u64,
}

/// Translates `linear` for `access`, setting accessed bits and, for a write, the dirty bit.
///
/// Stops with #PF where the tables forbid the access, and with [`Stop::Unsupported`] when a table is
/// not in RAM. Whether `linear` is canonical is the caller's concern: its upper bits are ignored.
pub fn translate(
    memory: &mut dyn PhysicalMemory,
    paging: &Paging,
    linear: u64,
    access: Access,
) -> Result<Translation, Stop> {
    let Some(format) = Format::of(paging) else {
        let physical = linear & u64::from(u32::MAX);
        return Ok(Translation { physical, page_bytes: 1 << PAGE_SHIFT });
    };
    for _ in 0..MAX_RESTARTS {
        let walk = Walk::run(memory, paging, &format, linear, access)?;
        walk.check(paging, access).map_err(|code| page_fault(paging, linear, access, code))?;
        if walk.mark(memory, &format, access)? {
            return Ok(walk.translation);
        }
    }
    Err(Stop::Unsupported("page tables that change all the time"))
}

/// The shape of the tables of a paging mode.
struct Format {
    mode: Mode,
    levels: u32,
    index_bits: u32,
    entry_bytes: u64,
    root: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Legacy,
    Pae,
    Long,
}

impl Format {
    /// `None` without paging.
    fn of(paging: &Paging) -> Option<Self> {
        /// CR3 bits 31:5 under PAE.
        const PAE_ROOT: u64 = 0xFFFF_FFE0;
        /// CR3 bits 31:12 of 32-bit paging.
        const LEGACY_ROOT: u64 = 0xFFFF_F000;
        if paging.cr0 & cr0::PG == 0 {
            return None;
        }
        Some(if paging.efer & efer::LMA != 0 {
            let levels = if paging.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
            let root = paging.cr3 & entry::ADDRESS & !reserved_address(paging);
            Self { mode: Mode::Long, levels, index_bits: 9, entry_bytes: 8, root }
        } else if paging.cr4 & cr4::PAE != 0 {
            let root = paging.cr3 & PAE_ROOT;
            Self { mode: Mode::Pae, levels: 3, index_bits: 9, entry_bytes: 8, root }
        } else {
            let root = paging.cr3 & LEGACY_ROOT;
            Self { mode: Mode::Legacy, levels: 2, index_bits: 10, entry_bytes: 4, root }
        })
    }

    fn shift(&self, level: u32) -> u32 {
        PAGE_SHIFT + self.index_bits * (level - 1)
    }

    fn entry_address(&self, table: u64, level: u32, linear: u64) -> u64 {
        let linear = if self.mode == Mode::Long { linear } else { linear & u64::from(u32::MAX) };
        let index = (linear >> self.shift(level)) & ((1 << self.index_bits) - 1);
        table + index * self.entry_bytes
    }

    fn read(&self, memory: &mut dyn PhysicalMemory, address: u64) -> Result<u64, Stop> {
        let value = match self.entry_bytes {
            4 => memory.read_u32(address).map(u64::from),
            _ => memory.read_u64(address),
        };
        value.ok_or(NOT_IN_RAM)
    }

    fn is_leaf(&self, paging: &Paging, level: u32, value: u64) -> bool {
        let large = value & entry::PAGE_SIZE != 0;
        match (self.mode, level) {
            (_, 1) => true,
            (Mode::Legacy, 2) => large && paging.cr4 & cr4::PSE != 0,
            (Mode::Pae, 2) | (Mode::Long, 2 | 3) => large,
            _ => false,
        }
    }

    /// PDPTEs under PAE hold neither rights nor an accessed bit.
    fn is_pointer(&self, level: u32) -> bool {
        self.mode == Mode::Pae && level == 3
    }

    /// The bits of an entry that must be 0 (SDM vol. 3 §4.3 to §4.5).
    fn reserved(&self, paging: &Paging, level: u32, leaf: bool) -> u64 {
        let address = reserved_address(paging);
        let large = leaf && level > 1;
        if self.mode == Mode::Legacy {
            return if large { entry::PSE_RESERVED | pse_reserved(paging) } else { 0 };
        }
        if self.is_pointer(level) {
            let above = !(u64::MAX >> (64 - entry::ADDRESS_BITS));
            return entry::POINTER_RESERVED | address | above;
        }
        let mut reserved = address;
        if paging.efer & efer::NXE == 0 {
            reserved |= entry::EXECUTE_DISABLE;
        }
        if self.mode == Mode::Pae {
            reserved |= !(u64::MAX >> (64 - entry::ADDRESS_BITS)) & !entry::EXECUTE_DISABLE;
        }
        if large {
            reserved |= (1 << self.shift(level)) - (1 << entry::LARGE_LOW);
        }
        if self.mode == Mode::Long && level >= 4 {
            reserved |= entry::PAGE_SIZE;
        }
        reserved
    }

    fn page(&self, level: u32, value: u64, linear: u64) -> Translation {
        let page_bytes = 1 << self.shift(level);
        let mut base = value & entry::ADDRESS & !(page_bytes - 1);
        if self.mode == Mode::Legacy && level == 2 {
            base |= pse_high(value);
        }
        Translation { physical: base | linear & (page_bytes - 1), page_bytes }
    }
}

const NOT_IN_RAM: Stop = Stop::Unsupported("a page table that is not in RAM");

/// Address bits of an entry beyond the physical address width.
fn reserved_address(paging: &Paging) -> u64 {
    let bits = u32::from(paging.physical_bits).clamp(32, entry::ADDRESS_BITS);
    entry::ADDRESS & !((1 << bits) - 1)
}

/// Bits 39:32 of a 4 MiB page's address stand in bits 20:13 of its entry (PSE-36).
fn pse_high(value: u64) -> u64 {
    ((value >> entry::LARGE_LOW) & 0xFF) << 32
}

fn pse_reserved(paging: &Paging) -> u64 {
    ((reserved_address(paging) >> 32) & 0xFF) << entry::LARGE_LOW
}

/// The entries that a walk came by and what they grant together.
struct Walk {
    entries: [(u64, u64); MAX_LEVELS as usize],
    /// How many of `entries` count; the last is the leaf.
    count: usize,
    user: bool,
    writable: bool,
    executable: bool,
    translation: Translation,
}

impl Walk {
    fn run(
        memory: &mut dyn PhysicalMemory,
        paging: &Paging,
        format: &Format,
        linear: u64,
        access: Access,
    ) -> Result<Self, Stop> {
        let mut walk = Self {
            entries: [(0, 0); MAX_LEVELS as usize],
            count: 0,
            user: true,
            writable: true,
            executable: true,
            translation: Translation { physical: 0, page_bytes: 0 },
        };
        let mut table = format.root;
        for level in (1..=format.levels).rev() {
            let address = format.entry_address(table, level, linear);
            let value = format.read(memory, address)?;
            if value & entry::PRESENT == 0 {
                return Err(page_fault(paging, linear, access, 0));
            }
            let leaf = format.is_leaf(paging, level, value);
            if value & format.reserved(paging, level, leaf) != 0 {
                let code = fault::PRESENT | fault::RESERVED;
                return Err(page_fault(paging, linear, access, code));
            }
            if !format.is_pointer(level) {
                walk.add(address, value);
            }
            if leaf {
                walk.translation = format.page(level, value, linear);
                break;
            }
            table = value & entry::ADDRESS;
        }
        Ok(walk)
    }

    fn add(&mut self, address: u64, value: u64) {
        self.user &= value & entry::USER != 0;
        self.writable &= value & entry::WRITABLE != 0;
        self.executable &= value & entry::EXECUTE_DISABLE == 0;
        if let Some(slot) = self.entries.get_mut(self.count) {
            *slot = (address, value);
            self.count += 1;
        }
    }

    /// The access rights (SDM vol. 3 §4.6.1); the error code where they forbid `access`.
    fn check(&self, paging: &Paging, access: Access) -> Result<(), u32> {
        let smap = paging.cr4 & cr4::SMAP != 0 && !access.alignment_check;
        let smep = paging.cr4 & cr4::SMEP != 0;
        let page_is_reachable = match (access.user, access.kind) {
            (true, _) => self.user,
            (false, AccessKind::Execute) => !(self.user && smep),
            (false, _) => !(self.user && smap),
        };
        let kind_is_allowed = match access.kind {
            AccessKind::Read => true,
            AccessKind::Execute => self.executable,
            AccessKind::Write => self.writable || (!access.user && paging.cr0 & cr0::WP == 0),
        };
        if page_is_reachable && kind_is_allowed { Ok(()) } else { Err(fault::PRESENT) }
    }

    /// Sets accessed and dirty bits; false if an entry has changed meanwhile.
    fn mark(
        &self,
        memory: &mut dyn PhysicalMemory,
        format: &Format,
        access: Access,
    ) -> Result<bool, Stop> {
        for (place, (address, value)) in self.entries.iter().take(self.count).enumerate() {
            let leaf = place + 1 == self.count;
            let dirty = leaf && access.kind == AccessKind::Write;
            let new = value | entry::ACCESSED | if dirty { entry::DIRTY } else { 0 };
            if new == *value {
                continue;
            }
            let unchanged = match format.entry_bytes {
                4 => memory.compare_exchange_u32(*address, *value as u32, new as u32),
                _ => memory.compare_exchange_u64(*address, *value, new),
            };
            if !unchanged.ok_or(NOT_IN_RAM)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn page_fault(paging: &Paging, linear: u64, access: Access, cause: u32) -> Stop {
    let nx = paging.cr4 & cr4::PAE != 0 && paging.efer & efer::NXE != 0;
    let kind = match access.kind {
        AccessKind::Read => 0,
        AccessKind::Write => fault::WRITE,
        AccessKind::Execute if nx || paging.cr4 & cr4::SMEP != 0 => fault::FETCH,
        AccessKind::Execute => 0,
    };
    let user = if access.user { fault::USER } else { 0 };
    Exception::page_fault(linear, cause | kind | user).into()
}
