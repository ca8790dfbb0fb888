//! Two reports side by side.

use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::report::{FORMAT, Figure, Report, Summary, columns};

/// Medians that are closer than this count as equal, whatever their runs say.
const NOISE_FLOOR: f64 = 0.01;

/// Why a report cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file.
    #[error("cannot open {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What is in it.
    #[error("{path} is no report of alcove bench")]
    Content {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Another version of the format.
    #[error("{path} has the format {found}, this alcove knows {FORMAT}")]
    Format {
        /// Which.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

/// Reads what `--json` has written.
///
/// # Errors
/// [`ReadError`].
pub fn read(path: &Path) -> Result<Report, ReadError> {
    let file =
        File::open(path).map_err(|source| ReadError::Open { path: path.to_owned(), source })?;
    let report: Report = serde_json::from_reader(BufReader::new(file))
        .map_err(|source| ReadError::Content { path: path.to_owned(), source })?;
    match report.format {
        FORMAT => Ok(report),
        found => Err(ReadError::Format { path: path.to_owned(), found }),
    }
}

/// How a figure has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Not beyond noise.
    None,
    /// It is better.
    Better,
    /// It is worse.
    Worse,
}

/// Whether `new` differs from `old` beyond noise: no run of the one lies among the runs of the other,
/// and the medians differ by 1 % or more. Of five runs each, two samples of the same distribution come
/// to lie apart by chance once in 126 times.
pub fn change(old: &Summary, new: &Summary, more_is_better: bool) -> Change {
    let apart = new.min > old.max || new.max < old.min;
    let difference = new.median - old.median;
    if !apart || difference.abs() < NOISE_FLOOR * old.median.abs() {
        Change::None
    } else if (difference > 0.0) == more_is_better {
        Change::Better
    } else {
        Change::Worse
    }
}

/// A comparison, written down, and how many figures changed.
#[derive(Debug)]
pub struct Comparison {
    /// A table, and a sentence on the whole.
    pub text: String,
    /// Figures that got better beyond noise.
    pub better: usize,
    /// Figures that got worse beyond noise.
    pub worse: usize,
}

/// Compares `new` with `old`, figure by figure.
pub fn compare(old: &Report, new: &Report) -> Comparison {
    let mut rows =
        vec![["case", "figure", "by", "before", "after", "ratio", ""].map(str::to_owned)];
    let (mut better, mut worse, mut equal) = (0, 0, 0);
    let mut alone = Vec::new();
    for figure in &new.figures {
        let known = old.figures.iter().find(|other| is_same(figure, other));
        let before = known.and_then(|known| Summary::of(&known.values));
        let (Some(before), Some(after)) = (before, Summary::of(&figure.values)) else {
            alone.push((figure, "second"));
            continue;
        };
        let mark = match change(&before, &after, figure.unit.more_is_better()) {
            Change::None => {
                equal += 1;
                ""
            }
            Change::Better => {
                better += 1;
                "better"
            }
            Change::Worse => {
                worse += 1;
                "WORSE"
            }
        };
        let ratio = match before.median {
            0.0 => "-".to_owned(),
            median => format!("{:.3}", after.median / median),
        };
        rows.push([
            figure.case.clone(),
            figure.name.clone(),
            figure.vmm.clone(),
            figure.unit.show(before.median),
            figure.unit.show(after.median),
            ratio,
            mark.to_owned(),
        ]);
    }
    let gone = old.figures.iter().filter(|f| !new.figures.iter().any(|other| is_same(f, other)));
    alone.extend(gone.map(|figure| (figure, "first")));
    let mut text = columns(&rows, 3);
    for (figure, which) in alone {
        let _ =
            writeln!(text, "only in the {which}: {}: {}, {}", figure.case, figure.name, figure.vmm);
    }
    if old.host != new.host {
        let _ = writeln!(text, "\nfrom different hosts: {}; {}", old.host, new.host);
    }
    let verdict = match (better, worse) {
        (0, 0) => format!("\nnothing changed beyond noise in {equal} figures"),
        _ => format!("\nbeyond noise {better} better, {worse} worse; {equal} unchanged"),
    };
    text.push_str(&verdict);
    text.push('\n');
    Comparison { text, better, worse }
}

fn is_same(one: &Figure, other: &Figure) -> bool {
    (&one.case, &one.name, &one.vmm, one.unit) == (&other.case, &other.name, &other.vmm, other.unit)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::report::{Host, Missing, Unit};
    use super::*;

    /// A report with one figure of `values`.
    pub fn report(values: &[f64]) -> Report {
        let host = Host {
            processor: "one <that> & counts".to_owned(),
            cpus: 1,
            kernel: "6.12".to_owned(),
            kvm: "hardware".to_owned(),
        };
        let figure = Figure {
            case: "start".to_owned(),
            name: "exec to first output".to_owned(),
            vmm: "alcove".to_owned(),
            unit: Unit::Nanoseconds,
            values: values.to_vec(),
        };
        Report {
            format: FORMAT,
            alcove: "0.1.0".to_owned(),
            host,
            when: "2026-01-01T00:00:00Z".to_owned(),
            runs: values.len() as u32,
            warm_up: 0,
            figures: vec![figure],
            missing: vec![Missing { case: "net".to_owned(), why: "no tap".to_owned() }],
        }
    }

    #[test]
    fn runs_that_overlap_or_are_close_have_not_changed() {
        for (old, new) in [
            ([100.0, 110.0, 120.0], [115.0, 130.0, 140.0]),
            ([100.0, 100.1, 100.2], [100.5, 100.6, 100.7]),
            ([0.0; 3], [0.0; 3]),
        ] {
            let compared = compare(&report(&old), &report(&new));

            assert_eq!((compared.better, compared.worse), (0, 0), "{}", compared.text);
            assert!(compared.text.contains("nothing changed"), "{}", compared.text);
        }
    }

    #[test]
    fn runs_that_lie_apart_have_changed() {
        let (slow, fast) = (report(&[200.0, 201.0, 202.0]), report(&[100.0, 101.0, 102.0]));

        let worse = compare(&fast, &slow);
        let better = compare(&slow, &fast);

        assert!(worse.text.contains("1.990  WORSE"), "{}", worse.text);
        assert!(better.text.contains("0.502  better"), "{}", better.text);
        assert_eq!((worse.worse, better.better), (1, 1));
    }

    #[test]
    fn a_figure_that_only_one_has_is_told() {
        let mut other = report(&[1.0]);
        other.figures.clear();

        assert!(compare(&report(&[1.0]), &other).text.contains("only in the first: start: exec"));
        assert!(compare(&other, &report(&[1.0])).text.contains("only in the second: start: exec"));
    }

    #[test]
    fn more_guests_are_better() {
        let (few, many) = (Summary::of(&[1.0]).unwrap(), Summary::of(&[2.0]).unwrap());

        assert_eq!(change(&few, &many, true), Change::Better);
        assert_eq!(change(&few, &many, false), Change::Worse);
    }
}
