//! Opening: what is refused and why, sizes, locks.

use std::process::{Command, Stdio};

use super::*;

fn refusal(path: &Path) -> OpenError {
    RawDisk::open(&options(path, Engine::Sync)).unwrap_err()
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    File::create(&empty).unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let small = folder.path().join("small");
    fs::write(&small, [0; 511]).unwrap();

    assert!(matches!(refusal(&folder.path().join("none")), OpenError::Missing));
    assert!(matches!(refusal(&empty.join("below")), OpenError::Missing));
    assert!(matches!(refusal(folder.path()), OpenError::Directory));
    assert!(matches!(refusal(&empty), OpenError::Empty));
    assert!(matches!(refusal(&pipe), OpenError::WrongKind));
    assert!(matches!(refusal("/dev/null".as_ref()), OpenError::WrongKind));
    assert!(matches!(refusal(&small), OpenError::TooSmall { size: 511, block: 512 }));
}

#[test]
fn the_rest_after_the_last_sector_is_out_of_reach() {
    let file = image(4096 + 100);
    let mut rig = Rig::new(&options(file.path(), Engine::Sync));

    assert_eq!(rig.disk.geometry().capacity, 4096);
    assert_eq!(rig.write(4096, &mut [9; 512]), Err(Failure::OutOfRange));
    assert_eq!(fs::read(file.path()).unwrap().len(), 4096 + 100);
}

#[test]
fn geometry_is_made_of_powers_of_two() {
    let file = image(1 << 16);
    let geometry = Rig::new(&options(file.path(), Engine::Sync)).disk.geometry();

    assert_eq!((geometry.capacity, geometry.logical_block), (1 << 16, 512));
    assert!(geometry.physical_block.is_power_of_two() && geometry.physical_block >= 512);
    assert!(!geometry.read_only && !geometry.aligned_only);
}

#[test]
fn a_file_in_memory_is_served_without_a_ring() {
    let mut file = NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(&[0; 4096]).unwrap();
    let unspecified = DiskOptions { engine: None, ..options(file.path(), Engine::Sync) };

    assert_eq!(RawDisk::open(&unspecified).unwrap().engine(), Engine::Sync);
}

#[test]
fn a_writer_is_alone_and_readers_share() {
    let file = image(4096);
    let writer = options(file.path(), Engine::Sync);
    let reader = DiskOptions { read_only: true, ..writer.clone() };
    let in_use = |options: &DiskOptions| match RawDisk::open(options) {
        Err(OpenError::InUse { owner }) => Some(owner),
        Err(other) => panic!("{other}"),
        Ok(_) => None,
    };

    let first = RawDisk::open(&writer).unwrap();
    assert_eq!(in_use(&writer), Some(LockOwner::SelfSame));
    assert_eq!(in_use(&reader), Some(LockOwner::SelfSame));
    drop(first);
    let readers = [RawDisk::open(&reader).unwrap(), RawDisk::open(&reader).unwrap()];
    assert_eq!(in_use(&writer), Some(LockOwner::SelfSame));
    drop(readers);
    assert_eq!(in_use(&writer), None);
}

const HELD_IMAGE: &str = "ALCOVE_TEST_HELD_IMAGE";

/// The other process of the next test.
fn hold_a_lock_until_stdin_ends(path: &Path) {
    let held = Rig::new(&options(path, Engine::IoUring));
    std::io::stderr().write_all(b"held\n").unwrap();
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
    drop(held);
}

#[test]
fn the_owner_of_a_lock_is_named_and_its_death_frees_the_image() {
    use std::io::{BufRead, BufReader};
    if let Some(path) = std::env::var_os(HELD_IMAGE) {
        return hold_a_lock_until_stdin_ends(path.as_ref());
    }
    let file = image(4096);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("backend::disk::tests::files::the_owner_of_a_lock_is_named_and_its_death_frees_the_image")
        .env(HELD_IMAGE, file.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "held"));

    let refused = refusal(file.path());
    child.kill().unwrap();
    child.wait().unwrap();

    let expected = LockOwner::Process(child.id());
    assert!(matches!(refused, OpenError::InUse { owner } if owner == expected), "{refused}");
    assert!(refused.to_string().contains(&format!("process {}", child.id())));
    assert!(RawDisk::open(&options(file.path(), Engine::Sync)).is_ok());
}

/// A loop device on a file, if this process may make one.
struct Loop(String);

impl Loop {
    fn attach(file: &Path, flags: &[&str]) -> Option<Self> {
        let output = Command::new("losetup").args(flags).args(["-f", "--show"]).arg(file).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_disk_with_the_devices_blocks() {
    let file = image(1 << 20);
    let Some(device) = Loop::attach(file.path(), &["-b", "4096"]) else { return };
    for engine in ENGINES {
        for direct in [false, true] {
            let options = DiskOptions { direct, ..options(device.0.as_ref(), engine) };
            let mut rig = Rig::new(&options);
            let geometry = rig.disk.geometry();
            assert_eq!((geometry.capacity, geometry.logical_block), (1 << 20, 4096));

            rig.write(8192, &mut [0x11; 8192]).unwrap();
            rig.run(8192, 4096, Operation::Discard).unwrap();
            rig.run(0, 4096, Operation::WriteZeroes { may_unmap: false, durable: false }).unwrap();
            rig.run(4096, 4096, Operation::WriteZeroes { may_unmap: true, durable: true }).unwrap();
            rig.run(0, 0, Operation::Flush).unwrap();

            let mut data = vec![0xffu8; 16384];
            rig.read(0, &mut data).unwrap();
            assert!(data[..8192].iter().all(|byte| *byte == 0));
            assert!(data[12288..].iter().all(|byte| *byte == 0x11));
        }
    }
}

#[test]
fn a_write_protected_block_device_is_only_opened_for_reading() {
    let file = image(1 << 20);
    let Some(device) = Loop::attach(file.path(), &["-r"]) else { return };
    let writer = options(device.0.as_ref(), Engine::Sync);
    let reader = DiskOptions { read_only: true, ..writer.clone() };

    assert!(matches!(RawDisk::open(&writer), Err(OpenError::NotWritable)));
    assert_eq!(Rig::new(&reader).read(512, &mut [0; 512]), Ok(()));
}
