//! Guests of a few instructions, as ELF kernels: what a machine costs without an operating system in
//! it. They begin in 64-bit mode, where addresses below 1 GiB are mapped to themselves.

use crate::memory::layout::{BOOT_PDPT, GIB, MIB, VIRTIO_MMIO_START};

/// Where they are loaded.
pub const LOAD_ADDRESS: u64 = 2 * MIB;
/// A page that is theirs, for a page directory.
const DIRECTORY: u64 = 3 * MIB;
/// COM1's data and scratch registers, and the port that ends the machine.
pub const COM1: u16 = 0x3f8;
const COM1_SCRATCH: u16 = COM1 + 7;
/// See [`devices::legacy::debug_exit`].
pub const DEBUG_EXIT: u16 = 0xf4;
/// A register that a driver writes: DriverFeaturesSel (virtio 1.2 §4.2.2) of the first device.
const REGISTER: u64 = VIRTIO_MMIO_START + 0x24;

/// Machine code in the making (Intel SDM vol. 2).
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn add(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    fn add_u32(&mut self, opcode: u8, value: u32) -> &mut Self {
        self.add(&[opcode]).add(&value.to_le_bytes())
    }

    /// `mov edx, port`
    fn port(&mut self, port: u16) -> &mut Self {
        self.add_u32(0xba, port.into())
    }

    /// Prints a line of nothing.
    fn print(&mut self) -> &mut Self {
        // mov al, '\n'; out dx, al
        self.port(COM1).add(&[0xb0, b'\n', 0xee])
    }

    /// `mov eax, value; mov [address], rax`
    fn store(&mut self, address: u64, value: u64) -> &mut Self {
        let (address, value) = (address as u32, value as u32);
        self.add_u32(0xb8, value).add(&[0x48, 0x89, 0x04, 0x25]).add(&address.to_le_bytes())
    }

    /// Does `body` so many times; it leaves ECX alone and is short.
    fn repeat(&mut self, times: u32, body: &[u8]) -> &mut Self {
        // mov ecx, times; body; dec ecx; jnz body
        let back = -(body.len() as i8) - 4;
        self.add_u32(0xb9, times).add(body).add(&[0xff, 0xc9, 0x75, back.cast_unsigned()])
    }

    /// Ends the machine with the status 0.
    fn end(&mut self) -> &mut Self {
        // xor eax, eax; out dx, al
        self.port(DEBUG_EXIT).add(&[0x31, 0xc0, 0xee])
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

/// Prints a line and ends.
pub fn print() -> Vec<u8> {
    Code::default().print().end().take()
}

/// Prints a line and sleeps for ever.
pub fn idle() -> Vec<u8> {
    // hlt; jmp to it
    Code::default().print().add(&[0xf4, 0xeb, 0xfd]).take()
}

/// Prints a line, reads a port so many times, prints a line, writes a register as many times, prints a
/// line, ends.
pub fn exits(times: u32) -> Vec<u8> {
    const PAGE_BYTES: u64 = 2 * MIB;
    const ENTRY_BYTES: u64 = 8;
    // Present, writable, accessed; a large page also dirty and large (Intel SDM vol. 3 §4.5.4).
    const TABLE: u64 = 0x23;
    const LARGE_PAGE: u64 = 0xe3;
    let mut code = Code::default();
    // The page that the register lies in, mapped to itself.
    let page = REGISTER / PAGE_BYTES * PAGE_BYTES;
    code.store(DIRECTORY + page % GIB / PAGE_BYTES * ENTRY_BYTES, page | LARGE_PAGE);
    code.store(BOOT_PDPT + page / GIB * ENTRY_BYTES, DIRECTORY | TABLE);
    // in al, dx
    code.print().port(COM1_SCRATCH).repeat(times, &[0xec]);
    // xor eax, eax; mov ebx, register; mov [rbx], eax
    code.print().add(&[0x31, 0xc0]).add_u32(0xbb, REGISTER as u32).repeat(times, &[0x89, 0x03]);
    code.print().end().take()
}

/// An ELF executable that is loaded at [`LOAD_ADDRESS`] and starts with `code` (System V ABI, chapters 4
/// and 5).
pub fn elf(code: &[u8]) -> Vec<u8> {
    const EHDR_BYTES: u16 = 64;
    const PHDR_BYTES: u16 = 56;
    const OFFSET: u64 = 0x1000;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let (executable, x86_64, version) = (2u16, 62u16, 1u32);
    image.extend(executable.to_le_bytes());
    image.extend(x86_64.to_le_bytes());
    image.extend(version.to_le_bytes());
    for field in [LOAD_ADDRESS, EHDR_BYTES.into(), 0] {
        image.extend(field.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for field in [EHDR_BYTES, PHDR_BYTES, 1, 64, 0, 0] {
        image.extend(field.to_le_bytes());
    }
    let (load, read_execute) = (1u32, 5u32);
    image.extend(load.to_le_bytes());
    image.extend(read_execute.to_le_bytes());
    let length = code.len() as u64;
    for field in [OFFSET, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 0x1000] {
        image.extend(field.to_le_bytes());
    }
    image.resize(OFFSET as usize, 0);
    image.extend(code);
    image
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, FastFormatter};

    use super::*;

    fn listing(code: &[u8]) -> Vec<String> {
        let mut formatter = FastFormatter::new();
        let decoder = Decoder::with_ip(64, code, LOAD_ADDRESS, DecoderOptions::NONE);
        let line = |instruction| {
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            text
        };
        decoder.into_iter().map(line).collect()
    }

    #[test]
    fn the_guests_are_the_instructions_that_are_meant() {
        let exits = listing(&exits(1000));

        assert_eq!(listing(&print())[..3], ["mov edx,3F8h", "mov al,0Ah", "out dx,al"]);
        assert_eq!(listing(&idle())[3..], ["hlt", "jmp 200008h"]);
        assert_eq!(exits[1], "mov [300400h],rax");
        assert_eq!(exits[3], "mov [0A018h],rax");
        assert_eq!(exits[7..11], ["mov edx,3FFh", "mov ecx,3E8h", "in al,dx", "dec ecx"]);
        let back = exits.iter().filter(|line| line.starts_with("jne")).count();
        assert_eq!(back, 2, "{exits:?}");
        assert_eq!(exits.last().unwrap(), "out dx,al");
    }
}
