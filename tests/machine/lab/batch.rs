//! The side of this host: runs the lab once for all who ask, and keeps what it reports.
//!
//! A folder below target/lab/runs stands for a run: nextest gives each run an identity, without
//! nextest a process is one. Who holds the folder's lock runs the batch; `started` says that
//! somebody did, so that nobody does it again. Each test's result is a file that appears whole.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::report::Frame;
use super::{Mode, agent};
use crate::Test;

/// Narrows the batch to the tests whose names contain it.
const FILTER: &str = "ALCOVE_LAB_FILTER";

/// A lab that gives no sign of life for this time hangs. It gives one every few seconds, but this
/// machine may be busy.
const SILENCE: Duration = Duration::from_secs(180);
/// Between looks at a result that somebody else works on.
const POLL: Duration = Duration::from_millis(100);
/// Runs whose folder is older than this are over.
const STALE: Duration = Duration::from_secs(3600);

/// What narrows the batch: the environment or, where all trials are one process's, its arguments.
pub fn filter(arguments: &Arguments) -> String {
    if let Ok(filter) = std::env::var(FILTER) {
        return filter;
    }
    let own = if std::env::var_os(RUN_ID).is_some() { None } else { arguments.filter.as_deref() };
    let own = own.unwrap_or_default();
    own.trim_start_matches("lab::").trim_start_matches("counting::").to_owned()
}

/// Set by nextest, equal for all processes of a run.
const RUN_ID: &str = "NEXTEST_RUN_ID";

/// The result of `test` in `mode`, from the lab; the first to ask runs it.
pub fn result(tests: &'static [Test], mode: Mode, test: &str, filter: &str) -> Result<(), Failed> {
    if !test.contains(filter) {
        return Err(format!("it was not run: {filter:?} is not in its name").into());
    }
    let run = Run::open().map_err(|e| format!("the folder for results: {e}"))?;
    loop {
        if let Some(result) = run.read(mode, test) {
            return result;
        }
        match run.lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => thread::sleep(POLL),
            Err(TryLockError::Error(e)) => return Err(format!("the lock of results: {e}").into()),
        }
    }
    if !run.folder.join(STARTED).exists() {
        run.all(tests, filter)?;
    }
    let lost = || Err("who ran the lab ended before this test did; see the other failures".into());
    run.read(mode, test).unwrap_or_else(lost)
}

const STARTED: &str = "started";
/// How many labs are tried: one that dies fails the tests that ran in it, and says nothing of those that
/// had not begun.
const LABS: usize = 3;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder of a run.
struct Run {
    folder: PathBuf,
    lock: File,
}

