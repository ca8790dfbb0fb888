//! `alcove bench`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

use super::Failure;
use crate::bench::{self, Bench, CaseName, Event, Peer, Settings, compare};
use crate::cli::{BenchArgs, BenchCommand};

/// Measures, or compares what was measured.
pub fn run(args: BenchArgs) -> Result<ExitCode, Failure> {
    if let Some(BenchCommand::Compare { before, after, fail_if_worse }) = args.command {
        let compared = compare::compare(&compare::read(&before)?, &compare::read(&after)?);
        io::stdout().write_all(compared.text.as_bytes())?;
        let fails = fail_if_worse && compared.worse > 0;
        return Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    }
    let (json, html) = (args.json.clone(), args.html.clone());
    let settings = settings(args)?;
    // Before the bar, which has a thread.
    let bench = Bench::prepare(&settings)?;
    let bar = progress();
    let report = bench.run(|event| show(&bar, event));
    bar.finish_and_clear();
    let report = report?;
    io::stdout().write_all(report.table().as_bytes())?;
    if let Some(path) = json {
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        fs::write(&path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    }
    if let Some(path) = html {
        fs::write(&path, bench::page(&report))
            .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(args: BenchArgs) -> Result<Settings, Failure> {
    let peers = args.vs.into_iter().chain(args.vs_command.into_iter().map(Peer::Command));
    let mut cases = args.cases;
    if cases.is_empty() {
        cases = CaseName::value_variants().to_vec();
    }
    Ok(Settings {
        cases,
        alcove: std::env::current_exe()?,
        guest: args.guest,
        kernel: args.kernel,
        initrd: args.initrd,
        marker: args.marker,
        runs: args.runs,
        warm_up: args.warm_up,
        guests: args.guests,
        patience: args.patience.0,
        peers: peers.collect(),
    })
}

/// A bar on a terminal, nothing elsewhere.
fn progress() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg:8} {bar:40} {pos}/{len} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn show(bar: &ProgressBar, event: Event) {
    match event {
        Event::Case(case, runs) => {
            bar.set_message(case.to_string());
            bar.reset();
            bar.set_length(runs.into());
        }
        Event::Run => bar.inc(1),
    }
}
