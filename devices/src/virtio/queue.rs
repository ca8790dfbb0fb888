//! A split virtqueue (virtio 1.2 §2.7) as a device uses it.
//!
//! Besides what the specification asks for:
//! - a chain is checked whole before the device sees it ([`Chain`]);
//! - several chains can be used at one stroke ([`Queue::push_heads`]);
//! - VIRTQ_AVAIL_F_NO_INTERRUPT is obeyed;
//! - a driver cannot have more chains in flight than the queue has entries.
//!
//! What becomes of a driver's errors, which the specification leaves to the device:
//! - a bad chain goes back with length 0, so that only its own request is lost. A device whose
//!   requests end in a status byte has an error written there where the chain's end can be found
//!   ([`Queue::set_error_status`]), lest the driver take an old status for the answer;
//! - rings that contradict themselves (an index that moved too far, a head outside the table)
//!   leave nothing to give back: the queue asks for a reset and is dead until then.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_ALIGN_SIZE,
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_ALIGN_SIZE, VRING_USED_ALIGN_SIZE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError, ChainRules, Head};
use super::device::{Memory, QueueSlot, Signals};
use super::ram::Ram;
use super::rings::{AVAIL_ENTRY_BYTES, META_BYTES, Rings, USED_ENTRY_BYTES};

/// What the device may say in the used ring's flags (§2.7.10).
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// How a driver set a queue up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}

impl QueueSetup {
    /// Whether a queue offered with `max_size` entries can be used so.
    ///
    /// # Errors
    /// [`QueueError`], the first reason against it.
    pub fn check(&self, max_size: u16, memory: &Memory) -> Result<(), QueueError> {
        let Self { size, desc_table, avail_ring, used_ring } = *self;
        if !size.is_power_of_two() || size > max_size {
            return Err(QueueError::Size { size, max_size });
        }
        let entries = usize::from(size);
        let desc_bytes = entries * VRING_DESC_ALIGN_SIZE as usize;
        let avail_bytes = entries * AVAIL_ENTRY_BYTES + META_BYTES;
        let used_bytes = entries * USED_ENTRY_BYTES + META_BYTES;
        for (part, address, align, bytes) in [
            ("descriptor table", desc_table, VRING_DESC_ALIGN_SIZE, desc_bytes),
            ("available ring", avail_ring, VRING_AVAIL_ALIGN_SIZE, avail_bytes),
            ("used ring", used_ring, VRING_USED_ALIGN_SIZE, used_bytes),
        ] {
            if !address.is_multiple_of(align.into()) {
                return Err(QueueError::Align { part, address, align });
            }
            if address == 0 || memory.get_slice(GuestAddress(address), bytes).is_err() {
                return Err(QueueError::OutsideMemory { part, address });
            }
        }
        Ok(())
    }
}

/// Why a queue cannot be used as the driver set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The size is zero, not a power of two, or more than the device offers.
    #[error("a queue of {size} entries, where a power of two up to {max_size} is possible")]
    Size {
        /// What the driver chose.
        size: u16,
        /// What the device offers.
        max_size: u16,
    },
    /// A part of the queue is not aligned.
    #[error("the {part} at {address:#x} is not aligned to {align} bytes")]
    Align {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
        /// What §2.7 demands.
        align: u32,
    },
    /// A part of the queue is not, or not whole, in guest RAM, or begins at address 0.
    #[error("the {part} at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
    },
}

/// Why a queue stopped working.
#[derive(Debug, thiserror::Error)]
enum RingError {
    #[error("the available ring moved by {moved}, past its {size} entries")]
    Jump { moved: u16, size: u16 },
    #[error("the available ring names descriptor {head} of {size}")]
    Head { head: u16, size: u16 },
    #[error("more chains are in flight than the {size} entries allow")]
    InFlight { size: u16 },
}

