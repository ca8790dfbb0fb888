//! Opens an image and finds out what it is.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, Statx, StatxFlags, fstatfs, open, seek, statx,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::lock::{self, LockOwner};
use super::raw::{Alignment, RawDisk, RawFile};
use super::{Geometry, SECTOR_BYTES, host, uring};

/// How to open an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// Open it for reading only.
    pub read_only: bool,
    /// Pass the host's page cache by (`O_DIRECT`).
    pub direct: bool,
    /// How to do the I/O; `None` takes what suits the file and works on this host.
    pub engine: Option<Engine>,
}

/// How I/O is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Many requests at a time, through a ring shared with the kernel.
    IoUring,
    /// One system call after the other.
    Sync,
}

impl Engine {
    /// As the user writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Sync => "sync",
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such file.
    #[error("the file does not exist; check the path, or make an image with truncate -s SIZE FILE")]
    Missing,
    /// It is a directory.
    #[error("it is a directory; give an image file or a block device")]
    Directory,
    /// It is a socket, a pipe or a character device.
    #[error("it is neither a file nor a block device")]
    WrongKind,
    /// The user may not even read it.
    #[error("no permission to open it; change its mode or owner")]
    Permission,
    /// It can be read, but not be opened for writing.
    #[error("it cannot be written; add ,readonly or make it writable")]
    NotWritable,
    /// It has no bytes.
    #[error("it is empty; make it as large as the disk shall be, with truncate -s SIZE FILE")]
    Empty,
    /// It has not even one block.
    #[error("it has {size} bytes, less than one block of {block}")]
    TooSmall {
        /// Its size in bytes.
        size: u64,
        /// The size of a block in bytes.
        block: u32,
    },
    /// Someone else writes to it, or reads it and this disk would write to it.
    #[error("it is in use by {owner}; end that first, or open it ,readonly on both sides")]
    InUse {
        /// Who.
        owner: LockOwner,
    },
    /// The file system has no direct I/O.
    #[error("its file system has no direct I/O; leave ,direct out")]
    DirectUnsupported,
    /// io_uring was asked for by name and is not to be had.
    #[error("io_uring does not work on this host; leave ,engine out or take engine=sync")]
    NoIoUring(#[source] io::Error),
    /// The host failed.
    #[error("it cannot be opened")]
    Host(#[source] io::Error),
}

impl From<Errno> for OpenError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::NOTDIR => Self::Missing,
            Errno::ISDIR => Self::Directory,
            Errno::ACCESS | Errno::PERM => Self::Permission,
            Errno::ROFS => Self::NotWritable,
            Errno::NXIO => Self::WrongKind,
            error => Self::Host(error.into()),
        }
    }
}

/// What the host's page cache writes at once, the largest block that can be written without reading
/// first. Some file systems name a larger one, up to megabytes, which is but what suits them.
const PAGE_BYTES: u32 = 4096;
/// Direct I/O's alignment on file systems that do not tell: the largest in use.
const UNTOLD_ALIGNMENT: u32 = 4096;

impl RawDisk {
    /// Opens and locks the image that `options` name.
    ///
    /// A writer excludes everyone else who opens the image through this function, a reader
    /// excludes writers. The bytes after the last whole block are out of reach.
    ///
    /// # Errors
    /// Why the image cannot be used.
    pub fn open(options: &DiskOptions) -> Result<Self, OpenError> {
        // Before it is opened: opening a pipe would wait.
        match FileType::from_raw_mode(rustix::fs::stat(&options.path)?.st_mode) {
            FileType::Directory => return Err(OpenError::Directory),
            FileType::RegularFile | FileType::BlockDevice => {}
            _ => return Err(OpenError::WrongKind),
        }
        let file = open_file(options)?;
        let flags = AtFlags::EMPTY_PATH;
        let about = statx(&file, c"", flags, StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN)?;
        let is_block_device =
            FileType::from_raw_mode(about.stx_mode.into()) == FileType::BlockDevice;
        if is_block_device && !options.read_only && host::is_block_device_read_only(file.as_fd())? {
            return Err(OpenError::NotWritable);
        }
        let lock = open_again(options, &about)?;
        lock::lock(lock.as_fd(), &options.path, !options.read_only)
            .map_err(|owner| OpenError::InUse { owner })?;
        let alignment = if options.direct { Some(alignment(&about)?) } else { None };
        let geometry = geometry(&file, &about, is_block_device, alignment, options)?;
        let engine = choose_engine(&file, options)?;
        Ok(Self::new(RawFile { file, _lock: lock, geometry, is_block_device, alignment }, engine))
    }
}

