//! Queues served on the event loop, for devices whose requests are quickly done.
//!
//! A device writes what it does with one request ([`QueueHandler`]); batches, kicks, interrupts
//! and the life cycle of [`VirtioDevice`](super::device::VirtioDevice) are here.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chain::Chain;
use super::device::{ActivateError, Activation, QueueSlot};
use super::queue::Queue;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done; so many bytes of it were written.
    Done(u32),
    /// It stays in the queue until one of the handler's own descriptors is ready.
    Later,
}

/// What a device does with requests. Called on the event loop's thread and never while the device
/// is paused.
pub trait QueueHandler: Send + 'static {
    /// Carries out one request of queue `index`. Must not wait.
    fn handle(&mut self, index: u16, chain: &mut Chain) -> Answer;

    /// Descriptors of the handler's own for the event loop to watch. Constant, and they outlive
    /// the handler's place on the loop.
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// `source` is readable: makes it unreadable and names the queue to serve, if any.
    fn on_source(&mut self, source: RawFd) -> Option<u16> {
        let _ = source;
        None
    }

    /// The driver reset the device.
    fn reset(&mut self) {}
}

/// The device's side: what [`VirtioDevice`](super::device::VirtioDevice) asks for, but for
/// identity, features and configuration.
#[derive(Debug)]
pub struct LoopDevice<H> {
    slots: Vec<QueueSlot>,
    worker: Arc<Mutex<LoopWorker<H>>>,
}

impl<H: QueueHandler> LoopDevice<H> {
    /// A device with queues of up to `sizes` entries, served by `handler`.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(handler: H, sizes: &[u16]) -> io::Result<Self> {
        let slot = |&max_size: &u16| {
            Ok(QueueSlot { max_size, kick: Arc::new(EventFd::new(EFD_NONBLOCK)?) })
        };
        let slots: Vec<QueueSlot> = sizes.iter().map(slot).collect::<io::Result<_>>()?;
        let worker = LoopWorker {
            queues: slots.iter().map(|_| None).collect(),
            kicks: slots.iter().map(|slot| slot.kick.clone()).collect(),
            handler,
            chain: Chain::new(),
            paused: false,
        };
        Ok(Self { slots, worker: Arc::new(Mutex::new(worker)) })
    }

    /// What goes on the event loop.
    pub fn subscriber(&self) -> Arc<Mutex<dyn MutEventSubscriber + Send>> {
        self.worker.clone()
    }

    /// See [`VirtioDevice::queues`](super::device::VirtioDevice::queues).
    pub fn queues(&self) -> &[QueueSlot] {
        &self.slots
    }

    /// See [`VirtioDevice::activate`](super::device::VirtioDevice::activate).
    ///
    /// # Errors
    /// None today.
    pub fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let mut worker = self.worker();
        for queue in activation.queues {
            worker.attach(queue);
        }
        Ok(())
    }

    /// See [`VirtioDevice::reset`](super::device::VirtioDevice::reset).
    pub fn reset(&self) {
        let mut worker = self.worker();
        worker.queues.fill_with(|| None);
        worker.handler.reset();
    }

    /// See [`VirtioDevice::reset_queue`](super::device::VirtioDevice::reset_queue).
    pub fn reset_queue(&self, index: u16) {
        if let Some(queue) = self.worker().queues.get_mut(usize::from(index)) {
            *queue = None;
        }
    }

    /// See [`VirtioDevice::enable_queue`](super::device::VirtioDevice::enable_queue).
    ///
    /// # Errors
    /// None today.
    pub fn enable_queue(&self, queue: Queue) -> Result<(), ActivateError> {
        self.worker().attach(queue);
        Ok(())
    }

    /// See [`VirtioDevice::pause`](super::device::VirtioDevice::pause).
    pub fn pause(&self) {
        self.worker().paused = true;
    }

    /// See [`VirtioDevice::resume`](super::device::VirtioDevice::resume).
    pub fn resume(&self) {
        let mut worker = self.worker();
        worker.paused = false;
        for queue in worker.queues.iter().flatten() {
            wake(queue.kick());
        }
    }

    fn worker(&self) -> MutexGuard<'_, LoopWorker<H>> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The event loop's side.
#[derive(Debug)]
struct LoopWorker<H> {
    /// By index; those that the driver set up.
    queues: Vec<Option<Queue>>,
    kicks: Vec<Arc<EventFd>>,
    handler: H,
    chain: Chain,
    paused: bool,
}

impl<H: QueueHandler> LoopWorker<H> {
    fn attach(&mut self, queue: Queue) {
        if let Some(place) = self.queues.get_mut(usize::from(queue.index())) {
            // The driver may have filled it before.
            wake(queue.kick());
            *place = Some(queue);
        }
    }

    /// Serves one batch of queue `index`, no longer than the queue, so that other devices get
    /// their turn.
    fn serve(&mut self, index: u16) {
        if self.paused {
            return;
        }
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { return };
        queue.disable_kicks();
        let mut turns = queue.size();
        loop {
            if turns == 0 {
                wake(queue.kick());
                break;
            }
            turns -= 1;
            if queue.pop(&mut self.chain) {
                match self.handler.handle(index, &mut self.chain) {
                    Answer::Done(written) => queue.push(&mut self.chain, written),
                    Answer::Later => {
                        queue.put_back(&mut self.chain);
                        break;
                    }
                }
            } else if !queue.enable_kicks() {
                break;
            }
        }
        queue.signal();
    }
}

/// Has the event loop look at a queue.
fn wake(kick: &EventFd) {
    // It fails when the counter is full, and then the loop is awake anyway.
    let _ = kick.write(1);
}

impl<H: QueueHandler> MutEventSubscriber for LoopWorker<H> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = self.kicks.iter().map(|kick| kick.as_raw_fd());
        for source in kicks.chain(self.handler.sources()) {
            if let Err(error) = ops.add(Events::new_raw(source, EventSet::IN)) {
                tracing::error!(%error, "a virtio device cannot be served");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let source = events.fd();
        let kicked = self.kicks.iter().position(|kick| kick.as_raw_fd() == source);
        let index = match kicked {
            Some(index) => {
                // It fails when there was no kick after all.
                let _ = self.kicks.get(index).map(|kick| kick.read());
                u16::try_from(index).ok()
            }
            None => self.handler.on_source(source),
        };
        if let Some(index) = index {
            self.serve(index);
        }
    }
}
