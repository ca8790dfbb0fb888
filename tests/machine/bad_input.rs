//! What is wrong with the input is told in one line that names the flag and the remedy, with
//! status 125.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use tempfile::{NamedTempFile, TempDir};

use crate::alcove::{Finished, alcove, binary, finish};
use crate::bare_metal;

/// Fails unless alcove refused with one line that holds all of `parts`.
#[track_caller]
pub fn assert_refused(ended: Finished, parts: &[&str]) {
    assert_eq!(ended.status, 125, "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    for part in parts {
        assert!(ended.stderr.contains(part), "no {part:?} in {:?}", ended.stderr);
    }
}

fn run(arguments: &[&str]) -> Finished {
    finish(alcove([&["run"], arguments].concat()))
}

fn file(content: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    file
}

fn path(file: &NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

/// A guest that would spin, if it were ever entered.
fn some_kernel() -> NamedTempFile {
    let mut code = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
    code.hlt().unwrap();
    bare_metal::kernel(&mut code)
}

pub fn a_missing_kernel_tells_what_was_tried() {
    let empty = TempDir::new().unwrap();
    let mut command = alcove(["run"]);
    command.current_dir(empty.path());

    let ended = finish(command);

    // A host may keep its own kernel in /boot, which is then taken.
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    if std::path::Path::new(&format!("/boot/vmlinuz-{}", own.trim())).exists() {
        let _ = writeln!(std::io::stderr(), "this host has a kernel in /boot: not all is tested");
    } else {
        assert_refused(ended, &["./vmlinux", "./bzImage", "/boot/vmlinuz-", "--kernel FILE"]);
    }
    let missing = "/nonexistent/vmlinux";
    assert_refused(run(&["--kernel", missing]), &["--kernel /nonexistent", "name a vmlinux"]);
}

pub fn a_kernel_that_is_none_is_refused() {
    let folder = TempDir::new().unwrap();
    let good = std::fs::read(some_kernel().path()).unwrap();
    let with = |offset: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        file(&image)
    };
    const E_MACHINE: usize = 18;
    const AARCH64: [u8; 2] = [183, 0];
    const P_PADDR: usize = 64 + 24;
    const P_MEMSZ: usize = 64 + 40;
    let (empty, garbage) = (file(&[]), file(&[0x5a; 5000]));
    let truncated = file(&good[..0x1000]);
    let foreign = with(E_MACHINE, &AARCH64);
    let outside = with(P_PADDR, &0x1_0000_0000u64.to_le_bytes());
    let low = with(P_PADDR, &0x7000u64.to_le_bytes());
    let huge = with(P_MEMSZ, &0x4000_0000u64.to_le_bytes());
    let cases = [
        (folder.path().to_str().unwrap(), "directory"),
        (path(&empty), "empty"),
        (path(&garbage), "neither"),
        (path(&truncated), "truncated"),
        (path(&foreign), "AArch64"),
        (path(&outside), "outside"),
        (path(&low), "MiB"),
        (path(&huge), "--memory"),
    ];
    for (kernel, part) in cases {
        let ended = run(&["--kernel", kernel, "--memory", "16M"]);

        let remedy =
            if part == "outside" || part == "--memory" { "memory" } else { "name another" };
        assert_refused(ended, &["--kernel", kernel, part, remedy]);
    }
}

pub fn an_initrd_that_does_not_fit_is_refused() {
    let kernel = some_kernel();
    let large = NamedTempFile::new().unwrap();
    large.as_file().set_len(64 << 20).unwrap();

    let run = |initrd: &str| run(&["--kernel", path(&kernel), "-m", "32M", "--initrd", initrd]);

    let missing = run("/nonexistent.cpio");
    assert_refused(missing, &["--initrd /nonexistent.cpio", "name an initial RAM disk"]);
    assert_refused(run("/"), &["--initrd /", "directory", "leave --initrd out"]);
    assert_refused(run(path(&large)), &["--initrd", "--memory"]);
}

pub fn impossible_cpus_and_memory_are_refused() {
    let kernel = some_kernel();
    let run = |flags: &[&str]| run(&[&["--kernel", path(&kernel)], flags].concat());

    assert_refused(run(&["--memory", "0"]), &["--memory 0"]);
    assert_refused(run(&["--memory", "lots"]), &["--memory", "256M"]);
    assert_refused(run(&["--memory", "1M"]), &["--memory 1M", "16"]);
    assert_refused(run(&["--memory", "9999T"]), &["--memory 9999T"]);
    assert_refused(run(&["--memory", "60T"]), &["--memory 60T", "give less"]);
    assert_refused(run(&["--memory", "99999999999T"]), &["--memory"]);
    assert_refused(run(&["--memory", "16777217"]), &["--memory 16777217", "256M"]);
    assert_refused(run(&["--cpus", "0"]), &["--cpus 0", "at least 1"]);
    assert_refused(run(&["--cpus", "many"]), &["--cpus"]);
    assert_refused(run(&["--cpus", "6,threads=4"]), &["--cpus", "6 is not a multiple of 4"]);
    assert_refused(run(&["--cpus", "4,cores=1,threads=2,sockets=1"]), &["--cpus", "4 is not 2"]);
    assert_refused(run(&["--cpus", "4,sockets=0"]), &["--cpus", "sockets=0"]);
    assert_refused(run(&["--shutdown-timeout", "soon"]), &["--shutdown-timeout", "2s"]);
    assert_refused(run(&["--timeout", "soon"]), &["--timeout", "2s"]);
    assert_refused(run(&["--timeout", "1000years"]), &["--timeout", "hundred years"]);
}

