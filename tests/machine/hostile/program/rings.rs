//! Rings and requests of more or less sense.

use iced_x86::code_asm::*;

use super::*;

/// VIRTIO_BLK_T_IN.
const READ: i32 = 0;
/// Reading and writing more often than others, one that does not exist (virtio 1.2 §5.2.6).
const REQUEST_TYPES: [i32; 9] = [READ, READ, 1, 1, 4, 8, 11, 13, 0x1234];

impl Writer<'_> {
    /// Sets a device up as a driver does, mostly, and not always to the end.
    pub(super) fn bring_up(&mut self, device: u32) -> Assembled {
        use register::*;
        self.set(device, STATUS, Value::Is(0))?;
        self.set(device, STATUS, Value::Is(1))?;
        self.set(device, STATUS, Value::Is(3))?;
        // What is offered, without some of it at times.
        self.set(device, DEVICE_FEATURES_SEL, Value::Is(0))?;
        self.set(device, DRIVER_FEATURES_SEL, Value::Is(0))?;
        let without = if self.random.chance(2) { 0 } else { self.random.next() as u32 };
        self.a.mov(eax, dword_ptr(rbx + (device as i32 * 0x1000 + DEVICE_FEATURES)))?;
        self.a.and(eax, !without as i32)?;
        self.a.mov(dword_ptr(rbx + (device as i32 * 0x1000 + DRIVER_FEATURES)), eax)?;
        self.set(device, DRIVER_FEATURES_SEL, Value::Is(1))?;
        let ring_reset = if self.random.chance(4) { 0 } else { 0x100 };
        self.set(device, DRIVER_FEATURES, Value::Is(1 | ring_reset))?;
        self.set(device, STATUS, Value::Is(11))?;
        for queue in 0..QUEUES {
            self.set_up_queue(device, queue)?;
        }
        if !(self.wild && self.random.chance(8)) {
            self.set(device, STATUS, Value::Is(15))?;
        }
        for queue in 0..QUEUES {
            self.chain(device, queue)?;
        }
        self.set(device, QUEUE_NOTIFY, Value::Random(3, 0))
    }

    pub(super) fn set_up_queue(&mut self, device: u32, queue: u32) -> Assembled {
        use register::*;
        let slot = Self::slot(device, queue);
        let size = match self.random.below(16) {
            0 if self.wild => ANY,
            1 if self.wild => Value::Random(0x1ff, 0),
            _ => Value::Is(self.queue_size(device, queue)),
        };
        self.set(device, QUEUE_SEL, Value::Is(queue))?;
        self.set(device, QUEUE_NUM, size)?;
        for (register, offset) in
            [(QUEUE_DESC, 0), (QUEUE_AVAIL, SLOT_AVAIL), (QUEUE_USED, SLOT_USED)]
        {
            let (low, high) = match self.random.below(64) {
                0 if self.wild => (self.address(), Value::Is(0)),
                1 if self.wild => (ANY, ANY),
                2 if self.wild => (Value::Is((END - 64) as u32), Value::Is(0)),
                _ => (Value::Is((slot + offset) as u32), Value::Is(0)),
            };
            self.set(device, register, low)?;
            self.set(device, register + 4, high)?;
        }
        // The device begins with the first entry.
        self.a.mov(dword_ptr(r10 + (slot + SLOT_AVAIL)), 0)?;
        self.set(device, QUEUE_READY, Value::Is(1))
    }

    /// The low half of an address of a buffer or ring.
    pub(super) fn address(&mut self) -> Value {
        match self.random.below(16) {
            0 => ANY,
            1 => Value::Random(0xffff, (END - 0x1_0000) as u32),
            2 => Value::Random(0xff_ffff, END as u32),
            3 => Value::Random(0x3fff, ARENA as u32 + (self.random.below(20) << 15)),
            4..=6 => Value::Random(0xff0, HEADERS as u32),
            _ => Value::Random(DATA_BYTES as u32 - 1, DATA as u32),
        }
    }

    pub(super) fn length(&mut self) -> Value {
        match self.random.below(16) {
            0 => Value::Random(u32::MAX, 1 << 31),
            1 => Value::Is(0),
            2 => Value::Random(0xffff, 0),
            3..=5 => Value::Is(16),
            6 | 7 => Value::Is(1),
            _ => Value::Random(0x1e00, 512),
        }
    }

    /// A descriptor at `at` in memory.
    pub(super) fn descriptor(&mut self, at: i32, flags: u32, next: u32) -> Assembled {
        self.count += 1;
        let (address, length) = match self.wild {
            true => (self.address(), self.length()),
            false => (Value::Random(0x7_0fff, DATA as u32), Value::Random(0x1e00, 512)),
        };
        self.draw(address)?;
        self.a.mov(dword_ptr(r10 + at), eax)?;
        if !self.wild {
            // Data that differs each time.
            self.a.mov(dword_ptr(rax), r15d)?;
        }
        let wild = self.wild && self.random.chance(32);
        let high = if wild { self.random.next() as i32 } else { 0 };
        self.a.mov(dword_ptr(r10 + (at + 4)), high)?;
        self.draw(length)?;
        self.a.mov(dword_ptr(r10 + (at + 8)), eax)?;
        self.a.mov(dword_ptr(r10 + (at + 12)), (next << 16 | flags) as i32)
    }

    /// A chain with more or less sense, made available.
    pub(super) fn chain(&mut self, device: u32, queue: u32) -> Assembled {
        const NEXT: u32 = 1;
        const WRITE: u32 = 2;
        const INDIRECT: u32 = 4;
        let slot = Self::slot(device, queue);
        let size = self.queue_size(device, queue);
        let head = self.random.below(size);
        let indirect = self.random.chance(6);
        let (table, length) = if indirect { (slot + SLOT_INDIRECT, 64) } else { (slot, size) };
        let first = if indirect { 0 } else { head };
        let is_disk = device < self.plan.disks;
        let count = 1 + self.random.below(4) + u32::from(is_disk && !self.wild);
        let kind = self.random.pick(&REQUEST_TYPES);
        let writable_from = match (is_disk, self.random.chance(2)) {
            (true, _) if self.wild => 1 + self.random.below(count),
            (true, _) if kind == READ => 1,
            (true, _) => count - 1,
            (false, all) => u32::from(!all) * count,
        };
        let place = |index: u32| (first + index) % length;
        for index in 0..count {
            let last = index + 1 == count;
            let wild = self.wild && self.random.chance(12);
            let write = index >= writable_from || is_disk && last && index > 0;
            let flags = match wild {
                true => self.random.below(16),
                false => (u32::from(!last) * NEXT) | (u32::from(write) * WRITE),
            };
            let next = if wild { self.random.below(1 << 16) } else { place(index + 1) };
            let at = table + place(index) as i32 * 16;
            self.descriptor(at, flags, next)?;
            // A request or frame begins with its header, a disk's request ends with its status.
            if index == 0 && !write && !wild {
                self.draw(Value::Random(0xff0, HEADERS as u32))?;
                self.a.mov(dword_ptr(r10 + at), eax)?;
                self.a.mov(dword_ptr(r10 + (at + 8)), if is_disk { 16 } else { 12 })?;
                self.header(None, kind)?;
            } else if last && is_disk && !wild {
                self.a.mov(dword_ptr(r10 + (at + 8)), 1)?;
            }
        }
        if indirect {
            let at = slot + head as i32 * 16;
            self.a.mov(dword_ptr(r10 + at), table)?;
            self.a.mov(dword_ptr(r10 + (at + 4)), 0)?;
            let wild = self.wild && self.random.chance(8);
            let bytes = if wild { self.random.next() as i32 } else { 16 * count as i32 };
            self.a.mov(dword_ptr(r10 + (at + 8)), bytes)?;
            let more = if wild { self.random.below(8) } else { 0 };
            self.a.mov(dword_ptr(r10 + (at + 12)), (INDIRECT | more) as i32)?;
        }
        self.offer(slot, size, head)
    }

    /// A request's header at eax, which is an address; or at `at`.
    pub(super) fn header(&mut self, at: Option<i32>, kind: i32) -> Assembled {
        if let Some(at) = at {
            self.a.mov(eax, at)?;
        }
        self.count += 1;
        let sector = self.random.below(300) as i32;
        self.a.mov(dword_ptr(rax), kind)?;
        self.a.mov(dword_ptr(rax + 8), sector)?;
        let wild = self.wild && self.random.chance(8);
        let high = if wild { self.random.next() as i32 } else { 0 };
        self.a.mov(dword_ptr(rax + 12), high)
    }

    /// Puts `head` into the available ring.
    pub(super) fn offer(&mut self, slot: i32, size: u32, head: u32) -> Assembled {
        self.count += 1;
        let ring = slot + SLOT_AVAIL;
        let head = if self.wild && self.random.chance(32) {
            self.random.next() as u16
        } else {
            head as u16
        };
        self.a.movzx(eax, word_ptr(r10 + (ring + 2)))?;
        self.a.mov(ecx, eax)?;
        self.a.and(ecx, size as i32 - 1)?;
        self.a.mov(word_ptr(r10 + rcx * 2 + (ring + 4)), i32::from(head as i16))?;
        self.a.inc(eax)?;
        self.a.mov(word_ptr(r10 + (ring + 2)), ax)
    }

    pub(super) fn requests(&mut self, device: u32) -> Assembled {
        if !self.wild || self.random.chance(2) {
            self.bring_up(device)?;
        }
        for _ in 0..8 {
            let queues = if self.wild { QUEUES } else { self.queues(device) };
            let queue = self.random.below(queues);
            for _ in 0..1 + self.random.below(3) {
                self.chain(device, queue)?;
            }
            self.set(device, register::QUEUE_NOTIFY, Value::Is(queue))?;
            if self.random.chance(2) {
                self.set(device, register::INTERRUPT_ACK, Value::Is(3))?;
            }
        }
        Ok(())
    }

    /// Changes rings and requests while the device may read them.
    pub(super) fn scribble(&mut self, device: u32) -> Assembled {
        for _ in 0..24 {
            let queue = self.random.below(QUEUES);
            let slot = Self::slot(device, queue);
            let size = self.queue_size(device, queue);
            match self.random.below(8) {
                0 => {
                    // The available ring's index.
                    self.draw(Value::Random(0xffff, 0))?;
                    self.a.mov(word_ptr(r10 + (slot + SLOT_AVAIL + 2)), ax)?;
                }
                1 => {
                    // used_event, or an entry, or flags.
                    let at = self.random.below(2 * size + 8) as i32 & !1;
                    self.draw(Value::Random(0x1ff, 0))?;
                    self.a.mov(word_ptr(r10 + (slot + SLOT_AVAIL + at)), ax)?;
                }
                2 => {
                    let at = self.random.below(8 * size + 8) as i32 & !3;
                    self.draw(ANY)?;
                    self.a.mov(dword_ptr(r10 + (slot + SLOT_USED + at)), eax)?;
                }
                3 => {
                    let (index, flags) = (self.random.below(64), self.random.below(8));
                    let next = self.random.below(64);
                    self.descriptor(slot + SLOT_INDIRECT + index as i32 * 16, flags, next)?;
                }
                4 => {
                    let at = HEADERS + self.random.below(256) as i32 * 16;
                    let kind = self.random.pick(&REQUEST_TYPES);
                    self.header(Some(at), kind)?;
                }
                _ => {
                    let (index, flags) = (self.random.below(size), self.random.below(8));
                    let next = self.random.below(size + 1);
                    self.descriptor(slot + index as i32 * 16, flags, next)?;
                }
            }
            self.count += 1;
            if self.random.chance(6) {
                self.set(device, register::QUEUE_NOTIFY, Value::Random(3, 0))?;
            }
        }
        Ok(())
    }

    /// Kicks, and takes the queue or the device away at once.
    pub(super) fn reset_in_flight(&mut self, device: u32) -> Assembled {
        use register::*;
        for _ in 0..4 {
            let queue = self.random.below(3);
            for _ in 0..4 {
                self.chain(device, queue)?;
            }
            self.set(device, QUEUE_NOTIFY, Value::Is(queue))?;
            self.set(device, QUEUE_SEL, Value::Is(queue))?;
            match self.random.below(3) {
                0 => self.set(device, QUEUE_READY, Value::Random(1, 0))?,
                _ => self.set(device, QUEUE_RESET, Value::Is(1))?,
            }
            self.set_up_queue(device, queue)?;
            self.set(device, QUEUE_NOTIFY, Value::Is(queue))?;
        }
        match self.random.below(3) {
            0 => self.set(device, STATUS, Value::Is(0)),
            1 => self.set(device, STATUS, Value::Random(0xff, 0)),
            _ => self.bring_up(device),
        }
    }

    /// Many devices at once.
    pub(super) fn mixture(&mut self) -> Assembled {
        for _ in 0..12 {
            let device = self.device();
            let queue = self.random.below(QUEUES);
            self.chain(device, queue)?;
            self.set(device, register::QUEUE_NOTIFY, Value::Is(queue))?;
            if self.random.chance(4) {
                let at = register::CONFIG + self.random.below(0x40) as i32;
                self.set(device, at, Value::Random(0xff, 0))?;
            }
        }
        Ok(())
    }
}
