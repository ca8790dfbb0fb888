//! The engine that does a request when it gets it, on the calling thread.
#![expect(unsafe_code, reason = "passes on the memory that the queue's user vouches for")]

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::Errno;

use super::bounce::{BOUNCE_BYTES, Bounce};
use super::host::{self, Direction, MAX_BUFFERS_PER_CALL};
use super::raw::RawFile;
use super::{Buffer, Completion, DiskQueue, Failure, Operation, Request};

/// Zeroes to be written where the host cannot make them otherwise. The alignment suits direct I/O.
#[repr(align(4096))]
struct Zeroes([u8; 64 * 1024]);
static ZEROES: Zeroes = Zeroes([0; 64 * 1024]);
/// How many times [`ZEROES`] go into one system call.
const ZEROES_PER_CALL: usize = 16;

/// Carries requests out by system calls, one after the other.
#[derive(Debug)]
pub(super) struct Worker {
    file: Arc<RawFile>,
    /// The buffers after a system call has done but a part.
    rest: Vec<Buffer>,
    bounce: Option<Bounce>,
}

impl Worker {
    pub fn new(file: Arc<RawFile>) -> Self {
        Self { file, rest: Vec::new(), bounce: None }
    }

    pub fn file(&self) -> &RawFile {
        &self.file
    }

    /// Does all of `request`, which was checked.
    ///
    /// # Safety
    /// The memory of the request's buffers is mapped, and for a read writable.
    #[inline]
    pub unsafe fn perform(&mut self, request: &Request<'_>) -> Result<(), Failure> {
        let Some((direction, buffers)) = data_of(&request.operation) else {
            return match request.operation {
                Operation::Discard => self.discard(request.offset, request.len),
                Operation::WriteZeroes { may_unmap, durable } => {
                    self.write_zeroes(request.offset, request.len, may_unmap)?;
                    if durable { self.flush() } else { Ok(()) }
                }
                _ => self.flush(),
            };
        };
        if self.file.must_bounce(buffers) {
            // SAFETY: as for this function.
            return unsafe { self.transfer_bounced(direction, buffers, request) };
        }
        // SAFETY: as for this function.
        unsafe { self.transfer(direction, buffers, request.offset, request.len) }
    }

    /// Moves `len` bytes, whatever number of system calls it takes.
    ///
    /// # Safety
    /// The memory of `buffers` is mapped, and writable if `direction` is to read.
    unsafe fn transfer(
        &mut self,
        direction: Direction,
        buffers: &[Buffer],
        offset: u64,
        len: u64,
    ) -> Result<(), Failure> {
        let file = self.file.file.as_fd();
        // All at once in nearly all cases.
        // SAFETY: as for this function.
        match unsafe { host::transfer(file, direction, buffers, offset) } {
            Ok(moved) if moved as u64 == len => Ok(()),
            // SAFETY: as for this function.
            result => unsafe { self.go_on(direction, buffers, (offset, len), result) },
        }
    }

