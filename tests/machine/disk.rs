//! Disks: Linux on virtio-blk, and what the host finds in the images after.

mod kill;

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::alcove::{Finished, alcove, finish, run_script, wait};
use crate::bad_input::assert_refused;
use crate::bare_metal;
use crate::host::{guest_file, has_hardware_kvm};

pub use kill::what_was_synced_survives_a_kill;

const MIB: u64 = 1 << 20;

/// A folder with images, removed with them.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A sparse image of zeroes.
    fn empty(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// A new ext4 file system, with what is in `folder` if one is given.
    fn ext4(&self, name: &str, bytes: u64, folder: Option<&Path>) -> PathBuf {
        let path = self.empty(name, bytes);
        let mut make = Command::new("mke2fs");
        // Blocks that a disk with direct I/O can always take.
        make.args(["-q", "-F", "-t", "ext4", "-b", "4096"]);
        if let Some(folder) = folder {
            make.arg("-d").arg(folder);
        }
        succeed(make.arg(&path));
        path
    }
}

/// Runs a program of the host that must succeed; what it printed.
#[track_caller]
fn succeed(command: &mut Command) -> Vec<u8> {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {} {said}", output.status);
    output.stdout
}

/// Fails unless the file system is whole and was unmounted.
#[track_caller]
fn assert_clean(image: &Path) {
    succeed(Command::new("e2fsck").arg("-fn").arg(image));
}

/// The content of a file in a file system that is not mounted.
#[track_caller]
fn read_file(image: &Path, name: &str) -> Vec<u8> {
    let mut command = Command::new("debugfs");
    command.args(["-R", &format!("cat {name}")]).arg(image).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    // It succeeds without the file, too.
    assert!(output.status.success() && !said.contains("not found"), "{name}: {said}");
    output.stdout
}

fn disk(path: &Path, options: &str) -> String {
    format!("{}{options}", path.display())
}

/// Puts `script` where the guest's init runs it, for a guest without an initramfs.
fn root_folder(script: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    let archive = fs::File::open(guest_file("initramfs.cpio")).unwrap();
    let mut unpack = Command::new("cpio");
    unpack.args(["-i", "-d"]).current_dir(folder.path()).stderr(Stdio::null()).stdin(archive);
    assert!(unpack.status().unwrap().success());
    for name in ["dev", "etc/alcove"] {
        fs::create_dir_all(folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("etc/alcove/run"), script).unwrap();
    folder
}

pub fn linux_boots_from_a_disk_without_an_initramfs() {
    let images = Images::new();
    let root = root_folder(
        "mount -t tmpfs none /run && echo was here >/was-here && sync && mount -o remount,ro / && exit 42",
    );
    let image = images.ext4("root.ext4", 32 * MIB, Some(root.path()));
    let mut command = alcove(["run", "--append", "init=/init", "--kernel"]);
    command.arg(guest_file("vmlinux")).args(["--disk", &disk(&image, ",root")]);

    finish(command).expect(42);

    assert_clean(&image);
    assert_eq!(read_file(&image, "/was-here"), b"was here\n");
}

pub fn what_linux_writes_is_what_the_host_finds() {
    // A boot for each engine is long where the guest is interpreted.
    match has_hardware_kvm() {
        true => assert_files_arrive(64 * MIB, ",queues=2"),
        false => assert_files_arrive(MIB / 4, ",queues=2,engine=io_uring,direct"),
    }
}

pub fn every_engine_writes_what_the_host_finds() {
    for options in
        [",engine=io_uring,direct", ",engine=io_uring", ",engine=sync,direct", ",sync=off"]
    {
        assert_files_arrive(MIB / 4, options);
    }
}

/// Several files at once, of lines that tell where they belong.
#[track_caller]
fn assert_files_arrive(file_bytes: u64, options: &str) {
    const FILES: u64 = 4;
    let images = Images::new();
    let image = images.ext4("data.ext4", FILES * file_bytes * 3 / 2 + 32 * MIB, None);
    let script = format!(
        "mount -t ext4 /dev/vda /tmp || exit 1
         for n in 1 2 3 4; do yes \"this is file $n of {FILES}\" | head -c {file_bytes} >/tmp/$n & done
         wait; sync; umount /tmp && exit 42"
    );

    run_script(&script, &[], &["--disk", &disk(&image, options), "--memory", "128M"]).expect(42);

    assert_clean(&image);
    for number in 1..=FILES {
        let content = read_file(&image, &format!("/{number}"));
        let line = format!("this is file {number} of {FILES}\n");
        assert_eq!(content.len() as u64, file_bytes, "file {number}");
        let right = content.chunks(line.len()).all(|part| line.as_bytes().starts_with(part));
        assert!(right, "file {number} differs");
    }
}

pub fn trimming_gives_space_back() {
    const LARGE_BYTES: usize = 8 << 20;
    let images = Images::new();
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("large"), vec![b'x'; LARGE_BYTES]).unwrap();
    let image = images.ext4("trim.ext4", 64 * MIB, Some(folder.path()));
    let blocks_before = fs::metadata(&image).unwrap().blocks();
    let script = "mount -t ext4 /dev/vda /tmp && rm /tmp/large && sync && fstrim /tmp && \\
                  umount /tmp && exit 42";

    run_script(script, &[], &["--disk", &disk(&image, "")]).expect(42);

    let blocks_after = fs::metadata(&image).unwrap().blocks();
    let large_blocks = LARGE_BYTES as u64 / 512;
    assert!(blocks_before >= large_blocks, "{blocks_before} blocks before");
    assert!(blocks_after + large_blocks <= blocks_before + 64, "{blocks_before}, {blocks_after}");
    assert_clean(&image);
}

