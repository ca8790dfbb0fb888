//! The command line: flags only.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use devices::legacy::serial::SerialConfig;
use devices::virtio::blk::DiskConfig;
use devices::virtio::net::NetConfig;
use devices::virtio::rng::RngConfig;

use crate::bench::{CaseName, Peer};
use crate::config::{
    AssistMode, ByteSize, CpuConfig, MemoryConfig, SandboxConfig, SandboxMode, Span, VmConfig,
    keyvalue,
};
use crate::log::Level;

/// Runs Linux guests on KVM, with or without hardware virtualisation.
#[derive(Debug, Parser)]
#[command(name = "alcove", version, disable_help_subcommand = true, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How much of alcove's own log goes to standard error.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "LEVEL")]
    pub log: Level,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Launch a guest and stay until it ends.
    Run(Box<RunArgs>),
    /// Measure what guests cost here, or compare two measurements.
    Bench(Box<BenchArgs>),
    /// Tell what this host offers to guests, and what to do about what is missing.
    Doctor,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff.
    Man,
}

/// The flags of `alcove run`. Options take `key=value,key=value`; the first key may be left out.
#[derive(Debug, Args)]
#[command(after_long_help = EXIT_STATUS)]
pub struct RunArgs {
    /// ELF vmlinux or bzImage [default: ./vmlinux, ./bzImage, /boot/vmlinuz-$(uname -r)]
    #[arg(short, long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(short, long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Added to the kernel command line that alcove writes; after " -- " arguments for init
    #[arg(short, long, value_name = "STR", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Replaces the kernel command line that alcove writes
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Number of vCPUs [default: 1], with threads=T, cores=C, sockets=S to arrange them
    #[arg(short, long, value_name = "N,…", value_parser = parse_cpus)]
    pub cpus: Option<CpuConfig>,
    /// RAM, with K, M, G or T [default: 256M]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_memory)]
    pub memory: Option<MemoryConfig>,
    /// Disk, repeatable, vda first: FILE with readonly, root, direct, queues=N, queue-size=N,
    /// engine=io_uring|sync, id=S, iops=RATE, bandwidth=RATE, discard=on|off, sync=on|off
    #[arg(short, long = "disk", value_name = "FILE,…", value_parser = parse_disk)]
    pub disks: Vec<DiskConfig>,
    /// Network, repeatable, eth0 first: user with forward=tcp|udp:HOSTPORT:GUESTPORT (repeatable),
    /// host=ADDRESS; tap=NAME with queues=N; fd=N; none; all with mac=MAC, mtu=BYTES, id=S,
    /// bandwidth=RATE, packets=RATE [default: none]
    #[arg(short, long = "net", value_name = "KIND,…", value_parser = parse_net)]
    pub nets: Vec<NetConfig>,
    /// Entropy device: on or off, with bandwidth=RATE [default: on]
    #[arg(long, value_name = "on|off", value_parser = parse_rng)]
    pub rng: Option<RngConfig>,
    /// First serial port: stdio, null, file=PATH, unix=PATH or pty [default: stdio]
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<SerialConfig>,
    /// End the guest after this time, such as 90s or 5m, with status 124
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<Span>,
    /// Time that the guest has to power off when SIGTERM presses its power button [default: 10s]
    #[arg(long, value_name = "DURATION")]
    pub shutdown_timeout: Option<Span>,
    /// Complete instructions that KVM's emulator refuses [default: auto]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub assist: Option<AssistMode>,
    /// How alcove is confined
    #[command(flatten)]
    pub sandbox: SandboxArgs,
    /// Read settings from a TOML or JSON file; flags given beside it win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the settings as TOML for --config, and do not run
    #[arg(long)]
    pub print_config: bool,
}

/// The flags that confine alcove itself.
#[derive(Debug, Args)]
pub struct SandboxArgs {
    /// Confine alcove to what the machine needs, so that a guest that takes it over gets nothing
    /// else [default: on]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub sandbox: Option<SandboxMode>,
    /// Run in namespaces of its own with an empty root; needs no root where the host allows it
    #[arg(long)]
    pub jail: bool,
    /// With --jail, as root: the user that alcove becomes, a number
    #[arg(long, value_name = "ID")]
    pub uid: Option<u32>,
    /// With --jail, as root: the group that alcove becomes, a number
    #[arg(long, value_name = "ID")]
    pub gid: Option<u32>,
    /// With --jail, as root: processor time in hundredths of one processor, such as 150%
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    pub cpu_quota: Option<u32>,
    /// With --jail, as root: memory for guest and alcove, with K, M, G or T
    #[arg(long, value_name = "SIZE")]
    pub memory_max: Option<ByteSize>,
}

impl SandboxArgs {
    fn apply(self, config: &mut SandboxConfig) {
        override_with(&mut config.mode, self.sandbox);
        config.jail |= self.jail;
        override_optional(&mut config.uid, self.uid);
        override_optional(&mut config.gid, self.gid);
        override_optional(&mut config.cpu_quota, self.cpu_quota);
        override_optional(&mut config.memory_max, self.memory_max);
    }
}

