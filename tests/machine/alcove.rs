//! Runs the built binary.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::host::{guest_file, has_hardware_kvm};
use alcove::bench::cpio;

/// After this time a guest that should have ended counts as hung. On a software KVM a boot takes half
/// a minute, with 8 GiB of memory minutes, and on a busy machine longer; in the lab, seconds, but for
/// the guests that are to run for a minute.
pub fn patience() -> Duration {
    Duration::from_secs(if crate::lab::is_inside() { 180 } else { 1200 })
}

/// A run of alcove that has ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit status; 128 and the signal if one killed it.
    pub status: i32,
    /// Standard output, carriage returns taken out.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails unless the status is `status`.
    #[track_caller]
    pub fn expect(self, status: i32) -> Self {
        assert_eq!(self.status, status, "{}\n{}", self.stdout, self.stderr);
        self
    }
}

/// The binary under test: ALCOVE names it, else the one that cargo built.
pub fn binary() -> PathBuf {
    std::env::var_os("ALCOVE").map_or_else(|| env!("CARGO_BIN_EXE_alcove").into(), PathBuf::from)
}

/// alcove with `arguments`, standard input empty, the output to be collected.
pub fn alcove<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(binary());
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("RUST_BACKTRACE");
    command
}

/// Adds `--net fd=N` for `network`, which the child inherits.
pub fn give_network(command: &mut Command, network: &impl AsRawFd) {
    const FD: i32 = 17;
    command.args(["--net", &format!("fd={FD}")]);
    let raw = network.as_raw_fd();
    let give = move || {
        // SAFETY: both are numbers of descriptors.
        #[expect(unsafe_code, reason = "dup2")]
        let given = unsafe { libc::dup2(raw, FD) };
        if given == FD { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: dup2 may be called between fork and exec.
    #[expect(unsafe_code, reason = "pre_exec")]
    unsafe {
        command.pre_exec(give);
    }
}

/// Runs `command` to its end and kills it when that does not come.
pub fn finish(mut command: Command) -> Finished {
    wait(command.spawn().unwrap())
}

/// Waits for `child`, reading what it prints, and kills it when it does not end.
pub fn wait(mut child: Child) -> Finished {
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let deadline = Instant::now() + patience();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(5));
    };
    let text = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        let bytes = reader.map(|thread| thread.join().unwrap()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    };
    let status = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap();
    Finished { status, stdout: text(stdout), stderr: text(stderr) }
}

fn drain(mut source: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        source.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Runs `alcove run` with `arguments`.
pub fn run(arguments: &[&str]) -> Finished {
    finish(alcove([&["run"], arguments].concat()))
}

/// `alcove run` with the test guest's `kernel` (`vmlinux` or `bzImage`), its initramfs and
/// `arguments`.
pub fn guest_command(kernel: &str, arguments: &[&str]) -> Command {
    let mut command = alcove(["run"]);
    command.arg("--kernel").arg(guest_file(kernel));
    command.arg("--initrd").arg(guest_file("initramfs.cpio")).args(arguments);
    command
}

/// An initramfs whose init runs `script` and ends the machine with its status, with more files by
/// name and content; all of them may be executed.
pub fn initramfs(script: &str, files: &[(&str, Vec<u8>)]) -> NamedTempFile {
    let mut archive = cpio::Archive::default();
    archive.folder("etc");
    archive.folder("etc/alcove");
    archive.file("etc/alcove/run", script.as_bytes());
    for (name, content) in files {
        archive.file(name, content);
    }
    let mut image = std::fs::read(guest_file("initramfs.cpio")).unwrap();
    image.extend(archive.finish());
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image).unwrap();
    file
}

/// Has the test guest's kernel use all that it finds of the processor, for tests of just that.
pub const WHOLE_PROCESSOR: [&str; 2] = ["--append", ""];

/// `alcove run` with the test guest's vmlinux, `image` for its initramfs and `arguments`.
///
/// Unless these say otherwise, a software KVM boots it a tenth faster: with little memory, whose pages take
/// time to set up, and copying quadwords, since string instructions of bytes are interpreted one by one
/// (but see [`WHOLE_PROCESSOR`]).
pub fn script_command(image: &NamedTempFile, arguments: &[&str]) -> Command {
    let mut command = alcove(["run"]);
    if !arguments.contains(&"--memory") {
        command.args(["--memory", "64M"]);
    }
    if !has_hardware_kvm() && !arguments.contains(&"--append") {
        command.args(["--append", "clearcpuid=erms,fsrm"]);
    }
    command.arg("--kernel").arg(guest_file("vmlinux"));
    command.arg("--initrd").arg(image.path()).args(arguments);
    command
}

/// Boots the test guest with `script` and `files`.
pub fn run_script(script: &str, files: &[(&str, Vec<u8>)], arguments: &[&str]) -> Finished {
    finish(script_command(&initramfs(script, files), arguments))
}
