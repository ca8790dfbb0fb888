//! A guest that attacks its devices: it may ruin what it was given, and nothing else.
//!
//! alcove must neither crash, hang, grow nor fill its log, and a disk that the guest uses properly
//! must go on working. How long it goes on: ALCOVE_HOSTILE_OPERATIONS accesses, each run with a seed
//! that is printed; ALCOVE_HOSTILE_SEED repeats one.

mod program;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::alcove::give_network;
use crate::bare_metal;
use crate::host::has_hardware_kvm;
use crate::net::{Host, resident_kib};
use program::{DONE, PATTERN, Plan, READY, WELL};

const KIB: u64 = 1 << 10;
const ATTACKED_BYTES: u64 = 128 * KIB;
const GOOD_SECTORS: u32 = 1024;
const SECTOR_BYTES: usize = 512;
/// What alcove may grow by.
const MOST_GROWTH_KIB: u64 = 4 << 10;
/// What it may log, whatever the guest does: some lines for each second.
const LOG_LINES_A_SECOND: u64 = 20;

/// One CPU; a network behind a socket, whose other end is hostile as well.
pub fn registers_and_rings_of_garbage_harm_nobody() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let network = thread::spawn(move || wild_network(ours));
    let attack = Attack { two_cpus: false, net: Net::Socket(theirs), arguments: &[] };

    attack.run();

    network.join().unwrap();
}

/// Two CPUs, so that rings change while they are read; a tap interface; the assist is on.
pub fn two_cpus_that_race_the_devices_harm_nobody() {
    let host = Host::enter();
    host.tap("tap0", "10.9.0.1/24", "");

    let arguments = &["--cpus", "2", "--assist", "on"];
    Attack { two_cpus: true, net: Net::Tap("tap0"), arguments }.run();
}

/// Takes what comes, and sends frames of all lengths, until the other end is closed.
fn wild_network(socket: UnixStream) {
    let mut sender = socket.try_clone().unwrap();
    let sends = thread::spawn(move || {
        for length in (14..1500u32).cycle() {
            let frame = vec![length as u8; length as usize];
            let sent = sender.write_all(&[&length.to_be_bytes()[..], &frame].concat());
            if sent.is_err() {
                return;
            }
            thread::sleep(Duration::from_micros(500));
        }
    });
    let mut buffer = [0; 1 << 14];
    while matches!((&socket).read(&mut buffer), Ok(1..)) {}
    let _ = socket.shutdown(std::net::Shutdown::Both);
    sends.join().unwrap();
}

enum Net {
    /// The test's end of it is somewhere else.
    Socket(UnixStream),
    /// A tap interface.
    Tap(&'static str),
}

struct Attack {
    two_cpus: bool,
    net: Net,
    arguments: &'static [&'static str],
}

/// A number in the environment.
fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Accesses, and a time that they surely take less than.
fn length() -> (u64, Duration) {
    let short = if has_hardware_kvm() { 100_000 } else { 200_000 };
    let operations = setting("ALCOVE_HOSTILE_OPERATIONS").unwrap_or(short);
    // Far slower than the lab on a busy machine.
    (operations, Duration::from_secs(120) + Duration::from_micros(operations * 500))
}

fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let random = || RandomState::new().build_hasher().finish();
    setting("ALCOVE_HOSTILE_SEED").unwrap_or_else(random)
}

impl Attack {
    fn run(self) {
        let (operations, patience) = length();
        let seed = seed();
        say(&format!("ALCOVE_HOSTILE_SEED={seed} ALCOVE_HOSTILE_OPERATIONS={operations}"));
        let folder = TempDir::new().unwrap();
        let image = |name: &str, bytes: u64| {
            let path = folder.path().join(name);
            fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            path.display().to_string()
        };
        let attacked = image("attacked", ATTACKED_BYTES);
        let other = image("other", ATTACKED_BYTES);
        let good = image("good", u64::from(GOOD_SECTORS) * SECTOR_BYTES as u64);
        // The places of the devices: two disks, the good disk, the network, the entropy device.
        let plan = Plan {
            seed,
            operations,
            two_cpus: self.two_cpus,
            attacked: vec![(0, 2), (1, 1), (3, 2), (4, 1)],
            disks: 3,
            good_disk: 2,
            good_sectors: GOOD_SECTORS,
        };
        let kernel = program::kernel(&plan);
        let mut command = bare_metal::command(&kernel, self.arguments);
        // Flushes of a real disk would be what takes the time.
        command.args(["--disk", &format!("{attacked},queues=2,sync=off")]);
        command.args(["--disk", &format!("{other},engine=sync")]);
        command.args(["--disk", &format!("{good},sync=off")]);
        match &self.net {
            Net::Tap(name) => drop(command.args(["--net", &format!("tap={name}")])),
            Net::Socket(socket) => give_network(&mut command, socket),
        }
        command.stdin(Stdio::piped());
        let child = command.spawn().unwrap();
        drop(self.net);

        let guest = Guest::follow(child);
        let others = guest.attack(patience);

        let total = operations + others;
        say(&format!("{total} operations"));
        assert!(!self.two_cpus || others > 0, "the second CPU did nothing");
        assert_good(&fs::read(&good).unwrap());
        for path in [&attacked, &other] {
            let content = fs::read(path).unwrap();
            assert_eq!(content.len() as u64, ATTACKED_BYTES, "{path}");
            // Some of the requests were good ones.
            assert!(content.iter().any(|byte| *byte != 0), "nothing was written to {path}");
        }
    }
}

