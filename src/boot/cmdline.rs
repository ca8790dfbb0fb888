//! The kernel's command line.

use std::ffi::CString;

use crate::memory::layout::CMDLINE_ROOM_BYTES;

/// What alcove asks of every kernel: the console on COM1, reset through the keyboard controller,
/// and reset at once after a panic, so that alcove sees both. The keyboard controller needs no ACPI,
/// and a kernel that cannot use it falls back on ACPI's reset register. `pci=off`: there is no PCI bus,
/// and looking for one is a twelfth of a small kernel's boot on a software KVM.
pub const DEFAULT: &str = "console=ttyS0 reboot=k panic=-1 pci=off";

/// Why a command line cannot be handed to the kernel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CmdlineError {
    /// A byte that ends the line for the kernel or breaks it in its log.
    #[error("the command line contains {} at byte {position}; remove it", name(*byte))]
    Byte {
        /// NUL or newline.
        byte: u8,
        /// Its offset in the part that contains it.
        position: usize,
    },
    /// Longer than the kernel takes; it would cut off the end without a word.
    #[error(
        "the command line has {length_bytes} bytes, this kernel takes {limit_bytes}; shorten \
         --append or --cmdline"
    )]
    TooLong {
        /// The length of the whole line without the NUL.
        length_bytes: usize,
        /// What the kernel takes, without the NUL.
        limit_bytes: usize,
    },
}

/// What a command line is made of.
#[derive(Debug, Clone, Copy, Default)]
pub struct CmdlineParts<'a> {
    /// What devices add (`root=/dev/vda ro`), each one or more parameters.
    pub devices: &'a [String],
    /// The user's addition.
    pub append: Option<&'a str>,
    /// The user's replacement for everything else.
    pub replacement: Option<&'a str>,
}

/// Puts the command line together: [`DEFAULT`], the devices' parameters, then the user's; or the
/// user's replacement alone.
///
/// The user's addition comes last, so that its values win where the kernel takes the last one, and
/// since ` -- ` in it ends the kernel's part: what follows goes to init. `limit_bytes` is
/// [`LoadedKernel::cmdline_limit_bytes`](super::kernel::LoadedKernel::cmdline_limit_bytes).
pub fn build(parts: &CmdlineParts<'_>, limit_bytes: u32) -> Result<CString, CmdlineError> {
    let words: Vec<&str> = match parts.replacement {
        Some(line) => vec![line],
        None => std::iter::once(DEFAULT)
            .chain(parts.devices.iter().map(String::as_str))
            .chain(parts.append)
            .collect(),
    };
    for word in &words {
        if let Some(position) = word.bytes().position(|byte| matches!(byte, 0 | b'\n')) {
            return Err(CmdlineError::Byte { byte: word.as_bytes()[position], position });
        }
    }
    let trimmed: Vec<&str> = words.iter().map(|w| w.trim()).filter(|w| !w.is_empty()).collect();
    let line = trimmed.join(" ");
    // A header may promise any length; the room in guest memory is alcove's.
    let limit_bytes = (limit_bytes as usize).min(CMDLINE_ROOM_BYTES as usize - 1);
    if line.len() > limit_bytes {
        return Err(CmdlineError::TooLong { length_bytes: line.len(), limit_bytes });
    }
    CString::new(line)
        .map_err(|error| CmdlineError::Byte { byte: 0, position: error.nul_position() })
}

fn name(byte: u8) -> &'static str {
    if byte == 0 { "a NUL" } else { "a newline" }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u32 = 2047;

    fn line(parts: CmdlineParts<'_>) -> String {
        build(&parts, LIMIT).unwrap().into_string().unwrap()
    }

    #[test]
    fn without_parts_it_is_the_default() {
        assert_eq!(line(CmdlineParts::default()), "console=ttyS0 reboot=k panic=-1 pci=off");
    }

    #[test]
    fn devices_come_before_what_the_user_adds() {
        let devices = ["root=/dev/vda ro".to_owned(), "ip=dhcp".to_owned()];
        let append = Some(" quiet -- single ");
        assert_eq!(
            line(CmdlineParts { devices: &devices, append, ..Default::default() }),
            "console=ttyS0 reboot=k panic=-1 pci=off root=/dev/vda ro ip=dhcp quiet -- single"
        );
    }

    #[test]
    fn a_replacement_stands_alone() {
        let devices = ["root=/dev/vda ro".to_owned()];
        let parts = CmdlineParts { devices: &devices, append: Some("x"), replacement: Some("a b") };
        assert_eq!(line(parts), "a b");
        assert_eq!(line(CmdlineParts { replacement: Some(""), ..parts }), "");
    }

    #[test]
    fn nul_and_newline_are_refused_wherever_they_stand() {
        let devices = ["root=\n".to_owned()];
        let newline = CmdlineError::Byte { byte: b'\n', position: 5 };
        let parts = CmdlineParts { devices: &devices, ..Default::default() };
        assert_eq!(build(&parts, LIMIT).unwrap_err(), newline);
        let nul = CmdlineError::Byte { byte: 0, position: 1 };
        let parts = CmdlineParts { append: Some("a\0b"), ..Default::default() };
        assert_eq!(build(&parts, LIMIT).unwrap_err(), nul);
        let parts = CmdlineParts { replacement: Some("a\0"), ..Default::default() };
        assert_eq!(build(&parts, LIMIT).unwrap_err(), nul);
        let parts = CmdlineParts { append: Some("quiet\n"), ..Default::default() };
        assert_eq!(build(&parts, LIMIT).unwrap_err(), newline);
    }

    #[test]
    fn the_limit_counts_the_whole_line() {
        let most = "x".repeat(LIMIT as usize - DEFAULT.len() - 1);
        let parts = CmdlineParts { append: Some(&most), ..Default::default() };
        assert_eq!(build(&parts, LIMIT).unwrap().as_bytes().len(), LIMIT as usize);
        let over = format!("{most}x");
        let parts = CmdlineParts { append: Some(&over), ..Default::default() };
        let refused = build(&parts, LIMIT).unwrap_err();
        assert_eq!(refused, CmdlineError::TooLong { length_bytes: 2048, limit_bytes: 2047 });
    }

    #[test]
    fn a_header_cannot_ask_for_more_room_than_there_is() {
        let line = "x".repeat(CMDLINE_ROOM_BYTES as usize);
        let parts = CmdlineParts { replacement: Some(&line), ..Default::default() };
        let refused = build(&parts, u32::MAX).unwrap_err();
        let CmdlineError::TooLong { limit_bytes, .. } = refused else {
            panic!("unexpected {refused}")
        };
        assert_eq!(limit_bytes as u64, CMDLINE_ROOM_BYTES - 1);
        build(&CmdlineParts { replacement: Some(&line[1..]), ..parts }, u32::MAX).unwrap();
    }
}
