//! The serial console, from a person's and from a program's side.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::{NamedTempFile, TempDir};

use crate::alcove::{guest_command, patience, script_command, wait};
use crate::bare_metal::{command, kernel};
use crate::terminal::Terminal;

const COM1_DATA: u32 = 0x3f8;
const COM1_LINE_STATUS: u32 = 0x3fd;
const DATA_READY: i32 = 1;
const DEBUG_EXIT: u32 = 0xf4;

/// Ctrl-a.
const ESCAPE: &str = "\x01";

/// A guest that sends back what it gets, in blocks of 64 bytes or at the end of a line, and ends
/// with status 5 after `count` bytes.
fn echo_kernel(count: u64) -> NamedTempFile {
    const BLOCK_BYTES: i32 = 64;
    const BUFFER: u64 = 0x30_0000;
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut next, mut send, mut block) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(r8, count).unwrap();
    a.set_label(&mut block).unwrap();
    a.mov(rdi, BUFFER).unwrap();
    a.xor(r9d, r9d).unwrap();
    a.set_label(&mut next).unwrap();
    a.mov(dx, COM1_LINE_STATUS).unwrap();
    a.in_(al, dx).unwrap();
    a.test(al, DATA_READY).unwrap();
    a.jz(next).unwrap();
    a.mov(dx, COM1_DATA).unwrap();
    a.in_(al, dx).unwrap();
    a.mov(byte_ptr(rdi + r9), al).unwrap();
    a.inc(r9).unwrap();
    a.dec(r8).unwrap();
    a.jz(send).unwrap();
    a.cmp(al, i32::from(b'\n')).unwrap();
    a.je(send).unwrap();
    a.cmp(r9, BLOCK_BYTES).unwrap();
    a.jne(next).unwrap();
    a.set_label(&mut send).unwrap();
    a.mov(rsi, rdi).unwrap();
    a.mov(rcx, r9).unwrap();
    a.mov(dx, COM1_DATA).unwrap();
    a.rep().outsb().unwrap();
    a.test(r8, r8).unwrap();
    a.jnz(block).unwrap();
    a.mov(dx, DEBUG_EXIT).unwrap();
    a.mov(al, 5).unwrap();
    a.out(dx, al).unwrap();
    kernel(&mut a)
}

/// Bytes in which every loss, repetition and exchange shows; none is a line feed.
fn pattern(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            b' ' + (state % 95) as u8
        })
        .collect()
}

fn resident_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Everything is written before anything is read, at the pace of an interpreted guest.
pub fn a_mebibyte_goes_both_ways_through_a_slow_guest() {
    let sent = pattern(1 << 20);
    let guest = echo_kernel(sent.len() as u64);
    let mut echo = command(&guest, &[]);
    echo.stdin(Stdio::piped());
    let mut child = echo.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let (id, all) = (child.id(), sent.clone());
    let writer = thread::spawn(move || {
        // More than pipe and queues hold, so that the guest is at work when this is through.
        let (first, rest) = all.split_at(128 << 10);
        input.write_all(first).unwrap();
        let before = resident_kib(id);
        input.write_all(rest).unwrap();
        (before, resident_kib(id))
    });
    // Nobody reads for a while: what the guest sends has to wait.
    thread::sleep(Duration::from_secs(2));

    let ended = wait(child).expect(5);

    assert!(ended.stdout.as_bytes() == sent, "{} of {} bytes", ended.stdout.len(), sent.len());
    let (before, after) = writer.join().unwrap();
    assert!(after < before + 1024, "resident memory went from {before} to {after} KiB");
}

/// Neither what the guest prints nor what alcove has to say goes anywhere.
pub fn a_reader_that_leaves_does_not_disturb_the_guest() {
    const LINES: u32 = 5000;
    let mut a = CodeAssembler::new(64).unwrap();
    let mut again = a.create_label();
    a.mov(ecx, LINES).unwrap();
    a.set_label(&mut again).unwrap();
    a.mov(al, u32::from(b'\n')).unwrap();
    a.mov(dx, 0x3f8).unwrap();
    a.out(dx, al).unwrap();
    a.dec(ecx).unwrap();
    a.jnz(again).unwrap();
    a.mov(al, 7).unwrap();
    a.mov(dx, 0xf4).unwrap();
    a.out(dx, al).unwrap();
    a.hlt().unwrap();
    let guest = kernel(&mut a);
    let mut child = command(&guest, &["--log", "debug"]).spawn().unwrap();

    drop((child.stdout.take(), child.stderr.take()));

    wait(child).expect(7);
}

