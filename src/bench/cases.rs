//! The cases: what each needs, and what one run of it does.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::cpio::Archive;
use super::launch::{Launched, Resident, proportional_kib};
use super::report::{Sample, Unit};
use super::{Bench, BenchError, file_or_reason, guest, namespace, net_server};
use crate::host;
use crate::vm::bare_loop;

/// Every guest's RAM, MiB.
const MEMORY_MIB: u32 = 128;
/// How long an idle guest is left alone before it is looked at.
const SETTLE: Duration = Duration::from_millis(50);
/// Whose figures most are.
const ALCOVE: &str = "alcove";
/// Where files come from that are missing.
const MAKE_GUEST: &str = "make guest builds it, --guest DIR names another place";

/// A case of `alcove bench`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CaseName {
    /// From exec to the first byte that a guest prints.
    Start,
    /// From exec to the guest's first process, peers too.
    Boot,
    /// Round trips from the guest to a device model and back.
    Exits,
    /// What is resident besides guest RAM: in all, per vCPU, per device.
    Memory,
    /// Requests to a disk, random and in sequence.
    Disk,
    /// Streams and single bytes over a tap interface, both ways.
    Net,
    /// Many guests side by side.
    Density,
}

impl fmt::Display for CaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.pad(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// What `case` lacks here, and where that comes from.
pub(super) fn missing(case: CaseName, bench: &Bench<'_>) -> Result<Option<String>, BenchError> {
    let settings = bench.settings;
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        return Ok(Some(format!("/dev/kvm does not open: {error}; see alcove doctor")));
    }
    let linux = || {
        file_or_reason(&settings.kernel(), MAKE_GUEST)
            .or_else(|| file_or_reason(&settings.initrd(), MAKE_GUEST))
    };
    let program = |name: &str| file_or_reason(&settings.program(name), MAKE_GUEST);
    Ok(match case {
        CaseName::Start | CaseName::Exits => None,
        CaseName::Boot => linux().or_else(|| settings.peers.iter().find_map(|p| p.missing())),
        CaseName::Memory | CaseName::Density => hidden_memory(bench)?,
        CaseName::Disk => linux().or_else(|| program("diskbench")),
        CaseName::Net => {
            linux().or_else(|| program("netbench")).or_else(|| bench.no_network.clone())
        }
    })
}

/// Why the memory of what is started cannot be seen, if it cannot.
fn hidden_memory(bench: &Bench<'_>) -> Result<Option<String>, BenchError> {
    let launched = idle(bench, &[])?;
    let told = |error| {
        format!(
            "the host does not show alcove's memory to this user: {error}; run it as root, or where \
             alcove doctor says that jails work"
        )
    };
    Ok(Resident::of(launched.id()).err().map(told))
}

/// One run of `case`.
pub(super) fn run(case: CaseName, bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    match case {
        CaseName::Start => start(bench),
        CaseName::Boot => boot(bench),
        CaseName::Exits => exits(bench),
        CaseName::Memory => memory(bench),
        CaseName::Disk => disk(bench),
        CaseName::Net => net(bench),
        CaseName::Density => density(bench),
    }
}

fn sample(name: &str, vmm: &str, unit: Unit, value: f64) -> Sample {
    Sample { name: name.to_owned(), vmm: vmm.to_owned(), unit, value }
}