/// A queue that a driver set up and that is ready for use.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    rings: Rings,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    event_idx: bool,
    rules: ChainRules,
    ram: Ram,
    signals: Arc<Signals>,
    kick: Arc<EventFd>,
    /// Written to the last byte of bad chains.
    error_status: Option<u8>,
    /// Chains that were popped and not pushed.
    in_flight: u16,
    /// The available ring's index as far as chains were taken.
    next_avail: u16,
    /// The used ring's index.
    next_used: u16,
    /// What it was at the last decision on an interrupt.
    next_used_then: u16,
    /// Dead until the driver resets it.
    broken: bool,
    bad_chains: u64,
}

impl Queue {
    /// Queue `index`, offered as `slot`, as the driver set it up for `features`.
    ///
    /// # Errors
    /// [`QueueError`]: the driver may not use the queue so.
    pub fn new(
        index: u16,
        slot: &QueueSlot,
        setup: QueueSetup,
        features: u64,
        memory: Memory,
        signals: Arc<Signals>,
    ) -> Result<Self, QueueError> {
        setup.check(slot.max_size, &memory)?;
        let QueueSetup { size, desc_table, avail_ring, used_ring } = setup;
        // Not for what the check has passed.
        let outside = QueueError::OutsideMemory { part: "used ring", address: used_ring };
        let ram = Ram::new(&memory);
        let rings = Rings::new(&ram, desc_table, avail_ring, used_ring, size).ok_or(outside)?;
        let rules = ChainRules {
            table: GuestAddress(desc_table),
            entries: size,
            limit: slot.max_size,
            indirect: has(features, VIRTIO_RING_F_INDIRECT_DESC),
        };
        Ok(Self {
            index,
            rings,
            event_idx: has(features, VIRTIO_RING_F_EVENT_IDX),
            rules,
            ram,
            signals,
            kick: slot.kick.clone(),
            error_status: None,
            in_flight: 0,
            next_avail: 0,
            next_used: 0,
            next_used_then: 0,
            broken: false,
            bad_chains: 0,
        })
    }

