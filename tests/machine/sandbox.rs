//! What is left to a guest that owns alcove: each barrier, tried from within.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Gid, Pid, Uid, setgid, setgroups, setuid};
use tempfile::{NamedTempFile, TempDir};

use crate::alcove::{Finished, finish, give_network, guest_command, patience, wait};
use crate::bare_metal::{command, kernel, spin};

/// The threads that a guest of these tests has, by their names: all kinds there are.
const THREADS: [&str; 4] = ["main", "vcpu0", "vda-q0", "net0-q0"];
/// What each of them tries, and the system call that is refused for it.
const ATTEMPTS: [(&str, &str); 11] = [
    ("open", "openat"),
    ("create", "openat"),
    ("connect", "socket"),
    ("exec", "execve"),
    ("fork", "fork"),
    ("ptrace", "ptrace"),
    ("userns", "unshare"),
    ("signal", "kill"),
    ("ring", "io_uring_setup"),
    ("execmem", "mmap"),
    ("execheap", "mprotect"),
];

/// A guest that prints a line and then does nothing.
fn idle_kernel() -> NamedTempFile {
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(dx, 0x3f8).unwrap();
    a.mov(al, u32::from(b'\n')).unwrap();
    a.out(dx, al).unwrap();
    spin(&mut a).unwrap();
    kernel(&mut a)
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    image
}

fn attempt(thread: &str, what: &str, without: &str) -> Finished {
    let (guest, image) = (idle_kernel(), image());
    let mut command = command(&guest, &["--timeout", "1ms", "--disk"]);
    command.arg(image.path());
    let (_peer, network) = UnixStream::pair().unwrap();
    give_network(&mut command, &network);
    command.env("ALCOVE_TEST_ATTEMPT", format!("{thread}:{what}"));
    command.env("ALCOVE_TEST_WITHOUT", without);
    finish(command)
}

pub fn every_thread_is_refused_what_it_has_no_use_for() {
    for thread in THREADS {
        for (what, call) in ATTEMPTS {
            let said = attempt(thread, what, "").expect(125).stderr;

            let expected = format!("thread {thread}: the sandbox refused the system call {call} ");
            assert!(said.contains(&expected), "{thread}: {what}: {said}");
            assert!(!said.contains("attempt:"), "{thread}: {what}: {said}");
        }
    }
}

/// Were a filter too wide, Landlock and the limits would still stand.
pub fn behind_the_filters_there_are_more_barriers() {
    for thread in THREADS {
        for (what, why) in [
            ("open", "Permission denied"),
            ("create", "Permission denied"),
            ("connect", "Permission denied"),
            ("exec", "Permission denied"),
        ] {
            let said = attempt(thread, what, "seccomp").stderr;

            let expected = format!("attempt: {what} failed: {why}");
            assert!(said.contains(&expected), "{thread}: {said}");
        }
    }
}

/// A running alcove that is killed in the end.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts `command`, which is that of [`idle_kernel`], and waits until its guest runs.
    fn start(mut command: Command) -> Self {
        let mut running = Self(command.spawn().unwrap());
        let mut line = String::new();
        BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "\n");
        running
    }

    fn id(&self) -> u32 {
        self.0.id()
    }
}

/// The fields of a process's status that begin with `name`.
fn status(process: u32, name: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap().split_whitespace().map(str::to_owned).collect()
}

fn threads(process: u32) -> Vec<u32> {
    let folder = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    folder.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// Fails unless every thread of `process` is without capabilities and new privileges, and filtered.
#[track_caller]
fn assert_powerless(process: u32) {
    for thread in threads(process) {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(thread, set), ["0000000000000000"], "{set} of {thread}");
        }
        assert_eq!(status(thread, "NoNewPrivs"), ["1"]);
        assert_eq!(status(thread, "Seccomp"), ["2"], "{thread}");
    }
}

