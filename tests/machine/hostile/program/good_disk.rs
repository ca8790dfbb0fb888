//! The disk that is used properly, and must go on working.

use iced_x86::code_asm::*;

use super::*;

impl Writer<'_> {
    pub(super) fn good(&mut self, register: i32, value: u32) -> Assembled {
        let at = self.plan.good_disk as i32 * 0x1000 + register;
        self.a.mov(dword_ptr(rbx + at), value as i32)
    }

    pub(super) fn good_disk_set_up(&mut self) -> Assembled {
        use register::*;
        const QUEUE_ENTRIES: u32 = 4;
        for status in [0, 1, 3] {
            self.good(STATUS, status)?;
        }
        for (sel, features) in [(0, 0), (1, 1)] {
            self.good(DRIVER_FEATURES_SEL, sel)?;
            self.good(DRIVER_FEATURES, features)?;
        }
        self.good(STATUS, 11)?;
        self.good(QUEUE_SEL, 0)?;
        self.good(QUEUE_NUM, QUEUE_ENTRIES)?;
        for (register, at) in
            [(QUEUE_DESC, GOOD_DESC), (QUEUE_AVAIL, GOOD_AVAIL), (QUEUE_USED, GOOD_USED)]
        {
            self.good(register, at as u32)?;
            self.good(register + 4, 0)?;
        }
        self.good(QUEUE_READY, 1)?;
        self.good(STATUS, 15)?;
        // A header, a sector, a status; only the second changes from one request to the next.
        let chain = [(GOOD_HEADER, 16, 1 | 1 << 16), (0, 512, 0), (GOOD_STATUS, 1, 2)];
        for (index, (address, length, flags)) in (0..).zip(chain) {
            let at = GOOD_DESC + 16 * index;
            for (offset, word) in [(0, address), (4, 0), (8, length), (12, flags)] {
                self.a.mov(dword_ptr(r10 + (at + offset)), word)?;
            }
        }
        Ok(())
    }

    /// One request of the good disk, whose sector is in the header, and its end.
    pub(super) fn good_request(
        &mut self,
        kind: i32,
        buffer: i32,
        flags: i32,
        wrong: CodeLabel,
    ) -> Assembled {
        let mut wait = self.a.create_label();
        self.a.mov(dword_ptr(r10 + GOOD_HEADER), kind)?;
        self.a.mov(dword_ptr(r10 + (GOOD_DESC + 16)), buffer)?;
        self.a.mov(dword_ptr(r10 + (GOOD_DESC + 28)), flags | 1 | 2 << 16)?;
        self.a.mov(byte_ptr(r10 + GOOD_STATUS), 0x7f)?;
        self.a.movzx(eax, word_ptr(r10 + (GOOD_AVAIL + 2)))?;
        self.a.inc(eax)?;
        self.a.mov(word_ptr(r10 + (GOOD_AVAIL + 2)), ax)?;
        self.good(register::QUEUE_NOTIFY, 0)?;
        self.a.set_label(&mut wait)?;
        self.a.pause()?;
        self.a.cmp(word_ptr(r10 + (GOOD_USED + 2)), ax)?;
        self.a.jne(wait)?;
        self.good(register::INTERRUPT_ACK, 3)?;
        self.a.cmp(byte_ptr(r10 + GOOD_STATUS), 0)?;
        self.a.jne(wrong)
    }

    /// Writes a sector of the good disk and reads it back.
    pub(super) fn check_good_disk(&mut self) -> Assembled {
        const IN: i32 = 0;
        const OUT: i32 = 1;
        const DEVICE_WRITES: i32 = 2;
        let (mut wrong, mut right) = (self.a.create_label(), self.a.create_label());
        let mut next = self.a.create_label();
        let sectors = self.plan.good_sectors;
        assert!(sectors.is_power_of_two());
        self.draw(Value::Random(sectors - 1, 0))?;
        self.a.mov(dword_ptr(r10 + (GOOD_HEADER + 8)), eax)?;
        self.a.mov(rcx, PATTERN)?;
        self.a.or(rax, rcx)?;
        self.a.mov(rdi, GOOD_OUT as u64)?;
        self.a.mov(ecx, 64)?;
        self.a.cld()?;
        self.a.rep().stosq()?;
        self.good_request(OUT, GOOD_OUT, 0, wrong)?;
        self.good_request(IN, GOOD_IN, DEVICE_WRITES, wrong)?;
        self.a.mov(ecx, 64)?;
        self.a.set_label(&mut next)?;
        self.a.mov(rax, qword_ptr(r10 + rcx * 8 + (GOOD_IN - 8)))?;
        self.a.cmp(rax, qword_ptr(r10 + rcx * 8 + (GOOD_OUT - 8)))?;
        self.a.jne(wrong)?;
        self.a.dec(ecx)?;
        self.a.jnz(next)?;
        self.a.jmp(right)?;
        self.a.set_label(&mut wrong)?;
        self.a.mov(al, 2)?;
        self.a.mov(dx, 0xf4)?;
        self.a.out(dx, al)?;
        self.spin()?;
        self.a.set_label(&mut right)?;
        self.a.nop()
    }
}
