//! The thread that serves one queue of a disk.
//!
//! It sleeps in a read of the queue's kick, which the disk's completions write to as well: a
//! request that is done at once costs the read, the disk's system call and the interrupt, and
//! nothing else.
#![expect(unsafe_code, reason = "hands the guest's memory to the disk")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vmm_sys_util::eventfd::EventFd;

use super::metrics::DiskMetrics;
use super::request::{Command, Kind, Offers, Refusal, parse};
use crate::backend::disk::{Buffer, Completion, DiskQueue, Failure, Operation, Request};
use crate::rate_limit::{LogLimit, Throttle};
use crate::virtio::chain::Chain;
use crate::virtio::desk::{Desk, Taken};
use crate::virtio::pace::Pace;
use crate::virtio::queue::Queue;

/// The most requests that are taken before completions are looked for and the driver is told.
const BATCH: usize = 32;
/// No request is taken while so many bytes are on their way, so that a pause, a reset and the end do
/// not wait for all that a driver may have put into a queue. A request that is larger by itself is
/// carried out, up to [`MAX_REQUEST_BYTES`](super::request::MAX_REQUEST_BYTES).
const MAX_BYTES_IN_FLIGHT: u64 = 64 << 20;
/// Errors of the host are logged this often at the most.
const LOG_EVERY: Duration = Duration::from_secs(5);

const S_OK: u8 = VIRTIO_BLK_S_OK as u8;
const S_IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const S_UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// What all queues of a disk share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The disk's name in the log.
    pub name: String,
    /// What the guest gets as the serial number.
    pub id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub offers: Offers,
    /// Writes need not reach the medium before they complete (§5.2.6.2).
    pub write_back: AtomicBool,
    pub metrics: DiskMetrics,
    log: LogLimit,
}

impl Shared {
    pub fn new(name: &str, id: &str, offers: Offers) -> Self {
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            name: name.to_owned(),
            id: bytes,
            offers,
            write_back: AtomicBool::new(true),
            metrics: DiskMetrics::default(),
            log: LogLimit::new(LOG_EVERY),
        }
    }

    /// Counts and logs that the host failed a request.
    fn host_failed(&self, command: &Command, failure: Failure) {
        self.metrics.host_errors.add(1);
        if let Some(others) = self.log.pass(Instant::now()) {
            let Command { kind, offset, len } = command;
            tracing::warn!(
                disk = self.name, ?kind, offset, len, error = %failure, others,
                "the host failed a request; the guest gets an I/O error"
            );
        }
    }
}

/// A request's place while it is under way.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    command: Command,
}

/// One queue's way from the driver to the disk and back.
pub(super) struct Worker {
    /// Before `slots`: dropping it waits for requests that use their memory.
    disk: Box<dyn DiskQueue>,
    /// By tag.
    slots: Vec<Slot>,
    /// Tags without a request.
    free: Vec<u16>,
    throttle: Option<Throttle>,
    /// No request is taken before the throttle's timer fires.
    throttled: bool,
    /// Of what is in flight.
    bytes_in_flight: u64,
    pace: Pace,
    shared: Arc<Shared>,
}

impl Worker {
    /// Serves queues of up to `depth` entries.
    pub fn new(
        disk: Box<dyn DiskQueue>,
        depth: u16,
        throttle: Option<Throttle>,
        shared: Arc<Shared>,
    ) -> Self {
        let idle = Command { kind: Kind::Flush, offset: 0, len: 0 };
        let slot = |_| Slot { chain: Chain::new(), command: idle };
        Self {
            disk,
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            throttle,
            throttled: false,
            bytes_in_flight: 0,
            pace: Pace::default(),
            shared,
        }
    }

    /// The thread's life: serves what lies on `desk`.
    pub fn run(mut self, desk: &Desk<Option<Queue>>) {
        while let Some(mut taken) = Taken::next(desk) {
            if let Some(queue) = &mut taken.work {
                self.serve(queue, desk);
            }
        }
    }

