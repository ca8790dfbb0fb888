use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::OutputModes;

use super::*;

fn open_pty() -> (OwnedFd, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap();
    let slave = rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (master, slave)
}

fn is_raw(terminal: &OwnedFd) -> bool {
    let settings = tcgetattr(terminal).unwrap();
    !settings.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

// One test, because the saved terminal belongs to the whole process.
#[test]
fn raw_mode_is_left_on_drop_and_on_restore_once() {
    let (_master, slave) = open_pty();
    assert!(!is_raw(&slave));

    let guard = RawMode::enter(slave.as_fd()).unwrap().expect("a terminal");
    assert!(is_raw(&slave));
    let settings = tcgetattr(&slave).unwrap();
    assert!(settings.output_modes.contains(OutputModes::OPOST), "output processing stays");
    assert!(!settings.input_modes.contains(InputModes::ICRNL), "Enter arrives as CR");
    drop(guard);
    assert!(!is_raw(&slave));

    let guard = RawMode::enter(slave.as_fd()).unwrap().expect("a terminal");
    assert!(is_raw(&slave));
    restore();
    assert!(!is_raw(&slave));
    restore();
    drop(guard);
    assert!(!is_raw(&slave));
}

#[test]
fn what_is_no_terminal_is_left_alone() {
    let null = File::open("/dev/null").unwrap();
    assert!(RawMode::enter(null.as_fd()).unwrap().is_none());
}