fn ns(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// `alcove run` of `kernel`.
fn alcove(bench: &Bench<'_>, kernel: &Path) -> Command {
    let mut command = Command::new(&bench.settings.alcove);
    command.args(["--log", "error", "run", "--memory", &format!("{MEMORY_MIB}M")]);
    command.arg("--kernel").arg(kernel);
    command
}

/// A guest that does nothing, once it has come to that.
fn idle<'a>(bench: &'a Bench<'_>, arguments: &[String]) -> Result<Launched<'a>, BenchError> {
    let kernel = bench.write("idle", &guest::elf(&guest::idle()))?;
    let mut command = alcove(bench, &kernel);
    command.args(arguments);
    let mut launched = bench.launch(ALCOVE, command)?;
    launched.first_output()?;
    // What alcove's threads do once the guest runs.
    thread::sleep(SETTLE);
    Ok(launched)
}

fn start(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    let kernel = bench.write("print", &guest::elf(&guest::print()))?;
    let mut launched = bench.launch(ALCOVE, alcove(bench, &kernel))?;
    let time = launched.first_output()?;
    launched.end()?;
    Ok(vec![sample("exec to first output", ALCOVE, Unit::Nanoseconds, ns(time))])
}

fn boot(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    let settings = bench.settings;
    let (kernel, initrd) = (settings.kernel(), settings.initrd());
    let mut own = alcove(bench, &kernel);
    own.arg("--initrd").arg(&initrd);
    let mut commands = vec![(ALCOVE.to_owned(), own)];
    for peer in &settings.peers {
        let mut name = peer.name().to_owned();
        while commands.iter().any(|(other, _)| *other == name) {
            name.push('\'');
        }
        commands.push((name, peer.command(&kernel, &initrd, MEMORY_MIB)));
    }
    let mut samples = Vec::new();
    for (vmm, command) in commands {
        let mut launched = bench.launch(&vmm, command)?;
        let (_, time) = launched.line(&settings.marker)?;
        samples.push(sample("exec to init", &vmm, Unit::Nanoseconds, ns(time)));
        if let Ok(resident) = Resident::of(launched.id()) {
            let kib = resident.total() as f64;
            samples.push(sample("resident at init, less RAM", &vmm, Unit::Kib, kib));
        }
    }
    Ok(samples)
}

fn exits(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    const TIMES: u32 = 20_000;
    const NAMES: [&str; 2] = ["port read", "MMIO write"];
    let code = guest::exits(TIMES);
    let kernel = bench.write("exits", &guest::elf(&code))?;
    let mut launched = bench.launch(ALCOVE, alcove(bench, &kernel))?;
    let mut marks = Vec::new();
    for _ in 0..=NAMES.len() {
        marks.push(launched.newline()?);
    }
    launched.end()?;
    let bare = bare_loop::run(&code, guest::LOAD_ADDRESS, guest::COM1, guest::DEBUG_EXIT)
        .map_err(BenchError::BareLoop)?;
    let mut samples = Vec::new();
    for (vmm, marks) in [(ALCOVE, &marks), ("bare KVM_RUN", &bare)] {
        for (name, pair) in NAMES.iter().zip(marks.windows(2)) {
            let [from, to] = pair else { continue };
            let each = ns(to.saturating_sub(*from)) / f64::from(TIMES);
            samples.push(sample(name, vmm, Unit::NanosecondsEach, each));
        }
    }
    Ok(samples)
}

fn memory(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    /// Of each kind of thing, besides what is there anyway.
    const MORE: u32 = 4;
    let image = bench.write("image", &[])?;
    let sized = File::options().write(true).open(&image).and_then(|file| file.set_len(1 << 20));
    sized.map_err(BenchError::host("size an image"))?;
    let resident = |arguments: &[String]| -> Result<Resident, BenchError> {
        let launched = idle(bench, arguments)?;
        Resident::of(launched.id()).map_err(BenchError::host("see alcove's memory"))
    };
    let flag = |flag: &str, value: String| [flag.to_owned(), value];
    let off = flag("--rng", "off".to_owned());
    let with =
        |more: &[[String; 2]]| resident(&[std::slice::from_ref(&off), more].concat().concat());
    let disks: Vec<_> =
        (0..MORE).map(|_| flag("--disk", format!("{},readonly", image.display()))).collect();
    // What the guests inherit closes with these.
    let mut ends = Vec::new();
    for _ in 0..MORE {
        ends.push(UnixStream::pair().map_err(BenchError::host("make a socket"))?);
    }
    let base = with(&[])?;
    let cpus = with(&[flag("--cpus", format!("{}", MORE + 1))])?;
    let disks = with(&disks)?;
    let nets: Vec<_> =
        ends.iter().map(|(end, _)| flag("--net", format!("fd={}", end.as_raw_fd()))).collect();
    for (end, _) in &ends {
        rustix::io::fcntl_setfd(end, rustix::io::FdFlags::empty())
            .map_err(|error| BenchError::host("hand on a socket")(error.into()))?;
    }
    let nets = with(&nets)?;
    let entropy = resident(&[])?;
    let kib = |name: &str, value: f64| sample(name, ALCOVE, Unit::Kib, value);
    let more = |name: &str, with: Resident, count: u32| {
        kib(name, (with.own as f64 - base.own as f64) / f64::from(count))
    };
    Ok(vec![
        kib("1 vCPU, no device", base.total() as f64),
        kib("of which its own, not the program's file", base.own as f64),
        more("each vCPU more", cpus, MORE),
        more("entropy device", entropy, 1),
        more("each disk", disks, MORE),
        more("each network", nets, MORE),
    ])
}

/// The initial RAM disk with `program` and a script that is run instead of a shell.
fn initrd_with(
    bench: &Bench<'_>,
    name: &str,
    program: &str,
    script: &str,
) -> Result<PathBuf, BenchError> {
    let read = |path: PathBuf| {
        std::fs::read(&path).map_err(BenchError::host(format!("read {}", path.display())))
    };
    let mut image = read(bench.settings.initrd())?;
    let mut archive = Archive::default();
    for folder in ["bin", "etc", "etc/alcove"] {
        archive.folder(folder);
    }
    archive.file(&format!("bin/{program}"), &read(bench.settings.program(program))?);
    archive.file("etc/alcove/run", script.as_bytes());
    image.extend(archive.finish());
    bench.write(name, &image)
}

/// A Linux guest with `initrd`.
fn linux<'a>(
    bench: &'a Bench<'_>,
    initrd: &Path,
    arguments: &[&str],
) -> Result<Launched<'a>, BenchError> {
    let mut command = alcove(bench, &bench.settings.kernel());
    command.arg("--initrd").arg(initrd).args(arguments);
    bench.launch(ALCOVE, command)
}

