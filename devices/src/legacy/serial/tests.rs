use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::backend::console::{Direction, Stream, TAIL_BYTES};
use crate::testing::{EventLoop, EventRecorder, FakeInterrupt};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const LSR_DATA_READY: u8 = 1;
const IIR_NONE: u8 = 1;
const IIR_TRANSMITTER_EMPTY: u8 = 2;
const IIR_RECEIVED_DATA: u8 = 4;
/// DTR, RTS, OUT2.
const MCR_RUNNING: u8 = 0b1011;

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A serial port between two pipes, its pump running.
struct Fixture {
    port: Arc<SerialPort>,
    console: Console,
    line: Arc<FakeInterrupt>,
    typed: Option<OwnedFd>,
    printed: Option<OwnedFd>,
    _events: EventLoop,
}

impl Fixture {
    fn new() -> Self {
        let (source, typed) = rustix::pipe::pipe().unwrap();
        let (printed, sink) = rustix::pipe::pipe().unwrap();
        let stream = |fd: OwnedFd, direction| Stream::shared(fd.as_fd(), direction).unwrap();
        let backend = Backend::streams(
            Some(stream(source, Direction::Input)),
            Some(stream(sink, Direction::Output)),
        );
        let line = Arc::new(FakeInterrupt::default());
        let recorder = Arc::new(EventRecorder::default());
        let Serial { port, pump, console } =
            SerialPort::create(backend, line.clone(), recorder).unwrap();
        let _events = EventLoop::run(pump);
        Self { port, console, line, typed: Some(typed), printed: Some(printed), _events }
    }

    fn type_bytes(&self, bytes: &[u8]) {
        write_all(self.typed.as_ref().unwrap(), bytes);
    }
}

fn read(port: &SerialPort, offset: u64) -> u8 {
    let mut data = [0];
    port.read(offset, &mut data);
    data[0]
}

fn write(port: &SerialPort, offset: u64, value: u8) {
    port.write(offset, &[value]);
}

/// What Linux does once its driver has the port open.
fn start_driver(port: &SerialPort) {
    write(port, MCR, MCR_RUNNING);
    write(port, IER, 1);
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let count = rustix::io::write(fd, bytes).unwrap();
        bytes = &bytes[count..];
    }
}

fn read_to_end(fd: &OwnedFd, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    while all.len() < length {
        match rustix::io::read(fd, &mut chunk).unwrap() {
            0 => break,
            count => all.extend_from_slice(&chunk[..count]),
        }
    }
    all
}

/// Reads `length` bytes as an interrupt handler does: all there is after each edge.
fn receive(port: &SerialPort, line: &FakeInterrupt, length: usize) -> Vec<u8> {
    let mut received = Vec::new();
    let mut seen = 0;
    while received.len() < length {
        let count = line.wait_past(seen, PATIENCE);
        assert!(count > seen, "no interrupt after {} of {length} bytes", received.len());
        seen = count;
        read(port, IIR);
        while read(port, LSR) & LSR_DATA_READY != 0 {
            received.push(read(port, DATA));
        }
    }
    received
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_mebibyte_pasted_into_a_slow_guest_arrives_whole() {
    let mut fixture = Fixture::new();
    let text = pattern(MIB);
    let typed = fixture.typed.take().unwrap();
    let sent = text.clone();
    let typist = thread::spawn(move || write_all(&typed, &sent));
    // The guest comes up late.
    thread::sleep(Duration::from_millis(50));
    start_driver(&fixture.port);

    let received = receive(&fixture.port, &fixture.line, MIB);

    assert!(received == text, "bytes were lost, doubled or reordered");
    typist.join().unwrap();
}

#[test]
fn a_peer_that_writes_everything_before_it_reads_gets_everything() {
    let mut fixture = Fixture::new();
    let text = pattern(MIB);
    start_driver(&fixture.port);
    let (printer, expected) = (fixture.port.clone(), text.clone());
    let vcpu = thread::spawn(move || expected.iter().for_each(|byte| write(&printer, DATA, *byte)));
    let (reader, line) = (fixture.port.clone(), fixture.line.clone());
    let other_vcpu = thread::spawn(move || receive(&reader, &line, MIB));

    fixture.type_bytes(&text);
    fixture.typed = None;
    assert!(other_vcpu.join().unwrap() == text, "input differs");
    assert!(!vcpu.is_finished(), "the guest should wait for its output to be read");

    let printed = read_to_end(fixture.printed.as_ref().unwrap(), MIB);
    assert!(printed == text, "output differs");
    vcpu.join().unwrap();
}

#[test]
fn closing_the_console_frees_a_vcpu_that_waits_for_the_host() {
    let fixture = Fixture::new();
    let port = fixture.port.clone();
    let vcpu = thread::spawn(move || (0..MIB).for_each(|_| write(&port, DATA, b'x')));
    thread::sleep(Duration::from_millis(50));
    assert!(!vcpu.is_finished());

    fixture.console.close();

    vcpu.join().unwrap();
}

#[test]
fn a_host_that_goes_away_frees_the_guest() {
    let mut fixture = Fixture::new();
    let port = fixture.port.clone();
    let vcpu = thread::spawn(move || (0..MIB).for_each(|_| write(&port, DATA, b'x')));
    thread::sleep(Duration::from_millis(50));
    assert!(!vcpu.is_finished());

    fixture.printed = None;

    vcpu.join().unwrap();
    assert_eq!(fixture.console.tail(), vec![b'x'; TAIL_BYTES]);
}

#[test]
fn last_words_reach_a_reader_that_comes_late() {
    let mut fixture = Fixture::new();
    // More than the pipe takes at once.
    let words = pattern(100_000);
    words.iter().for_each(|byte| write(&fixture.port, DATA, *byte));
    let printed = fixture.printed.take().unwrap();
    let length = words.len();
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        read_to_end(&printed, length)
    });

    fixture.console.close();
    assert!(fixture.console.flush_at_end(PATIENCE));

    assert!(reader.join().unwrap() == words);
}