/// The flags of `alcove bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, after_long_help = BENCH_HELP)]
pub struct BenchArgs {
    /// What else to do.
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// What to measure [default: all]
    #[arg(value_name = "CASE", value_enum)]
    pub cases: Vec<CaseName>,
    /// Folder with vmlinux, initramfs.cpio and programs/, as `make guest` leaves them
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    pub guest: PathBuf,
    /// Another kernel
    #[arg(short, long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Another initial RAM disk
    #[arg(short, long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// How the line begins that the guest's first process prints
    #[arg(long, value_name = "TEXT", default_value = "alcove-guest: init")]
    pub marker: String,
    /// Runs for the figures
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Runs before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub warm_up: u32,
    /// Guests that the case density starts
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub guests: u32,
    /// How long a guest may take to print what it is measured by
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    pub patience: Span,
    /// Boot the same guest with another VMM, too; repeatable
    #[arg(long, value_name = "VMM", value_enum)]
    pub vs: Vec<Peer>,
    /// Likewise with a command for the shell, in which {kernel}, {initrd}, {cmdline} and {memory_mib} are
    /// replaced and which prints the guest's console; repeatable
    #[arg(long, value_name = "CMD")]
    pub vs_command: Vec<String>,
    /// Write all values to a file, for `alcove bench compare`
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a page with plots to a file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// What `alcove bench` does besides measuring.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Tell what changed from one measurement to another.
    Compare {
        /// The first measurement, as --json wrote it.
        before: PathBuf,
        /// The second.
        after: PathBuf,
        /// Exit with 1 if a figure is worse beyond noise.
        #[arg(long)]
        fail_if_worse: bool,
    },
}

const BENCH_HELP: &str = "\
A figure has changed beyond noise when no run of the one measurement lies among the runs of the other \
and the medians differ by 1 % or more.";

const EXIT_STATUS: &str = "\
Exit status:
  0    the guest powered off or reset, or was ended at the console (Ctrl-a x)
  N    the status that the guest wrote to the debug-exit port 0xf4
  124  --timeout is over
  125  alcove itself failed: bad flags, no KVM, a bad image
  126  the guest's kernel panicked
  127  the guest crashed
  128+N  signal N ended alcove; SIGTERM presses the guest's power button first, and a guest that
         powers off within --shutdown-timeout gives 0";

impl RunArgs {
    /// Puts the flags that were given over `config`.
    pub fn apply(self, config: &mut VmConfig) {
        let Self {
            kernel,
            initrd,
            append,
            cmdline,
            cpus,
            memory,
            disks,
            nets,
            rng,
            serial,
            timeout,
            shutdown_timeout,
            assist,
            sandbox,
            ..
        } = self;
        // A command line flag also replaces what the file says with the other one.
        if append.is_some() != cmdline.is_some() {
            (config.append, config.cmdline) = (None, None);
        }
        override_optional(&mut config.kernel, kernel);
        override_optional(&mut config.initrd, initrd);
        override_optional(&mut config.append, append);
        override_optional(&mut config.cmdline, cmdline);
        override_optional(&mut config.timeout, timeout);
        override_optional(&mut config.shutdown_timeout, shutdown_timeout);
        override_with(&mut config.cpus, cpus);
        override_with(&mut config.memory, memory);
        override_with(&mut config.rng, rng);
        if !disks.is_empty() {
            config.disks = disks;
        }
        if !nets.is_empty() {
            config.nets = nets;
        }
        override_with(&mut config.serial, serial);
        override_with(&mut config.assist, assist);
        sandbox.apply(&mut config.sandbox);
    }
}

fn override_with<T>(setting: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *setting = value;
    }
}

fn override_optional<T>(setting: &mut Option<T>, flag: Option<T>) {
    if flag.is_some() {
        *setting = flag;
    }
}

fn parse_cpus(text: &str) -> Result<CpuConfig, keyvalue::KeyValueError> {
    keyvalue::parse(text, "count")
}

fn parse_disk(text: &str) -> Result<DiskConfig, keyvalue::KeyValueError> {
    keyvalue::parse(text, DiskConfig::FIRST_KEY)
}

fn parse_net(text: &str) -> Result<NetConfig, keyvalue::KeyValueError> {
    keyvalue::parse(text, NetConfig::FIRST_KEY)
}

fn parse_rng(text: &str) -> Result<RngConfig, keyvalue::KeyValueError> {
    keyvalue::parse(text, "enabled")
}

fn parse_percent(text: &str) -> Result<u32, std::num::ParseIntError> {
    text.strip_suffix('%').unwrap_or(text).parse()
}

fn parse_memory(text: &str) -> Result<MemoryConfig, keyvalue::KeyValueError> {
    keyvalue::parse(text, "size")
}
