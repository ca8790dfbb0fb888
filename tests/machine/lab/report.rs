//! What the lab says about its tests: frames, each a line of text, over a serial port.

use std::io::{self, BufRead, Write};

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// `alive`: sent every few seconds, so that silence means a lab that hangs.
    Alive,
    /// `start NAME`: the test runs.
    Start(String),
    /// `output NAME LENGTH`, followed by that many bytes and a line's end: what the test printed.
    Output(String, Vec<u8>),
    /// `end NAME passed|failed`: the test has ended.
    End(String, bool),
}

/// More output than this at once is not from our agent.
const MAX_OUTPUT_BYTES: usize = 1 << 24;

impl Frame {
    /// Writes the frame and flushes.
    pub fn write(&self, mut sink: impl Write) -> io::Result<()> {
        match self {
            Self::Alive => writeln!(sink, "alive")?,
            Self::Start(name) => writeln!(sink, "start {name}")?,
            Self::Output(name, bytes) => {
                writeln!(sink, "output {name} {}", bytes.len())?;
                sink.write_all(bytes)?;
                writeln!(sink)?;
            }
            Self::End(name, passed) => {
                writeln!(sink, "end {name} {}", if *passed { "passed" } else { "failed" })?;
            }
        }
        sink.flush()
    }

    /// Reads the next frame; none at the end of the stream, an error for anything else.
    pub fn read(mut source: impl BufRead) -> io::Result<Option<Self>> {
        let mut line = String::new();
        if source.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let frame = match words[..] {
            ["alive"] => Self::Alive,
            ["start", name] => Self::Start(name.to_owned()),
            ["end", name, "passed"] => Self::End(name.to_owned(), true),
            ["end", name, "failed"] => Self::End(name.to_owned(), false),
            ["output", name, length] => {
                let length = length.parse().ok().filter(|n| *n <= MAX_OUTPUT_BYTES);
                let mut bytes = vec![0; length.ok_or_else(|| unexpected(&line))?];
                source.read_exact(&mut bytes)?;
                source.read_exact(&mut [0])?;
                Self::Output(name.to_owned(), bytes)
            }
            _ => return Err(unexpected(&line)),
        };
        Ok(Some(frame))
    }
}

fn unexpected(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a frame: {line:?}"))
}
