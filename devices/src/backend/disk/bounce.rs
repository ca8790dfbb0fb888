//! A buffer that direct I/O can take, for data that lies in memory as it cannot.
#![expect(unsafe_code, reason = "copies to and from memory that a guest may change meanwhile")]

use std::ptr;

use super::Buffer;

/// How much is moved at a time.
pub(super) const BOUNCE_BYTES: usize = 256 * 1024;
/// The largest alignment that direct I/O is known to ask for.
const MAX_ALIGNMENT: usize = 64 * 1024;

/// [`BOUNCE_BYTES`] of memory, aligned as asked for.
#[derive(Debug)]
pub(super) struct Bounce {
    memory: Box<[u8]>,
    start: usize,
}

impl Bounce {
    /// Aligned to `alignment` bytes, a power of two; more than 64 KiB counts as that.
    pub fn new(alignment: usize) -> Self {
        let alignment = alignment.min(MAX_ALIGNMENT);
        let memory = vec![0; BOUNCE_BYTES + alignment].into_boxed_slice();
        let start = memory.as_ptr().align_offset(alignment).min(alignment);
        Self { memory, start }
    }

    /// The first `len` bytes, at most [`BOUNCE_BYTES`].
    pub fn buffer(&mut self, len: usize) -> Buffer {
        let room = self.memory.get_mut(self.start..).unwrap_or_default();
        let room = room.get_mut(..len.min(BOUNCE_BYTES)).unwrap_or_default();
        Buffer::new(room.as_mut_ptr(), room.len())
    }

    /// Copies from `buffers`, `skip` bytes into them, until `len` bytes are here.
    ///
    /// # Safety
    /// The memory of `buffers` is mapped.
    pub unsafe fn gather(&mut self, buffers: &[Buffer], skip: u64, len: usize) {
        self.each_piece(buffers, skip, len, |bounce, outer| {
            // SAFETY: both are mapped and `outer.len()` long; `bounce` belongs to `self` alone.
            unsafe { ptr::copy_nonoverlapping(outer.start(), bounce, outer.len()) }
        });
    }

    /// Copies the first `len` bytes from here to `buffers`, `skip` bytes into them.
    ///
    /// # Safety
    /// The memory of `buffers` is mapped and writable.
    pub unsafe fn scatter(&mut self, buffers: &[Buffer], skip: u64, len: usize) {
        self.each_piece(buffers, skip, len, |bounce, outer| {
            // SAFETY: both are mapped and `outer.len()` long; `bounce` belongs to `self` alone.
            unsafe { ptr::copy_nonoverlapping(bounce, outer.start(), outer.len()) }
        });
    }

    /// Calls `copy` with each stretch of `buffers` between `skip` and `skip + len` and the place
    /// in the bounce buffer that belongs to it.
    fn each_piece(
        &mut self,
        buffers: &[Buffer],
        skip: u64,
        len: usize,
        mut copy: impl FnMut(*mut u8, Buffer),
    ) {
        let mut room = self.buffer(len);
        let mut skip = skip;
        for outer in buffers {
            let skipped = skip.min(outer.len() as u64);
            skip -= skipped;
            let outer = outer.skip(skipped as usize);
            let piece = Buffer::new(outer.start(), outer.len().min(room.len()));
            copy(room.start(), piece);
            room = room.skip(piece.len());
        }
    }
}
