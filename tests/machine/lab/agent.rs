//! The side in the lab: runs tests, each in a process of its own, and reports.

use std::io::{self, Read};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::report::Frame;
use crate::Test;

/// Tells the agent to run the tests that follow.
pub const SERVE: &str = "serve";
/// Tells a process of the agent's to run the one test that follows, by panicking if it fails.
const BODY: &str = "body";

/// Between signs of life.
const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// A test that takes longer has failed. Tests wait for a guest for less.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long the output of a test that has ended is waited for.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// What the test binary does in the lab: `serve JOBS NAME...` or `body NAME`.
pub fn main(tests: &'static [Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [SERVE, jobs, ref names @ ..] => serve(jobs.parse().unwrap(), names),
        [BODY, name] => (tests.iter().find(|test| test.name == name).unwrap().body)(),
        _ => panic!("in the lab this program takes `serve JOBS NAME...` or `body NAME`"),
    }
    ExitCode::SUCCESS
}

/// Runs the tests `names`, `jobs` at a time.
fn serve(jobs: usize, names: &[&str]) {
    let queue = Mutex::new(names.iter());
    thread::spawn(|| {
        loop {
            send(&Frame::Alive);
            thread::sleep(ALIVE_EVERY);
        }
    });
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(name) = queue.lock().unwrap().next() else { break };
                    run(name);
                }
            });
        }
    });
}

fn send(frame: &Frame) {
    frame.write(io::stdout().lock()).unwrap();
}

fn run(name: &str) {
    send(&Frame::Start(name.to_owned()));
    let passed = passes(name);
    send(&Frame::End(name.to_owned(), passed));
}

/// Runs a test in a process of its own, telling what it prints.
fn passes(name: &str) -> bool {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([BODY, name]).stdin(Stdio::null());
    let mut child = command.stdout(writer.try_clone().unwrap()).stderr(writer).spawn().unwrap();
    drop(command); // its ends of the pipe
    let (finished, is_finished) = mpsc::channel();
    let owned = name.to_owned();
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 14];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            send(&Frame::Output(owned.clone(), buffer[..count].to_vec()));
        }
        let _ = finished.send(());
    });
    let passed = wait(name, &mut child);
    // The pipe ends with its last holder, which may be a guest that the test left behind.
    let _ = is_finished.recv_timeout(LAST_OUTPUT);
    passed
}

fn wait(name: &str, child: &mut Child) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if Instant::now() > deadline {
            let text = format!("killed: it did not end within {} s\n", PATIENCE.as_secs());
            send(&Frame::Output(name.to_owned(), text.into_bytes()));
            child.kill().unwrap();
            child.wait().unwrap();
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