pub fn a_read_only_disk_refuses_writes() {
    let images = Images::new();
    let image = images.empty("fixed", 4 * MIB);
    let script = "[ $(cat /sys/block/vda/ro) = 1 ] || exit 1
                  echo x 2>/dev/null >/dev/vda && exit 2
                  [ $(head -c 512 /dev/vda | wc -c) = 512 ] || exit 4
                  [ $(head -c 512 /dev/vda | tr -d '\\0' | wc -c) = 0 ] || exit 3
                  exit 42";

    run_script(script, &[], &["--disk", &disk(&image, ",readonly")]).expect(42);

    assert!(fs::read(&image).unwrap().iter().all(|byte| *byte == 0));
}

/// A file system that is unmounted with it.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A host that has no more room is the guest's I/O error, not alcove's end.
pub fn a_full_host_is_an_io_error_in_the_guest() {
    let folder = TempDir::new().unwrap();
    let mounted = folder.path().join("small");
    fs::create_dir(&mounted).unwrap();
    succeed(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64K", "none"]).arg(&mounted));
    let mounted = Mounted(mounted);
    let image = mounted.0.join("large");
    fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let script = "dd if=/dev/zero of=/dev/vda bs=65536 count=4 conv=fsync 2>/dev/null && exit 1
                  echo 3 >/proc/sys/vm/drop_caches
                  dd if=/dev/vda of=/dev/null bs=512 count=1 2>/dev/null && exit 42";

    let ended = run_script(script, &[], &["--disk", &disk(&image, "")]);

    let Finished { stderr, .. } = ended.expect(42);
    assert!(stderr.contains("vda"), "{stderr}");
}

pub fn sixteen_disks_have_sixteen_names() {
    let images = Images::new();
    let mut arguments = Vec::new();
    for index in 1..=16u64 {
        let image = images.empty(&format!("disk{index}"), index * MIB);
        arguments.extend(["--disk".to_owned(), disk(&image, &format!(",id=number-{index}"))]);
    }
    let script = "n=0
                  for name in a b c d e f g h i j k l m n o p; do
                      n=$((n + 1))
                      read size </sys/block/vd$name/size; [ $size = $((n * 2048)) ] || exit $n
                      read serial </sys/block/vd$name/serial
                      [ $serial = number-$n ] || exit $((n + 100))
                  done
                  exit 42";
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();

    run_script(script, &[], &arguments).expect(42);
}

pub fn the_entropy_device_gives_what_differs() {
    let script = "[ $(cat /sys/class/misc/hw_random/rng_current) = virtio_rng.0 ] || exit 1
                  head -c 32 /dev/hwrng >/tmp/one; head -c 32 /dev/hwrng >/tmp/other
                  [ $(wc -c </tmp/one) = 32 ] || exit 2
                  cmp -s /tmp/one /tmp/other && exit 3
                  exit 42";

    run_script(script, &[], &[]).expect(42);
}

pub fn without_an_entropy_device_there_is_none() {
    const DEVICE_ID: i32 = 0x08;
    const ENTROPY: i32 = 4;

    check_registers(&[], &[(None, MAGIC_VALUE, MAGIC), (None, DEVICE_ID, ENTROPY)]).expect(42);
    check_registers(&["--rng", "off"], &[(None, MAGIC_VALUE, -1)]).expect(42);
}

pub fn bad_disks_are_refused() {
    let images = Images::new();
    let mut code = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
    code.hlt().unwrap();
    let kernel = bare_metal::kernel(&mut code);
    let run = |disks: &[&str]| {
        let mut command = alcove(["run", "--kernel"]);
        command.arg(kernel.path());
        disks.iter().for_each(|disk| {
            command.args(["--disk", disk]);
        });
        finish(command)
    };
    let image = images.empty("good", MIB);
    let good = image.to_str().unwrap();
    let tiny = images.empty("tiny", 100);
    let empty = images.empty("empty", 0);
    let folder = images.0.path().to_str().unwrap();

    assert_refused(run(&["/nonexistent.img"]), &["--disk /nonexistent.img", "truncate -s"]);
    assert_refused(run(&[folder]), &["--disk", "directory", "image file"]);
    assert_refused(run(&["/dev/null"]), &["--disk /dev/null", "block device"]);
    assert_refused(run(&[empty.to_str().unwrap()]), &["--disk", "empty", "truncate -s"]);
    assert_refused(run(&[tiny.to_str().unwrap()]), &["--disk", "100 bytes"]);
    assert_refused(run(&[&disk(&image, ",redonly")]), &["--disk", "\"readonly\""]);
    assert_refused(run(&[&disk(&image, ",queues=0")]), &["--disk", "queues=0"]);
    assert_refused(run(&[&disk(&image, ",queue-size=3")]), &["--disk", "power of two"]);
    assert_refused(run(&[&disk(&image, ",engine=fast")]), &["--disk", "io_uring"]);
    assert_refused(run(&[good, good]), &["--disk", "given twice", "readonly"]);
    let roots = [disk(&image, ",root,readonly"), disk(&tiny, ",root")];
    assert_refused(run(&[&roots[0], &roots[1]]), &["--disk", "root"]);
    let link = images.path("link");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    assert_refused(run(&[good, link.to_str().unwrap()]), &["--disk", "in use", "readonly"]);
    let many: Vec<String> = (0..30).map(|_| disk(&image, ",readonly")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_refused(run(&many), &["--disk", "31 devices"]);
}

/// What a driver finds in the registers of a disk, which the guest reads from memory of its own where
/// KVM can give it such, and that its writes reach nothing but what may be written.
pub fn registers_are_read_and_written_without_linux() {
    const STATUS: i32 = 0x70;
    const INTERRUPT_STATUS: i32 = 0x60;
    const CAPACITY: i32 = 0x100;
    let images = Images::new();
    let image = images.empty("small", MIB);
    let steps = [
        (None, MAGIC_VALUE, MAGIC),
        (Some(7), MAGIC_VALUE, MAGIC),
        (Some(3), INTERRUPT_STATUS, 0),
        (Some(1), STATUS, 1),
        (Some(3), STATUS, 3),
        (Some(7), CAPACITY, (MIB / 512) as i32),
        (Some(0), STATUS, 0),
    ];

    let ended = check_registers(&["--log", "info", "--disk", image.to_str().unwrap()], &steps);

    let Finished { stderr, .. } = ended.expect(42);
    assert!(!stderr.contains("read-only memory"), "{stderr}");
}

const MAGIC_VALUE: i32 = 0;
const MAGIC: i32 = i32::from_le_bytes(*b"virt");

/// Runs a guest without Linux that, step by step, writes to a register of the first virtio device if
/// there is a value for it, and compares what it then reads there. Its status is 42, or the number of
/// the step, from 1 on, that read another value.
fn check_registers(arguments: &[&str], steps: &[(Option<i32>, i32, i32)]) -> Finished {
    use iced_x86::code_asm::{
        CodeAssembler, al, cr3, dword_ptr, dx, eax, edx, qword_ptr, rax, rbx,
    };
    // A page of 2 MiB, present and writable, at 768 MiB in the tables that alcove leaves.
    const WINDOW: u64 = 0x3000_0000;
    const ENTRY: u64 = 0xb000 + (WINDOW >> 21) * 8;
    const FIRST_DEVICE: u64 = 0xd000_0000;
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut done, mut forever) = (a.create_label(), a.create_label());
    a.mov(rbx, ENTRY).unwrap();
    a.mov(rax, FIRST_DEVICE | 0x83).unwrap();
    a.mov(qword_ptr(rbx), rax).unwrap();
    a.mov(rax, cr3).unwrap();
    a.mov(cr3, rax).unwrap();
    a.mov(rbx, WINDOW).unwrap();
    for (number, (write, register, read)) in (1..).zip(steps) {
        a.mov(edx, number).unwrap();
        if let Some(value) = *write {
            a.mov(dword_ptr(rbx + *register), value).unwrap();
        }
        a.mov(eax, dword_ptr(rbx + *register)).unwrap();
        a.cmp(eax, *read).unwrap();
        a.jne(done).unwrap();
    }
    a.mov(edx, 42).unwrap();
    a.set_label(&mut done).unwrap();
    a.mov(eax, edx).unwrap();
    a.mov(dx, 0xf4).unwrap();
    a.out(dx, al).unwrap();
    a.set_label(&mut forever).unwrap();
    a.pause().unwrap();
    a.jmp(forever).unwrap();
    let kernel = bare_metal::kernel(&mut a);
    finish(bare_metal::command(&kernel, arguments))
}

/// The second alcove names the first.
pub fn an_image_that_another_writes_is_refused_with_its_owner() {
    let images = Images::new();
    let image = images.empty("shared", MIB);
    let mut code = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
    let mut forever = code.create_label();
    code.mov(iced_x86::code_asm::dx, 0x3f8).unwrap();
    code.out(iced_x86::code_asm::dx, iced_x86::code_asm::al).unwrap();
    code.set_label(&mut forever).unwrap();
    code.pause().unwrap();
    code.jmp(forever).unwrap();
    let kernel = bare_metal::kernel(&mut code);
    let with_disk = || bare_metal::command(&kernel, &["--disk", image.to_str().unwrap()]);
    let mut first = with_disk().spawn().unwrap();
    first.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();

    let second = finish(with_disk());

    assert_refused(second, &["--disk", "in use", &first.id().to_string()]);
    first.kill().unwrap();
    wait(first);
}
