//! The hostile guest: a program of some hundred blocks, each a run of accesses that were chosen at
//! random when it was assembled. Which block comes next, and most of what is written, is chosen by the
//! guest. With two CPUs both run it over the same memory.
//!
//! The guest leaves alone what would end it or it could not go on without: the ports that end a
//! machine, and the memory from [`OWN`] on, where it lies itself with the rings of the disk that it
//! uses properly. Devices get no address there, unless a device writes where it was not told to.

mod accesses;
mod good_disk;
mod rings;
mod second_cpu;

use iced_x86::code_asm::*;
use tempfile::NamedTempFile;

use crate::bare_metal;
use second_cpu::real_mode_code;

/// xorshift64*: the same as it is anywhere, for choices that a seed repeats.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u32) -> u32 {
        ((self.next() >> 33) % u64::from(end)) as u32
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.below(one_in) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }
}

/// What the guest is to do.
pub struct Plan {
    pub seed: u64,
    /// Accesses of the first CPU; the second goes on for as long.
    pub operations: u64,
    pub two_cpus: bool,
    /// The devices to attack, by their places from the first virtio-mmio page on, and how many queues
    /// they have, a control queue left out.
    pub attacked: Vec<(u32, u32)>,
    /// How many devices are disks; they come first.
    pub disks: u32,
    /// The place of the disk that is to go on working.
    pub good_disk: u32,
    /// Sectors of it.
    pub good_sectors: u32,
}

/// The guest says this when it begins, and waits for a byte.
pub const READY: &str = "\nhostile: ready\n";
/// The guest says this when it has ended its attack, with the second CPU's accesses as 16 letters
/// from `a` to `p`, and waits for a byte.
pub const DONE: &str = "\nhostile: done ";
/// The guest's status if all was well.
pub const WELL: i32 = 42;
/// What the guest writes to each sector of the good disk, combined with its number.
pub const PATTERN: u64 = 0x600d_d15c_0000_0000;

const WINDOW: i32 = 0x3000_0000;
const APIC: i32 = WINDOW + 0x20_0000;
const FIRST_DEVICE: u64 = 0xd000_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;

/// The guest's own memory, up to [`ARENA`].
const OWN: i32 = 0x20_0000;
const GOOD: i32 = 0x38_0000;
const GOOD_DESC: i32 = GOOD;
const GOOD_AVAIL: i32 = GOOD + 0x100;
const GOOD_USED: i32 = GOOD + 0x200;
const GOOD_HEADER: i32 = GOOD + 0x300;
const GOOD_STATUS: i32 = GOOD + 0x320;
const GOOD_OUT: i32 = GOOD + 0x400;
const GOOD_IN: i32 = GOOD + 0x600;
const TABLES: i32 = 0x39_0000;
const BLOCK_TABLE: i32 = 0x3a_0000;
const FLAGS: i32 = 0x3b_0000;
const STOP: i32 = FLAGS;
const PARKED: i32 = FLAGS + 8;
const OTHER_COUNT: i32 = FLAGS + 16;
/// What the attacked devices get: rings, requests, data.
const ARENA: i32 = 0x40_0000;
const SLOT_BYTES: i32 = 0x8000;
const SLOT_AVAIL: i32 = 0x1000;
const SLOT_USED: i32 = 0x2000;
const SLOT_INDIRECT: i32 = 0x4000;
const HEADERS: i32 = 0x50_0000;
const DATA: i32 = 0x58_0000;
const DATA_BYTES: i32 = 0x8_0000;
/// The end of RAM.
const END: i32 = 0x100_0000;

/// Where the second CPU begins, in real mode.
const TRAMPOLINE: i32 = 0x1_0000;

const BLOCKS: u32 = 256;
const QUEUES: u32 = 4;
const CHECK_EVERY_BLOCKS: i32 = 48;

const COM1: u32 = 0x3f8;