impl Run {
    /// The folder of this process's run, made if need be; folders of stale runs are removed.
    fn open() -> io::Result<Self> {
        let runs = root().join("target/lab/runs");
        let own = format!("process-{}", std::process::id());
        let folder = runs.join(std::env::var(RUN_ID).unwrap_or(own));
        if !folder.exists() {
            remove_stale(&runs);
        }
        fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join("lock"))?;
        Ok(Self { folder, lock })
    }

    fn result_file(&self, mode: Mode, test: &str) -> PathBuf {
        self.folder.join(format!("{}.{}", mode.name(), test.replace("::", ".")))
    }

    /// The result of a test if it is there.
    fn read(&self, mode: Mode, test: &str) -> Option<Result<(), Failed>> {
        let text = fs::read(self.result_file(mode, test)).ok()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let (status, output) = text.split_once('\n')?;
        let _ = io::stdout().write_all(output.as_bytes());
        Some(if status == "passed" {
            Ok(())
        } else {
            Err("it failed in the lab, see above".into())
        })
    }

    /// Leaves the result of a test; the first result of a test counts.
    fn write(&self, mode: Mode, test: &str, passed: bool, output: &[u8]) -> io::Result<()> {
        let file = self.result_file(mode, test);
        if file.exists() {
            return Ok(());
        }
        let unfinished = file.with_extension("unfinished");
        let mut content = if passed { b"passed\n".to_vec() } else { b"failed\n".to_vec() };
        content.extend(output);
        fs::write(&unfinished, content)?;
        fs::rename(unfinished, file)
    }

    /// Runs the batch in every mode.
    fn all(&self, tests: &'static [Test], filter: &str) -> Result<(), Failed> {
        File::create(self.folder.join(STARTED)).map_err(|e| format!("the run's folder: {e}"))?;
        let programs = build_programs();
        for mode in Mode::ALL {
            let wanted = |test: &&Test| mode.runs(test) && test.name.contains(filter);
            let names: Vec<&str> = tests.iter().filter(wanted).map(|test| test.name).collect();
            if names.is_empty() {
                continue;
            }
            let mut why = String::new();
            let fail = |name: &str, output: &[u8], text: &str| {
                self.write(mode, name, false, &[output, text.as_bytes()].concat())
                    .map_err(|e| format!("the result of {name}: {e}"))
            };
            for lab in 1..=LABS {
                let open = |name: &&str| !self.result_file(mode, name).exists();
                let left: Vec<&str> = names.iter().copied().filter(open).collect();
                if left.is_empty() {
                    break;
                }
                let mut unfinished: BTreeMap<String, Vec<u8>> = BTreeMap::new();
                let end = match &programs {
                    Ok(()) => self.boot(mode, &left, &mut unfinished),
                    Err(why) => Err(io::Error::other(why.clone())),
                };
                let text =
                    end.err().map_or("it ended before all tests had".to_owned(), |e| e.to_string());
                why.push_str(&format!("lab {lab} of {LABS}: {text}\n"));
                for (name, output) in unfinished {
                    fail(&name, &output, &format!("the lab failed while this test ran: {text}\n"))?;
                }
            }
            for name in names {
                fail(name, &[], &format!("the lab failed before this test: {why}\n"))?;
            }
        }
        Ok(())
    }

    /// Runs the tests `names` in one lab and keeps their results. `unfinished` then holds the tests
    /// that have started but not ended, with what they printed.
    fn boot(
        &self,
        mode: Mode,
        names: &[&str],
        unfinished: &mut BTreeMap<String, Vec<u8>>,
    ) -> io::Result<()> {
        let says = self.folder.join(format!("{}.stderr", mode.name()));
        let mut lab = self.command(mode, names).stderr(File::create(&says)?).spawn()?;
        let end = self.follow(mode, &mut lab, unfinished);
        if end.is_err() {
            // lab.sh then ends the lab and tells the end of its console.
            let _ = kill(Pid::from_raw(lab.id() as i32), Signal::SIGTERM);
        }
        let status = lab.wait()?;
        let says = fs::read(&says)?;
        let says = String::from_utf8_lossy(&says);
        match end {
            Ok(()) if status.success() => Ok(()),
            Ok(()) => Err(io::Error::other(format!("{status}\n{says}"))),
            Err(e) => Err(io::Error::new(e.kind(), format!("{e}\n{says}"))),
        }
    }

    fn command(&self, mode: Mode, names: &[&str]) -> Command {
        let programs = root().join("target/lab");
        let jobs = "1"; // what the emulator's two CPUs bear
        let mut command = Command::new(root().join("scripts/lab.sh"));
        command.arg(mode.name());
        for (name, path) in [
            ("alcove", programs.join("alcove")),
            ("machine", programs.join("machine")),
            ("guest", crate::host::guest_file("")),
        ] {
            command.arg(format!("{name}={}", path.display()));
        }
        command.args(["--", "machine", agent::SERVE, jobs]).args(names);
        command.env("ALCOVE_LAB_CONSOLE", self.folder.join(format!("{}.console", mode.name())));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    /// Reads frames to their end and keeps results as they come; fails when none comes for long.
    fn follow(
        &self,
        mode: Mode,
        lab: &mut Child,
        unfinished: &mut BTreeMap<String, Vec<u8>>,
    ) -> io::Result<()> {
        let mut frames = BufReader::new(lab.stdout.take().expect("it is piped"));
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            while let Some(frame) = Frame::read(&mut frames).transpose() {
                let last = frame.is_err();
                if sender.send(frame).is_err() || last {
                    break;
                }
            }
        });
        loop {
            match receiver.recv_timeout(SILENCE) {
                Ok(frame) => match frame? {
                    Frame::Alive => {}
                    Frame::Start(name) => drop(unfinished.insert(name, Vec::new())),
                    Frame::Output(name, bytes) => {
                        unfinished.entry(name).and_modify(|output| output.extend(bytes));
                    }
                    Frame::End(name, passed) => {
                        let output = unfinished.remove(&name).unwrap_or_default();
                        self.write(mode, &name, passed, &output)?;
                    }
                },
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    let text = format!("no sign of life for {} s", SILENCE.as_secs());
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
            }
        }
    }
}

/// Brings the programs for the lab up to date. What cargo told this process is not for that build.
fn build_programs() -> Result<(), String> {
    let mut command = Command::new(root().join("scripts/lab-programs.sh"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_BIN_") {
            command.env_remove(&name);
        }
    }
    let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr);
    output.status.success().then_some(()).ok_or_else(|| format!("its programs: {text}"))
}

/// Removes the folders of runs that are over.
fn remove_stale(runs: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age > STALE) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
