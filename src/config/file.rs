//! A machine's settings as a file, in TOML or JSON.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::VmConfig;
use super::nearest::nearest;

/// The largest file that is read, in bytes: far more than any machine needs.
const MAX_BYTES: u64 = 1 << 20;

/// Why a settings file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be read.
    #[error("--config {}: {error}; name a TOML or JSON file that you may read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is larger than 1 MiB.
    #[error("--config {}: more than 1 MiB, which is no settings file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It does not say what a machine is.
    #[error("--config {}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
}

/// Reads `path`: JSON if its name ends so, else TOML.
pub fn load(path: &Path) -> Result<VmConfig, FileError> {
    let text = read(path)?;
    let json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let parsed = if json { parse_json(&text) } else { parse_toml(&text) };
    parsed.map_err(|message| FileError::Content { path: path.to_owned(), message })
}

/// Writes `config` as TOML that [`load`] reads back to the same.
pub fn to_toml(config: &VmConfig) -> Result<String, toml::ser::Error> {
    toml::to_string(config)
}

fn read(path: &Path) -> Result<String, FileError> {
    let failed = |error| FileError::Read { path: path.to_owned(), error };
    let file = fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

/// Reads settings in TOML; what is wrong in one line.
pub(crate) fn parse_toml(text: &str) -> Result<VmConfig, String> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map(|span| line_of(text, span.start));
        let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        format!("{place}{}", with_nearest(e.message()))
    })
}

/// Reads settings in JSON; what is wrong in one line.
pub(crate) fn parse_json(text: &str) -> Result<VmConfig, String> {
    serde_json::from_str(text).map_err(|e| with_nearest(&e.to_string()))
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

/// Shortens serde's list of all known fields to the one that was probably meant.
fn with_nearest(message: &str) -> String {
    let message = message.trim().replace('\n', " ");
    let Some(rest) = message.strip_prefix("unknown field ") else {
        return message;
    };
    let mut names = rest.split('`').skip(1).step_by(2);
    let field = names.next().unwrap_or_default();
    match nearest(field, names) {
        Some(known) => format!("unknown key \"{field}\", did you mean \"{known}\"?"),
        None => message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{AssistMode, ByteSize, CpuConfig, MemoryConfig, Span};

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_nearest_neighbour() {
        let error = parse_toml("initrd = \"a\"\nkernle = \"b\"\n").unwrap_err();

        assert_eq!(error, "line 2: unknown key \"kernle\", did you mean \"kernel\"?");
    }

    #[test]
    fn json_is_read_as_well() {
        let config = parse_json(r#"{"kernel": "vmlinux", "memory": {"size": "1G"}}"#).unwrap();

        assert_eq!(config.memory.size, ByteSize(1 << 30));
        assert!(parse_json(r#"{"memroy": {}}"#).unwrap_err().contains("\"memory\""));
    }

    #[test]
    fn sizes_and_durations_may_be_numbers() {
        let config = parse_toml("timeout = 90\n[memory]\nsize = 268435456\n").unwrap();
        assert_eq!(config.timeout, Some(Span(std::time::Duration::from_secs(90))));
        assert_eq!(config.memory.size, ByteSize(256 << 20));
        for text in ["timeout = -1", "timeout = true", "[memory]\nsize = 1.5"] {
            let error = parse_toml(text).unwrap_err();
            assert!(error.contains("such as"), "{error}");
        }
    }

    prop_compose! {
        fn any_config()(
            kernel in proptest::option::of("[a-z/. \"\\\\]{1,20}"),
            append in proptest::option::of(".{0,40}"),
            seconds in proptest::option::of(0u64..1 << 30),
            threads in proptest::option::of(1u32..4),
            count in 1u32..64,
            bytes: u64,
        ) -> VmConfig {
            VmConfig {
                kernel: kernel.map(PathBuf::from),
                append,
                timeout: seconds.map(|s| Span(std::time::Duration::from_secs(s))),
                assist: AssistMode::On,
                shutdown_timeout: seconds.map(|s| Span(std::time::Duration::from_millis(s))),
                cpus: CpuConfig { count, threads, ..CpuConfig::default() },
                memory: MemoryConfig { size: ByteSize(bytes) },
                ..VmConfig::default()
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(config in any_config()) {
            let text = to_toml(&config).unwrap();
            prop_assert_eq!(parse_toml(&text).unwrap(), config);
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,200}") {
            let _ = parse_toml(&text);
            let _ = parse_json(&text);
        }
    }
}
