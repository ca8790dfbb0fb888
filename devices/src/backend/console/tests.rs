use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::event::MachineEvent;
use crate::testing::{EventLoop, EventRecorder};

const PATIENCE: Duration = Duration::from_secs(30);

/// Takes input without limit, or none.
struct Ear {
    heard: Mutex<Vec<u8>>,
    room: usize,
    pace: Timer,
}

impl Receiver for Ear {
    fn room(&self) -> usize {
        self.room
    }

    fn deliver(&self, bytes: &[u8]) {
        self.heard.lock().unwrap().extend_from_slice(bytes);
    }

    fn pace(&self) -> &Timer {
        &self.pace
    }

    fn on_pace(&self) {}
}

/// A console whose pump runs, with a fake device behind it.
struct Fixture {
    output: Arc<Output>,
    ear: Arc<Ear>,
    recorder: Arc<EventRecorder>,
    _events: EventLoop,
}

impl Fixture {
    fn new(mut backend: Backend) -> Self {
        let waker = Waker::new().unwrap();
        let output = backend.output(waker.clone()).unwrap();
        let ear =
            Arc::new(Ear { heard: Mutex::default(), room: 1000, pace: Timer::new().unwrap() });
        let recorder = Arc::new(EventRecorder::default());
        let pump = ConsolePump::new(backend, output.clone(), ear.clone(), recorder.clone(), waker);
        let _events = EventLoop::run(Arc::new(Mutex::new(pump)));
        Self { output, ear, recorder, _events }
    }

    fn print(&self, text: &[u8]) {
        text.iter().for_each(|byte| self.output.push(*byte));
    }

    fn heard(&self) -> Vec<u8> {
        self.ear.heard.lock().unwrap().clone()
    }

    fn wait_heard(&self, expected: &[u8]) {
        wait_until("the input arrives", || self.heard().len() >= expected.len());
        assert_eq!(self.heard(), expected);
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn read_exactly(from: &mut impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

fn open_terminal(path: &Path) -> fs::File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits().cast_signed())
        .open(path)
        .unwrap()
}

#[test]
fn a_file_is_created_or_truncated_and_gets_the_output() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    fs::write(&path, "left from an earlier run").unwrap();
    let fixture = Fixture::new(Backend::file(&path).unwrap());
    fixture.print(b"one\ntwo");
    assert!(fixture.output.flush_at_end(Instant::now()));
    assert_eq!(fs::read(&path).unwrap(), b"one\ntwo");
}

#[test]
fn an_unwritable_file_is_named() {
    let error = Backend::file(Path::new("/nonexistent/log")).unwrap_err();
    assert_eq!(error.to_string(), "cannot write the serial file /nonexistent/log");
}

#[test]
fn input_from_a_file_arrives_though_epoll_does_not_take_files() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'x'; 10_000]).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let source = Stream::shared(file.as_fd(), Direction::Input).unwrap();
    let fixture = Fixture::new(Backend::streams(Some(source), None));
    fixture.wait_heard(&[b'x'; 10_000]);
}

#[test]
fn dev_null_serves_as_both_ends() {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let stream = |direction| Some(Stream::shared(null.as_fd(), direction).unwrap());
    let backend = Backend::streams(stream(Direction::Input), stream(Direction::Output));
    let fixture = Fixture::new(backend);
    fixture.print(b"unheard\n");
    assert!(fixture.output.flush_at_end(Instant::now()));
}

#[test]
fn sharing_a_pipe_does_not_change_its_flags_for_others() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let source = Stream::shared(reader.as_fd(), Direction::Input).unwrap();
    let sink = Stream::shared(writer.as_fd(), Direction::Output).unwrap();
    for fd in [&reader, &writer] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
    let would_block = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
    assert!(source.read(&mut [0; 8]).is_err_and(would_block));
    let full = loop {
        if let Err(error) = sink.write(&[0; 4096]) {
            break error;
        }
    };
    assert!(would_block(full));
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let fixture = Fixture::new(Backend::unix(&path).unwrap());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    fixture.print(b"before anyone came\n");
    let mut first = UnixStream::connect(&path).unwrap();
    assert_eq!(read_exactly(&mut first, 19), b"before anyone came\n");
    let mut second = UnixStream::connect(&path).unwrap();
    second.write_all(b"second").unwrap();
    first.write_all(b"first ").unwrap();
    fixture.wait_heard(b"first ");
    fixture.print(b"to the first\n");
    assert_eq!(read_exactly(&mut first, 13), b"to the first\n");

    drop(first);
    fixture.wait_heard(b"first second");
    fixture.print(b"to the second\n");
    assert_eq!(read_exactly(&mut second, 14), b"to the second\n");

    drop(fixture);
    assert!(!path.exists(), "the socket's name is removed");
}