pub fn a_plain_run_has_no_privileges_and_hides_its_memory() {
    let (guest, image) = (idle_kernel(), image());
    let mut plain = command(&guest, &["--cpus", "2", "--disk"]);
    plain.arg(image.path());
    let running = Running::start(plain);

    let name = |id: u32| status(id, "Name").remove(0);
    let mut names: Vec<String> = threads(running.id()).into_iter().map(name).collect();
    // Newer kernels keep KVM's own work in a thread of the process's.
    names.retain(|name| !name.starts_with("kvm-"));
    names.sort();
    assert_eq!(names, ["alcove", "vcpu0", "vcpu1", "vda-q0"]);
    assert_powerless(running.id());
    let owner = fs::metadata(format!("/proc/{}/maps", running.id())).unwrap().uid();
    assert_eq!(owner, 0, "a process that may be dumped belongs to its user");
    let limits = fs::read_to_string(format!("/proc/{}/limits", running.id())).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(limit("Max core file size"), 0);
    assert!(limit("Max open files") < 128);
}

pub fn guest_memory_stays_out_of_core_dumps() {
    const GUEST_KIB: u64 = 16 << 10;
    let guest = idle_kernel();
    let running = Running::start(command(&guest, &[]));

    let maps = fs::read_to_string(format!("/proc/{}/smaps", running.id())).unwrap();

    let (mut size_kib, mut kept_out_kib) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Size:") => size_kib = words.next().unwrap().parse().unwrap(),
            Some("VmFlags:") if words.any(|flag| flag == "dd") => kept_out_kib += size_kib,
            _ => {}
        }
    }
    assert!(kept_out_kib >= GUEST_KIB, "{kept_out_kib} KiB are kept out");
}

pub fn stray_descriptors_are_closed_and_named_ones_kept() {
    let guest = idle_kernel();
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("log");
    let mut shell = Command::new("sh");
    let run = "exec 9</dev/null 8>\"$2\"; \
               exec \"$0\" run --memory 16M --kernel \"$1\" --serial file=/dev/fd/8";
    shell.arg("-c").arg(run).arg(crate::alcove::binary()).arg(guest.path()).arg(&log);
    shell.stdin(Stdio::null());
    let running = Running(shell.spawn().unwrap());
    let printed = || fs::read(&log).is_ok_and(|text| text.ends_with(b"\n"));
    let deadline = Instant::now() + patience();
    while !printed() {
        assert!(Instant::now() < deadline, "the guest has not printed");
        thread::sleep(Duration::from_millis(5));
    }

    let descriptors = fs::read_dir(format!("/proc/{}/fd", running.id())).unwrap();
    let numbers: Vec<String> =
        descriptors.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();

    for stray in ["8", "9"] {
        let target = fs::read_link(format!("/proc/{}/fd/{stray}", running.id()));
        let is_stray = |path: PathBuf| path == log || path == Path::new("/dev/null");
        assert!(!target.is_ok_and(is_stray), "{stray} is still open: {numbers:?}");
    }
}

pub fn the_sandbox_can_be_left_out_with_a_warning() {
    let guest = idle_kernel();
    let running = Running::start({
        let mut command = command(&guest, &["--sandbox", "off"]);
        command.stderr(Stdio::inherit());
        command
    });

    assert_eq!(status(running.id(), "Seccomp"), ["0"]);
    drop(running);
    let ended = finish(command(&guest, &["--sandbox", "off", "--timeout", "1ms"])).expect(124);
    assert!(ended.stderr.contains("--sandbox off"), "{}", ended.stderr);
}

/// The processes in the pid namespace of `process`.
fn companions(process: u32) -> Vec<u32> {
    let space = |id: u32| fs::read_link(format!("/proc/{id}/ns/pid")).ok();
    let own = space(process).unwrap();
    let all = fs::read_dir("/proc").unwrap();
    let ids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    ids.filter(|id| space(*id).as_ref() == Some(&own)).collect()
}

/// The one child of a jail's keeper.
fn prisoner(keeper: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    children.trim().parse().unwrap_or_else(|_| panic!("children of {keeper}: {children:?}"))
}