    /// Does what is left of a transfer whose first call had this result.
    ///
    /// # Safety
    /// As for [`Worker::transfer`].
    unsafe fn go_on(
        &mut self,
        direction: Direction,
        buffers: &[Buffer],
        (offset, len): (u64, u64),
        first: Result<usize, Errno>,
    ) -> Result<(), Failure> {
        let mut result = first;
        let mut done = 0;
        while done < len {
            match result {
                Ok(0) => return Err(Failure::Truncated),
                Ok(moved) => done += moved as u64,
                Err(Errno::INTR) => {}
                // Not to be expected of files; the host asks for patience.
                Err(Errno::AGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
            if done < len {
                skip_into(&mut self.rest, buffers, done);
                let file = self.file.file.as_fd();
                // SAFETY: `rest` is a part of `buffers`.
                result = unsafe { host::transfer(file, direction, &self.rest, offset + done) };
            }
        }
        Ok(())
    }

    /// Does what is left of a checked read or write of which `moved` bytes were done.
    ///
    /// # Safety
    /// As for [`Worker::perform`].
    pub unsafe fn finish(&mut self, request: &Request<'_>, moved: usize) -> Result<(), Failure> {
        let Some((direction, buffers)) = data_of(&request.operation) else { return Ok(()) };
        let range = (request.offset, request.len);
        // SAFETY: as for this function.
        unsafe { self.go_on(direction, buffers, range, Ok(moved)) }
    }

    /// Moves the data by way of a buffer that direct I/O can take.
    ///
    /// # Safety
    /// The memory of `buffers` is mapped, and writable if `direction` is to read.
    unsafe fn transfer_bounced(
        &mut self,
        direction: Direction,
        buffers: &[Buffer],
        request: &Request<'_>,
    ) -> Result<(), Failure> {
        let alignment = self.file.alignment.map_or(1, |alignment| alignment.memory_bytes);
        let mut bounce = self.bounce.take().unwrap_or_else(|| Bounce::new(alignment));
        let mut done = 0;
        let mut result = Ok(());
        while done < request.len && result.is_ok() {
            let len = (request.len - done).min(BOUNCE_BYTES as u64);
            let piece = [bounce.buffer(len as usize)];
            if direction != Direction::Read {
                // SAFETY: as for this function.
                unsafe { bounce.gather(buffers, done, len as usize) };
            }
            // SAFETY: the piece is the bounce buffer's own memory.
            result = unsafe { self.transfer(direction, &piece, request.offset + done, len) };
            if direction == Direction::Read && result.is_ok() {
                // SAFETY: as for this function.
                unsafe { bounce.scatter(buffers, done, len as usize) };
            }
            done += len;
        }
        self.bounce = Some(bounce);
        result
    }

    fn flush(&self) -> Result<(), Failure> {
        retry(|| fdatasync(&self.file.file))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Failure> {
        if len == 0 {
            return Ok(());
        }
        match self.file.is_block_device {
            true => retry(|| host::discard_blocks(self.file.file.as_fd(), offset, len)),
            false => self.allocate(PUNCH, offset, len),
        }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> Result<(), Failure> {
        if len == 0 {
            return Ok(());
        }
        match self.allocate(if may_unmap { PUNCH } else { ZERO }, offset, len) {
            Err(Failure::Unsupported) => self.write_zeroes_plainly(offset, len),
            result => result,
        }
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Failure> {
        retry(|| fallocate(&self.file.file, mode, offset, len))
    }

    /// Writes zeroes from memory.
    fn write_zeroes_plainly(&mut self, offset: u64, len: u64) -> Result<(), Failure> {
        let zeroes = |len: usize| Buffer::new(ZEROES.0.as_ptr().cast_mut(), len);
        let unit = ZEROES.0.len();
        let mut done = 0;
        while done < len {
            let left = len - done;
            let whole = usize::try_from(left / unit as u64).unwrap_or(usize::MAX);
            let result = if whole == 0 {
                // SAFETY: they are only read.
                unsafe {
                    self.transfer(Direction::Write, &[zeroes(left as usize)], offset + done, left)
                }
                .map(|()| left)
            } else {
                let count = whole.min(ZEROES_PER_CALL);
                let buffers = [zeroes(unit); ZEROES_PER_CALL];
                let buffers = buffers.get(..count).unwrap_or_default();
                let bytes = (count * unit) as u64;
                // SAFETY: they are only read.
                unsafe { self.transfer(Direction::Write, buffers, offset + done, bytes) }
                    .map(|()| bytes)
            };
            done += result?;
        }
        Ok(())
    }
}

/// Which data an operation moves where.
pub(super) fn data_of<'a>(operation: &Operation<'a>) -> Option<(Direction, &'a [Buffer])> {
    match *operation {
        Operation::Read(buffers) => Some((Direction::Read, buffers)),
        Operation::Write { buffers, durable: false } => Some((Direction::Write, buffers)),
        Operation::Write { buffers, durable: true } => Some((Direction::WriteDurably, buffers)),
        Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => None,
    }
}

/// Gives the range back to the host; it then reads as zeroes.
pub(super) const PUNCH: FallocateFlags =
    FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// Makes the range read as zeroes, with its space kept.
pub(super) const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Repeats a call that a signal interrupts.
fn retry(call: impl Fn() -> Result<(), Errno>) -> Result<(), Failure> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result.map_err(Failure::from),
        }
    }
}

/// Fills `rest` with what is left of `buffers` after `done` bytes, as far as one system call
/// takes it.
fn skip_into(rest: &mut Vec<Buffer>, buffers: &[Buffer], done: u64) {
    let mut skip = done;
    rest.clear();
    let left = buffers.iter().filter_map(|buffer| {
        let skipped = skip.min(buffer.len() as u64);
        skip -= skipped;
        let left = buffer.skip(skipped as usize);
        (!left.is_empty()).then_some(left)
    });
    rest.extend(left.take(MAX_BUFFERS_PER_CALL));
}

/// A [`DiskQueue`] whose requests are done once they are submitted.
#[derive(Debug)]
pub(super) struct SyncQueue {
    worker: Worker,
    done: VecDeque<Completion>,
    depth: u16,
}

impl SyncQueue {
    pub fn new(file: Arc<RawFile>, depth: u16) -> Self {
        let done = VecDeque::with_capacity(depth.into());
        Self { worker: Worker::new(file), done, depth }
    }
}

impl DiskQueue for SyncQueue {
    unsafe fn submit(&mut self, request: &Request<'_>) {
        let checked = match request.tag < self.depth {
            true => self.worker.file().check(request),
            false => Err(Failure::Malformed),
        };
        // SAFETY: as for this function.
        let result = checked.and_then(|()| unsafe { self.worker.perform(request) });
        self.done.push_back(Completion { tag: request.tag, result });
    }

    fn start(&mut self) {}

    fn next_completion(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn arm(&mut self) -> bool {
        !self.done.is_empty()
    }

    fn wait(&mut self) {}
}
