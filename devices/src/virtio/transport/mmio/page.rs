//! The registers as the driver reads them, in memory.
//!
//! Reading a register of a virtio device has no effect, so that all that a driver may read can stand
//! in a page of memory, for whoever answers the read: this process, or KVM, which lets the guest
//! read the page itself and leaves but the writes to this process.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{MmapRegion, VolatileMemory};

use super::MMIO_BYTES;

/// The bytes of a word, the unit in which pages are accessed.
const WORD_BYTES: usize = size_of::<u32>();

/// Memory for the registers of several devices, a page each, one after the other.
#[derive(Clone)]
pub struct RegisterPages(Arc<MmapRegion<()>>);

impl fmt::Debug for RegisterPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RegisterPages").field(&self.size_bytes()).finish()
    }
}

impl RegisterPages {
    /// Memory for `count` devices, one at the least.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(count: usize) -> io::Result<Self> {
        let bytes = count.saturating_mul(MMIO_BYTES as usize);
        Ok(Self(Arc::new(MmapRegion::new(bytes).map_err(io::Error::other)?)))
    }

    /// Where the memory starts in this process, at a page. It is there for as long as there is a
    /// clone of this or one of its pages is in use.
    pub fn host_address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// The length in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.size() as u64
    }

    /// The pages, each for one device.
    pub fn iter(&self) -> impl Iterator<Item = RegisterPage> + '_ {
        let starts = (0..self.0.size()).step_by(MMIO_BYTES as usize);
        starts.map(|start| RegisterPage { pages: self.clone(), start })
    }
}

/// The memory for one device's registers.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    pages: RegisterPages,
    /// In bytes from the start of all pages.
    start: usize,
}

impl RegisterPage {
    /// The word at `offset` bytes from the page's start, in the byte order of the guest. Every word
    /// of the page is aligned; there is none past the page or off its place.
    #[inline]
    pub(super) fn word(&self, offset: usize) -> Option<&AtomicU32> {
        let is_within = offset < MMIO_BYTES as usize;
        is_within.then(|| self.pages.0.get_atomic_ref(self.start + offset).ok()).flatten()
    }

    /// Makes it the page of a device without registers. What is not there reads as all ones, a length
    /// of shared memory among it (virtio 1.2 §4.2.2, SHMLenLow), but for the configuration space.
    pub(super) fn fill(&self) {
        for register in (0..VIRTIO_MMIO_CONFIG).step_by(WORD_BYTES) {
            self.set(register, u32::MAX);
        }
    }

    /// Writes the word of a register.
    pub(super) fn set(&self, register: u32, value: u32) {
        if let Some(word) = self.word(register as usize) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Reads `data.len()` bytes at `offset`; past the page's end there are ones.
    pub(in crate::virtio::transport) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut at = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut rest = data;
        while !rest.is_empty() {
            let within = at % WORD_BYTES;
            let count = rest.len().min(WORD_BYTES - within);
            let (part, others) = rest.split_at_mut(count);
            let word = self.word(at - within).map_or(u32::MAX, |w| w.load(Ordering::Acquire));
            part.iter_mut()
                .zip(word.to_ne_bytes().iter().skip(within))
                .for_each(|(to, from)| *to = *from);
            at = at.saturating_add(count);
            rest = others;
        }
    }

    /// Writes `data` at `offset`, each word that it touches at once; what lies past the page's end
    /// is lost. Whoever else writes these words must wait meanwhile.
    pub(super) fn write(&self, offset: usize, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let within = at % WORD_BYTES;
            let (part, others) = rest.split_at(rest.len().min(WORD_BYTES - within));
            if let Some(word) = self.word(at - within) {
                let mut bytes = word.load(Ordering::Relaxed).to_ne_bytes();
                bytes.iter_mut().skip(within).zip(part).for_each(|(to, from)| *to = *from);
                word.store(u32::from_ne_bytes(bytes), Ordering::Release);
            }
            at = at.saturating_add(part.len());
            rest = others;
        }
    }
}
