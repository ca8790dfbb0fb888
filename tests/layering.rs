//! Holds the import rules of the design: who may know whom.

use std::fs;
use std::path::{Path, PathBuf};

/// The crates through which code talks to KVM.
const KVM_CRATES: [&str; 2] = ["kvm_ioctls", "kvm_bindings"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `folder`, by their path from the root, with their text less comments.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let code: Vec<&str> = text.lines().map(|l| l.split("//").next().unwrap()).collect();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), code.join("\n")));
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    assert!(!found.is_empty(), "no sources below {folder}");
    found
}

fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

/// Fails for every file of `files` that has one of `words`.
fn assert_free_of<W: AsRef<str>>(files: &[(PathBuf, String)], words: &[W]) {
    let mut broken = Vec::new();
    for (path, code) in files {
        for word in words.iter().map(AsRef::as_ref).filter(|word| has_word(code, word)) {
            broken.push(format!("{} mentions {word}", path.display()));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// `crate::<module>` for every module of the root package but those in `allowed`.
fn modules_but(allowed: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let names: Vec<&str> =
        text.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert!(names.len() > 10, "src/lib.rs lists its modules one a line");
    names.iter().filter(|n| !allowed.contains(n)).map(|n| format!("crate::{n}")).collect()
}

fn within(files: Vec<(PathBuf, String)>, places: &[&str], inside: bool) -> Vec<(PathBuf, String)> {
    let found: Vec<_> = files
        .into_iter()
        .filter(|(path, _)| places.iter().any(|place| path.starts_with(place)) == inside)
        .collect();
    assert!(!found.is_empty(), "nothing to check");
    found
}

#[test]
fn devices_know_neither_kvm_nor_the_command_line_nor_the_root_package() {
    let manifest = fs::read_to_string(root().join("devices/Cargo.toml")).unwrap();

    for name in ["kvm-ioctls", "kvm-bindings", "clap", "alcove"] {
        let listed = manifest.lines().any(|line| line.starts_with(name));
        assert!(!listed, "devices/Cargo.toml depends on {name}");
    }
    assert_free_of(&sources("devices/src"), &KVM_CRATES);
}

#[test]
fn backends_know_no_virtio() {
    let lower = |(path, code): (PathBuf, String)| (path, code.to_lowercase());
    let files: Vec<_> = sources("devices/src/backend").into_iter().map(lower).collect();

    assert_free_of(&files, &["virtio", "virtio_queue", "virtio_bindings"]);
}

#[test]
fn kvm_crates_stay_where_kvm_is_at_home() {
    // The design's list, and `doctor`, which asks KVM what it offers.
    let home = ["src/memory", "src/vcpu", "src/arch", "src/irq.rs", "src/vm"];
    let home = [&home[..], &["src/commands/doctor.rs"]].concat();

    assert_free_of(&within(sources("src"), &home, false), &KVM_CRATES);
}

#[test]
fn the_assist_imports_only_std_and_a_decoder() {
    let files = sources("src/assist");

    assert_free_of(&files, &modules_but(&["assist"]));
    assert_free_of(&files, &["devices", "vm_memory", "vmm_sys_util", "kvm_ioctls", "kvm_bindings"]);
}

#[test]
fn boot_imports_only_memory_and_arch() {
    assert_free_of(&sources("src/boot"), &modules_but(&["boot", "memory", "arch"]));
}

#[test]
fn log_and_host_import_no_other_module() {
    let files = within(sources("src"), &["src/log.rs", "src/host.rs"], true);

    assert_free_of(&files, &modules_but(&[]));
}

#[test]
fn the_sandbox_imports_no_other_module_and_devices_know_none() {
    let files = sources("src/sandbox");

    assert_free_of(&files, &modules_but(&["sandbox"]));
    assert_free_of(&files, &["devices", "clap", "tracing", "vm_memory", "kvm_ioctls"]);
    let sandbox = ["seccompiler", "landlock", "seccomp"];
    assert_free_of(&sources("devices/src"), &sandbox);
    // Where the machine meets it, and `doctor`.
    let home = ["src/sandbox", "src/vm", "src/commands/doctor.rs", "src/host.rs"];
    assert_free_of(&within(sources("src"), &home, false), &sandbox);
}

#[test]
fn only_main_imports_the_commands() {
    let files = within(sources("src"), &["src/commands", "src/main.rs"], false);

    assert_free_of(&files, &["crate::commands", "alcove::commands"]);
}

#[test]
fn target_arch_is_named_in_arch_only() {
    let files = [sources("src"), sources("devices/src")].concat();

    assert_free_of(&within(files, &["src/arch"], false), &["target_arch"]);
}

#[test]
fn one_version_of_the_shared_crates_is_locked() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();

    for name in ["vm-memory", "vmm-sys-util", "kvm-bindings", "event-manager"] {
        let versions = lock.lines().filter(|l| **l == format!("name = \"{name}\"")).count();
        assert_eq!(versions, 1, "{name} is locked in {versions} versions");
    }
}
