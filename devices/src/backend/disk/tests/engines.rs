//! What both engines do alike.

use super::*;

#[test]
fn what_is_written_in_pieces_is_read_in_others() {
    for engine in ENGINES {
        let file = image(1 << 16);
        let mut rig = Rig::new(&options(file.path(), engine));
        let (mut a, mut b, mut c) = ([1u8; 100], [2u8; 400], [3u8; 524]);
        let buffers = [buffer(&mut a), buffer(&mut b), buffer(&mut c)];
        let write = Operation::Write { buffers: &buffers, durable: true };

        rig.run(4096, 1024, write).unwrap();
        rig.run(0, 0, Operation::Flush).unwrap();
        let mut back = [0u8; 2048];
        rig.read(4096 - 512, &mut back).unwrap();

        let expected =
            [vec![7; 512], vec![1; 100], vec![2; 400], vec![3; 524], vec![10; 512]].concat();
        assert_eq!(back.as_slice(), expected, "{engine:?}");
    }
}

#[test]
fn more_buffers_than_a_system_call_takes_are_moved() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut rig = Rig::new(&options(file.path(), engine));
        let mut data = vec![0u8; 1500 * 512];
        let buffers: Vec<Buffer> = data.chunks_mut(512).map(buffer).collect();

        rig.run(512, 1500 * 512, Operation::Read(&buffers)).unwrap();

        assert!((1..=1500).zip(data.chunks(512)).all(|(at, chunk)| chunk == [at as u8; 512]));
    }
}

#[test]
fn senseless_requests_fail_and_leave_the_disk_alone() {
    for engine in ENGINES {
        let file = image(8192);
        let mut rig = Rig::new(&options(file.path(), engine));
        let mut data = [0xaau8; 1024];
        for offset in [8192 - 512, 8192, u64::MAX, u64::MAX - 1023, 1 << 63] {
            assert_eq!(rig.write(offset, &mut data), Err(Failure::OutOfRange), "{offset:#x}");
            assert_eq!(rig.read(offset, &mut data), Err(Failure::OutOfRange));
            assert_eq!(rig.run(offset, 1024, Operation::Discard), Err(Failure::OutOfRange));
            let zeroes = Operation::WriteZeroes { may_unmap: false, durable: false };
            assert_eq!(rig.run(offset, 1024, zeroes), Err(Failure::OutOfRange));
        }
        let buffers = [buffer(&mut data)];
        assert_eq!(rig.run(0, 512, Operation::Read(&buffers)), Err(Failure::Malformed));
        assert_eq!(rig.run(0, 0, Operation::Read(&[])), Ok(()));

        assert_eq!(fs::read(file.path()).unwrap(), fs::read(image(8192).path()).unwrap());
    }
}

#[test]
fn a_tag_that_is_in_use_or_too_large_is_refused() {
    let file = image(8192);
    let mut rig = Rig::new(&options(file.path(), Engine::IoUring));
    let mut data = [0u8; 512];
    let buffers = [buffer(&mut data)];
    for tag in [5, 5, 64, u16::MAX] {
        let request = Request { tag, offset: 512, len: 512, operation: Operation::Read(&buffers) };
        // SAFETY: the data outlives the queue's requests, which are waited for.
        unsafe { rig.queue.submit(&request) };
    }
    let mut results = Vec::new();
    while rig.queue.in_flight() > 0 {
        rig.queue.wait();
        results.extend(rig.queue.next_completion().map(|done| (done.tag, done.result)));
    }
    results.sort_by_key(|(tag, result)| (*tag, result.is_ok()));

    let refused = Err(Failure::Malformed);
    assert_eq!(results, [(5, refused), (5, Ok(())), (64, refused), (u16::MAX, refused)]);
    assert_eq!(data, [1; 512]);
}