    /// Serves `queue` until it shall stop, and finishes what is in flight.
    fn serve(&mut self, queue: &mut Queue, desk: &Desk<Option<Queue>>) {
        queue.set_error_status(S_IOERR);
        self.throttled = false;
        // The driver may have filled it before.
        while !desk.stops() {
            if self.turn(queue, desk) {
                continue;
            }
            if let Err(error) = self.wait(desk.kick()) {
                // Nothing that a host is known to do.
                tracing::error!(disk = self.shared.name, %error, "a queue stops: no more kicks");
                desk.refuse();
                break;
            }
            self.pace.woken();
        }
        while self.disk.in_flight() > 0 {
            self.disk.wait();
            self.complete_all(queue);
        }
        queue.signal();
    }

    /// Takes a batch, starts it and completes what is done; whether there is more to do at once.
    fn turn(&mut self, queue: &mut Queue, desk: &Desk<Option<Queue>>) -> bool {
        queue.disable_kicks();
        let mut room = BATCH;
        while room > 0 && !self.is_held_up() && !desk.stops() && self.take(queue) {
            room -= 1;
        }
        self.pace.saw(BATCH - room);
        self.disk.start();
        self.complete_all(queue);
        queue.signal();
        if room == 0 {
            return true;
        }
        // A queue that must wait needs no kicks.
        (!self.is_held_up() && queue.enable_kicks()) || self.disk.arm()
    }

    /// Whether requests stay in the queue until a timer fires or one in flight is done.
    fn is_held_up(&self) -> bool {
        self.throttled || self.free.is_empty() || self.bytes_in_flight >= MAX_BYTES_IN_FLIGHT
    }

    /// Takes one request and starts or answers it; false when there is none to be taken.
    #[inline]
    fn take(&mut self, queue: &mut Queue) -> bool {
        let Some(tag) = self.free.pop() else { return false };
        let Some(slot) = self.slots.get_mut(usize::from(tag)) else { return false };
        if !queue.pop(&mut slot.chain) {
            self.free.push(tag);
            return false;
        }
        let command = match parse(&mut slot.chain, self.shared.offers) {
            Ok(command) => command,
            Err(refusal) => {
                self.shared.metrics.refused.add(1);
                match refusal {
                    Refusal::NoStatus => queue.push(&mut slot.chain, 0),
                    Refusal::Malformed => answer(queue, &mut slot.chain, S_IOERR, 0),
                    Refusal::Unsupported => answer(queue, &mut slot.chain, S_UNSUPP, 0),
                }
                self.free.push(tag);
                return true;
            }
        };
        if let Some(throttle) = &mut self.throttle
            && !is_admitted(throttle, &command, &self.shared)
        {
            queue.put_back(&mut slot.chain);
            self.free.push(tag);
            self.throttled = true;
            return false;
        }
        if command.kind == Kind::GetId {
            let written = slot.chain.write(&self.shared.id) as u64;
            answer(queue, &mut slot.chain, S_OK, written);
            self.free.push(tag);
            return true;
        }
        slot.command = command;
        self.bytes_in_flight += command.bytes();
        let operation = operation(&command, &slot.chain, &self.shared);
        let request = Request { tag, offset: command.offset, len: command.len, operation };
        // SAFETY: the chain stays in its slot, untouched, until the completion is taken, and keeps
        // the guest's memory mapped; the disk is dropped before the slots.
        unsafe { self.disk.submit(&request) };
        true
    }

    fn complete_all(&mut self, queue: &mut Queue) {
        while let Some(completion) = self.disk.next_completion() {
            self.complete(queue, completion);
        }
    }

    /// Answers the request of `completion`.
    fn complete(&mut self, queue: &mut Queue, completion: Completion) {
        let Some(slot) = self.slots.get_mut(usize::from(completion.tag)) else { return };
        self.bytes_in_flight -= slot.command.bytes();
        let metrics = &self.shared.metrics;
        match completion.result {
            Ok(()) => {
                count_success(&slot.command, metrics);
                match slot.command.kind {
                    Kind::Read => answer_read(queue, &mut slot.chain),
                    _ => answer(queue, &mut slot.chain, S_OK, 0),
                }
            }
            Err(Failure::Unsupported) => {
                metrics.refused.add(1);
                answer(queue, &mut slot.chain, S_UNSUPP, 0);
            }
            Err(failure) => {
                match failure {
                    Failure::Host(_) | Failure::Truncated => {
                        self.shared.host_failed(&slot.command, failure);
                    }
                    _ => metrics.refused.add(1),
                }
                answer(queue, &mut slot.chain, S_IOERR, 0);
            }
        }
        self.free.push(completion.tag);
    }