/// The number that the guest prints after `marker`.
fn number(launched: &mut Launched<'_>, marker: &str) -> Result<f64, BenchError> {
    let (text, _) = launched.line(marker)?;
    text.parse().map_err(|_| BenchError::Guest {
        vmm: ALCOVE.to_owned(),
        what: format!("printed no number after {marker:?}"),
        tail: text,
    })
}

/// How much less is done where guest kernels are interpreted, so that it ends today.
fn divisor() -> u32 {
    const INTERPRETED: u32 = 20;
    if host::has_hardware_virtualisation() { 1 } else { INTERPRETED }
}

fn disk(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    const IMAGE_BYTES: usize = 64 << 20;
    const SMALL: Unit = Unit::NanosecondsEach;
    const LARGE: Unit = Unit::NanosecondsPerMib;
    /// What the program calls them, and what they are.
    const LOADS: [(&str, &str, Unit); 9] = [
        ("read-4k", "4 KiB random read", SMALL),
        ("write-4k", "4 KiB random write", SMALL),
        ("read-1m", "1 MiB sequential read", LARGE),
        ("write-1m", "1 MiB sequential write", LARGE),
        ("write-4k-fsync", "4 KiB random write and fsync", SMALL),
        ("read-4k-depth-32", "4 KiB random read, depth 32", SMALL),
        ("write-4k-depth-32", "4 KiB random write, depth 32", SMALL),
        ("read-1m-depth-32", "1 MiB sequential read, depth 32", LARGE),
        ("write-1m-depth-32", "1 MiB sequential write, depth 32", LARGE),
    ];
    let image = bench.path("disk");
    if !image.exists() {
        bench.write("disk", &vec![0; IMAGE_BYTES])?;
    }
    let script = format!("exec bin/diskbench /dev/vda {}\n", divisor());
    let initrd = initrd_with(bench, "disk-initrd", "diskbench", &script)?;
    let mut launched = linux(bench, &initrd, &["--disk", &image.to_string_lossy()])?;
    let mut samples = Vec::new();
    for (load, name, unit) in LOADS {
        let value = number(&mut launched, &format!("diskbench: {load} "))?;
        samples.push(sample(name, ALCOVE, unit, value));
    }
    launched.end()?;
    Ok(samples)
}

