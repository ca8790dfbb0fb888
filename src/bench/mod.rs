//! Benchmarks: what a machine costs, measured from outside, by starting `alcove run` and listening.
//!
//! A case is run [`Settings::warm_up`] times without being looked at and [`Settings::runs`] times for the
//! figures, each run giving one value a figure. Times are those of CLOCK_MONOTONIC on this host, or in
//! the guest where a guest measures; in a lab whose clock counts instructions, they repeat.

mod cases;
pub mod compare;
pub mod cpio;
pub mod guest;
mod launch;
mod namespace;
mod net_server;
mod page;
mod peer;
pub mod report;

use std::cell::OnceCell;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use tempfile::TempDir;

pub use self::cases::CaseName;
use self::launch::Launched;
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
    /// How long a guest may take to print what it is measured by.
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
    /// A signal.
    #[error("interrupted by a signal")]
    Interrupted,
    /// No case could be run.
    #[error("none of the cases could be run: {0}")]
    Nothing(String),
}

impl BenchError {
    fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what: what.into(), source }
    }
}

/// What happens, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A case begins that has so many runs.
    Case(CaseName, u32),
    /// A run is over.
    Run,
}

/// A benchmark that is about to be run, and what its cases work with.
#[derive(Debug)]
pub struct Bench<'a> {
    settings: &'a Settings,
    /// For files that a case makes; memory, as a rule.
    folder: TempDir,
    /// Why there is no network that a case could use, if there is none.
    no_network: Option<String>,
    /// The host's end of the guests' network, once it serves.
    server: OnceCell<SocketAddr>,
    /// The signals that end it.
    signals: SignalFd,
}

impl<'a> Bench<'a> {
    /// Prepares what `settings` ask for. The calling process must have one thread only: it moves to
    /// namespaces of its own when a case needs that, and SIGINT, SIGTERM and SIGHUP are blocked from now
    /// on, since they end [`Bench::run`], which cleans up.
    ///
    /// # Errors
    /// [`BenchError::Host`].
    pub fn prepare(settings: &'a Settings) -> Result<Self, BenchError> {
        let has = |case| settings.cases.contains(&case);
        let needs_network = has(CaseName::Net);
        let needs_namespace = needs_network || has(CaseName::Memory) || has(CaseName::Density);
        let entered = if needs_namespace { namespace::enter(needs_network) } else { Ok(()) };
        launch::place_mappings_alike();
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        let signals = set
            .thread_block()
            .and_then(|()| SignalFd::new(&set))
            .map_err(|error| BenchError::host("wait for signals")(error.into()))?;
        let folder = TempDir::with_prefix("alcove-bench-")
            .map_err(BenchError::host("make a temporary folder"))?;
        let no_network = entered.err().map(|error| error.to_string());
        Ok(Self { settings, folder, no_network, server: OnceCell::new(), signals })
    }

    /// Runs the cases, one after the other.
    ///
    /// # Errors
    /// [`BenchError`]: a case that had all it needed failed, or a signal came. What a case lacks is no
    /// error but told in the report, unless all lack something.
    pub fn run(&self, mut watch: impl FnMut(Event)) -> Result<Report, BenchError> {
        let Settings { runs, warm_up, .. } = *self.settings;
        let mut report = Report {
            format: report::FORMAT,
            alcove: env!("CARGO_PKG_VERSION").to_owned(),
            host: Host::this(),
            when: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            runs,
            warm_up,
            figures: Vec::new(),
            missing: Vec::new(),
        };
        for &case in &self.settings.cases {
            if let Some(why) = cases::missing(case, self)? {
                report.missing.push(Missing { case: case.to_string(), why });
                continue;
            }
            watch(Event::Case(case, warm_up + runs));
            for run in 0..warm_up + runs {
                let samples = cases::run(case, self)?;
                if run >= warm_up {
                    add(&mut report.figures, case, samples);
                }
                watch(Event::Run);
            }
        }
        if report.figures.is_empty() && !report.missing.is_empty() {
            let told = report.missing.iter().map(|Missing { case, why }| format!("{case}: {why}"));
            return Err(BenchError::Nothing(told.collect::<Vec<_>>().join("; ")));
        }
        Ok(report)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file for the guest or alcove.
    fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, BenchError> {
        let path = self.path(name);
        fs::write(&path, content).map_err(BenchError::host(format!("write {}", path.display())))?;
        Ok(path)
    }

    /// Starts `command`, whose time begins now.
    fn launch(&self, vmm: &str, command: Command) -> Result<Launched<'_>, BenchError> {
        Launched::start(vmm, command, self.settings.patience, &self.signals)
    }

    /// Where guests find the host's end of their network.
    fn server(&self) -> Result<SocketAddr, BenchError> {
        if let Some(address) = self.server.get() {
            return Ok(*address);
        }
        let address = net_server::serve().map_err(BenchError::host("serve a guest's network"))?;
        Ok(*self.server.get_or_init(|| address))
    }
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