/// Each sector has what the guest writes there, or nothing yet.
#[track_caller]
fn assert_good(image: &[u8]) {
    let mut written = 0;
    for (sector, content) in (0u64..).zip(image.chunks(SECTOR_BYTES)) {
        let pattern = (PATTERN | sector).to_le_bytes();
        let is_right = content.chunks(8).all(|word| word == pattern);
        assert!(is_right || content.iter().all(|byte| *byte == 0), "sector {sector}");
        written += u32::from(is_right);
    }
    assert!(written > 0, "the good disk was never written");
}

/// A guest at its attack; killed when dropped.
struct Guest {
    child: Child,
    /// What it says, without the rest that it prints.
    words: Receiver<String>,
    log: Option<JoinHandle<(u64, String)>>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    fn follow(mut child: Child) -> Self {
        let (sender, words) = mpsc::channel();
        let output = child.stdout.take().unwrap();
        thread::spawn(move || find_words(output, |word| drop(sender.send(word))));
        let log = child.stderr.take().unwrap();
        Self { child, words, log: Some(thread::spawn(move || read_log(log))) }
    }

    /// Lets the attack begin, watches it, and returns what the second CPU did of it.
    fn attack(mut self, patience: Duration) -> u64 {
        let start = Instant::now();
        self.wait_for(READY, start + patience, &mut 0);
        let before = resident_kib(self.child.id());
        let mut most = before;
        self.go_on();
        let begun = Instant::now();
        let done = self.wait_for(DONE, start + patience, &mut most);
        let took = begun.elapsed();
        most = most.max(resident_kib(self.child.id()));
        self.go_on();
        let status = self.child.wait().unwrap();
        let (lines, log) = self.log.take().unwrap().join().unwrap();
        let grown = most.saturating_sub(before);
        say(&format!("{took:.1?}, {grown} KiB more than {before}, {lines} lines of log"));

        assert_eq!(status.code(), Some(WELL), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        assert!(grown <= MOST_GROWTH_KIB, "it grew by {grown} KiB");
        assert!(lines <= LOG_LINES_A_SECOND * (2 + took.as_secs()), "{lines} lines\n{log}");
        let digits = done.strip_prefix(DONE).unwrap().trim().bytes();
        digits.fold(0, |number, digit| number << 4 | u64::from(digit - b'a'))
    }

    /// Waits for what begins with `word`, looking at alcove's memory meanwhile.
    #[track_caller]
    fn wait_for(&mut self, word: &str, end: Instant, most: &mut u64) -> String {
        loop {
            match self.words.recv_timeout(Duration::from_millis(50)) {
                Ok(said) if said.starts_with(word) => return said,
                Ok(said) => panic!("{said:?} in place of {word:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().unwrap();
                    let (_, log) = self.log.take().unwrap().join().unwrap();
                    panic!("alcove ended before {word:?}: {status}\n{log}");
                }
                Err(RecvTimeoutError::Timeout) => {
                    assert!(Instant::now() < end, "it hangs before {word:?}");
                    // Nothing can be read of one that has just ended.
                    let alive = self.child.try_wait().unwrap().is_none();
                    if alive {
                        *most = (*most).max(resident_kib(self.child.id()));
                    }
                }
            }
        }
    }

    fn go_on(&mut self) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(b"!").unwrap();
    }
}

/// Calls `found` with each [`READY`] and each [`DONE`] with its number.
fn find_words(mut output: impl Read, found: impl Fn(String)) {
    const NUMBER_BYTES: usize = 17;
    let mut unseen = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        // A terminal's line ends may have got a carriage return.
        unseen.extend(buffer[..count].iter().filter(|byte| **byte != b'\r'));
        for (word, bytes) in [(READY, READY.len()), (DONE, DONE.len() + NUMBER_BYTES)] {
            let at = unseen.windows(word.len()).position(|part| part == word.as_bytes());
            if let Some(whole) = at.and_then(|at| unseen.get(at..at + bytes)) {
                found(String::from_utf8_lossy(whole).into_owned());
                unseen.clear();
            }
        }
        let most = DONE.len() + NUMBER_BYTES;
        unseen.drain(..unseen.len().saturating_sub(most));
    }
}

/// Reads the log: how many lines there are, and the last of it.
fn read_log(mut log: impl Read) -> (u64, String) {
    const KEPT_BYTES: usize = 1 << 14;
    let (mut lines, mut last) = (0, Vec::new());
    let mut buffer = vec![0; 1 << 14];
    while let Ok(count @ 1..) = log.read(&mut buffer) {
        lines += buffer[..count].iter().filter(|byte| **byte == b'\n').count() as u64;
        last.extend(&buffer[..count]);
        last.drain(..last.len().saturating_sub(KEPT_BYTES));
    }
    (lines, String::from_utf8_lossy(&last).into_owned())
}

/// Says something in the test's output.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