pub fn more_cpus_than_kvm_offers_are_refused() {
    let kernel = some_kernel();

    let ended = run(&["--kernel", path(&kernel), "--cpus", "100000"]);

    assert_refused(ended, &["--cpus 100000", "KVM", "give less"]);
}

pub fn a_command_line_over_the_limit_is_refused() {
    let kernel = some_kernel();
    let long = "x".repeat(2100);
    let run = |flag: &str, line: &str| run(&["--kernel", path(&kernel), flag, line]);

    assert_refused(run("--append", &long), &["--append", "2047"]);
    assert_refused(run("--cmdline", &long), &["--cmdline", "2047"]);
    assert_refused(run("--append", "two\nlines"), &["--append"]);
    let both = ["--append", "a", "--cmdline", "b", "--kernel", path(&kernel)];
    assert_refused(crate::alcove::run(&both), &["--append and --cmdline"]);
}

pub fn an_unwritable_serial_file_is_refused() {
    let kernel = some_kernel();
    let run = |serial: &str| run(&["--kernel", path(&kernel), "--serial", serial]);

    let folder = run("file=/nonexistent/folder/log");
    assert_refused(folder, &["--serial", "/nonexistent/folder/log", "name a place"]);
    assert_refused(run("unix=/nonexistent/folder/socket"), &["--serial", "/nonexistent/folder"]);
    assert_refused(run("stdoi"), &["--serial", "stdio"]);
    assert_refused(run("file"), &["--serial", "file=PATH"]);
}

pub fn unknown_keys_are_told_with_the_nearest() {
    let toml = NamedTempFile::with_suffix(".toml").unwrap();
    std::fs::write(toml.path(), "kernel = \"x\"\n[memory]\nsiez = \"1G\"\n").unwrap();
    let json = NamedTempFile::with_suffix(".json").unwrap();
    std::fs::write(json.path(), "{\"memroy\": {}}").unwrap();
    let config = |file: &NamedTempFile| run(&["--config", path(file)]);

    assert_refused(run(&["--memory", "256M,prefalt=on"]), &["--memory", "prefalt"]);
    assert_refused(run(&["--cpus", "1,cuont=2"]), &["--cpus", "\"count\""]);
    assert_refused(run(&["--kernle", "x"]), &["--kernle", "--kernel"]);
    assert_refused(config(&toml), &["--config", "line 3", "\"siez\"", "\"size\""]);
    assert_refused(config(&json), &["--config", "\"memroy\"", "\"memory\""]);
    let missing = run(&["--config", "/nonexistent.toml"]);
    assert_refused(missing, &["--config /nonexistent.toml", "name a TOML or JSON file"]);
    assert_refused(run(&["--net", "tap"]), &["--net", "\"tap\"", "tap=NAME"]);
    assert_refused(run(&["--net", "user,forward=tcp:70000:80"]), &["--net", "1 to 65535"]);
}

/// In mount namespaces of its own the host has no /dev/kvm, or one that may not be opened.
pub fn no_kvm_is_told_with_its_remedy() {
    let kernel = some_kernel();
    let folder = TempDir::new().unwrap();
    // Other users have to get at the kernel, whose folder is only the test's.
    std::fs::set_permissions(kernel.path(), PermissionsExt::from_mode(0o644)).unwrap();
    let script = |prepare: &str, run: &str| {
        let alcove = binary();
        let kernel = path(&kernel);
        format!("{prepare}; {run} {} run --kernel {kernel}", alcove.display())
    };
    let unshared = |script: String| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).current_dir(folder.path());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        finish(command)
    };

    let missing = unshared(script("mount -t tmpfs none /dev", ""));
    // The binary may lie where only its owner gets.
    let copy = folder.path().join("alcove");
    std::fs::copy(binary(), &copy).unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut forbidden = Command::new(copy);
    forbidden.args(["run", "--timeout", "5s", "--kernel", path(&kernel)]).current_dir("/");
    forbidden.stdin(std::process::Stdio::null());
    forbidden.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    forbidden.uid(65534).gid(65534);
    let forbidden = finish(forbidden);

    assert_refused(missing, &["/dev/kvm", "modprobe"]);
    assert_refused(forbidden, &["/dev/kvm", "permission", "group"]);
}
