//! The escape key: Ctrl-a begins a command to alcove in what the user types.
//!
//! After the custom of screen and QEMU: `Ctrl-a x` ends the guest, `Ctrl-a h` (or `?`) prints
//! help, `Ctrl-a a` (or a second Ctrl-a) sends one Ctrl-a. Before any other key Ctrl-a is not a
//! command, and both bytes go to the guest: nothing that was typed is lost.

/// The byte of Ctrl-a.
pub const ESCAPE: u8 = 0x01;

/// What `Ctrl-a h` prints.
pub const HELP: &str = "\r\n\
    Ctrl-a x  end the guest\r\n\
    Ctrl-a h  this help\r\n\
    Ctrl-a a  send Ctrl-a to the guest\r\n";

/// What a typed byte amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Nothing yet: the next byte decides.
    Held,
    /// This byte goes to the guest.
    Send(u8),
    /// Ctrl-a, held until now, goes to the guest, and then this byte.
    SendEscaped(u8),
    /// The user asks for help.
    Help,
    /// The user ends the guest.
    Quit,
}

/// The parser's state between two bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EscapeParser {
    holding: bool,
}

impl EscapeParser {
    /// Takes the next byte typed.
    pub fn feed(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.holding) {
            if byte == ESCAPE {
                self.holding = true;
                return Key::Held;
            }
            return Key::Send(byte);
        }
        match byte {
            b'x' => Key::Quit,
            b'h' | b'?' => Key::Help,
            b'a' | ESCAPE => Key::Send(ESCAPE),
            other => Key::SendEscaped(other),
        }
    }

    /// The input has ended: whether a Ctrl-a was held that nothing followed.
    pub fn finish(&mut self) -> bool {
        std::mem::take(&mut self.holding)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed_all(bytes: &[u8]) -> Vec<Key> {
        let mut parser = EscapeParser::default();
        bytes.iter().map(|byte| parser.feed(*byte)).collect()
    }

    #[test]
    fn other_bytes_pass() {
        for byte in (0..=u8::MAX).filter(|byte| *byte != ESCAPE) {
            assert_eq!(feed_all(&[byte]), [Key::Send(byte)]);
        }
    }

    #[test]
    fn commands_are_recognised_after_the_escape() {
        assert_eq!(feed_all(b"\x01x"), [Key::Held, Key::Quit]);
        assert_eq!(feed_all(b"\x01h"), [Key::Held, Key::Help]);
        assert_eq!(feed_all(b"\x01?"), [Key::Held, Key::Help]);
        assert_eq!(feed_all(b"\x01a"), [Key::Held, Key::Send(ESCAPE)]);
        assert_eq!(feed_all(b"\x01\x01"), [Key::Held, Key::Send(ESCAPE)]);
    }

    #[test]
    fn a_command_letter_is_plain_text_without_or_past_the_escape() {
        assert_eq!(feed_all(b"x"), [Key::Send(b'x')]);
        assert_eq!(feed_all(b"\x01ax"), [Key::Held, Key::Send(ESCAPE), Key::Send(b'x')]);
    }

    #[test]
    fn an_unknown_command_reaches_the_guest_whole() {
        assert_eq!(feed_all(b"\x01d"), [Key::Held, Key::SendEscaped(b'd')]);
    }

    #[test]
    fn a_held_escape_survives_the_end_of_input() {
        let mut parser = EscapeParser::default();
        parser.feed(ESCAPE);
        assert!(parser.finish());
        assert!(!parser.finish());
    }

    proptest! {
        #[test]
        fn doubling_the_escape_makes_any_text_transparent(text in prop::collection::vec(any::<u8>(), 0..64)) {
            let typed: Vec<u8> = text.iter().flat_map(|byte| match *byte {
                ESCAPE => vec![ESCAPE, ESCAPE],
                other => vec![other],
            }).collect();
            let sent: Vec<u8> = feed_all(&typed).into_iter().filter_map(|key| match key {
                Key::Send(byte) => Some(byte),
                _ => None,
            }).collect();
            prop_assert_eq!(sent, text);
        }
    }
}