/// What is true of every jail.
#[track_caller]
fn assert_jailed(keeper: u32) -> u32 {
    let inside = prisoner(keeper);
    assert_eq!(companions(inside), [inside], "the processes in the jail");
    assert_eq!(status(inside, "NSpid").last().unwrap(), "1");
    assert_powerless(inside);
    let root = fs::read_dir(format!("/proc/{inside}/root")).unwrap();
    assert_eq!(root.count(), 0, "its root is not empty");
    let write = fs::write(format!("/proc/{inside}/root/file"), "").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(libc::EROFS));
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let space = |id: &str| fs::read_link(format!("/proc/{id}/ns/{kind}")).unwrap();
        assert_ne!(space(&inside.to_string()), space("self"), "{kind}");
    }
    let mounts = fs::read_to_string(format!("/proc/{inside}/mountinfo")).unwrap();
    assert!(mounts.lines().count() == 1 || crate::lab::is_inside(), "{mounts}");
    assert_powerless_keeper(keeper);
    inside
}

#[track_caller]
fn assert_powerless_keeper(keeper: u32) {
    assert_eq!(status(keeper, "CapEff"), ["0000000000000000"]);
    assert_eq!(status(keeper, "Seccomp"), ["2"]);
    let open = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().count();
    assert_eq!(open, 3, "standard error, signals in, signals out");
}

pub fn a_jail_holds_one_process_without_privileges_in_an_empty_root() {
    let (guest, image) = (idle_kernel(), image());
    let mut jailed = command(&guest, &["--jail", "--disk"]);
    jailed.arg(image.path());
    let running = Running::start(jailed);

    let inside = assert_jailed(running.id());

    drop(running);
    let gone = || !Path::new(&format!("/proc/{inside}")).exists();
    let deadline = Instant::now() + patience();
    while !gone() {
        assert!(Instant::now() < deadline, "the jail outlives its keeper");
        thread::sleep(Duration::from_millis(5));
    }
}

/// As any user, who may open /dev/kvm.
pub fn a_plain_user_gets_a_jail_too() {
    let guest = idle_kernel();
    open_to_all(guest.path(), 0o644);
    let folder = tempfile::Builder::new().prefix("alcove").tempdir().unwrap();
    let mut jailed = of_nobody(folder.path());
    jailed.args(["run", "--memory", "16M", "--jail", "--kernel"]).arg(guest.path());
    let running = Running::start(jailed);

    let inside = assert_jailed(running.id());

    assert_eq!(status(inside, "Uid"), ["65534"; 4]);
}

/// alcove, copied to `folder`, for a user without any right, but for a /dev/kvm that is open to all.
pub fn of_nobody(folder: &Path) -> Command {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let program = folder.join("alcove");
    fs::copy(crate::alcove::binary(), &program).unwrap();
    open_to_all(folder, 0o755);
    let device = folder.join("kvm");
    let kvm = fs::metadata("/dev/kvm").unwrap().rdev();
    mknod(&device, SFlag::S_IFCHR, Mode::from_bits_retain(0o666), kvm).unwrap();
    open_to_all(&device, 0o666);
    let mut command = Command::new(&program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let become_nobody = move || {
        // For this process alone.
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some(&device), "/dev/kvm", none, MsFlags::MS_BIND, none)?;
        setgroups(&[])?;
        setgid(Gid::from_raw(NOBODY))?;
        setuid(Uid::from_raw(NOBODY))?;
        Ok(())
    };
    // SAFETY: plain system calls on what was prepared before.
    #[expect(unsafe_code, reason = "becomes another user before it starts")]
    unsafe {
        command.pre_exec(become_nobody)
    };
    command
}

