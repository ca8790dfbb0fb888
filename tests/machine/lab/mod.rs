//! The same tests in the lab, a QEMU that emulates hardware-virtualised KVM (scripts/lab.sh).
//!
//! Each test that can run there is listed a second time as `lab::<name>`. The first process that
//! needs a result runs the whole batch, in one QEMU for each [`Mode`], and leaves the results in a
//! folder ([`batch`]); the others read theirs as they come. In the lab the same test binary runs
//! each test in a process of its own and tells what became of it ([`agent`], [`report`]).
//!
//! ALCOVE_LAB_FILTER narrows the batch to tests whose names contain it.

pub mod agent;
mod batch;
mod report;

use libtest_mimic::{Arguments, Trial};

use crate::Test;

/// Set in the lab, by its init.
const INSIDE: &str = "ALCOVE_IN_LAB";

/// How the lab's machine runs; the names are those of scripts/lab.sh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Two CPUs at the same time.
    Threads,
    /// One CPU whose clock counts instructions.
    Counting,
}

impl Mode {
    const ALL: [Self; 2] = [Self::Threads, Self::Counting];

    fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Counting => "counting",
        }
    }

    /// The name of the trial that stands for `test` in this mode.
    fn trial_name(self, test: &str) -> String {
        match self {
            Self::Threads => format!("lab::{test}"),
            Self::Counting => format!("lab::counting::{test}"),
        }
    }

    /// Whether `test` runs in this mode: everything that the lab can with threads, one boot in the
    /// counting mode.
    fn runs(self, test: &Test) -> bool {
        match self {
            Self::Threads => has(test),
            Self::Counting => has(test) && test.name == "boot::vmlinux_reports_and_ends",
        }
    }
}

/// Whether the lab has all that `test` needs.
pub fn has(test: &Test) -> bool {
    test.needs.iter().all(|need| need.is_in_lab())
}

/// Whether this process runs in the lab.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The trials that stand for tests in the lab.
pub fn trials(tests: &'static [Test], arguments: &Arguments) -> Vec<Trial> {
    let filter = batch::filter(arguments);
    let mut trials = Vec::new();
    for mode in Mode::ALL {
        for test in tests.iter().filter(|test| mode.runs(test)) {
            let filter = filter.clone();
            let run = move || batch::result(tests, mode, test.name, &filter);
            trials.push(Trial::test(mode.trial_name(test.name), run));
        }
    }
    trials
}
