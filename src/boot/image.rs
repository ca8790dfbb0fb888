//! A file whose bytes go into guest RAM.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError,
};

use crate::memory::GuestRam;

/// Why a file cannot be used as an image, whatever stands in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The path names a directory.
    #[error("it is a directory, not a file")]
    Directory,
    /// A pipe, socket or device. Loading seeks and needs the size in advance.
    #[error("it is a pipe or a device; save it to a file first")]
    NotRegular,
    /// No bytes at all.
    #[error("it is empty")]
    Empty,
    /// The file's own headers promise more bytes than it has.
    #[error("it is truncated: {needed_bytes} bytes expected, {size_bytes} there")]
    Truncated {
        /// The size that the headers ask for, at least.
        needed_bytes: u64,
        /// The size of the file.
        size_bytes: u64,
    },
    /// Reading failed.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// A range outside guest RAM; the loaders check ranges first.
    #[error("guest memory at {address:#x} cannot be written")]
    Memory {
        /// The first address of the range.
        address: u64,
        /// What guest memory answered.
        source: GuestMemoryError,
    },
}

/// A regular file that is not empty, and its size at the time of opening.
pub(super) struct ImageFile<'a> {
    file: &'a File,
    size_bytes: u64,
}

impl<'a> ImageFile<'a> {
    /// Takes `file` if it is a regular file with at least one byte.
    pub(super) fn new(file: &'a File) -> Result<Self, ImageError> {
        let metadata = file.metadata().map_err(ImageError::Read)?;
        if metadata.is_dir() {
            return Err(ImageError::Directory);
        }
        if !metadata.is_file() {
            return Err(ImageError::NotRegular);
        }
        match metadata.len() {
            0 => Err(ImageError::Empty),
            size_bytes => Ok(Self { file, size_bytes }),
        }
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The end of a range of the file, or the error that it is truncated. An empty range lies
    /// anywhere.
    pub(super) fn check_range(&self, offset: u64, len: u64) -> Result<u64, ImageError> {
        let needed_bytes = offset.saturating_add(len);
        if len > 0 && needed_bytes > self.size_bytes {
            return Err(ImageError::Truncated { needed_bytes, size_bytes: self.size_bytes });
        }
        Ok(needed_bytes)
    }

    /// Reads from the start of the file as many bytes as it has, up to the length of `buffer`, and
    /// returns them.
    pub(super) fn read_head<'b>(&self, buffer: &'b mut [u8]) -> Result<&'b [u8], ImageError> {
        let len = usize::try_from(self.size_bytes).unwrap_or(usize::MAX).min(buffer.len());
        let head = &mut buffer[..len];
        self.file.read_exact_at(head, 0).map_err(ImageError::Read)?;
        Ok(head)
    }

    /// Reads `len` bytes at `offset`, after it made sure that the file has them.
    pub(super) fn read_vec(&self, offset: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        self.check_range(offset, len)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, offset).map_err(ImageError::Read)?;
        Ok(bytes)
    }

    /// What is in `len` bytes at `offset`, from front to back. Moves the file's position.
    pub(super) fn reader(&self, offset: u64, len: u64) -> Result<impl Read + 'a, ImageError> {
        self.check_range(offset, len)?;
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset)).map_err(ImageError::Read)?;
        Ok(BufReader::new(file).take(len))
    }

    /// Reads `len` bytes at `offset` of the file straight into guest RAM at `address`. Moves the
    /// file's position.
    pub(super) fn read_into(
        &self,
        ram: &GuestRam,
        address: u64,
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let mut target = ram
            .memory()
            .get_slice(GuestAddress(address), count)
            .map_err(|source| ImageError::Memory { address, source })?;
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset)).map_err(ImageError::Read)?;
        file.read_exact_volatile(&mut target).map_err(|error| match error {
            VolatileMemoryError::IOError(error) => ImageError::Read(error),
            error => ImageError::Memory { address, source: error.into() },
        })
    }
}

/// The `N` bytes at `offset` of `bytes`, if they are there.
pub(super) fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}
