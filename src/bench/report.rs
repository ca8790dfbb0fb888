//! Figures: their values, what is made of them, and how they are written down.

use std::fmt::{self, Write};
use std::fs;
use std::thread;

use serde::{Deserialize, Serialize};

use crate::host;

/// The version of the format that reports are written in.
pub const FORMAT: u32 = 1;

/// What a value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Nanoseconds from start to end.
    Nanoseconds,
    /// Nanoseconds for each of many operations.
    NanosecondsEach,
    /// Nanoseconds for each MiB.
    NanosecondsPerMib,
    /// KiB, 1024 bytes.
    Kib,
    /// A number of guests; more is better.
    Guests,
}

impl Unit {
    /// Whether a larger value is the better one.
    pub fn more_is_better(self) -> bool {
        self == Self::Guests
    }

    /// `value` with the unit that suits it.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Nanoseconds | Self::NanosecondsEach => time(value),
            Self::NanosecondsPerMib => format!("{}/MiB", time(value)),
            Self::Kib => format!("{} KiB", thousands(value)),
            Self::Guests => format!("{value:.0}"),
        }
    }

    /// `value` as a rate, where it is one.
    pub fn rate(self, value: f64) -> Option<String> {
        const NS_PER_S: f64 = 1e9;
        let per_second = NS_PER_S / value;
        match self {
            Self::NanosecondsEach => Some(format!("{}/s", rate(per_second))),
            Self::NanosecondsPerMib => Some(format!("{} MiB/s", rate(per_second))),
            _ => None,
        }
    }
}

fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{} µs", digits(ns / 1e3)),
        ns if ns < 1e9 => format!("{} ms", digits(ns / 1e6)),
        ns => format!("{} s", digits(ns / 1e9)),
    }
}

/// `value`, 1 to 999, with three digits or four.
fn digits(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value => format!("{value:.1}"),
    }
}

fn rate(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { thousands(value) }
}

/// `value` without a fraction, its digits in threes.
fn thousands(value: f64) -> String {
    let plain = format!("{:.0}", value.abs());
    let mut text = if value <= -0.5 { "-".to_owned() } else { String::new() };
    for (index, digit) in plain.chars().enumerate() {
        if index > 0 && (plain.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// One value of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The figure's name within its case.
    pub name: String,
    /// Whose it is.
    pub vmm: String,
    /// What the value counts.
    pub unit: Unit,
    /// The value.
    pub value: f64,
}

/// The values of one figure, a value a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The case that it belongs to.
    pub case: String,
    /// Its name within the case.
    pub name: String,
    /// Whose it is: `alcove`, a peer, or the physical limit.
    pub vmm: String,
    /// What the values count.
    pub unit: Unit,
    /// In the order of the runs.
    pub values: Vec<f64>,
}

/// What the values of a figure amount to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The value in the middle, or the mean of the two there.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of `values`; `None` when there are none or one is not a number.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => f64::midpoint(*sorted.get(middle - 1)?, *sorted.get(middle)?),
            _ => *sorted.get(middle)?,
        };
        (min.is_finite() && max.is_finite()).then_some(Self { median, min, max })
    }

    /// The distance between the least and the largest, as a fraction of the median.
    pub fn spread(&self) -> f64 {
        let distance = self.max - self.min;
        if distance == 0.0 { 0.0 } else { distance / self.median.abs() }
    }
}

/// A case that was not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Which.
    pub case: String,
    /// What it lacks, and where that comes from.
    pub why: String,
}

/// Where the figures were taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The processor's name.
    pub processor: String,
    /// How many there are.
    pub cpus: usize,
    /// The kernel's release.
    pub kernel: String,
    /// `hardware` or `software`.
    pub kvm: String,
}