    /// The queue's number within its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.rules.entries
    }

    /// Becomes readable when the driver has something, see [`QueueSlot::kick`].
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &Memory {
        self.ram.memory()
    }

    /// Has `status` written to the last byte of a bad chain where that byte can be found and is
    /// writable.
    pub fn set_error_status(&mut self, status: u8) {
        self.error_status = Some(status);
    }

    /// Takes the next request that the driver made available into `chain`; false when there is
    /// none, `chain` is then empty. Bad chains are answered on the way, as many as the queue has
    /// entries; that there is no request after so many does not mean that the queue is empty,
    /// which only [`Queue::enable_kicks`] tells.
    ///
    /// A chain that is still out of its queue must not be passed: it would be lost.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        debug_assert!(chain.head().is_none());
        for _ in 0..self.size() {
            let head = match self.next_head() {
                Ok(Some(head)) => head,
                Ok(None) => return false,
                Err(error) => {
                    self.fail(&error);
                    return false;
                }
            };
            self.in_flight += 1;
            if chain.fill_with_one(&self.ram, head, &self.rings.descriptor(head)) {
                return true;
            }
            match self.rules.parse(&self.ram, head, chain) {
                Ok(()) => return true,
                Err(error) => self.answer_bad(chain, error),
            }
        }
        false
    }

    /// Gives `chain` back to the driver, `written` bytes of it filled from the first writable byte
    /// on (§2.7.8), and empties it. The driver learns of it with [`Queue::signal`]. An empty chain
    /// is ignored.
    ///
    /// `chain` must be one that this queue gave out.
    pub fn push(&mut self, chain: &mut Chain, written: u32) {
        self.push_heads(chain.release().map(|head| (head, written)).into_iter());
    }

    /// Does for several chains, of which [`Chain::release`] has left the heads, what [`Queue::push`] does
    /// for one, and lets the driver see all of them at once or none.
    pub fn push_heads(&mut self, heads: impl Iterator<Item = (Head, u32)>) {
        let mut next_used = self.next_used;
        for (Head(head), written) in heads {
            self.in_flight = self.in_flight.saturating_sub(1);
            if self.broken {
                continue;
            }
            self.rings.write_used(next_used, head, written);
            next_used = next_used.wrapping_add(1);
        }
        if next_used != self.next_used {
            self.next_used = next_used;
            self.rings.set_used_index(next_used);
        }
    }

    /// Undoes the last [`Queue::pop`]: the request waits in the queue again, and `chain` is empty.
    /// For the chain that was popped last, before anything else was done to the queue.
    pub fn put_back(&mut self, chain: &mut Chain) {
        if chain.release().is_some() {
            self.in_flight = self.in_flight.saturating_sub(1);
            self.next_avail = self.next_avail.wrapping_sub(1);
        }
    }

    /// Interrupts the driver if chains were pushed since the last call and it wants to know. Call
    /// it once a batch.
    pub fn signal(&mut self) {
        if self.next_used_then == self.next_used || self.broken {
            return;
        }
        if self.wants_interrupt() {
            self.signals.queue_used(self.index);
        }
    }

    /// Asks the driver not to kick while the queue is served anyway; it may still.
    pub fn disable_kicks(&mut self) {
        // With VIRTIO_F_EVENT_IDX it does not unless it was asked to.
        if !self.event_idx && !self.broken {
            self.rings.set_used_flags(NO_NOTIFY);
        }
    }

    /// Asks the driver to kick again; true when something came in the meantime, for which it may
    /// not.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        if self.event_idx {
            self.rings.set_avail_event(self.next_avail);
        } else {
            self.rings.set_used_flags(0);
        }
        // The driver sees this wish before its next index is looked at here, or that index is seen.
        fence(Ordering::SeqCst);
        self.rings.avail_index() != self.next_avail
    }

    /// How many chains are out of the queue; at most [`Queue::size`].
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// How many bad chains were answered.
    pub fn bad_chains(&self) -> u64 {
        self.bad_chains
    }

    /// Whether the queue is dead until the driver resets it: it then gives out nothing.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if self.broken {
            return Ok(None);
        }
        let size = self.rules.entries;
        let moved = self.rings.avail_index().wrapping_sub(self.next_avail);
        if moved == 0 {
            return Ok(None);
        }
        if moved > size {
            return Err(RingError::Jump { moved, size });
        }
        let head = self.rings.avail_head(self.next_avail);
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        if self.in_flight >= size {
            return Err(RingError::InFlight { size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    fn answer_bad(&mut self, chain: &mut Chain, error: ChainError) {
        self.bad_chains = self.bad_chains.saturating_add(1);
        if let Some(others) = self.signals.may_complain() {
            tracing::warn!(queue = self.index, %error, others, "a virtio driver sent a bad request");
        }
        if let Some(status) = self.error_status {
            chain.write_status(status);
        }
        self.push(chain, 0);
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call (§2.7.7,
    /// §2.7.10).
    fn wants_interrupt(&mut self) -> bool {
        let pushed = self.next_used.wrapping_sub(self.next_used_then);
        self.next_used_then = self.next_used;
        // The driver sees the used ring's index before its wish is read here, or its wish is seen.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return u32::from(self.rings.avail_flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let past_event = self.next_used.wrapping_sub(self.rings.used_event()).wrapping_sub(1);
        past_event < pushed
    }

    fn fail(&mut self, error: &RingError) {
        if let Some(others) = self.signals.may_complain() {
            tracing::warn!(queue = self.index, %error, others, "a virtio queue needs a reset");
        }
        self.broken = true;
        self.signals.request_reset();
    }
}

/// Whether `features` have bit `number`.
fn has(features: u64, number: u32) -> bool {
    features >> number & 1 != 0
}

#[cfg(test)]
mod tests;
