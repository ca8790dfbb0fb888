//! Starts a VMM and listens to what its guest prints.
#![expect(unsafe_code, reason = "a system call between fork and exec")]

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::personality::{self, Persona};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use super::BenchError;

/// How much of a guest's output an error shows, bytes.
const TAIL_BYTES: usize = 400;
/// Mappings from this size on are the guest's RAM, KiB.
const RAM_KIB: u64 = 64 << 10;

/// Has all programs that are started from now on have their mappings at the same addresses each time,
/// since these decide how many pages of a file one fault brings in.
pub fn place_mappings_alike() {
    if let Ok(persona) = personality::get() {
        // Where it is refused, figures vary a little more.
        let _ = personality::set(persona | Persona::ADDR_NO_RANDOMIZE);
    }
}

/// Has the host kill what `command` starts when this process ends, whatever ends it.
fn end_with_this(command: &mut Command) {
    let ask = || prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
    // SAFETY: prctl(2) may be called between fork and exec.
    unsafe { command.pre_exec(ask) };
}

/// A running VMM, which is killed when this is dropped.
pub struct Launched {
    vmm: String,
    child: Child,
    output: PipeReader,
    start: Instant,
    patience: Duration,
    printed: Vec<u8>,
    /// What of `printed` was looked at.
    seen: usize,
}