#[test]
fn a_read_only_disk_takes_no_writes_of_any_kind() {
    for engine in ENGINES {
        let file = image(8192);
        let read_only = DiskOptions { read_only: true, ..options(file.path(), engine) };
        let mut rig = Rig::new(&read_only);

        assert_eq!(rig.write(0, &mut [1; 512]), Err(Failure::ReadOnly));
        assert_eq!(rig.run(0, 512, Operation::Discard), Err(Failure::ReadOnly));
        let zeroes = Operation::WriteZeroes { may_unmap: true, durable: true };
        assert_eq!(rig.run(0, 512, zeroes), Err(Failure::ReadOnly));
        assert_eq!(rig.run(0, 0, Operation::Flush), Ok(()));
        assert_eq!(rig.read(512, &mut [0; 512]), Ok(()));
    }
}

#[test]
fn discarding_gives_space_back_and_zeroes_read_as_zeroes() {
    use std::os::unix::fs::MetadataExt;
    // In memory as well, where a file system cannot make zeroes by itself.
    for folder in [std::env::temp_dir(), "/dev/shm".into()] {
        for engine in ENGINES {
            let mut file = NamedTempFile::new_in(&folder).unwrap();
            file.write_all(&vec![0x55; 4 << 20]).unwrap();
            file.as_file().sync_all().unwrap();
            let before = file.as_file().metadata().unwrap().blocks();
            let mut rig = Rig::new(&options(file.path(), engine));

            rig.run(1 << 20, 1 << 20, Operation::Discard).unwrap();
            rig.run(
                2 << 20,
                (1 << 20) + 512,
                Operation::WriteZeroes { may_unmap: false, durable: false },
            )
            .unwrap();
            rig.run(512, 1536, Operation::WriteZeroes { may_unmap: true, durable: true }).unwrap();
            rig.run(0, 0, Operation::Discard).unwrap();
            rig.run(0, 0, Operation::WriteZeroes { may_unmap: false, durable: false }).unwrap();

            let bytes = fs::read(file.path()).unwrap();
            assert_eq!(bytes.len(), 4 << 20, "the disk keeps its size");
            assert!(file.as_file().metadata().unwrap().blocks() < before, "{folder:?} {engine:?}");
            assert!(bytes[2 << 20..(3 << 20) + 512].iter().all(|byte| *byte == 0));
            assert!(bytes[512..2048].iter().all(|byte| *byte == 0));
            assert!(bytes[..512].iter().chain(&bytes[2048..1 << 20]).all(|byte| *byte == 0x55));
            assert!(bytes[(3 << 20) + 512..].iter().all(|byte| *byte == 0x55));
        }
    }
}

#[test]
fn direct_io_takes_memory_as_it_lies_and_refuses_parts_of_blocks() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let direct = DiskOptions { direct: true, ..options(file.path(), engine) };
        if let Err(OpenError::DirectUnsupported) = RawDisk::open(&direct) {
            continue;
        }
        let mut rig = Rig::new(&direct);
        let block = rig.disk.geometry().logical_block as usize;
        let mut memory = vec![0u8; 600 * 1024 + 1];
        let len = 600 * 1024;
        assert!(rig.disk.geometry().aligned_only);

        rig.read(block as u64, &mut memory[1..]).unwrap();
        let first = (block / 512) as u8;
        assert_eq!((memory[1], memory[len]), (first, first.wrapping_add(((len - 1) / 512) as u8)));
        memory[1..].fill(0xee);
        rig.write(block as u64, &mut memory[1..]).unwrap();
        assert_eq!(rig.read(1, &mut memory[..block]), Err(Failure::Misaligned));

        let bytes = fs::read(file.path()).unwrap();
        assert!(bytes[block..block + len].iter().all(|byte| *byte == 0xee));
        assert_eq!((bytes[block - 1], bytes[block + len]), (0, ((block + len) / 512) as u8));
    }
}