pub fn a_socket_is_a_console() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("console");
    let guest = echo_kernel(6);
    let child =
        command(&guest, &["--serial", &format!("unix={}", path.display())]).spawn().unwrap();
    let mut client = connect(&path);

    client.write_all(b"first\n").unwrap();

    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    wait(child).expect(5);
    assert_eq!(said, "first\n");
    assert!(!path.exists(), "the socket is removed");
}

fn connect(path: &std::path::Path) -> UnixStream {
    let deadline = Instant::now() + patience();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn a_pty_is_a_console() {
    let guest = echo_kernel(6);
    let mut child = command(&guest, &["--serial", "pty"]).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let mut said = String::new();
    while !said.ends_with('\n') {
        let mut byte = [0];
        stderr.read_exact(&mut byte).unwrap();
        said.push(byte[0].into());
    }
    let path = said.trim().rsplit(' ').next().unwrap();
    let mut line = OpenOptions::new().read(true).write(true).open(path).unwrap();

    line.write_all(b"first\n").unwrap();

    let mut echo = [0; 6];
    line.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"first\n");
    wait(child).expect(5);
}

pub fn the_escape_key_helps_and_ends() {
    let guest = echo_kernel(1 << 20);
    let mut terminal = Terminal::start(command(&guest, &[]));
    terminal.wait_until_raw();

    terminal.type_keys(&format!("{ESCAPE}h"));
    terminal.wait_for("Ctrl-a x");
    terminal.type_keys(&format!("sent {ESCAPE}a on\n"));
    terminal.wait_for("sent \x01 on");
    terminal.type_keys(&format!("{ESCAPE}x"));

    assert_eq!(terminal.end(), (0, true));
}

pub fn a_terminal_is_put_back_whatever_ends_alcove() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let guest = echo_kernel(1);
        let terminal = Terminal::start(command(&guest, &[]));
        terminal.wait_until_raw();

        kill(Pid::from_raw(terminal.process()), signal).unwrap();

        assert_eq!(terminal.end(), (128 + signal as i32, true), "{signal}");
    }
    let guest = echo_kernel(1);
    let mut terminal = Terminal::start(command(&guest, &[]));
    terminal.wait_until_raw();
    terminal.type_keys("x");
    assert_eq!(terminal.end(), (5, true), "the guest's end");

    let mut panicking = Command::new(std::env::current_exe().unwrap());
    panicking.env(PANIC_CHILD, "1");
    let terminal = Terminal::start(panicking);
    terminal.wait_for("as asked");
    let (status, restored) = terminal.end();
    assert_ne!(status, 0);
    assert!(restored, "a panic");
}

/// Set for a process that is to panic with its terminal in raw mode.
pub const PANIC_CHILD: &str = "ALCOVE_TEST_PANIC";

/// What such a process does: it puts the terminal into raw mode as `alcove run` does, and panics in
/// a thread of its own.
pub fn panic_in_raw_mode() {
    alcove::commands::run::restore_terminal_on_panic();
    let _console = devices::backend::console::Backend::stdio().unwrap();
    let thread = thread::spawn(|| panic!("as asked"));
    assert!(thread.join().is_err());
    // As in a build where a panic aborts: nothing is dropped.
    std::process::abort();
}

pub fn the_shell_takes_commands() {
    let mut terminal = Terminal::start(guest_command("vmlinux", &["--append", "alcove.shell"]));
    terminal.wait_for("alcove# ");

    terminal.type_keys("echo $((6 * 7))\r");
    terminal.wait_for("\n42");
    terminal.type_keys(&format!("{ESCAPE}x"));

    assert_eq!(terminal.end(), (0, true));
}

/// A program that reads late loses nothing of a paste beyond what Linux itself buffers (68 KiB): it
/// stops the line with RTS.
pub fn a_paste_into_linux_arrives_whole() {
    const BYTES: usize = 80 << 10;
    let script = format!(
        "stty raw -echo crtscts; echo paste-ready; sleep 1; \
         head -c {BYTES} >/tmp/paste; sha256sum </tmp/paste"
    );
    let image = crate::alcove::initramfs(&script, &[]);
    let limit = format!("{}s", patience().as_secs());
    let mut linux = script_command(&image, &["--timeout", &limit]);
    linux.stdin(Stdio::piped());
    let mut child = linux.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let sent = pattern(BYTES);
    let expected = sha256(&sent);
    // What comes before the program has set the line up would be echoed and edited. A guest that
    // never gets there is ended by its limit.
    let output = child.stdout.as_mut().unwrap();
    let mut said = Vec::new();
    while !said.ends_with(b"paste-ready") {
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    thread::spawn(move || input.write_all(&sent));

    let ended = wait(child).expect(0);

    assert!(ended.stdout.contains(&expected), "no {expected} in {}", ended.stdout);
}

fn sha256(bytes: &[u8]) -> String {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}
