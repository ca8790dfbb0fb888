//! Other VMMs, to be measured in the same run with the same guest.

use std::path::Path;
use std::process::Command;

use clap::ValueEnum;

use crate::boot::cmdline;
use crate::host;

/// QEMU's programs, the one with machine type microvm only first, which starts faster.
const QEMU: [&str; 2] = ["qemu-system-x86_64-microvm", "qemu-system-x86_64"];

/// A VMM other than alcove.
#[derive(Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// QEMU's machine type microvm, with as few devices as it has.
    Qemu,
    /// A command for the shell with `{kernel}`, `{initrd}`, `{cmdline}` and `{memory_mib}`, quoted as
    /// words where they stand. The guest's console is to be its standard output.
    #[value(skip)]
    Command(String),
}

impl Peer {
    /// Its name in a report: QEMU's, or the first word of the command.
    pub fn name(&self) -> &str {
        match self {
            Self::Qemu => "qemu",
            Self::Command(text) => {
                let program = text.split_whitespace().next().unwrap_or("command");
                program.rsplit('/').next().unwrap_or(program)
            }
        }
    }

    /// What it lacks on this host.
    pub(super) fn missing(&self) -> Option<String> {
        match self {
            Self::Qemu if QEMU.iter().any(|name| host::has_program(name)) => None,
            Self::Qemu => Some(format!(
                "--vs qemu: there is no {} in PATH; Debian's package is qemu-system-x86",
                QEMU.join(" or ")
            )),
            Self::Command(_) => None,
        }
    }

    /// What starts it.
    pub(super) fn command(&self, kernel: &Path, initrd: &Path, memory_mib: u32) -> Command {
        match self {
            Self::Qemu => {
                let program = QEMU.iter().find(|name| host::has_program(name));
                let mut command = Command::new(program.unwrap_or(&QEMU[0]));
                command.args(["-M", "microvm,pic=off,pit=off,rtc=off,accel=kvm", "-cpu", "host"]);
                command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
                command.args(["-serial", "stdio", "-m", &format!("{memory_mib}M")]);
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
                command.args(["-append", cmdline::DEFAULT]);
                command
            }
            Self::Command(text) => {
                let mut command = Command::new("sh");
                // The process that is looked at is to be the VMM.
                let line = format!("exec {text}");
                let line = line
                    .replace("{kernel}", &quote(&kernel.to_string_lossy()))
                    .replace("{initrd}", &quote(&initrd.to_string_lossy()))
                    .replace("{cmdline}", &quote(cmdline::DEFAULT))
                    .replace("{memory_mib}", &memory_mib.to_string());
                command.args(["-c", &line]);
                command
            }
        }
    }
}

/// `text` as one word of the shell's.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_its_words_quoted() {
        let peer = Peer::Command("/usr/bin/vmm -m {memory_mib} -k {kernel} -a {cmdline}".into());

        let command = peer.command(Path::new("it's"), Path::new("i"), 128);

        let line = command.get_args().nth(1).unwrap().to_str().unwrap().to_owned();
        let expected = r"exec /usr/bin/vmm -m 128 -k 'it'\''s' -a 'console=ttyS0";
        assert!(line.starts_with(expected), "{line}");
        assert_eq!(peer.name(), "vmm");
    }
}