fn open_file(options: &DiskOptions) -> Result<File, OpenError> {
    let direct = if options.direct { OFlags::DIRECT } else { OFlags::empty() };
    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = OFlags::CLOEXEC | OFlags::NOCTTY | direct;
    match open(&options.path, flags | access, Mode::empty()) {
        Ok(file) => Ok(file.into()),
        Err(Errno::INVAL) if options.direct => Err(OpenError::DirectUnsupported),
        Err(Errno::ACCESS | Errno::PERM)
            if !options.read_only
                && open(&options.path, OFlags::CLOEXEC, Mode::empty()).is_ok() =>
        {
            Err(OpenError::NotWritable)
        }
        Err(error) => Err(error.into()),
    }
}

/// The same file a second time, to hold the lock. A ring that has the image in its table closes it
/// some time after its process has died, and until then a lock would stay.
fn open_again(options: &DiskOptions, about: &Statx) -> Result<File, OpenError> {
    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let file = open(&options.path, OFlags::CLOEXEC | OFlags::NOCTTY | access, Mode::empty())?;
    let again = statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
    let identity = |about: &Statx| (about.stx_dev_major, about.stx_dev_minor, about.stx_ino);
    match identity(&again) == identity(about) {
        true => Ok(file.into()),
        false => Err(OpenError::Host(Errno::STALE.into())),
    }
}

/// What direct I/O asks for.
fn alignment(about: &Statx) -> Result<Alignment, OpenError> {
    let told = StatxFlags::from_bits_retain(about.stx_mask).contains(StatxFlags::DIOALIGN);
    let (memory, range) = match told {
        true => (about.stx_dio_mem_align, about.stx_dio_offset_align),
        false => (UNTOLD_ALIGNMENT, UNTOLD_ALIGNMENT),
    };
    if !memory.is_power_of_two() || !range.is_power_of_two() {
        return Err(OpenError::DirectUnsupported);
    }
    Ok(Alignment { memory_bytes: memory as usize, range_bytes: range })
}

fn geometry(
    file: &File,
    about: &Statx,
    is_block_device: bool,
    alignment: Option<Alignment>,
    options: &DiskOptions,
) -> Result<Geometry, OpenError> {
    let least = SECTOR_BYTES as u32;
    let (mut logical_block, mut physical_block) = (least, about.stx_blksize.min(PAGE_BYTES));
    let mut optimal_io = about.stx_blksize;
    let mut size = about.stx_size;
    if is_block_device {
        logical_block = rustix::fs::ioctl_blksszget(file)?;
        physical_block = rustix::fs::ioctl_blkpbszget(file)?;
        optimal_io = host::block_device_optimal_io(file.as_fd())?;
        size = seek(file, SeekFrom::End(0))?;
    }
    if let Some(alignment) = alignment {
        logical_block = logical_block.max(alignment.range_bytes);
    }
    if !logical_block.is_power_of_two() {
        logical_block = least;
    }
    if !physical_block.is_power_of_two() {
        physical_block = least;
    }
    if size == 0 {
        return Err(OpenError::Empty);
    }
    let block = u64::from(logical_block);
    let rest = size % block;
    if rest == size {
        return Err(OpenError::TooSmall { size, block: logical_block });
    }
    if rest > 0 {
        let path = options.path.display();
        tracing::warn!(%path, "the last {rest} bytes of the image make no block of {block} and stay out of reach");
    }
    Ok(Geometry {
        capacity: size - rest,
        logical_block: logical_block.max(least),
        physical_block: physical_block.max(logical_block),
        optimal_io,
        aligned_only: alignment.is_some(),
        read_only: options.read_only,
    })
}

/// Takes the engine that was asked for, or io_uring where it works and the file may ever wait.
fn choose_engine(file: &File, options: &DiskOptions) -> Result<Engine, OpenError> {
    let path = options.path.display();
    let engine = match options.engine {
        Some(Engine::Sync) => Engine::Sync,
        Some(Engine::IoUring) => {
            uring::probe(file.as_fd()).map_err(OpenError::NoIoUring)?;
            Engine::IoUring
        }
        None if lives_in_memory(file, &options.path) => Engine::Sync,
        None => match uring::probe(file.as_fd()) {
            Ok(()) => Engine::IoUring,
            Err(error) => {
                tracing::warn!(%path, %error, "io_uring does not work on this host; taking engine=sync");
                Engine::Sync
            }
        },
    };
    tracing::debug!(%path, engine = engine.name(), "disk opened");
    Ok(engine)
}

/// The file's data is never further away than memory, so that reading it is a copy: a ring would
/// only add to that.
fn lives_in_memory(file: &File, path: &Path) -> bool {
    match fstatfs(file) {
        Ok(about) => matches!(about.f_type, libc::TMPFS_MAGIC | RAMFS_MAGIC),
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "the file system does not tell its kind");
            false
        }
    }
}

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;