fn open_to_all(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

pub fn root_gives_a_jail_its_user_and_group() {
    let guest = idle_kernel();
    let running = Running::start(command(&guest, &["--jail", "--uid", "1234", "--gid", "4321"]));

    let inside = assert_jailed(running.id());

    assert_eq!(status(inside, "Uid"), ["1234"; 4]);
    assert_eq!(status(inside, "Gid"), ["4321"; 4]);
    assert!(status(inside, "Groups").is_empty());
}

/// With control groups of version 2, which the lab has to mount first.
pub fn root_limits_what_a_jail_uses() {
    let group = Path::new("/sys/fs/cgroup");
    if !group.join("cgroup.controllers").exists() {
        let mount = Command::new("mount").args(["-t", "cgroup2", "none"]).arg(group).status();
        assert!(mount.unwrap().success());
    }
    let guest = idle_kernel();
    let flags = ["--jail", "--cpu-quota", "50%", "--memory-max", "64M"];
    let running = Running::start(command(&guest, &flags));
    let own = group.join("alcove").join(running.id().to_string());
    let read = |name: &str| fs::read_to_string(own.join(name)).unwrap();

    assert_eq!(read("cgroup.procs").trim(), prisoner(running.id()).to_string());
    assert_eq!(read("cpu.max").trim(), "50000 100000");
    assert_eq!(read("memory.max").trim(), (64 << 20).to_string());

    kill(Pid::from_raw(running.id() as i32), Signal::SIGINT).unwrap();
    let mut running = running;
    running.0.wait().unwrap();
    assert!(!own.exists(), "the group is left behind");
}

pub fn a_jail_passes_signals_in_and_the_status_out() {
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(dx, 0xf4).unwrap();
    a.mov(al, 9).unwrap();
    a.out(dx, al).unwrap();
    spin(&mut a).unwrap();
    finish(command(&kernel(&mut a), &["--jail"])).expect(9);

    let guest = idle_kernel();
    for signal in [Signal::SIGINT, Signal::SIGHUP] {
        let mut running = Running::start(command(&guest, &["--jail"]));
        kill(Pid::from_raw(running.id() as i32), signal).unwrap();
        assert_eq!(running.0.wait().unwrap().code(), Some(128 + signal as i32));
    }
    let mut child = command(&guest, &["--jail"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    kill(Pid::from_raw(prisoner(child.id()) as i32), Signal::SIGKILL).unwrap();
    let ended = wait(child).expect(137);
    assert!(ended.stderr.contains("signal 9 killed"), "{}", ended.stderr);
}

/// The console's socket has no name any more for those within, and goes all the same.
pub fn a_jailed_console_leaves_no_socket_behind() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("console");
    for flags in [&["--jail"][..], &[]] {
        let guest = idle_kernel();
        let mut command = command(&guest, flags);
        command.arg("--serial").arg(format!("unix={}", path.display()));
        let mut running = Running(command.spawn().unwrap());
        let deadline = Instant::now() + patience();
        let client = loop {
            match std::os::unix::net::UnixStream::connect(&path) {
                Ok(client) => break client,
                Err(_) => assert!(Instant::now() < deadline, "nobody listens"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();

        kill(Pid::from_raw(running.id() as i32), Signal::SIGINT).unwrap();
        running.0.wait().unwrap();

        assert!(!path.exists(), "{flags:?}");
    }
}

pub fn linux_boots_in_a_jail() {
    let image = image();
    let mut jailed = guest_command("vmlinux", &["--jail", "--cpus", "2", "--disk"]);
    jailed.arg(image.path());

    let said = finish(jailed).expect(0).stdout;

    assert!(said.contains("alcove-guest: cpus 2"), "{said}");
}

pub fn flags_that_do_not_fit_are_told_with_their_remedy() {
    for (flags, told) in [
        (&["--jail", "--sandbox", "off"][..], "--jail and --sandbox off exclude each other"),
        (&["--uid", "5"], "--uid needs a jail; add --jail"),
        (&["--memory-max", "1G"], "--memory-max needs a jail"),
        (&["--jail", "--cpu-quota", "0"], "--cpu-quota 0"),
        (&["--jail", "--memory-max", "16M"], "give 32M or more"),
    ] {
        let guest = idle_kernel();

        let ended = finish(command(&guest, flags)).expect(125);

        assert!(ended.stderr.contains(told), "{}", ended.stderr);
    }
}
