//! Sizes and durations as people write them.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// A number of bytes, written as a plain number or with the suffix K, M, G or T for powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
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

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let expected = "a number of bytes or a size such as \"256M\"";
        input.deserialize_any(NumberOrText { expected, result: PhantomData })
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct Span(pub Duration);

impl Span {
    /// The longest: a hundred years.
    pub const MAX: Self = Self(Duration::from_secs(100 * 31_557_600));
}

/// Why a text is no [`Span`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpanError {
    /// Not a number with an optional unit.
    #[error("\"{0}\" is not a duration; write a number with its unit, such as 2s, 500ms or 1m 30s")]
    NotASpan(String),
    /// Past [`Span::MAX`].
    #[error("\"{0}\" is more than a hundred years; give less")]
    TooLong(String),
}

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let seconds = text.parse().ok().map(Duration::from_secs);
        let span = seconds
            .or_else(|| humantime::parse_duration(text).ok())
            .ok_or_else(|| SpanError::NotASpan(text.to_owned()))?;
        if span > Self::MAX.0 {
            return Err(SpanError::TooLong(text.to_owned()));
        }
        Ok(Self(span))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let expected = "a number of seconds or a duration such as \"500ms\"";
        input.deserialize_any(NumberOrText { expected, result: PhantomData })
    }
}

/// Reads from a settings file what may be a number or a text there.
struct NumberOrText<T> {
    expected: &'static str,
    result: PhantomData<T>,
}

impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for NumberOrText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
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
        for text in ["3155760001", "101years", "99999999999999999999s"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
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