fn net(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    const STREAM_BYTES: u32 = 64 << 20;
    const ECHOES: u32 = 4000;
    const PORT: u16 = 5000;
    let network = |source| BenchError::host("talk to the guest")(source);
    let server = bench.server()?;
    let (host, guest) = (namespace::HOST, namespace::GUEST);
    let (bytes, echoes) = (STREAM_BYTES / divisor(), ECHOES / divisor());
    let to = format!("{host} {}", server.port());
    let script = format!(
        "ip link set eth0 up\nip addr add {guest}/24 dev eth0\nexport NETBENCH_UNCHECKED=y\n\
         bin/netbench send {to} {bytes} || exit\nbin/netbench receive {to} {bytes} || exit\n\
         bin/netbench echo {to} {echoes} || exit\n\
         bin/netbench serve {PORT} &\nsleep 1\necho alcove-bench: serves\nwait\n"
    );
    let initrd = initrd_with(bench, "net-initrd", "netbench", &script)?;
    let mut launched = linux(bench, &initrd, &["--net", &format!("tap={}", namespace::TAP)])?;
    let mut samples = Vec::new();
    for (what, name, unit) in [
        ("send", "stream from the guest", Unit::NanosecondsPerMib),
        ("receive", "stream to the guest", Unit::NanosecondsPerMib),
        ("echo", "byte and answer, asked by the guest", Unit::NanosecondsEach),
    ] {
        let value = number(&mut launched, &format!("netbench: {what} "))?;
        samples.push(sample(name, ALCOVE, unit, value));
    }
    launched.line("alcove-bench: serves")?;
    let each = net_server::echo(PORT, echoes).map_err(network)?;
    let name = "byte and answer, asked by the host";
    samples.push(sample(name, ALCOVE, Unit::NanosecondsEach, ns(each)));
    Ok(samples)
}

fn density(bench: &Bench<'_>) -> Result<Vec<Sample>, BenchError> {
    let kernel = bench.write("idle", &guest::elf(&guest::idle()))?;
    let start = Instant::now();
    let mut guests = Vec::new();
    for _ in 0..bench.settings.guests {
        let begun = bench
            .launch(ALCOVE, alcove(bench, &kernel))
            .and_then(|mut guest| guest.first_output().map(|_| guest));
        match begun {
            Ok(guest) => guests.push(guest),
            Err(BenchError::Interrupted) => return Err(BenchError::Interrupted),
            // The host holds no more.
            Err(_) if !guests.is_empty() => break,
            Err(error) => return Err(error),
        }
    }
    let time = start.elapsed();
    thread::sleep(SETTLE);
    let mut kib = 0;
    for guest in &guests {
        let one = proportional_kib(guest.id());
        kib += one.map_err(BenchError::host("see alcove's memory"))?;
    }
    let count = guests.len() as f64;
    Ok(vec![
        sample("guests of 128 MiB", ALCOVE, Unit::Guests, count),
        sample("time for each", ALCOVE, Unit::Nanoseconds, ns(time) / count),
        sample("memory of each, touched RAM included", ALCOVE, Unit::Kib, kib as f64 / count),
    ])
}
