//! Where the user wants the serial console.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::backend::console::{Backend, OpenError};

/// Where COM1 leads. One text form everywhere: `stdio`, `null`, `file=PATH`, `unix=PATH`, `pty`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SerialConfig {
    /// The process's stdin and stdout, see [`Backend::stdio`].
    #[default]
    Stdio,
    /// Nowhere, see [`Backend::null`].
    Null,
    /// Output to a file, see [`Backend::file`].
    File(PathBuf),
    /// A socket for clients, see [`Backend::unix`].
    Unix(PathBuf),
    /// A pseudo-terminal for clients, see [`Backend::pty`].
    Pty,
}

impl SerialConfig {
    /// The forms there are, as the user writes them.
    pub const FORMS: [&str; 5] = ["stdio", "null", "file=PATH", "unix=PATH", "pty"];

    /// Opens what the configuration names.
    ///
    /// # Errors
    /// Those of the [`Backend`] constructors.
    pub fn open(&self) -> Result<Backend, OpenError> {
        match self {
            Self::Stdio => Backend::stdio(),
            Self::Null => Ok(Backend::null()),
            Self::File(path) => Backend::file(path),
            Self::Unix(path) => Backend::unix(path),
            Self::Pty => Backend::pty(),
        }
    }
}

/// A text that is no [`SerialConfig`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSerialError {
    /// The word is none of [`SerialConfig::FORMS`].
    #[error("unknown serial console \"{word}\"; give one of {}", SerialConfig::FORMS.join(", "))]
    UnknownWord {
        /// The word before `=`, or all of it.
        word: String,
    },
    /// The form needs a path and has none.
    #[error("serial console \"{word}\" needs a path: {word}=PATH")]
    PathMissing {
        /// The word before `=`.
        word: String,
    },
    /// The form takes no value and has one.
    #[error("serial console \"{word}\" takes no value; give \"{word}\" alone")]
    ValueNotTaken {
        /// The word before `=`.
        word: String,
    },
}

impl FromStr for SerialConfig {
    type Err = ParseSerialError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (word, value) = match text.split_once('=') {
            Some((word, value)) => (word, Some(value)),
            None => (text, None),
        };
        let alone = |config| match value {
            None => Ok(config),
            Some(_) => Err(ParseSerialError::ValueNotTaken { word: word.into() }),
        };
        let with_path = |config: fn(PathBuf) -> Self| match value {
            Some(path) if !path.is_empty() => Ok(config(path.into())),
            _ => Err(ParseSerialError::PathMissing { word: word.into() }),
        };
        match word {
            "stdio" => alone(Self::Stdio),
            "null" => alone(Self::Null),
            "pty" => alone(Self::Pty),
            "file" => with_path(Self::File),
            "unix" => with_path(Self::Unix),
            _ => Err(ParseSerialError::UnknownWord { word: word.into() }),
        }
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Null => f.write_str("null"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Unix(path) => write!(f, "unix={}", path.display()),
            Self::Pty => f.write_str("pty"),
        }
    }
}

impl TryFrom<String> for SerialConfig {
    type Error = ParseSerialError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SerialConfig> for String {
    fn from(config: SerialConfig) -> Self {
        config.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_is_parsed() {
        assert_eq!("stdio".parse(), Ok(SerialConfig::Stdio));
        assert_eq!("null".parse(), Ok(SerialConfig::Null));
        assert_eq!("pty".parse(), Ok(SerialConfig::Pty));
        assert_eq!("file=/a=b,c".parse(), Ok(SerialConfig::File("/a=b,c".into())));
        assert_eq!("unix=s".parse(), Ok(SerialConfig::Unix("s".into())));
    }

    #[test]
    fn mistakes_are_named() {
        let parse = |text: &str| text.parse::<SerialConfig>().unwrap_err();
        assert_eq!(parse("stdoi"), ParseSerialError::UnknownWord { word: "stdoi".into() });
        assert_eq!(parse(""), ParseSerialError::UnknownWord { word: "".into() });
        assert_eq!(parse("fiel=/x"), ParseSerialError::UnknownWord { word: "fiel".into() });
        assert_eq!(parse("file"), ParseSerialError::PathMissing { word: "file".into() });
        assert_eq!(parse("unix="), ParseSerialError::PathMissing { word: "unix".into() });
        assert_eq!(parse("pty=/x"), ParseSerialError::ValueNotTaken { word: "pty".into() });
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_back(path in "[^\0]{1,40}", form in 0..5) {
            let config = match form {
                0 => SerialConfig::Stdio,
                1 => SerialConfig::Null,
                2 => SerialConfig::File(path.into()),
                3 => SerialConfig::Unix(path.into()),
                _ => SerialConfig::Pty,
            };
            prop_assert_eq!(config.to_string().parse(), Ok(config.clone()));
            prop_assert_eq!(SerialConfig::try_from(String::from(config.clone())), Ok(config));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,40}") {
            let _ = text.parse::<SerialConfig>();
        }
    }
}
