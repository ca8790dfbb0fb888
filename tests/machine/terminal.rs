//! A person's terminal, as far as alcove can tell.
#![expect(unsafe_code, reason = "gives a child a controlling terminal before it starts")]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::termios::{Termios, tcgetattr};

/// A pseudo-terminal with a program on it.
pub struct Terminal {
    keyboard: File,
    /// Kept open, so that the settings can be read when the program has ended.
    line: OwnedFd,
    screen: Arc<Mutex<String>>,
    program: Child,
    before: Termios,
}

impl Terminal {
    /// Starts `command` on a new terminal, which is its controlling terminal, all its standard
    /// streams included.
    pub fn start(mut command: Command) -> Self {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let stream = || pty.slave.try_clone().unwrap();
        command.stdin(stream()).stdout(stream()).stderr(stream());
        let line = pty.slave.as_raw_fd();
        let become_leader = move || {
            // SAFETY: plain system calls, allowed between fork and exec.
            if unsafe { libc::setsid() } < 0 || unsafe { libc::ioctl(line, libc::TIOCSCTTY, 0) } < 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: the closure allocates nothing and takes no lock.
        unsafe { command.pre_exec(become_leader) };
        let program = command.spawn().unwrap();
        let keyboard = File::from(pty.master);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut output, shown) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                match output.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => {
                        let text = String::from_utf8_lossy(&buffer[..count]);
                        shown.lock().unwrap().push_str(&text);
                    }
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        });
        Self { keyboard, line: pty.slave, screen, program, before }
    }

    /// The id of the program's process.
    pub fn process(&self) -> i32 {
        self.program.id() as i32
    }

    /// Types `keys`.
    pub fn type_keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen has shown `text`.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + crate::alcove::patience();
        while !self.screen.lock().unwrap().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {}", self.screen.lock().unwrap());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the program takes single keys.
    #[track_caller]
    pub fn wait_until_raw(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while tcgetattr(&self.line).unwrap() == self.before {
            assert!(Instant::now() < deadline, "never raw: {}", self.screen.lock().unwrap());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the program's end, kills it when that does not come, and returns its status, or
    /// 128 and the signal, and whether the terminal is as it was before.
    pub fn end(mut self) -> (i32, bool) {
        use std::os::unix::process::ExitStatusExt;
        let deadline = Instant::now() + crate::alcove::patience();
        let status = loop {
            if let Some(status) = self.program.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.program.kill().unwrap();
            }
            thread::sleep(Duration::from_millis(5));
        };
        let status = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap();
        (status, tcgetattr(&self.line).unwrap() == self.before)
    }
}