#[test]
fn a_file_that_becomes_shorter_fails_reads_and_the_queue_goes_on() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut rig = Rig::new(&options(file.path(), engine));
        let mut data = vec![0u8; 8192];

        file.as_file().set_len(4096 + 512).unwrap();

        assert_eq!(rig.read(8192, &mut data), Err(Failure::Truncated));
        assert_eq!(rig.read(0, &mut data), Err(Failure::Truncated), "half of it is there");
        assert_eq!(rig.read(0, &mut data[..4096]), Ok(()));
        assert_eq!(rig.write(8192, &mut data), Ok(()), "writing makes the file longer again");
        assert_eq!(rig.run(0, 0, Operation::Flush), Ok(()));
    }
}

#[test]
fn an_error_of_the_host_fails_the_request_and_the_queue_goes_on() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    for engine in ENGINES {
        let memory = memfd_create(c"disk", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memory, 1 << 16).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
        let mut rig = Rig::new(&options(path.as_ref(), engine));
        let mut data = [0u8; 4096];
        ftruncate(&memory, 0).unwrap();
        fcntl_add_seals(&memory, SealFlags::GROW).unwrap();

        let result = rig.write(4096, &mut data);

        assert_eq!(result, Err(Failure::Host(rustix::io::Errno::PERM.raw_os_error())));
        assert_eq!(rig.run(0, 0, Operation::Flush), Ok(()));
    }
}

#[test]
fn a_full_file_system_fails_the_write_and_room_made_later_is_used() {
    let Some(mount) = SmallFileSystem::mount() else {
        return;
    };
    for engine in ENGINES {
        let path = mount.0.path().join(engine.name());
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let filler = mount.0.path().join("filler");
        fs::write(&filler, vec![0u8; 192 * 1024]).unwrap();
        let mut rig = Rig::new(&options(&path, engine));
        let mut data = vec![0x77u8; 128 * 1024];

        let full = rig.write(0, &mut data);
        fs::remove_file(&filler).unwrap();

        assert_eq!(full, Err(Failure::Host(rustix::io::Errno::NOSPC.raw_os_error())));
        assert_eq!(rig.write(0, &mut data), Ok(()));
        drop(rig);
        fs::remove_file(&path).unwrap();
    }
}

/// A tmpfs of 256 KiB, if this process may mount one.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256K", "none"])
            .arg(folder.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self(folder))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

/// A step of a random history: what, the first sector, the number of sectors.
fn step() -> impl Strategy<Value = (u8, u64, u64)> {
    (0u8..5, 0u64..140, 0u64..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_disk_behaves_like_memory(steps in prop::collection::vec(step(), 1..40), uring: bool) {
        const SECTORS: u64 = 128;
        let file = image((SECTORS * 512) as usize);
        let mut model = fs::read(file.path()).unwrap();
        let engine = if uring { Engine::IoUring } else { Engine::Sync };
        let mut rig = Rig::new(&options(file.path(), engine));
        for (number, (what, first, count)) in steps.into_iter().enumerate() {
            let (offset, len) = (first * 512, count * 512);
            let range = offset as usize..(offset + len) as usize;
            let fits = first + count <= SECTORS;
            let mut data = vec![number as u8; len as usize];
            let result = match what {
                0 => rig.read(offset, &mut data),
                1 => rig.write(offset, &mut data),
                2 => rig.run(0, 0, Operation::Flush),
                3 => rig.run(offset, len, Operation::WriteZeroes { may_unmap: false, durable: false }),
                _ => rig.run(offset, len, Operation::WriteZeroes { may_unmap: true, durable: true }),
            };
            prop_assert_eq!(result.is_ok(), fits || what == 2);
            if result.is_ok() {
                match what {
                    0 => prop_assert_eq!(&data, &model[range]),
                    1 => model[range].fill(number as u8),
                    2 => {}
                    _ => model[range].fill(0),
                }
            }
        }
        prop_assert_eq!(fs::read(file.path()).unwrap(), model);
    }
}
