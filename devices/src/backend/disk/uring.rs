//! The engine that has many requests under way, through io_uring(7).
#![expect(unsafe_code, reason = "hands memory to the kernel that the queue's user vouches for")]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use io_uring::register::Restriction;
use io_uring::{EnterFlags, IoUring, Probe, opcode, squeue, types};
use rustix::io::Errno;

use super::host::{Direction, MAX_BUFFERS_PER_CALL, as_iovecs};
use super::raw::RawFile;
use super::sync::{PUNCH, Worker, ZERO, data_of};
use super::{Buffer, Completion, DiskQueue, Failure, Operation, Request};

/// The image in the ring's table of files.
const FILE: types::Fixed = types::Fixed(0);

/// What is ever asked of a ring.
const OPERATIONS: [u8; 4] =
    [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];

/// Whether the host has an io_uring that can serve `file`.
///
/// # Errors
/// What is in the way: an old kernel, a policy that forbids it, no memory to lock.
pub(super) fn probe(file: BorrowedFd<'_>) -> io::Result<()> {
    let ring = IoUring::new(1)?;
    // Linux 5.11 has it. The switch for the eventfd, 5.8, does not tell by itself.
    if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
        return Err(Errno::NOSYS.into());
    }
    let mut known = Probe::new();
    ring.submitter().register_probe(&mut known)?;
    if !OPERATIONS.iter().all(|code| known.is_supported(*code)) {
        return Err(Errno::NOSYS.into());
    }
    ring.submitter().register_files(&[file.as_raw_fd()])
}

/// A [`DiskQueue`] on a ring.
pub(super) struct UringQueue {
    ring: IoUring,
    /// Requests that the ring has or gets at the next start, by tag. They refer to memory as
    /// [`DiskQueue::submit`] has it: for as long as they are here.
    slots: Vec<Option<Request<'static>>>,
    /// How many of `slots` are taken.
    taken: usize,
    /// The tags of entries pushed since the last start, in order.
    pushed: Vec<u16>,
    /// Completions that need not be asked of the ring.
    done: VecDeque<Completion>,
    worker: Worker,
    /// Completions make the eventfd readable at present.
    armed: bool,
    /// The ring takes no more: `worker` does everything. What it had taken still completes.
    broken: bool,
}

impl fmt::Debug for UringQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringQueue").field("taken", &self.taken).finish_non_exhaustive()
    }
}

impl UringQueue {
    /// # Errors
    /// The host refuses a ring of this size.
    pub fn new(file: Arc<RawFile>, depth: u16, wake: BorrowedFd<'_>) -> io::Result<Self> {
        let entries = u32::from(depth).next_power_of_two();
        // Older kernels do not know that a thread which is not interrupted for completions learns
        // of them at its next system call, which is soon.
        let mut builder = IoUring::builder();
        builder.setup_r_disabled();
        let ring = match builder.clone().setup_coop_taskrun().build(entries) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => builder.build(entries)?,
            ring => ring?,
        };
        ring.submitter().register_files(&[file.file.as_raw_fd()])?;
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        restrict(&ring)?;
        let mut queue = Self {
            ring,
            slots: vec![None; depth.into()],
            taken: 0,
            pushed: Vec::with_capacity(depth.into()),
            done: VecDeque::with_capacity(depth.into()),
            worker: Worker::new(file),
            armed: true,
            broken: false,
        };
        queue.disarm();
        Ok(queue)
    }

    /// Puts `request` into the ring; an error tells how it ended already.
    ///
    /// # Safety
    /// As for [`DiskQueue::submit`].
    unsafe fn enqueue(&mut self, request: &Request<'_>) -> Result<(), Result<(), Failure>> {
        let free = self.slots.get(usize::from(request.tag)).is_some_and(Option::is_none);
        if !free {
            return Err(Err(Failure::Malformed));
        }
        self.worker.file().check(request).map_err(Err)?;
        let entry = match entry_for(self.worker.file(), request) {
            Some(entry) if !self.broken => entry.user_data(request.tag.into()),
            // SAFETY: as for this function.
            _ => return Err(unsafe { self.worker.perform(request) }),
        };
        // SAFETY: what the entry refers to lives until the completion is taken, and the drop of
        // the queue takes all completions.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            // Not to be expected: the ring has an entry a slot.
            // SAFETY: as for this function.
            return Err(unsafe { self.worker.perform(request) });
        }
        if let Some(slot) = self.slots.get_mut(usize::from(request.tag)) {
            // SAFETY: the request leaves its slot when its completion is taken.
            *slot = Some(unsafe { for_ever(request) });
            self.taken += 1;
            self.pushed.push(request.tag);
        }
        Ok(())
    }

    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.ring.completion().disable_eventfd();
        }
    }

    /// Moves completions from the ring to `done`.
    fn reap(&mut self) {
        while let Some(entry) = { self.ring.completion().next() } {
            let tag = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
            let slot = self.slots.get_mut(usize::from(tag));
            let Some(request) = slot.and_then(Option::take) else { continue };
            self.taken -= 1;
            let result = self.settle(&request, entry.result());
            self.done.push_back(Completion { tag, result });
        }
    }

    /// What the ring's answer means; what is left to do is done.
    fn settle(&mut self, request: &Request<'_>, answer: i32) -> Result<(), Failure> {
        match usize::try_from(answer) {
            Ok(moved) if data_of(&request.operation).is_some() => {
                if moved as u64 == request.len {
                    return Ok(());
                }
                // SAFETY: the request's memory is there until its completion is taken.
                unsafe { self.worker.finish(request, moved) }
            }
            Ok(_) => Ok(()),
            Err(_) => match Errno::from_raw_os_error(answer.saturating_neg()) {
                Errno::INTR | Errno::AGAIN | Errno::CANCELED | Errno::OPNOTSUPP => {
                    // SAFETY: as above.
                    unsafe { self.worker.perform(request) }
                }
                error => Err(error.into()),
            },
        }
    }

    /// The kernel does not take what was pushed: from now on everything is done one by one.
    fn give_up(&mut self, error: &io::Error) {
        tracing::warn!(%error, "io_uring fails; the disk's queue goes on with engine=sync");
        self.broken = true;
        let left = self.ring.submission().len();
        let first = self.pushed.len().saturating_sub(left);
        let tags: Vec<u16> = self.pushed.drain(first..).collect();
        for tag in tags {
            let slot = self.slots.get_mut(usize::from(tag));
            let Some(request) = slot.and_then(Option::take) else { continue };
            self.taken -= 1;
            // SAFETY: the request's memory is there until its completion is taken, and the ring
            // is never asked again to take the entry.
            let result = unsafe { self.worker.perform(&request) };
            self.done.push_back(Completion { tag, result });
        }
    }

    /// Waits for a completion in the ring.
    fn wait_for_ring(&self) {
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: it hands over no entries and no argument.
        let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, flags, None) };
        if result.is_err() {
            // A signal, most likely. Completions arrive in any case.
            std::thread::yield_now();
        }
    }
}

