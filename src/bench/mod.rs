//! Benchmarks: what a machine costs, measured from outside, by starting `alcove run` and listening.
//!
//! A case is run [`Settings::warm_up`] times without being looked at and [`Settings::runs`] times for the
//! figures, each run giving one value a figure. Times are those of CLOCK_MONOTONIC on this host, or in
//! the guest where a guest measures; in a lab whose clock counts instructions, they repeat.

mod cases;
pub mod compare;
pub mod cpio;
mod guest;
mod launch;
mod namespace;
mod net_server;
mod page;
mod peer;
pub mod report;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

pub use self::cases::CaseName;
pub use self::page::page;
pub use self::peer::Peer;
use self::report::{Figure, Host, Missing, Report, Sample};

/// What `alcove bench` shall do.
#[derive(Debug)]
pub struct Settings {
    /// The cases, in their order.
    pub cases: Vec<CaseName>,
    /// The program that is measured.
    pub alcove: PathBuf,
    /// A folder with `vmlinux`, `initramfs.cpio` and `programs`, as `make guest` leaves them.
    pub guest: PathBuf,
    /// Another kernel.
    pub kernel: Option<PathBuf>,
    /// Another initial RAM disk, whose init prints [`Settings::marker`].
    pub initrd: Option<PathBuf>,
    /// How a line begins that the guest's first process prints.
    pub marker: String,
    /// Runs for the figures, 1 or more.
    pub runs: u32,
    /// Runs before that.
    pub warm_up: u32,
    /// How many guests the case density starts, 1 or more.
    pub guests: u32,
    /// How long a guest may keep silent.
    pub patience: Duration,
    /// Whom else to measure.
    pub peers: Vec<Peer>,
}

impl Settings {
    fn kernel(&self) -> PathBuf {
        self.kernel.clone().unwrap_or_else(|| self.guest.join("vmlinux"))
    }

    fn initrd(&self) -> PathBuf {
        self.initrd.clone().unwrap_or_else(|| self.guest.join("initramfs.cpio"))
    }

    /// A program for the guest, statically linked.
    fn program(&self, name: &str) -> PathBuf {
        self.guest.join("programs").join(name)
    }
}

/// Why a benchmark cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A program cannot be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A guest said something else than was expected, or nothing.
    #[error("{vmm}: the guest {what}; it printed: {tail}")]
    Guest {
        /// Who ran it.
        vmm: String,
        /// What it did.
        what: String,
        /// The end of what it printed.
        tail: String,
    },
    /// Something of the host's.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The loop that only counts exits.
    #[error("the bare loop of KVM_RUN")]
    BareLoop(#[source] crate::vm::VmError),
    /// No case could be run.
    #[error("none of the cases could be run: {0}")]
    Nothing(String),
}

impl BenchError {
    fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what: what.into(), source }
    }
}

/// What a case works with.
struct Bench<'a> {
    settings: &'a Settings,
    /// For files that a case makes; memory, as a rule.
    folder: TempDir,
    /// Why there is no network that a case could use, if there is none.
    no_network: Option<String>,
}

impl Bench<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file for the guest or alcove.
    fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, BenchError> {
        let path = self.path(name);
        fs::write(&path, content).map_err(BenchError::host(format!("write {}", path.display())))?;
        Ok(path)
    }
}

/// What happens, for whoever watches.
#[derive(Debug)]
pub enum Event<'a> {
    /// A case begins that has so many runs.
    Case(CaseName, u32),
    /// A run is over.
    Run,
    /// A case is over, or cannot be run for this reason.
    Ended(Option<&'a str>),
}

/// Runs the cases of `settings`, one after the other. The calling process must have one thread only: it
/// moves to namespaces of its own when a case needs a network.
///
/// # Errors
/// [`BenchError`]: a case that had all it needed failed. What a case lacks is no error but told in the
/// report, unless all lack something.
pub fn run(settings: &Settings, mut watch: impl FnMut(Event<'_>)) -> Result<Report, BenchError> {
    let needs_network = settings.cases.contains(&CaseName::Net);
    let no_network = namespace::enter(needs_network).err().map(|error| error.to_string());
    launch::place_mappings_alike();
    let folder = TempDir::with_prefix("alcove-bench-")
        .map_err(BenchError::host("make a temporary folder"))?;
    let bench = Bench { settings, folder, no_network };
    let mut report = Report {
        format: report::FORMAT,
        alcove: env!("CARGO_PKG_VERSION").to_owned(),
        host: Host::this(),
        when: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        runs: settings.runs,
        warm_up: settings.warm_up,
        figures: Vec::new(),
        missing: Vec::new(),
    };
    for &case in &settings.cases {
        let missing = cases::missing(case, &bench);
        watch(Event::Case(case, settings.warm_up + settings.runs));
        if let Some(why) = missing {
            watch(Event::Ended(Some(&why)));
            report.missing.push(Missing { case: case.to_string(), why });
            continue;
        }
        for run in 0..settings.warm_up + settings.runs {
            let samples = cases::run(case, &bench)?;
            if run >= settings.warm_up {
                add(&mut report.figures, case, samples);
            }
            watch(Event::Run);
        }
        watch(Event::Ended(None));
    }
    if report.figures.is_empty() && !report.missing.is_empty() {
        let told = report.missing.iter().map(|Missing { case, why }| format!("{case}: {why}"));
        return Err(BenchError::Nothing(told.collect::<Vec<_>>().join("; ")));
    }
    Ok(report)
}

/// Adds one run's samples to the figures that they are of.
fn add(figures: &mut Vec<Figure>, case: CaseName, samples: Vec<Sample>) {
    for Sample { name, vmm, unit, value } in samples {
        let case = case.to_string();
        let known = figures.iter_mut().find(|f| f.case == case && f.name == name && f.vmm == vmm);
        match known {
            Some(figure) => figure.values.push(value),
            None => figures.push(Figure { case, name, vmm, unit, values: vec![value] }),
        }
    }
}

/// `path` if a file is there, else what is missing and where it comes from.
fn file_or_reason(path: &Path, remedy: impl fmt::Display) -> Option<String> {
    (!path.is_file()).then(|| format!("there is no {}; {remedy}", path.display()))
}