    /// Waits for a kick, a completion or the throttle's timer.
    fn wait(&mut self, kick: &EventFd) -> io::Result<()> {
        let throttle = match &mut self.throttle {
            Some(throttle) if self.throttled => throttle,
            _ => return read_kick(kick),
        };
        // SAFETY: both descriptors are open for as long as they are borrowed.
        let timer = unsafe { BorrowedFd::borrow_raw(throttle.as_raw_fd()) };
        // SAFETY: as above.
        let kicked = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
        let mut ready = [PollFd::new(&timer, PollFlags::IN), PollFd::new(&kicked, PollFlags::IN)];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result?,
        };
        let [timer, kicked] = ready.map(|fd| !fd.revents().is_empty());
        if timer {
            self.throttled = false;
            throttle.clear()?;
        }
        if kicked { read_kick(kick) } else { Ok(()) }
    }
}

/// Waits for a kick and takes all there are.
fn read_kick(kick: &EventFd) -> io::Result<()> {
    match kick.read() {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

fn is_admitted(throttle: &mut Throttle, command: &Command, shared: &Shared) -> bool {
    match throttle.admit(command.bytes()) {
        Ok(true) => true,
        Ok(false) => {
            shared.metrics.throttled.add(1);
            false
        }
        Err(error) => {
            if shared.log.pass(Instant::now()).is_some() {
                tracing::warn!(disk = shared.name, %error, "the disk's rate is not limited");
            }
            true
        }
    }
}

fn operation<'a>(command: &Command, chain: &'a Chain, shared: &Shared) -> Operation<'a> {
    let durable = || shared.offers.flush && !shared.write_back.load(Ordering::Relaxed);
    match command.kind {
        Kind::Read => Operation::Read(Buffer::from_iovecs(chain.writable())),
        Kind::Write => {
            Operation::Write { buffers: Buffer::from_iovecs(chain.readable()), durable: durable() }
        }
        Kind::Discard => Operation::Discard,
        Kind::WriteZeroes { may_unmap } => Operation::WriteZeroes { may_unmap, durable: durable() },
        // An id is not asked of the disk.
        Kind::Flush | Kind::GetId => Operation::Flush,
    }
}

/// Counts a request that succeeded.
fn count_success(command: &Command, metrics: &DiskMetrics) {
    match command.kind {
        Kind::Read => {
            metrics.reads.add(1);
            metrics.read_bytes.add(command.len);
        }
        Kind::Write => {
            metrics.writes.add(1);
            metrics.write_bytes.add(command.len);
        }
        Kind::Flush => metrics.flushes.add(1),
        Kind::Discard => metrics.discards.add(1),
        Kind::WriteZeroes { .. } => metrics.write_zeroes.add(1),
        Kind::GetId => {}
    }
}

/// Gives `chain` back with `status` in its last byte, after `data` bytes that the device wrote.
fn answer(queue: &mut Queue, chain: &mut Chain, status: u8, data: u64) {
    chain.write_status(status);
    // What was written is told without gaps from the first byte on (§2.7.8), so that the status
    // counts only when all before it was written.
    let written = if chain.writable_bytes() == 0 { data.saturating_add(1) } else { data };
    queue.push(chain, u32::try_from(written).unwrap_or(u32::MAX));
}

/// Gives back a `chain` whose data the disk wrote, all of it.
fn answer_read(queue: &mut Queue, chain: &mut Chain) {
    chain.write_status(S_OK);
    let written = chain.writable_bytes().saturating_add(1);
    queue.push(chain, u32::try_from(written).unwrap_or(u32::MAX));
}