/// Has `ring` take nothing from now on but [`OPERATIONS`] on the files that are in its table: what is
/// asked of a ring passes by every filter of system calls.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut allowed: Vec<_> = OPERATIONS.iter().map(|code| Restriction::sqe_op(*code)).collect();
    allowed.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

/// The ring's form of `request`; `None` if it has none.
fn entry_for(file: &RawFile, request: &Request<'_>) -> Option<squeue::Entry> {
    if let Some((direction, buffers)) = data_of(&request.operation) {
        if buffers.is_empty() || buffers.len() > MAX_BUFFERS_PER_CALL || file.must_bounce(buffers) {
            return None;
        }
        if direction == Direction::Write && file.alignment.is_none() {
            // A copy to the page cache. Most file systems do not let the ring do that: it would
            // wake a thread of its own for each, and let those write one after the other.
            return None;
        }
        let (iovecs, count) = (as_iovecs(buffers), buffers.len() as u32);
        return Some(match direction {
            Direction::Read => {
                opcode::Readv::new(FILE, iovecs, count).offset(request.offset).build()
            }
            Direction::Write | Direction::WriteDurably => {
                let durable = direction == Direction::WriteDurably;
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Writev::new(FILE, iovecs, count);
                write.offset(request.offset).rw_flags(flags).build()
            }
        });
    }
    let mode = match request.operation {
        Operation::Discard if file.is_block_device => return None,
        // Two calls, one after the other.
        Operation::WriteZeroes { durable: true, .. } => return None,
        Operation::Discard | Operation::WriteZeroes { may_unmap: true, .. } => PUNCH,
        Operation::WriteZeroes { may_unmap: false, .. } => ZERO,
        _ => {
            return Some(opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build());
        }
    };
    if request.len == 0 {
        return None;
    }
    let allocate = opcode::Fallocate::new(FILE, request.len).offset(request.offset);
    Some(allocate.mode(mode.bits().cast_signed()).build())
}

