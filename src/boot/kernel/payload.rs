//! The compressed kernel inside a bzImage, unpacked by alcove instead of by the guest.
//!
//! On a software KVM the guest's own decompressor is interpreted: it takes a minute or more, and
//! KVM's emulator takes LZCNT, which Zstandard's decoder uses wherever the processor has it, for BSR
//! without a word. Here it takes a second.

use std::fs::File;
use std::io::{self, Read, Write};

use flate2::read::GzDecoder;
use linux_loader::loader::bootparam::setup_header;
use lz4_flex::frame::FrameDecoder;
use rustix::fs::{MemfdFlags, memfd_create};
use ruzstd::decoding::StreamingDecoder;

use super::KernelError;
use crate::boot::image::{ImageError, ImageFile};

/// Behind every payload but gzip's, which has it itself, stands its size when unpacked.
const SIZE_BYTES: u64 = 4;
/// Enough to tell the compressions apart.
const MAGIC_BYTES: u64 = 4;
/// What is unpacked at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Unpacks the payload of a bzImage whose protected-mode part starts at `offset` of `image`.
///
/// Gives an ELF file that lives in memory, or nothing if the compression is none of gzip, LZ4 and
/// Zstandard. `payload_offset`, `payload_length` and the formats are those of the boot protocol
/// ("Details of Header Fields"). What unpacks to more than `init_size`, the room that the guest's own
/// decompressor has, is refused, and so is a kernel whose `init_size` is more than `limit`.
pub(super) fn unpack(
    image: &ImageFile<'_>,
    header: &setup_header,
    offset: u64,
    limit: u64,
) -> Result<Option<File>, KernelError> {
    let (start, length) = (header.payload_offset, header.payload_length);
    let (start, length) = (offset + u64::from(start), u64::from(length));
    let magic = image.read_vec(start, length.min(MAGIC_BYTES))?;
    let packed = |trailer| image.reader(start, length.saturating_sub(trailer));
    let failed = |error: String| KernelError::Payload { cause: error };
    let decoder: Box<dyn Read + '_> = match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(GzDecoder::new(packed(0)?)),
        [0x02, 0x21, 0x4c, 0x18, ..] => Box::new(FrameDecoder::new(packed(SIZE_BYTES)?)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = StreamingDecoder::new(packed(SIZE_BYTES)?);
            Box::new(decoder.map_err(|e| failed(e.to_string()))?)
        }
        _ => return Ok(None),
    };
    let limit = limit.min(header.init_size.into());
    let mut source = decoder.take(limit.saturating_add(1));
    let host = |source| KernelError::Image(ImageError::Read(source));
    let mut file = memfd_create(c"kernel", MemfdFlags::CLOEXEC).map(File::from);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut length = 0;
    loop {
        let count = match source.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error.to_string())),
        };
        length += count as u64;
        let file = file.as_mut().map_err(|errno| host((*errno).into()))?;
        file.write_all(chunk.get(..count).unwrap_or_default()).map_err(host)?;
    }
    if length > limit {
        return Err(failed(format!("it unpacks to more than init_size, {limit:#x} bytes")));
    }
    file.map(Some).map_err(|errno| host(errno.into()))
}
