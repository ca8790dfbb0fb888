use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::thread;

use super::super::stream::Direction;
use super::*;

fn output_to_pipe() -> (Arc<Output>, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let sink = Stream::shared(writer.as_fd(), Direction::Output).unwrap();
    let waker = Waker::new().unwrap();
    let output = Output::new(Some(Arc::new(sink)), Unattended::Dropped, waker).unwrap();
    (Arc::new(output), reader)
}

fn push_all(output: &Output, text: &[u8]) {
    text.iter().for_each(|byte| output.push(*byte));
}

/// What one read of the pipe gives, which is at least what one write put there.
fn read_once(reader: &mut PipeReader) -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    let count = reader.read(&mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

fn timer_is_armed(output: &Output) -> bool {
    output.lock().timer_armed_at.is_some()
}

#[test]
fn the_first_byte_after_silence_goes_out_at_once_and_the_line_with_its_newline() {
    let (output, mut reader) = output_to_pipe();
    output.push(b'[');
    assert_eq!(read_once(&mut reader), b"[");
    push_all(&output, b"0.1] Linux\n");
    assert_eq!(read_once(&mut reader), b"0.1] Linux\n");
    assert_eq!(output.lock().writes, 2);
}

#[test]
fn a_boot_log_costs_one_write_a_line() {
    let (output, _reader) = output_to_pipe();
    push_all(&output, b"\n");
    for _ in 0..100 {
        push_all(&output, b"[    0.000000] a line of the usual length, more or less\r\n");
    }
    assert!(output.lock().writes <= 102, "{} writes", output.lock().writes);
}

#[test]
fn a_line_without_end_goes_out_by_the_kibibyte() {
    let (output, mut reader) = output_to_pipe();
    push_all(&output, b"\n");
    read_once(&mut reader);
    push_all(&output, &[b'x'; BATCH_BYTES]);
    assert_eq!(read_once(&mut reader), [b'x'; BATCH_BYTES]);
}

#[test]
fn a_prompt_goes_out_when_the_timer_fires() {
    let (output, mut reader) = output_to_pipe();
    push_all(&output, b"\n# ");
    read_once(&mut reader);
    assert!(timer_is_armed(&output));
    output.on_timer();
    assert_eq!(read_once(&mut reader), b"# ");
    assert!(!timer_is_armed(&output));
}

#[test]
fn a_timer_armed_for_an_earlier_line_is_armed_again_for_the_next() {
    let (output, mut reader) = output_to_pipe();
    push_all(&output, b"\none\ntw");
    assert_eq!(read_once(&mut reader), b"\none\n");
    output.on_timer();
    assert!(timer_is_armed(&output), "\"tw\" has not waited its time yet");
    output.on_timer();
    assert_eq!(read_once(&mut reader), b"tw");
}

#[test]
fn a_blocked_sink_is_reported_and_resumed() {
    let (output, mut reader) = output_to_pipe();
    let text = vec![b'x'; 100_000];
    push_all(&output, &text);
    assert!(output.is_blocked());
    let mut seen = 0;
    while seen < text.len() {
        seen += read_once(&mut reader).len();
        output.on_writable();
    }
    assert!(!output.is_blocked());
}

#[test]
fn a_thread_that_waits_goes_on_when_there_is_room() {
    let (output, mut reader) = output_to_pipe();
    let printing = output.clone();
    let vcpu = thread::spawn(move || {
        push_all(&printing, &[b'x'; 299_999]);
        printing.push(b'\n');
    });
    while output.lock().waiting_threads == 0 {
        thread::yield_now();
    }
    let host = thread::spawn(move || {
        let mut seen = 0;
        while seen < 300_000 {
            seen += read_once(&mut reader).len();
        }
    });
    while !host.is_finished() {
        output.on_writable();
        thread::yield_now();
    }
    vcpu.join().unwrap();
    assert!(output.lock().buffer.capacity() <= 2 * BUFFER_BYTES, "the buffer has grown");
}

#[test]
fn a_reader_that_leaves_ends_output_and_not_the_guest() {
    let (output, reader) = output_to_pipe();
    drop(reader);
    push_all(&output, b"into the void\n");
    assert!(!output.is_attached());
    push_all(&output, &[b'x'; 2 * BUFFER_BYTES]);
    assert_eq!(output.tail(), [b'x'; TAIL_BYTES]);
    assert!(output.flush_at_end(Instant::now()), "nothing is left to write");
}

#[test]
fn closing_keeps_what_is_buffered_for_the_end() {
    let (output, mut reader) = output_to_pipe();
    push_all(&output, b"\n# ");
    output.close();
    push_all(&output, b"bye");
    assert!(output.flush_at_end(Instant::now()));
    assert_eq!(read_once(&mut reader), b"\n# bye");
}