/// `request` without its lifetime.
///
/// # Safety
/// The result is used only while the slice of buffers is there.
unsafe fn for_ever(request: &Request<'_>) -> Request<'static> {
    let longer = |buffers: &[Buffer]| {
        // SAFETY: as for this function.
        unsafe { std::slice::from_raw_parts(buffers.as_ptr(), buffers.len()) }
    };
    let operation = match request.operation {
        Operation::Read(buffers) => Operation::Read(longer(buffers)),
        Operation::Write { buffers, durable } => {
            Operation::Write { buffers: longer(buffers), durable }
        }
        Operation::Flush => Operation::Flush,
        Operation::Discard => Operation::Discard,
        Operation::WriteZeroes { may_unmap, durable } => {
            Operation::WriteZeroes { may_unmap, durable }
        }
    };
    Request { tag: request.tag, offset: request.offset, len: request.len, operation }
}

impl DiskQueue for UringQueue {
    unsafe fn submit(&mut self, request: &Request<'_>) {
        // SAFETY: as for this function.
        if let Err(result) = unsafe { self.enqueue(request) } {
            self.done.push_back(Completion { tag: request.tag, result });
        }
    }

    fn start(&mut self) {
        self.disarm();
        while !self.pushed.is_empty() {
            match self.ring.submit() {
                Ok(_) if self.ring.submission().is_empty() => self.pushed.clear(),
                // The kernel took a part; it says why when asked again.
                Ok(taken) if taken > 0 => {}
                Ok(_) => self.give_up(&io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.give_up(&error),
            }
            if self.broken {
                self.pushed.clear();
            }
        }
    }

    fn next_completion(&mut self) -> Option<Completion> {
        if self.done.is_empty() && self.taken > 0 {
            self.reap();
        }
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.taken + self.done.len()
    }

    fn arm(&mut self) -> bool {
        if !self.done.is_empty() {
            return true;
        }
        if self.taken == 0 {
            return false;
        }
        if !self.armed {
            self.armed = true;
            self.ring.completion().enable_eventfd();
            // The kernel posts a completion, then looks at the switch; here it is the other way
            // round.
            fence(Ordering::SeqCst);
        }
        !self.ring.completion().is_empty()
    }

    fn wait(&mut self) {
        self.start();
        while self.done.is_empty() && self.taken > 0 {
            self.reap();
            if self.done.is_empty() {
                self.wait_for_ring();
            }
        }
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        while self.taken > 0 {
            self.wait();
            self.done.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use vmm_sys_util::eventfd::EventFd;

    use super::super::{Disk, DiskOptions, Engine, RawDisk};
    use super::*;

    fn open(image: &Path) -> RawDisk {
        let engine = Some(Engine::IoUring);
        let path = image.to_owned();
        RawDisk::open(&DiskOptions { path, read_only: false, direct: false, engine }).unwrap()
    }

    #[test]
    fn a_ring_takes_nothing_but_operations_on_the_image() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 16).unwrap();
        let disk = open(image.path());
        let wake = EventFd::new(0).unwrap();
        // SAFETY: the eventfd is open for as long as it is borrowed.
        let wake = unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) };
        let mut queue = UringQueue::new(disk.file(), 8, wake).unwrap();
        let here = types::Fd(libc::AT_FDCWD);
        let other = types::Fd(disk.file().file.as_raw_fd());
        let tries = [
            opcode::OpenAt::new(here, c"/etc/passwd".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Nop::new().build(),
            opcode::Fsync::new(other).build(),
        ];

        for entry in tries {
            // SAFETY: what the entry refers to is there for ever.
            unsafe { queue.ring.submission().push(&entry) }.unwrap();
            queue.ring.submit_and_wait(1).unwrap();
            let answer = { queue.ring.completion().next() }.unwrap().result();
            assert_eq!(answer, -libc::EACCES, "{entry:?}");
        }
        let more = queue.ring.submitter().register_files(&[0]).unwrap_err();
        assert_eq!(more.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn what_the_kernel_does_not_take_is_done_without_the_ring() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 16).unwrap();
        let disk = open(image.path());
        let wake = EventFd::new(0).unwrap();
        // SAFETY: the eventfd is open for as long as it is borrowed.
        let wake = unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) };
        let mut queue = UringQueue::new(disk.file(), 8, wake).unwrap();
        let mut data = [7u8; 512];
        let buffers = [Buffer::new(data.as_mut_ptr(), 512)];
        let write = Operation::Write { buffers: &buffers, durable: true };
        let request =
            |tag: u16| Request { tag, offset: u64::from(tag) * 512, len: 512, operation: write };
        for tag in 0..4 {
            // SAFETY: the data outlives the queue.
            unsafe { queue.submit(&request(tag)) };
        }

        queue.give_up(&io::ErrorKind::OutOfMemory.into());
        for tag in 4..8 {
            // SAFETY: as above.
            unsafe { queue.submit(&request(tag)) };
        }
        queue.start();

        assert_eq!(queue.in_flight(), 8);
        let tags = std::iter::from_fn(|| {
            queue.wait();
            queue.next_completion()
        });
        assert!(tags.map(|done| (done.tag, done.result)).eq((0..8).map(|tag| (tag, Ok(())))));
        let bytes = fs::read(image.path()).unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 7));
        assert!(bytes[4096..].iter().all(|byte| *byte == 0));
        assert_eq!(disk.geometry().capacity, 1 << 16);
    }
}
