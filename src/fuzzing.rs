//! Bodies of fuzz targets for what the `devices` crate does not have: kernels, settings, and the
//! instructions that the assist completes. See [`devices::fuzzing`].

mod assist;

use std::fs::File;
use std::io::Write;

use clap::Parser;
use devices::fuzzing::Target;
use devices::legacy::serial::SerialConfig;
use devices::virtio::blk::DiskConfig;
use devices::virtio::net::NetConfig;
use devices::virtio::rng::RngConfig;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

pub use assist::{Repeated, assist};

use crate::boot::kernel::{self, KernelEntry};
use crate::cli::{Cli, Command};
use crate::config::{CpuConfig, MemoryConfig, VmConfig, file, keyvalue};
use crate::memory::GuestRam;
use crate::memory::layout::MIB;

/// The targets of this crate.
pub const TARGETS: [Target; 4] = [
    ("assist", assist),
    ("command_line", command_line),
    ("kernel", kernel),
    ("settings", settings),
];

/// A kernel image, ELF or bzImage: it is loaded where the result says, or not at all.
pub fn kernel(data: &[u8]) {
    let ram = GuestRam::new(GuestRam::MIN_BYTES, 36).unwrap();
    for load in [kernel::load, kernel::load_unpacked] {
        let mut image = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        image.write_all(data).unwrap();
        match load(&ram, &image) {
            Ok(loaded) => {
                let (KernelEntry::Pvh { rip } | KernelEntry::Linux64 { rip }) = loaded.entry;
                assert!(loaded.start >= MIB && loaded.end <= ram.low_end(), "{loaded:x?}");
                assert!((loaded.start..loaded.end).contains(&rip), "{loaded:x?}");
            }
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
        let mut low = vec![0; MIB as usize];
        ram.memory().read_slice(&mut low, GuestAddress(0)).unwrap();
        assert!(low.iter().all(|byte| *byte == 0), "the first MiB was written to");
    }
}

/// Words of a command line, a line each: what they mean can be written down and read back.
pub fn command_line(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let words = ["alcove", "run"].into_iter().chain(text.lines());
    if let Ok(Cli { command: Command::Run(run), .. }) = Cli::try_parse_from(words) {
        let mut config = VmConfig::default();
        run.apply(&mut config);
        check(&config);
    }
    let _ = keyvalue::parse::<CpuConfig>(text, "count");
    let _ = keyvalue::parse::<MemoryConfig>(text, "size");
    let _ = keyvalue::parse::<DiskConfig>(text, DiskConfig::FIRST_KEY);
    let _ = keyvalue::parse::<NetConfig>(text, NetConfig::FIRST_KEY);
    let _ = keyvalue::parse::<RngConfig>(text, "enabled");
    let _ = text.parse::<SerialConfig>();
}

/// A settings file: what it means can be written down and read back.
pub fn settings(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for parsed in [file::parse_toml(text), file::parse_json(text)] {
        match parsed {
            Ok(config) => check(&config),
            Err(message) => assert!(!message.contains('\n'), "{message:?}"),
        }
    }
}

/// What holds of any settings.
fn check(config: &VmConfig) {
    let Ok(text) = file::to_toml(config) else { return };
    assert_eq!(file::parse_toml(&text).as_ref(), Ok(config), "{text}");
    if let Err(error) = config.validate() {
        assert!(!error.to_string().is_empty());
        return;
    }
    for (name, net) in config.named_nets() {
        let _ = net.mac_for(&name).to_string();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_seeds_are_borne() {
        for (name, body) in TARGETS {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
            let folder = folder.join("fuzz/seeds").join(name);
            let seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().collect();
            assert!(!seeds.is_empty(), "no seeds for {name}");
            for seed in seeds {
                let bytes = std::fs::read(seed.path()).unwrap();
                let borne = std::panic::catch_unwind(|| body(&bytes));
                assert!(borne.is_ok(), "{}", seed.path().display());
            }
            body(&[]);
        }
    }
}