impl Launched {
    /// Starts `command`, whose time begins now.
    pub fn start(vmm: &str, command: &mut Command, patience: Duration) -> Result<Self, BenchError> {
        let failed = |source| BenchError::Start { program: command_name(command), source };
        let (output, writer) = match io::pipe() {
            Ok(pipe) => pipe,
            Err(source) => return Err(failed(source)),
        };
        command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::inherit());
        end_with_this(command);
        let start = Instant::now();
        let child = command.spawn();
        // Else this process keeps the pipe's end open.
        command.stdout(Stdio::null());
        let child =
            child.map_err(|source| BenchError::Start { program: command_name(command), source })?;
        let vmm = vmm.to_owned();
        Ok(Self { vmm, child, output, start, patience, printed: Vec::new(), seen: 0 })
    }

    /// Waits until the guest has printed something; how long that took since the start.
    pub fn first_output(&mut self) -> Result<Duration, BenchError> {
        while self.printed.is_empty() {
            self.hear("ended before it printed anything")?;
        }
        Ok(self.start.elapsed())
    }

    /// Waits for a line that begins with `marker` and has not been waited for yet; the rest of the line,
    /// and how long it took since the start, of which the end of the line is no part.
    pub fn line(&mut self, marker: &str) -> Result<(String, Duration), BenchError> {
        let mut found = None;
        loop {
            let text = self.printed.get(self.seen..).unwrap_or_default();
            let at = text.windows(marker.len()).position(|part| part == marker.as_bytes());
            if let Some(at) = at {
                let elapsed = *found.get_or_insert_with(|| self.start.elapsed());
                let rest = text.get(at + marker.len()..).unwrap_or_default();
                if let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
                    let line = rest.get(..length).unwrap_or_default();
                    let line = String::from_utf8_lossy(line).trim().to_owned();
                    self.seen += at + marker.len() + length + 1;
                    return Ok((line, elapsed));
                }
            }
            self.hear(&format!("did not print {marker:?}"))?;
        }
    }

    /// Waits for the end of a line that has not been waited for yet; how long it took since the start.
    pub fn newline(&mut self) -> Result<Duration, BenchError> {
        loop {
            let text = self.printed.get(self.seen..).unwrap_or_default();
            if let Some(at) = text.iter().position(|byte| *byte == b'\n') {
                self.seen += at + 1;
                return Ok(self.start.elapsed());
            }
            self.hear("did not print a line")?;
        }
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the VMM has ended.
    pub fn end(mut self) -> Result<(), BenchError> {
        while self.hear("").is_ok() {}
        let status = self.child.wait().map_err(BenchError::host("wait for a process"))?;
        match status.success() {
            true => Ok(()),
            false => Err(self.failed(&format!("ended with {status}"))),
        }
    }

    /// Takes what is printed next; an error with `what` when the guest ends or keeps silent.
    fn hear(&mut self, what: &str) -> Result<(), BenchError> {
        let patience = Timespec::try_from(self.patience).unwrap_or_default();
        let mut wait = [PollFd::new(&self.output, PollFlags::IN)];
        match poll(&mut wait, Some(&patience)) {
            Ok(0) => {
                let silence = self.patience.as_secs();
                return Err(self.failed(&format!("{what} and was silent for {silence} s")));
            }
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(BenchError::host("listen to a guest")(error.into())),
            Ok(_) => {}
        }
        let mut bytes = [0; 4096];
        match self.output.read(&mut bytes) {
            Ok(0) => Err(self.failed(what)),
            Ok(count) => {
                self.printed.extend_from_slice(bytes.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) => Err(BenchError::host("listen to a guest")(error)),
        }
    }

    fn failed(&self, what: &str) -> BenchError {
        let from = self.printed.len().saturating_sub(TAIL_BYTES);
        let tail = String::from_utf8_lossy(self.printed.get(from..).unwrap_or_default());
        let tail = format!("{:?}", tail.trim());
        BenchError::Guest { vmm: self.vmm.clone(), what: what.to_owned(), tail }
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        // It fails where the VMM has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command_name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// What of a process is resident outside its guest's RAM, which is what is kept out of core dumps or
/// larger than 64 MiB; KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Pages of files, mostly the program's own code: all processes that run it share them, and how many
    /// are there depends on where the last faults happened to be.
    pub of_files: u64,
    /// The others.
    pub own: u64,
}

impl Resident {
    /// All of it.
    pub fn total(self) -> u64 {
        self.of_files + self.own
    }

    /// Of `process`.
    ///
    /// # Errors
    /// The host does not show another process's memory.
    pub fn of(process: u32) -> io::Result<Self> {
        Ok(Self::sum(&fs::read_to_string(format!("/proc/{process}/smaps"))?))
    }

    /// By the text of /proc/PID/smaps.
    fn sum(maps: &str) -> Self {
        let mut sum = Self::default();
        let (mut is_file, mut size, mut resident) = (false, 0, 0);
        for line in maps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let kib = || words.get(1).and_then(|value| value.parse().ok()).unwrap_or(0);
            match words.first() {
                Some(&"Size:") => size = kib(),
                Some(&"Rss:") => resident = kib(),
                Some(&"VmFlags:") if size >= RAM_KIB || words.contains(&"dd") => {}
                Some(&"VmFlags:") if is_file => sum.of_files += resident,
                Some(&"VmFlags:") => sum.own += resident,
                // Where a mapping begins and ends: its file is the sixth word.
                Some(word) if !word.ends_with(':') => {
                    is_file = words.get(5).is_some_and(|path| path.starts_with('/'));
                }
                _ => {}
            }
        }
        sum
    }
}

/// The KiB that `process` takes of the host, its guest's included and pages that are shared counted in
/// part.
///
/// # Errors
/// The host does not show another process's memory.
pub fn proportional_kib(process: u32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = value.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    kib.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_does_not_count_and_files_count_apart() {
        let mapping = |head: &str, size: u64, resident: u64, flags: &str| {
            format!("{head}\nSize: {size} kB\nRss: {resident} kB\nVmFlags: {flags}\n")
        };
        let maps = [
            mapping("1000-2000 r-xp 00000000 08:01 42 /bin/vmm", 100, 40, "rd ex"),
            mapping("2000-3000 rw-p 00000000 00:00 0 [heap]", 100, 7, "rd wr"),
            mapping("3000-4000 rw-p 00000000 00:00 0", 1024, 500, "rd wr dd"),
            mapping("4000-5000 rw-p 00000000 00:00 0", 131_072, 3000, "rd wr"),
            mapping("5000-6000 rw-s 00000000 00:0e 9 anon_inode:kvm-vcpu:0", 12, 4, "rd wr"),
        ];

        let resident = Resident::sum(&maps.concat());

        assert_eq!(resident, Resident { of_files: 40, own: 11 });
        assert_eq!(resident.total(), 51);
    }
}