#[test]
fn flushing_at_the_end_gives_up_on_a_reader_that_never_comes() {
    let fixture = Fixture::new();
    (0..100_000).for_each(|_| write(&fixture.port, DATA, b'x'));
    fixture.console.close();
    assert!(!fixture.console.flush_at_end(Duration::from_millis(20)));
}

#[test]
fn a_prompt_without_newline_shows() {
    let fixture = Fixture::new();
    b"\nlogin: ".iter().for_each(|byte| write(&fixture.port, DATA, *byte));
    let printed = read_to_end(fixture.printed.as_ref().unwrap(), 8);
    assert_eq!(printed, b"\nlogin: ");
}

#[test]
fn input_survives_the_drivers_probing() {
    let fixture = Fixture::new();
    fixture.type_bytes(b"echo hello\n");
    thread::sleep(Duration::from_millis(20));
    let port = &fixture.port;
    // Linux: the existence test, the loopback test, the type test and the clean-up, each with the
    // event loop given time to interfere.
    let pause = || thread::sleep(Duration::from_millis(5));
    write(port, MCR, 0b0011);
    for value in [0, 0xf, 0] {
        write(port, IER, value);
        pause();
        assert_eq!(read(port, IER), value);
    }
    write(port, MCR, 0b1_1010);
    pause();
    assert_eq!(read(port, MSR) & 0xf0, 0x90);
    write(port, MCR, 0);
    for value in [1, 7, 0] {
        write(port, IIR, value);
        assert_eq!(read(port, IIR) & 0xc0, 0xc0, "a 16550A");
    }
    for offset in [LSR, DATA, IIR, MSR, LSR, DATA] {
        read(port, offset);
        pause();
    }

    start_driver(port);

    assert_eq!(receive(port, &fixture.line, 11), b"echo hello\n");
}

#[test]
fn received_data_stays_pending_until_all_of_it_is_read() {
    let fixture = Fixture::new();
    let port = &fixture.port;
    start_driver(port);
    fixture.type_bytes(b"ab");
    assert_eq!(fixture.line.wait_past(0, PATIENCE), 1);
    for expected in [b'a', b'b'] {
        assert_eq!(read(port, IIR) & 0xf, IIR_RECEIVED_DATA);
        assert_eq!(read(port, DATA), expected);
    }
    assert_eq!(read(port, IIR) & 0xf, IIR_NONE);
}

#[test]
fn received_data_goes_before_an_empty_transmitter_and_hides_it_only_for_a_while() {
    let fixture = Fixture::new();
    let port = &fixture.port;
    start_driver(port);
    fixture.type_bytes(b"a");
    fixture.line.wait_past(0, PATIENCE);
    write(port, IER, 0b11);
    assert_eq!(read(port, IIR) & 0xf, IIR_RECEIVED_DATA);
    assert_eq!(read(port, DATA), b'a');
    assert_eq!(read(port, IIR) & 0xf, IIR_TRANSMITTER_EMPTY);
    assert_eq!(read(port, IIR) & 0xf, IIR_NONE);
}

/// Linux reads at most 256 bytes a turn and takes another turn if the chip says so.
#[test]
fn a_driver_that_reads_in_turns_of_256_bytes_gets_everything() {
    let mut fixture = Fixture::new();
    let text = pattern(MIB / 4);
    let (typed, sent) = (fixture.typed.take().unwrap(), text.clone());
    let typist = thread::spawn(move || write_all(&typed, &sent));
    let (port, line) = (&fixture.port, &fixture.line);
    start_driver(port);

    let (mut received, mut seen) = (Vec::new(), 0);
    while received.len() < text.len() {
        let count = line.wait_past(seen, PATIENCE);
        assert!(count > seen, "no interrupt after {} bytes", received.len());
        seen = count;
        while read(port, IIR) & 0xf == IIR_RECEIVED_DATA {
            for _ in 0..256 {
                if read(port, LSR) & LSR_DATA_READY == 0 {
                    break;
                }
                received.push(read(port, DATA));
            }
        }
    }

    assert!(received == text, "bytes were lost, doubled or reordered");
    typist.join().unwrap();
}