/// Registers of virtio-mmio (virtio 1.2 §4.2.2).
mod register {
    pub const DEVICE_FEATURES: i32 = 0x10;
    pub const DEVICE_FEATURES_SEL: i32 = 0x14;
    pub const DRIVER_FEATURES: i32 = 0x20;
    pub const DRIVER_FEATURES_SEL: i32 = 0x24;
    pub const QUEUE_SEL: i32 = 0x30;
    pub const QUEUE_NUM: i32 = 0x38;
    pub const QUEUE_READY: i32 = 0x44;
    pub const QUEUE_NOTIFY: i32 = 0x50;
    pub const INTERRUPT_ACK: i32 = 0x64;
    pub const STATUS: i32 = 0x70;
    pub const QUEUE_DESC: i32 = 0x80;
    pub const QUEUE_AVAIL: i32 = 0x90;
    pub const QUEUE_USED: i32 = 0xa0;
    pub const QUEUE_RESET: i32 = 0xc0;
    pub const CONFIG: i32 = 0x100;
    /// All that can be written, those that matter more often twice.
    pub const WRITABLE: [i32; 20] = [
        DEVICE_FEATURES_SEL,
        DRIVER_FEATURES,
        DRIVER_FEATURES_SEL,
        QUEUE_SEL,
        QUEUE_SEL,
        QUEUE_NUM,
        QUEUE_READY,
        QUEUE_NOTIFY,
        QUEUE_NOTIFY,
        INTERRUPT_ACK,
        STATUS,
        QUEUE_DESC,
        QUEUE_DESC + 4,
        QUEUE_AVAIL,
        QUEUE_AVAIL + 4,
        QUEUE_USED,
        QUEUE_USED + 4,
        QUEUE_RESET,
        CONFIG + 0x20,
        CONFIG + 0x24,
    ];
}

/// An ELF kernel that does what `plan` says.
pub fn kernel(plan: &Plan) -> NamedTempFile {
    let (a, random) = (CodeAssembler::new(64).unwrap(), Random::new(plan.seed));
    let mut writer = Writer { a, random, count: 0, wild: false, plan };
    writer.program().unwrap();
    bare_metal::kernel(&mut writer.a)
}

/// What a register or memory is written with.
#[derive(Clone, Copy)]
enum Value {
    Is(u32),
    /// Random bits where the first has ones, the second's ones set.
    Random(u32, u32),
}

/// Any value that is no address in the guest's memory.
const ANY: Value = Value::Random(u32::MAX, 1 << 30);

/// Use of registers: rbx the devices, r10 zero, r11 and r12 the generator's constants, r13 the goal
/// and r14 the accesses so far, r15 the generator's state, rbp blocks until the next check. No stack.
struct Writer<'a> {
    a: CodeAssembler,
    random: Random,
    /// Accesses of the block so far.
    count: u32,
    /// Whether what is written may make no sense.
    wild: bool,
    plan: &'a Plan,
}

type Assembled = Result<(), IcedError>;