impl Host {
    /// The one that this runs on.
    pub fn this() -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let processor = line("/proc/cpuinfo").lines().find_map(|line| {
            Some(line.strip_prefix("model name")?.split_once(':')?.1.trim().to_owned())
        });
        let kvm = if host::has_hardware_virtualisation() { "hardware" } else { "software" };
        Self {
            processor: processor.unwrap_or_else(|| "unknown".to_owned()),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            kernel: line("/proc/sys/kernel/osrelease"),
            kvm: kvm.to_owned(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cpus, kernel, kvm } = self;
        write!(f, "{kvm} KVM, Linux {kernel}, {cpus} × {processor}")
    }
}

/// All figures of one `alcove bench`. As JSON this is what `--json` writes and `compare` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// alcove's version.
    pub alcove: String,
    /// Where.
    pub host: Host,
    /// When, by RFC 3339.
    pub when: String,
    /// Runs for each figure.
    pub runs: u32,
    /// Runs before that.
    pub warm_up: u32,
    /// The figures, in the order in which they were taken.
    pub figures: Vec<Figure>,
    /// The cases that were not run.
    pub missing: Vec<Missing>,
}

impl Report {
    /// A table for a terminal.
    pub fn table(&self) -> String {
        let mut rows = vec![
            ["case", "figure", "by", "median", "min", "max", "spread", "rate"].map(str::to_owned),
        ];
        for figure in &self.figures {
            let Some(summary) = Summary::of(&figure.values) else { continue };
            let show = |value| figure.unit.show(value);
            rows.push([
                figure.case.clone(),
                figure.name.clone(),
                figure.vmm.clone(),
                show(summary.median),
                show(summary.min),
                show(summary.max),
                format!("{:.1} %", summary.spread() * 100.0),
                figure.unit.rate(summary.median).unwrap_or_default(),
            ]);
        }
        let mut text = format!(
            "alcove {} on {}\n{} runs after {} to warm up\n\n",
            self.alcove, self.host, self.runs, self.warm_up
        );
        text.push_str(&columns(&rows, 3));
        for Missing { case, why } in &self.missing {
            let _ = writeln!(text, "not run: {case}: {why}");
        }
        text
    }
}

/// `rows` with their columns aligned: the first `left` to the left, the others to the right.
pub(super) fn columns<const N: usize>(rows: &[[String; N]], left: usize) -> String {
    let width = |column: usize| {
        rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max()
    };
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(widths).enumerate() {
            let gap = if index == 0 { "" } else { "  " };
            let _ = match index < left {
                true => write!(line, "{gap}{cell:width$}"),
                false => write!(line, "{gap}{cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_of_sorted_values() {
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        let even = Summary::of(&[4.0, 1.0, 2.0, 3.0]).unwrap();

        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(even.median, 2.5);
        assert_eq!(odd.spread(), 1.0);
        assert_eq!(Summary::of(&[0.0, 0.0]).unwrap().spread(), 0.0);
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn values_are_shown_with_units_that_suit_them() {
        assert_eq!(Unit::Nanoseconds.show(8_884_321.0), "8.88 ms");
        assert_eq!(Unit::NanosecondsEach.show(37_412.0), "37.4 µs");
        assert_eq!(Unit::Nanoseconds.show(14_000_000_000.0), "14.0 s");
        assert_eq!(Unit::NanosecondsEach.show(950.0), "950 ns");
        assert_eq!(Unit::Kib.show(1316.4), "1,316 KiB");
        assert_eq!(Unit::Kib.show(-8.0), "-8 KiB");
        assert_eq!(Unit::NanosecondsEach.rate(1000.0).unwrap(), "1,000,000/s");
        assert_eq!(Unit::NanosecondsPerMib.rate(5e6).unwrap(), "200 MiB/s");
        assert_eq!(Unit::NanosecondsPerMib.rate(6e9).unwrap(), "0.17 MiB/s");
        assert_eq!(Unit::Kib.rate(1.0), None);
    }

    #[test]
    fn the_table_has_all_figures_and_what_is_missing() {
        let report = super::super::compare::tests::report(&[1.0, 2.0, 3.0]);

        let table = report.table();

        assert!(table.contains("exec to first output  alcove    2 ns"), "{table}");
        assert!(table.contains("not run: net: no tap"), "{table}");
    }
}
