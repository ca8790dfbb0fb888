//! The `key=value,key=value` syntax of options, over serde: one struct serves flags and files.

use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{self, DeserializeOwned, IntoDeserializer, Visitor};

use super::nearest::nearest;

/// What is wrong with a `key=value` text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValueError(String);

impl fmt::Display for KeyValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for KeyValueError {}

impl de::Error for KeyValueError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(match nearest(field, expected.iter().copied()) {
            Some(known) => format!("unknown key \"{field}\", did you mean \"{known}\"?"),
            None => format!("unknown key \"{field}\", known are {}", expected.join(", ")),
        })
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("\"{field}\" is missing"))
    }
}

/// Reads `text` as a `T`. The first entry may leave out its key, which then is `first_key`; any
/// other entry without a value is a true boolean. A key that takes a list may be given several
/// times, once for each entry.
pub fn parse<T: DeserializeOwned>(text: &str, first_key: &str) -> Result<T, KeyValueError> {
    let entries = text.split(',').enumerate().map(|(index, entry)| match entry.split_once('=') {
        Some((key, value)) => (key, Word::Text(value)),
        None if index == 0 => (first_key, Word::Text(entry)),
        None => (entry, Word::Bare),
    });
    let mut values: Vec<(&str, Value<'_>)> = Vec::new();
    for (key, word) in entries {
        match values.iter_mut().find(|(known, _)| *known == key) {
            Some((_, value)) => value.words.push(word),
            None => values.push((key, Value { key, words: vec![word] })),
        }
    }
    T::deserialize(MapDeserializer::new(values.into_iter()))
}

/// One value.
#[derive(Clone, Copy)]
enum Word<'a> {
    Text(&'a str),
    Bare,
}

/// All that was given for a key, at least one word.
struct Value<'a> {
    key: &'a str,
    words: Vec<Word<'a>>,
}

impl<'a> Value<'a> {
    /// The value of a key that takes one.
    fn word(&self) -> Result<Word<'a>, KeyValueError> {
        match self.words[..] {
            [word] => Ok(word),
            _ => Err(KeyValueError(format!("\"{}\" is given twice", self.key))),
        }
    }
}

impl<'a> IntoDeserializer<'a, KeyValueError> for Value<'a> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! single {
    ($($method:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
            self.word()?.$method(visitor)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Value<'de> {
    type Error = KeyValueError;

    single! { deserialize_any, deserialize_bool, deserialize_u8, deserialize_u16, deserialize_u32,
    deserialize_u64 }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, KeyValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyValueError> {
        self.word()?.deserialize_enum(name, variants, visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        visitor.visit_seq(SeqDeserializer::new(self.words.into_iter()))
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct map struct identifier ignored_any
    }
}

impl<'a> IntoDeserializer<'a, KeyValueError> for Word<'a> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'a> Word<'a> {
    fn text(&self) -> Result<&'a str, KeyValueError> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Bare => Err(de::Error::custom("a key without a value; write key=value")),
        }
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
            let text = self.text()?;
            let number = text
                .parse::<$type>()
                .map_err(|e| de::Error::custom(format!("\"{text}\": {e}")))?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Word<'de> {
    type Error = KeyValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        match self {
            Self::Text(text) => visitor.visit_borrowed_str(text),
            Self::Bare => visitor.visit_bool(true),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        match self {
            Self::Bare | Self::Text("on" | "true") => visitor.visit_bool(true),
            Self::Text("off" | "false") => visitor.visit_bool(false),
            Self::Text(text) => Err(de::Error::custom(format!("\"{text}\" is neither on nor off"))),
        }
    }

    numbers! {
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, KeyValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyValueError> {
        let text: StrDeserializer<'_, KeyValueError> = self.text()?.into_deserializer();
        text.deserialize_enum(name, variants, visitor)
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Disk {
        path: PathBuf,
        #[serde(default)]
        readonly: bool,
        queues: Option<u16>,
        #[serde(default)]
        tag: Vec<String>,
    }

    #[test]
    fn the_first_key_may_be_left_out_and_a_bare_word_is_true() {
        let disk: Disk = parse("123.img,readonly,queues=2", "path").unwrap();

        assert_eq!(
            disk,
            Disk { path: "123.img".into(), readonly: true, queues: Some(2), tag: Vec::new() }
        );
    }

    #[test]
    fn a_key_that_takes_a_list_may_be_given_several_times() {
        let disk: Disk = parse("a,tag=x,readonly,tag=y", "path").unwrap();

        assert_eq!(disk.tag, ["x", "y"]);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_nearest_neighbour() {
        let error = parse::<Disk>("a,redonly", "path").unwrap_err();

        assert_eq!(error.to_string(), "unknown key \"redonly\", did you mean \"readonly\"?");
    }

    #[test]
    fn wrong_values_say_what_is_wrong() {
        for (text, message) in [
            ("a,queues=many", "\"many\": invalid digit found in string"),
            ("a,queues", "a key without a value; write key=value"),
            ("a,readonly=perhaps", "\"perhaps\" is neither on nor off"),
            ("readonly=on", "\"path\" is missing"),
            ("a,readonly,readonly", "\"readonly\" is given twice"),
        ] {
            assert_eq!(parse::<Disk>(text, "path").unwrap_err().to_string(), message, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}") {
            let _ = parse::<Disk>(&text, "path");
        }
    }
}