impl Writer<'_> {
    fn program(&mut self) -> Assembled {
        let (mut choose, mut leave) = (self.a.create_label(), self.a.create_label());
        let mut blocks: Vec<CodeLabel> = (0..BLOCKS).map(|_| self.a.create_label()).collect();
        let (mut other, mut trampoline) = (self.a.create_label(), self.a.create_label());
        let (mut check, mut finish) = (self.a.create_label(), self.a.create_label());

        self.page_tables()?;
        self.constants(self.plan.seed)?;
        self.touch_memory()?;
        for (index, block) in (0..).zip(&blocks) {
            self.a.lea(rax, ptr(*block))?;
            self.a.mov(qword_ptr(r10 + (BLOCK_TABLE + 8 * index)), rax)?;
        }
        self.good_disk_set_up()?;
        self.say(READY)?;
        self.listen()?;
        if self.plan.two_cpus {
            self.start_other(other, trampoline)?;
        }
        let goal = self.plan.operations;
        self.a.mov(r13, goal)?;
        self.a.mov(ebp, CHECK_EVERY_BLOCKS)?;
        self.a.jmp(choose)?;

        // The second CPU.
        self.a.set_label(&mut other)?;
        self.constants(self.plan.seed.rotate_left(32) ^ 0x5555)?;
        self.a.mov(r13, i64::MAX as u64)?;
        self.a.mov(rbp, i64::MAX as u64)?;

        // The next block.
        self.a.set_label(&mut choose)?;
        self.a.cmp(r14, r13)?;
        self.a.jae(finish)?;
        self.a.cmp(dword_ptr(r10 + STOP), 0)?;
        self.a.jne(leave)?;
        self.a.dec(rbp)?;
        self.a.jz(check)?;
        self.draw(Value::Random(BLOCKS - 1, 0))?;
        self.a.mov(rax, qword_ptr(r10 + rax * 8 + BLOCK_TABLE))?;
        self.a.jmp(rax)?;

        for (index, block) in (0..).zip(&mut blocks) {
            self.a.set_label(block)?;
            self.count = 0;
            self.block(index)?;
            let count = self.count as i32;
            self.a.add(r14, count)?;
            self.a.jmp(choose)?;
        }

        self.a.set_label(&mut check)?;
        self.a.mov(ebp, CHECK_EVERY_BLOCKS)?;
        self.check_good_disk()?;
        self.a.jmp(choose)?;

        // The second CPU is told to stop.
        self.a.set_label(&mut leave)?;
        self.a.mov(qword_ptr(r10 + OTHER_COUNT), r14)?;
        self.a.mov(dword_ptr(r10 + PARKED), 1)?;
        self.spin()?;

        self.a.set_label(&mut finish)?;
        self.finish()?;
        self.a.set_label(&mut trampoline)?;
        self.a.db(&real_mode_code())
    }

    /// Random constants and a state of the generator.
    fn constants(&mut self, seed: u64) -> Assembled {
        let a = &mut self.a;
        a.xor(r10d, r10d)?;
        a.mov(rbx, WINDOW as u64)?;
        a.mov(r12, 6_364_136_223_846_793_005u64)?;
        a.mov(r11, 1_442_695_040_888_963_407u64)?;
        a.mov(r15, seed)?;
        a.xor(r14d, r14d)
    }

    /// Page tables of the guest's own: RAM, the devices, the local APIC.
    fn page_tables(&mut self) -> Assembled {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 0x83;
        let large = |at: i32| TABLES + 0x2000 + (at >> 21) * 8;
        let mut entries = vec![
            (TABLES, (TABLES + 0x1000) as u64 | PRESENT_WRITABLE),
            (TABLES + 0x1000, (TABLES + 0x2000) as u64 | PRESENT_WRITABLE),
            (large(WINDOW), FIRST_DEVICE | LARGE),
            (large(APIC), LOCAL_APIC | LARGE),
        ];
        entries.extend((0..END).step_by(1 << 21).map(|at| (large(at), at as u64 | LARGE)));
        self.a.xor(r10d, r10d)?;
        for (at, entry) in entries {
            self.a.mov(rax, entry)?;
            self.a.mov(qword_ptr(r10 + at), rax)?;
        }
        self.a.mov(eax, TABLES)?;
        self.a.mov(cr3, rax)
    }

    /// Brings in every page, so that the host's growth is not the guest's.
    fn touch_memory(&mut self) -> Assembled {
        let mut again = self.a.create_label();
        self.a.xor(eax, eax)?;
        self.a.set_label(&mut again)?;
        self.a.lock().add(byte_ptr(rax), 0)?;
        self.a.add(eax, 0x1000)?;
        self.a.cmp(eax, END)?;
        self.a.jb(again)?;
        // What is written to disks and networks.
        let mut more = self.a.create_label();
        self.a.mov(edi, DATA)?;
        self.a.set_label(&mut more)?;
        self.draw(ANY)?;
        self.a.mov(dword_ptr(rdi), eax)?;
        self.a.add(edi, 0x100)?;
        self.a.cmp(edi, DATA + DATA_BYTES)?;
        self.a.jb(more)
    }

    /// The value into eax; changes nothing else but the generator.
    fn draw(&mut self, value: Value) -> Assembled {
        let a = &mut self.a;
        match value {
            Value::Is(value) => a.mov(eax, value),
            Value::Random(mask, ones) => {
                a.imul_2(r15, r12)?;
                a.add(r15, r11)?;
                a.mov(rax, r15)?;
                a.shr(rax, 32)?;
                a.and(eax, mask as i32)?;
                a.or(eax, ones as i32)
            }
        }
    }

    fn device(&mut self) -> u32 {
        self.random.pick(&self.plan.attacked).0
    }

    fn queues(&self, device: u32) -> u32 {
        let mut devices = self.plan.attacked.iter();
        devices.find(|(place, _)| *place == device).map_or(1, |(_, queues)| *queues)
    }

    /// Writes a register of the device at place `device`.
    fn set(&mut self, device: u32, register: i32, value: Value) -> Assembled {
        let at = device as i32 * 0x1000 + register;
        self.count += 1;
        match value {
            Value::Is(value) => self.a.mov(dword_ptr(rbx + at), value as i32),
            value => {
                self.draw(value)?;
                self.a.mov(dword_ptr(rbx + at), eax)
            }
        }
    }

    fn slot(device: u32, queue: u32) -> i32 {
        ARENA + (device * QUEUES + queue) as i32 * SLOT_BYTES
    }

    /// The size that the queue mostly has.
    fn queue_size(&self, device: u32, queue: u32) -> u32 {
        4 << (2 * ((queue + device) % 3) + (self.plan.seed >> (device + queue) & 1) as u32)
    }

    /// One block; the rare kinds too come in every program.
    fn block(&mut self, index: u32) -> Assembled {
        let device = self.device();
        self.wild = !matches!(index % 16, 1..=3);
        match index % 16 {
            0 => self.bring_up(device),
            1..=5 => self.requests(device),
            6 | 7 => self.scribble(device),
            8 => self.spray(),
            9 => self.reset_in_flight(device),
            10 => self.serial(),
            11 => self.flood(),
            12 => self.ports(),
            13 => self.read_everything(),
            14 => self.instructions(),
            _ => self.mixture(),
        }
    }

    fn finish(&mut self) -> Assembled {
        let mut wait = self.a.create_label();
        self.a.mov(dword_ptr(r10 + STOP), 1)?;
        if self.plan.two_cpus {
            self.a.set_label(&mut wait)?;
            self.a.pause()?;
            self.a.cmp(dword_ptr(r10 + PARKED), 0)?;
            self.a.je(wait)?;
        }
        for (device, _) in self.plan.attacked.clone() {
            self.set(device, register::STATUS, Value::Is(0))?;
        }
        self.check_good_disk()?;
        self.say(DONE)?;
        let mut digit = self.a.create_label();
        self.a.mov(rcx, qword_ptr(r10 + OTHER_COUNT))?;
        self.a.mov(esi, 16)?;
        self.a.mov(edx, COM1)?;
        self.a.set_label(&mut digit)?;
        self.a.rol(rcx, 4)?;
        self.a.mov(eax, ecx)?;
        self.a.and(eax, 15)?;
        self.a.add(eax, i32::from(b'a'))?;
        self.a.out(dx, al)?;
        self.a.dec(esi)?;
        self.a.jnz(digit)?;
        self.a.mov(al, u32::from(b'\n'))?;
        self.a.out(dx, al)?;
        self.listen()?;
        self.a.mov(al, WELL)?;
        self.a.mov(dx, 0xf4)?;
        self.a.out(dx, al)?;
        self.spin()
    }

    /// Prints `text`, whatever the serial port was set to.
    fn say(&mut self, text: &str) -> Assembled {
        for (register, value) in [(3, 3), (1, 0), (4, 0)] {
            self.a.mov(edx, COM1 + register)?;
            self.a.mov(al, value)?;
            self.a.out(dx, al)?;
        }
        self.a.mov(edx, COM1)?;
        for byte in text.bytes() {
            self.a.mov(al, u32::from(byte))?;
            self.a.out(dx, al)?;
        }
        Ok(())
    }

    /// Waits for a byte.
    fn listen(&mut self) -> Assembled {
        let mut poll = self.a.create_label();
        self.a.mov(edx, COM1 + 5)?;
        self.a.set_label(&mut poll)?;
        self.a.in_(al, dx)?;
        self.a.test(al, 1)?;
        self.a.jz(poll)?;
        self.a.mov(edx, COM1)?;
        self.a.in_(al, dx)
    }

    fn spin(&mut self) -> Assembled {
        let mut forever = self.a.create_label();
        self.a.set_label(&mut forever)?;
        self.a.pause()?;
        self.a.jmp(forever)
    }
}

const _: () = assert!(OWN < GOOD && GOOD < ARENA && DATA + DATA_BYTES < END);
