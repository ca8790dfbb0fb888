//! Ports and registers in any width, and instructions for the assist.

use iced_x86::code_asm::*;

use super::*;

impl Writer<'_> {
    /// Any register and any place of any device, in any width.
    pub(super) fn spray(&mut self) -> Assembled {
        for _ in 0..24 {
            let device = self.device();
            let value = match self.random.below(6) {
                0 | 1 => Value::Random(7, 0),
                2 => Value::Random(0x1ff, 0),
                3 => self.address(),
                _ => ANY,
            };
            if self.random.chance(3) {
                let register = self.random.pick(&register::WRITABLE);
                self.set(device, register, value)?;
                continue;
            }
            let at = device as i32 * 0x1000 + self.random.below(0xff8) as i32;
            self.count += 1;
            self.draw(value)?;
            match self.random.below(5) {
                0 => self.a.mov(byte_ptr(rbx + at), al)?,
                1 => self.a.mov(word_ptr(rbx + at), ax)?,
                2 => self.a.mov(dword_ptr(rbx + at), eax)?,
                3 => self.a.mov(qword_ptr(rbx + at), r15)?,
                _ => self.a.or(dword_ptr(rbx + at), eax)?,
            }
        }
        Ok(())
    }

    pub(super) fn out(&mut self, port: u32, width: u32) -> Assembled {
        self.count += 1;
        self.a.mov(edx, port)?;
        match width {
            0 => self.a.out(dx, al),
            1 => self.a.out(dx, ax),
            _ => self.a.out(dx, eax),
        }
    }

    pub(super) fn input(&mut self, port: u32, width: u32) -> Assembled {
        self.count += 1;
        self.a.mov(edx, port)?;
        match width {
            0 => self.a.in_(al, dx),
            1 => self.a.in_(ax, dx),
            _ => self.a.in_(eax, dx),
        }
    }

    pub(super) fn serial(&mut self) -> Assembled {
        for _ in 0..16 {
            let port = COM1 - 2 + self.random.below(12);
            let width = self.random.below(3);
            if self.random.chance(3) {
                self.input(port, width)?;
            } else {
                self.draw(ANY)?;
                self.out(port, width)?;
            }
        }
        Ok(())
    }

    pub(super) fn flood(&mut self) -> Assembled {
        const BYTES: u32 = 128;
        // The divisor latch is put away, loopback off.
        self.draw(Value::Is(3))?;
        self.out(COM1 + 3, 0)?;
        self.draw(Value::Is(0))?;
        self.out(COM1 + 4, 0)?;
        self.a.cld()?;
        self.a.mov(edx, COM1)?;
        self.a.mov(esi, DATA)?;
        self.a.mov(ecx, BYTES)?;
        match self.random.below(3) {
            0 => self.a.rep().outsb()?,
            1 => self.a.rep().outsw()?,
            _ => self.a.rep().outsd()?,
        }
        self.count += BYTES;
        self.a.mov(edi, DATA)?;
        self.a.mov(ecx, 16)?;
        self.count += 16;
        self.a.rep().insb()
    }

    /// The other ports, and those that nobody has.
    pub(super) fn ports(&mut self) -> Assembled {
        /// Commands of an i8042 that are none for the reset line.
        const I8042: [u32; 10] = [0x20, 0x60, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xad, 0xd0, 0xd4];
        const READ_ONLY: [u32; 6] = [0xf4, 0x505, 0x600, 0x601, 0x602, 0x604];
        for _ in 0..16 {
            let width = self.random.below(3);
            match self.random.below(6) {
                0 => {
                    let command = self.random.pick(&I8042);
                    self.draw(Value::Is(command))?;
                    self.out(0x64, 0)?;
                }
                1 => {
                    self.draw(ANY)?;
                    self.out(0x60, width)?;
                }
                2 => {
                    let port = self.random.pick(&READ_ONLY);
                    self.input(port, width)?;
                }
                3 => {
                    let port = self.random.pick(&[0x60, 0x64]);
                    self.input(port, width)?;
                }
                4 => {
                    // Neither the sleep's enabling bit nor the reset's value.
                    self.draw(Value::Random(0x1f1e, 0))?;
                    let port = self.random.pick(&[0x600, 0x601, 0x604]);
                    self.out(port, 0)?;
                }
                _ => {
                    self.draw(ANY)?;
                    let port = 0x1000 + self.random.below(0xe000);
                    self.out(port, width)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn read_everything(&mut self) -> Assembled {
        for _ in 0..24 {
            let device = self.device();
            let near = self.random.chance(2);
            let range = if near { 0x140 } else { 0xff8 };
            let at = device as i32 * 0x1000 + self.random.below(range) as i32;
            self.count += 1;
            match self.random.below(4) {
                0 => self.a.mov(al, byte_ptr(rbx + at))?,
                1 => self.a.mov(ax, word_ptr(rbx + at))?,
                2 => self.a.mov(eax, dword_ptr(rbx + at))?,
                _ => self.a.mov(rax, qword_ptr(rbx + at))?,
            }
        }
        Ok(())
    }

    /// Instructions that a software KVM leaves to the assist, their operands also where the RAM ends
    /// and in what devices write meanwhile.
    pub(super) fn instructions(&mut self) -> Assembled {
        for _ in 0..6 {
            let at = match self.random.below(3) {
                0 => END - 8,
                1 => Self::slot(self.plan.attacked[0].0, 0) + SLOT_USED,
                _ => DATA + self.random.below(DATA_BYTES as u32 - 8) as i32,
            };
            self.count += 1;
            match self.random.below(3) {
                0 => self.a.popcnt(rax, qword_ptr(r10 + at))?,
                1 => self.a.popcnt(eax, dword_ptr(r10 + at))?,
                _ => self.a.popcnt(rcx, r15)?,
            }
        }
        Ok(())
    }
}
