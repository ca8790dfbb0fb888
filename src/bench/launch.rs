//! Starts a VMM and listens to what its guest prints.
#![expect(unsafe_code, reason = "a system call between fork and exec")]

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::personality::{self, Persona};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::time::Timespec;

use super::BenchError;

/// How much of a guest's output an error shows, bytes.
const TAIL_BYTES: usize = 400;
/// The longest line that is waited for the end of, bytes.
const LINE_BYTES: usize = 4096;
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
pub struct Launched<'a> {
    vmm: String,
    child: Child,
    output: PipeReader,
    signals: &'a SignalFd,
    start: Instant,
    patience: Duration,
    /// What the guest printed and nobody has waited for yet, and before `seen` the end of what was.
    printed: Vec<u8>,
    seen: usize,
}

impl<'a> Launched<'a> {
    /// Starts `command`, whose time begins now. The guest may take `patience` for each thing that is
    /// waited for; one of `signals` ends a wait.
    pub fn start(
        vmm: &str,
        mut command: Command,
        patience: Duration,
        signals: &'a SignalFd,
    ) -> Result<Self, BenchError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |source| BenchError::Start { program, source };
        let (output, writer) = io::pipe().map_err(BenchError::host("make a pipe"))?;
        command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::inherit());
        end_with_this(&mut command);
        let start = Instant::now();
        // The command is dropped, and with it this process's copy of the pipe's end.
        let child = { command }.spawn().map_err(failed)?;
        let vmm = vmm.to_owned();
        Ok(Self { vmm, child, output, signals, start, patience, printed: Vec::new(), seen: 0 })
    }

    /// Waits until the guest has printed something; how long that took since the start.
    pub fn first_output(&mut self) -> Result<Duration, BenchError> {
        self.hear("print anything", Instant::now() + self.patience)?;
        Ok(self.start.elapsed())
    }

    /// Waits for a line that begins with `marker` and has not been waited for yet; the rest of the line,
    /// and how long it took since the start, of which the end of the line is no part.
    pub fn line(&mut self, marker: &str) -> Result<(String, Duration), BenchError> {
        let deadline = Instant::now() + self.patience;
        let what = format!("print {marker:?}");
        self.until(&what, deadline, |text| {
            match text.windows(marker.len()).position(|part| part == marker.as_bytes()) {
                Some(at) => Found::Until(at + marker.len()),
                // It may have begun.
                None => Found::Nothing(text.len().saturating_sub(marker.len())),
            }
        })?;
        let elapsed = self.start.elapsed();
        let rest = self.until(&what, deadline, |text| match end_of_line(text) {
            Some(length) => Found::Until(length),
            None if text.len() > LINE_BYTES => Found::Until(text.len()),
            None => Found::Nothing(0),
        })?;
        Ok((rest, elapsed))
    }

    /// Waits for the end of a line that has not been waited for yet; how long it took since the start.
    pub fn newline(&mut self) -> Result<Duration, BenchError> {
        self.until("print a line", Instant::now() + self.patience, |text| {
            match end_of_line(text) {
                Some(length) => Found::Until(length),
                None => Found::Nothing(text.len()),
            }
        })?;
        Ok(self.start.elapsed())
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the VMM has ended, which it has to do with the status 0.
    pub fn end(mut self) -> Result<(), BenchError> {
        let deadline = Instant::now() + self.patience;
        while self.hear_or_end("end", deadline)? {
            self.seen = self.printed.len();
        }
        let status = self.child.wait().map_err(BenchError::host("wait for a process"))?;
        match status.success() {
            true => Ok(()),
            false => Err(self.failed(&format!("ended with {status}"))),
        }
    }

    /// Shows `look` what was not looked at, over and over, until it has found what it looks for; the text
    /// up to there.
    fn until(
        &mut self,
        what: &str,
        deadline: Instant,
        look: impl Fn(&[u8]) -> Found,
    ) -> Result<String, BenchError> {
        loop {
            let text = self.printed.get(self.seen..).unwrap_or_default();
            match look(text) {
                Found::Until(length) => {
                    let found = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
                    let found = found.trim().to_owned();
                    self.seen += length;
                    return Ok(found);
                }
                Found::Nothing(length) => self.seen += length,
            }
            self.hear(what, deadline)?;
        }
    }

    /// Takes what is printed next; an error when the guest has not done `what` at its end or by
    /// `deadline`.
    fn hear(&mut self, what: &str, deadline: Instant) -> Result<(), BenchError> {
        match self.hear_or_end(what, deadline)? {
            true => Ok(()),
            false => Err(self.failed(&format!("ended and did not {what}"))),
        }
    }

    /// Takes what is printed next; false when the guest has ended.
    fn hear_or_end(&mut self, what: &str, deadline: Instant) -> Result<bool, BenchError> {
        let failed = |error: io::Error| BenchError::host("listen to a guest")(error);
        let left = deadline.saturating_duration_since(Instant::now());
        let left =
            Timespec::try_from(left).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let mut wait = [
            PollFd::new(&self.output, PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
        ];
        let ready = retry_on_intr(|| poll(&mut wait, Some(&left)));
        if ready.map_err(|error| failed(error.into()))? == 0 {
            let patience = self.patience.as_secs();
            return Err(self.failed(&format!("did not {what} within {patience} s")));
        }
        if !wait[1].revents().is_empty() {
            return Err(BenchError::Interrupted);
        }
        // What was looked at is kept for an error only.
        let spare = self.seen.saturating_sub(TAIL_BYTES);
        self.printed.drain(..spare);
        self.seen -= spare;
        let mut bytes = [0; 4096];
        let count = self.output.read(&mut bytes).map_err(failed)?;
        self.printed.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(count > 0)
    }

    fn failed(&self, what: &str) -> BenchError {
        let from = self.printed.len().saturating_sub(TAIL_BYTES);
        let tail = String::from_utf8_lossy(self.printed.get(from..).unwrap_or_default());
        let tail = format!("{:?}", tail.trim());
        BenchError::Guest { vmm: self.vmm.clone(), what: what.to_owned(), tail }
    }
}

impl Drop for Launched<'_> {
    fn drop(&mut self) {
        // It fails where the VMM has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came of a look at what a guest has printed.
enum Found {
    /// What was looked for, with the byte before this one as its last.
    Until(usize),
    /// Not that; before this byte it does not begin.
    Nothing(usize),
}

/// How many bytes the first line of `text` has, its end included.
fn end_of_line(text: &[u8]) -> Option<usize> {
    Some(text.iter().position(|byte| *byte == b'\n')? + 1)
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