#[test]
fn a_client_that_has_sent_everything_still_gets_output() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let fixture = Fixture::new(Backend::unix(&path).unwrap());
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    fixture.wait_heard(b"all");
    fixture.print(b"answer\n");
    assert_eq!(read_exactly(&mut client, 7), b"answer\n");
    drop(client);
    // The place is free again.
    let mut next = UnixStream::connect(&path).unwrap();
    next.write_all(b"!").unwrap();
    fixture.wait_heard(b"all!");
}

#[test]
fn without_a_client_the_latest_output_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let fixture = Fixture::new(Backend::unix(&path).unwrap());
    fixture.print(&vec![b'o'; BUFFER_BYTES]);
    fixture.print(b"newest\n");
    let mut client = UnixStream::connect(&path).unwrap();
    let seen = read_exactly(&mut client, BUFFER_BYTES);
    assert_eq!(&seen[BUFFER_BYTES - 8..], b"onewest\n");
}

#[test]
fn a_client_that_does_not_read_is_waited_for_and_its_leaving_frees_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let fixture = Fixture::new(Backend::unix(&path).unwrap());
    let client = UnixStream::connect(&path).unwrap();
    wait_until("the client is served", || fixture.output.is_attached());
    let output = fixture.output.clone();
    let vcpu = thread::spawn(move || (0..1 << 20).for_each(|_| output.push(b'x')));
    thread::sleep(Duration::from_millis(100));
    assert!(!vcpu.is_finished());
    drop(client);
    vcpu.join().unwrap();
}

#[test]
fn a_stale_socket_is_replaced_and_what_is_alive_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves the name behind");
    let alive = Backend::unix(&path).unwrap();
    assert!(matches!(Backend::unix(&path), Err(OpenError::SocketInUse { .. })));
    drop(alive);
    fs::write(&path, "").unwrap();
    assert!(matches!(Backend::unix(&path), Err(OpenError::NotASocket { .. })));
    assert!(path.exists());
    let too_long = folder.path().join("x".repeat(200));
    assert!(matches!(Backend::unix(&too_long), Err(OpenError::Socket { .. })));
}

#[test]
fn a_pseudo_terminal_survives_its_clients() {
    let backend = Backend::pty().unwrap();
    let path = backend.pty_path().unwrap().to_path_buf();
    let fixture = Fixture::new(backend);
    fixture.print(b"early\n");

    let mut client = open_terminal(&path);
    assert_eq!(read_exactly(&mut client, 6), b"early\n", "raw: no CR is added");
    client.write_all(b"\x03one\r").unwrap();
    fixture.wait_heard(b"\x03one\r");
    drop(client);
    wait_until("the client's leaving is noticed", || !fixture.output.is_attached());
    fixture.print(b"meanwhile\n");

    let mut client = open_terminal(&path);
    assert_eq!(read_exactly(&mut client, 10), b"meanwhile\n");
    client.write_all(b"two").unwrap();
    fixture.wait_heard(b"\x03one\rtwo");
}

#[test]
fn what_a_fleeting_client_wrote_to_the_pseudo_terminal_arrives() {
    let backend = Backend::pty().unwrap();
    let path = backend.pty_path().unwrap().to_path_buf();
    let fixture = Fixture::new(backend);
    for _ in 0..20 {
        open_terminal(&path).write_all(b"x").unwrap();
    }
    fixture.wait_heard(&[b'x'; 20]);
}

/// A console on a terminal with the escape key, and the user's end of it.
fn terminal_fixture() -> (Fixture, OwnedFd) {
    let pty = Pty::open().unwrap();
    let user = open_terminal(pty.path());
    // The pump sits on the master here, the user on the slave: either end will do.
    let terminal = Arc::try_unwrap(pty.into_master()).unwrap();
    let backend = Backend { escapes: true, ..Backend::streams(Some(terminal), None) };
    (Fixture::new(backend), user.into())
}

#[test]
fn the_escape_key_ends_the_guest_and_helps_on_a_terminal() {
    let (fixture, user) = terminal_fixture();
    let mut user = fs::File::from(user);
    user.write_all(b"a\x01ab\x01h\x01?c\x01dx").unwrap();
    fixture.wait_heard(b"a\x01bc\x01dx");
    let help = read_exactly(&mut user, super::super::terminal::escape::HELP.len());
    assert!(String::from_utf8(help).unwrap().contains("Ctrl-a x"));
    assert_eq!(fixture.recorder.take(), []);

    user.write_all(b"\x01x").unwrap();

    let recorder = fixture.recorder.clone();
    wait_until("Ctrl-a x is seen", || recorder.take() == [MachineEvent::Quit]);
}

#[test]
fn a_pipe_is_transparent_to_the_escape_key() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let source = Stream::shared(reader.as_fd(), Direction::Input).unwrap();
    let fixture = Fixture::new(Backend::streams(Some(source), None));
    rustix::io::write(&writer, b"\x01x\x01a").unwrap();
    fixture.wait_heard(b"\x01x\x01a");
    assert_eq!(fixture.recorder.take(), []);
}
