//! Sizes and durations as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A number of bytes, written as a plain number or with the suffix K, M, G or T for powers of 1024.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

const SUFFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Why a text is no [`ByteSize`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with an optional suffix.
    #[error("\"{0}\" is not a size; write a number with K, M, G or T, such as 256M")]
    NotASize(String),
    /// Past 2⁶⁴ bytes.
    #[error("\"{0}\" is more than any machine can address")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let last = text.chars().next_back().map(|c| c.to_ascii_uppercase());
        let suffix = SUFFIXES.iter().find(|(c, _)| last == Some(*c));
        let digits = suffix.map_or(text, |_| &text[..text.len() - 1]);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(SizeError::NotASize(text.to_owned()));
        }
        let unit = 1u64 << suffix.map_or(0, |(_, shift)| *shift);
        digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit))
            .map(Self)
            .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
    }
}

impl TryFrom<String> for ByteSize {
    type Error = SizeError;

    fn try_from(text: String) -> Result<Self, SizeError> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |shift: u32| self.0 != 0 && self.0.trailing_zeros() >= shift;
        match SUFFIXES.iter().rev().find(|(_, shift)| whole(*shift)) {
            Some((suffix, shift)) => write!(f, "{}{suffix}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A span of time, written with its unit (`2s`, `500ms`, `1m 30s`) or as a number of seconds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

/// Why a text is no [`Span`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is not a duration; write a number with its unit, such as 2s, 500ms or 1m 30s")]
pub struct SpanError(String);

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let seconds = text.parse().ok().map(Duration::from_secs);
        seconds
            .or_else(|| humantime::parse_duration(text).ok())
            .map(Self)
            .ok_or_else(|| SpanError(text.to_owned()))
    }
}

impl TryFrom<String> for Span {
    type Error = SpanError;

    fn try_from(text: String) -> Result<Self, SpanError> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024_in_either_case() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("64k", 64 << 10), ("256M", 256 << 20), ("8G", 8 << 30)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "-1", "1.5G", "12MB", "x", "1 G", "µ"] {
            assert_eq!(text.parse::<ByteSize>(), Err(SizeError::NotASize(text.to_owned())));
        }
        let huge = "99999999999T";
        assert_eq!(huge.parse::<ByteSize>(), Err(SizeError::TooLarge(huge.to_owned())));
    }

    #[test]
    fn a_number_alone_is_in_seconds() {
        assert_eq!("90".parse(), Ok(Span(Duration::from_secs(90))));
        assert_eq!("250ms".parse(), Ok(Span(Duration::from_millis(250))));
        assert!("soon".parse::<Span>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(bytes: u64, ms in 0u64..1 << 40) {
            let (size, span) = (ByteSize(bytes), Span(Duration::from_millis(ms)));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }
    }
}
