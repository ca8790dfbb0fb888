//! Kernel images made by hand, for tests.

use std::fs::File;
use std::io::Write;

use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::memory::GuestRam;
use crate::memory::layout::MIB;

/// Guest RAM of `mebibytes` MiB.
pub fn ram(mebibytes: u64) -> GuestRam {
    GuestRam::new(mebibytes * MIB, 46).unwrap()
}

/// An unnamed file with `content`.
pub fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// Reads an object from guest RAM.
pub fn read<T: ByteValued>(ram: &GuestRam, address: u64) -> T {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

/// Reads bytes from guest RAM.
pub fn read_bytes(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// A program header, and what the file has at its offset.
#[derive(Clone)]
pub struct Segment {
    pub p_type: u32,
    pub offset: u64,
    pub paddr: u64,
    pub filesz: u64,
    pub memsz: u64,
    pub align: u64,
    pub content: Vec<u8>,
}

pub const PT_LOAD: u32 = 1;
pub const PT_INTERP: u32 = 3;
pub const PT_NOTE: u32 = 4;

impl Segment {
    /// A PT_LOAD of `content` with `bss_bytes` after it.
    pub fn load(offset: u64, paddr: u64, content: &[u8], bss_bytes: u64) -> Self {
        let filesz = content.len() as u64;
        let content = content.to_vec();
        let memsz = filesz + bss_bytes;
        Self { p_type: PT_LOAD, offset, paddr, filesz, memsz, align: 0x1000, content }
    }

    /// A PT_NOTE of `content`.
    pub fn note(offset: u64, content: &[u8]) -> Self {
        Self { p_type: PT_NOTE, align: 4, ..Self::load(offset, 0, content, 0) }
    }
}

/// A 64-bit ELF file. The fields are those of the ELF header with its names.
#[derive(Clone)]
pub struct Elf {
    pub class: u8,
    pub data: u8,
    pub e_type: u16,
    pub machine: u16,
    pub entry: u64,
    pub phoff: u64,
    pub phentsize: u16,
    /// The number of segments unless set.
    pub phnum: Option<u16>,
    pub segments: Vec<Segment>,
}

impl Elf {
    pub const HEADER_BYTES: u64 = 64;
    pub const PROGRAM_HEADER_BYTES: u64 = 56;

    /// An executable that is entered at the start of its only segment, at 1 MiB.
    pub fn small() -> Self {
        Self {
            class: 2,
            data: 1,
            e_type: 2,
            machine: 62,
            entry: MIB,
            phoff: Self::HEADER_BYTES,
            phentsize: Self::PROGRAM_HEADER_BYTES as u16,
            phnum: None,
            segments: vec![Segment::load(0x1000, MIB, b"\xf4\xf4\xf4\xf4", 0x2000)],
        }
    }

    pub fn with(mut self, segment: Segment) -> Self {
        self.segments.push(segment);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"\x7fELF".to_vec();
        bytes.extend([self.class, self.data, 1]);
        bytes.resize(16, 0);
        bytes.extend(self.e_type.to_le_bytes());
        bytes.extend(self.machine.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(self.entry.to_le_bytes());
        bytes.extend(self.phoff.to_le_bytes());
        bytes.extend([0; 8 + 4]);
        bytes.extend((Self::HEADER_BYTES as u16).to_le_bytes());
        bytes.extend(self.phentsize.to_le_bytes());
        bytes.extend(self.phnum.unwrap_or(self.segments.len() as u16).to_le_bytes());
        bytes.resize(self.phoff.max(Self::HEADER_BYTES) as usize, 0);
        for s in &self.segments {
            bytes.extend(s.p_type.to_le_bytes());
            bytes.extend(7u32.to_le_bytes());
            for field in [s.offset, u64::MAX << 31, s.paddr, s.filesz, s.memsz, s.align] {
                bytes.extend(field.to_le_bytes());
            }
        }
        for s in self.segments.iter().filter(|s| !s.content.is_empty()) {
            let end = s.offset as usize + s.content.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[s.offset as usize..end].copy_from_slice(&s.content);
        }
        bytes
    }

    pub fn file(&self) -> File {
        file(&self.bytes())
    }
}

/// One note with its paddings.
pub fn note(name: &[u8], note_type: u32, descriptor: &[u8], align: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((name.len() as u32).to_le_bytes());
    bytes.extend((descriptor.len() as u32).to_le_bytes());
    bytes.extend(note_type.to_le_bytes());
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(align), 0);
    bytes.extend(descriptor);
    bytes.resize(bytes.len().next_multiple_of(align), 0);
    bytes
}

/// A bzImage. The fields are those of the setup header with its names.
#[derive(Clone)]
pub struct BzImage {
    pub setup_sects: u8,
    pub syssize: u32,
    pub version: u16,
    pub loadflags: u8,
    pub initrd_addr_max: u32,
    pub kernel_alignment: u32,
    pub relocatable_kernel: u8,
    pub xloadflags: u16,
    pub cmdline_size: u32,
    pub pref_address: u64,
    pub init_size: u32,
    /// `payload_offset` and `payload_length`.
    pub payload: (u32, u32),
    /// The protected-mode kernel and what follows it.
    pub kernel: Vec<u8>,
}

impl BzImage {
    pub const KERNEL_BYTES: usize = 0x1000;

    /// A 64-bit kernel of 4 KiB that unpacks itself into 2 MiB from 2 MiB on.
    pub fn small() -> Self {
        Self {
            setup_sects: 3,
            syssize: (Self::KERNEL_BYTES / 16) as u32,
            version: 0x020f,
            loadflags: 1,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: 3,
            cmdline_size: 2047,
            payload: (0, 0),
            pref_address: 2 * MIB,
            init_size: 0x20_0000,
            kernel: (0..Self::KERNEL_BYTES).map(|i| (i / 16) as u8).collect(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let sectors = if self.setup_sects == 0 { 5 } else { usize::from(self.setup_sects) + 1 };
        let mut bytes = vec![0; sectors * 512];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0x1f1, &[self.setup_sects]);
        put(0x1f4, &self.syssize.to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &self.version.to_le_bytes());
        put(0x211, &[self.loadflags]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x22c, &self.initrd_addr_max.to_le_bytes());
        put(0x230, &self.kernel_alignment.to_le_bytes());
        put(0x234, &[self.relocatable_kernel]);
        put(0x236, &self.xloadflags.to_le_bytes());
        put(0x238, &self.cmdline_size.to_le_bytes());
        put(0x248, &self.payload.0.to_le_bytes());
        put(0x24c, &self.payload.1.to_le_bytes());
        put(0x258, &self.pref_address.to_le_bytes());
        put(0x260, &self.init_size.to_le_bytes());
        // After the header: code of the setup, which is no part of it.
        put(0x26c, &[0x90; 64]);
        bytes.extend(&self.kernel);
        bytes
    }

    pub fn file(&self) -> File {
        file(&self.bytes())
    }
}