/// The handler of a guest must come to its end, or what takes the bytes from it never runs.
#[test]
fn one_interrupt_brings_no_more_than_a_fifo() {
    let fixture = Fixture::new();
    let port = &fixture.port;
    start_driver(port);
    fixture.type_bytes(&pattern(4000));
    fixture.line.wait_past(0, PATIENCE);
    // As long as this the pause will be.
    thread::sleep(Duration::from_millis(100));
    let mut count = 0;
    while read(port, LSR) & LSR_DATA_READY != 0 {
        read(port, DATA);
        count += 1;
    }
    assert_eq!(count, 64);
}

#[test]
fn a_guest_that_polls_gets_its_input() {
    let fixture = Fixture::new();
    fixture.type_bytes(b"abc");
    let mut received = Vec::new();
    wait_until("three bytes came", || {
        (0..100).any(|_| read(&fixture.port, LSR) & LSR_DATA_READY != 0)
    });
    while read(&fixture.port, LSR) & LSR_DATA_READY != 0 {
        received.push(read(&fixture.port, DATA));
    }
    assert_eq!(received, b"abc");
}

#[test]
fn a_guest_holds_input_off_by_rts() {
    let fixture = Fixture::new();
    start_driver(&fixture.port);
    write(&fixture.port, MCR, MCR_RUNNING & !0b10);
    fixture.type_bytes(b"later");
    thread::sleep(Duration::from_millis(20));
    assert_eq!(read(&fixture.port, LSR) & LSR_DATA_READY, 0);

    write(&fixture.port, MCR, MCR_RUNNING);

    assert_eq!(receive(&fixture.port, &fixture.line, 5), b"later");
}

#[test]
fn the_end_of_input_does_not_disturb_the_guest() {
    let mut fixture = Fixture::new();
    fixture.type_bytes(b"last");
    fixture.typed = None;
    start_driver(&fixture.port);
    assert_eq!(receive(&fixture.port, &fixture.line, 4), b"last");
    write(&fixture.port, DATA, b'\n');
    assert_eq!(read_to_end(fixture.printed.as_ref().unwrap(), 1), b"\n");
}

fn null_port() -> (Arc<SerialPort>, Console) {
    let line = Arc::new(FakeInterrupt::default());
    let events = Arc::new(EventRecorder::default());
    let Serial { port, console, .. } = SerialPort::create(Backend::null(), line, events).unwrap();
    (port, console)
}

#[test]
fn the_tail_keeps_the_last_16_kib() {
    let (port, console) = null_port();
    let text = pattern(40_000);
    text.iter().for_each(|byte| write(&port, DATA, *byte));
    assert_eq!(console.tail(), text[text.len() - TAIL_BYTES..]);
}

#[test]
fn wide_accesses_are_split_into_byte_accesses_on_consecutive_ports() {
    let (port, console) = null_port();
    port.write(LCR, &[0b11, 0]);
    let mut both = [0xaa; 2];
    port.read(LCR, &mut both);
    assert_eq!(both, [0b11, 0]);

    port.write(DATA, &[b'!', 0b101]);
    assert_eq!(console.tail(), b"!");
    assert_eq!(read(&port, IER), 0b101);
}

#[test]
fn what_lies_past_the_registers_reads_as_ones() {
    let (port, console) = null_port();
    write(&port, SCR, 0x5a);
    let mut data = [0; 4];
    port.read(SCR, &mut data);
    assert_eq!(data, [0x5a, 0xff, 0xff, 0xff]);
    port.write(u64::MAX, b"xx");
    port.read(u64::MAX, &mut data);
    assert_eq!((console.tail(), data[0]), (vec![], 0xff));
}

#[test]
fn the_divisor_latch_does_not_pass_for_transmission_or_interrupt_enable() {
    let (port, console) = null_port();
    write(&port, LCR, 0x83);
    write(&port, DATA, 1);
    write(&port, IER, 0xff);
    write(&port, LCR, 0x03);
    assert_eq!((console.tail(), read(&port, IER)), (vec![], 0));
}

proptest! {
    #[test]
    fn random_accesses_neither_panic_nor_hang(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..9, any::<u64>()], prop::collection::vec(any::<u8>(), 0..9)),
            0..400,
        ),
        typed in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (port, _) = null_port();
        for (is_write, offset, mut data) in accesses {
            if is_write {
                port.write(offset, &data);
            } else {
                port.read(offset, &mut data);
            }
            let room = port.room();
            port.deliver(typed.get(..room).unwrap_or(&typed));
            prop_assert!(port.room() <= 4096);
        }
    }
}
