//! Networks: Linux on virtio-net, and hosts that live in network namespaces of the tests' own.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::alcove::{alcove, binary, finish, give_network, initramfs, patience, script_command};
use crate::bad_input::assert_refused;
use crate::bare_metal;
use crate::host::{guest_file, has_hardware_kvm};

/// Where a guest's netbench finds that of its host.
const BENCH_PORT: &str = "5000";
/// Where a guest that waits for its end is told of it.
const END_PORT: u16 = 5001;

/// A host without a network, but for what the test makes: this thread, and what it starts, is there.
pub struct Host {
    bench: Option<Child>,
}

impl Host {
    pub fn enter() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        Self { bench: None }
    }

    /// A tap interface with `address` that is up.
    pub fn tap(&self, name: &str, address: &str, flags: &str) {
        ip(&format!("tuntap add {name} mode tap {flags}"));
        if !address.is_empty() {
            ip(&format!("addr add {address} dev {name}"));
        }
        ip(&format!("link set {name} up"));
    }

    /// A way out of the host, as a network card would be.
    fn with_default_route(&self) {
        ip("link add ext0 type veth peer name ext1");
        ip("addr add 192.0.2.2/24 dev ext0");
        ip("link set ext0 up");
        ip("link set ext1 up");
        ip("route add default via 192.0.2.1");
    }

    /// Serves netbench.
    fn serve(&mut self) {
        let mut command = Command::new(guest_file("programs/netbench"));
        self.bench = Some(command.args(["serve", BENCH_PORT]).spawn().unwrap());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(bench) = &mut self.bench {
            let _ = bench.kill();
            let _ = bench.wait();
        }
    }
}

/// Runs `ip`, of iproute2, which must succeed.
#[track_caller]
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {said}");
}

/// Whether `address` answers a ping.
fn pings(address: &str) -> bool {
    let mut command = Command::new("busybox");
    command.args(["ping", "-c", "2", "-W", "20", address]).stdout(Stdio::null());
    command.status().unwrap().success()
}

/// How much goes over TCP each way, in bytes: a guest that is interpreted copies slowly.
fn stream_bytes() -> u64 {
    if has_hardware_kvm() { 64 << 20 } else { 1 << 18 }
}

fn netbench() -> (&'static str, Vec<u8>) {
    ("netbench", fs::read(guest_file("programs/netbench")).unwrap())
}

/// A guest that runs while the test does something else; killed when dropped.
struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
    seen: String,
}

impl Running {
    fn start(mut command: Command) -> Self {
        command.stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output, seen: String::new() }
    }

    /// Waits until the guest prints `line`.
    #[track_caller]
    fn wait_for(&mut self, line: &str) {
        loop {
            let mut next = String::new();
            let bytes = self.output.read_line(&mut next).unwrap();
            assert!(bytes > 0, "the guest ended before {line:?}:\n{}", self.seen);
            self.seen.push_str(&next);
            if next.trim() == line {
                return;
            }
        }
    }

    /// Waits for the guest to end with `status`.
    #[track_caller]
    fn expect(mut self, status: i32) {
        self.output.read_to_string(&mut self.seen).unwrap();
        let ended = self.child.wait().unwrap();
        assert_eq!(ended.code(), Some(status), "{}", self.seen);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects to a guest that may not listen yet.
#[track_caller]
fn connect(address: (Ipv4Addr, u16)) -> TcpStream {
    let end = Instant::now() + patience();
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "{address:?}: {error}"),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// What `address`, which leads into a guest, says to who asks. passt takes connections that it has to
/// give up while no one listens in the guest.
fn answer(address: (Ipv4Addr, u16)) -> String {
    let end = Instant::now() + patience();
    let mut said = String::new();
    while said.is_empty() {
        assert!(Instant::now() < end, "{address:?} says nothing");
        let mut stream = connect(address);
        // Either fails for a connection that is given up.
        let _ = stream.write_all(b"who?\n").and_then(|()| stream.read_to_string(&mut said));
        thread::sleep(Duration::from_millis(100));
    }
    said
}

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// The guest's part of most tests: an address, and the programs of netbench.
fn with_address(rest: &str) -> String {
    format!(
        "ip link set lo up; ip link set eth0 up; ip addr add {GUEST}/24 dev eth0 || exit 1\n{rest}"
    )
}

/// Streams each way, with and without offloads, and pings.
pub fn a_guest_and_its_host_talk_over_a_tap() {
    let mut host = Host::enter();
    host.tap("tap0", "10.9.0.1/24", "");
    host.serve();
    let bytes = stream_bytes();
    let script = with_address(&format!(
        "ping -c 2 10.9.0.1 || exit 2
         /netbench send 10.9.0.1 {BENCH_PORT} {bytes} || exit 3
         /netbench receive 10.9.0.1 {BENCH_PORT} {bytes} || exit 4
         /netbench offloads eth0 off || exit 5
         /netbench send 10.9.0.1 {BENCH_PORT} {} || exit 6
         /netbench receive 10.9.0.1 {BENCH_PORT} {} || exit 7
         /netbench offloads eth0 on || exit 8
         /netbench send 10.9.0.1 {BENCH_PORT} {} || exit 9
         echo ready
         nc -l -p {END_PORT}; exit 42",
        bytes / 4,
        bytes / 4,
        bytes / 4,
    ));
    let image = initramfs(&script, &[netbench()]);
    let mut guest = Running::start(script_command(&image, &["--net", "tap=tap0"]));

    guest.wait_for("ready");
    assert!(pings("10.9.0.2"));
    drop(connect((GUEST, END_PORT)));

    guest.expect(42);
}

/// Several queues, and frames as long as jumbo frames, over an interface that alcove makes.
pub fn several_queues_and_long_frames_work_on_an_interface_made_on_the_spot() {
    let mut host = Host::enter();
    host.serve();
    let bytes = stream_bytes() / 4;
    let script = with_address(&format!(
        "[ -d /sys/class/net/eth0/queues/rx-1 ] || exit 2
         [ $(cat /sys/class/net/eth0/mtu) = 9000 ] || exit 3
         [ $(cat /sys/class/net/eth0/address) = 02:00:00:00:00:07 ] || exit 4
         echo ready
         for cpu in 1 2; do
             taskset $cpu /netbench send 10.9.0.1 {BENCH_PORT} {bytes} || exit 5 &
             taskset $cpu /netbench receive 10.9.0.1 {BENCH_PORT} {bytes} || exit 6 &
         done
         for job in %1 %2 %3 %4; do wait $job || exit 7; done
         exit 42"
    ));
    let image = initramfs(&script, &[netbench()]);
    let net = "tap=tap7,queues=2,mtu=9000,mac=02:00:00:00:00:07,id=seven";
    let mut guest = Running::start(script_command(&image, &["--cpus", "2", "--net", net]));

    guest.wait_for("ready");
    assert_eq!(fs::read_to_string("/sys/class/net/tap7/mtu").ok(), None, "not this namespace's");
    ip("addr add 10.9.0.1/24 dev tap7");

    guest.expect(42);
}

/// The guest's link follows its interface down and up.
pub fn a_tap_that_goes_down_comes_up_again() {
    let host = Host::enter();
    host.tap("tap0", "10.9.0.1/24", "");
    let script = with_address(
        "echo ready
         while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do ping -c 1 -W 1 10.9.0.1 >/dev/null; done
         echo down
         while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done
         ping -c 2 -W 20 10.9.0.1 && exit 42",
    );
    let image = initramfs(&script, &[]);
    let mut guest = Running::start(script_command(&image, &["--net", "tap=tap0"]));

    guest.wait_for("ready");
    ip("link set tap0 down");
    guest.wait_for("down");
    ip("link set tap0 up");

    guest.expect(42);
}

pub fn two_guests_talk_on_a_bridge() {
    let host = Host::enter();
    ip("link add br0 type bridge");
    ip("link set br0 up");
    for name in ["tap1", "tap2"] {
        host.tap(name, "", "");
        ip(&format!("link set {name} master br0"));
    }
    let bytes = stream_bytes();
    let server = initramfs(
        &with_address(&format!("/netbench serve {BENCH_PORT} & echo ready; wait")),
        &[netbench()],
    );
    let client = initramfs(
        &format!(
            "ip link set eth0 up; ip addr add 10.9.0.3/24 dev eth0 || exit 1
             ping -c 2 -W 20 {GUEST} || exit 2
             /netbench send {GUEST} {BENCH_PORT} {bytes} || exit 3
             /netbench receive {GUEST} {BENCH_PORT} {bytes} || exit 4
             exit 42"
        ),
        &[netbench()],
    );
    let mut server = Running::start(script_command(&server, &["--net", "tap=tap1"]));
    server.wait_for("ready");

    let client = Running::start(script_command(&client, &["--net", "tap=tap2"]));

    client.expect(42);
}

/// An interface that was opened by whoever starts alcove, for a guest in a jail, which has no network of
/// its own.
pub fn an_inherited_interface_is_a_network() {
    let host = Host::enter();
    host.tap("tap0", "10.9.0.1/24", "vnet_hdr");
    let tap = open_tap("tap0");
    let script = with_address("ping -c 2 10.9.0.1 && exit 42");
    let image = initramfs(&script, &[]);
    let mut command = script_command(&image, &["--jail"]);
    give_network(&mut command, &tap);

    finish(command).expect(42);
}

fn open_tap(name: &str) -> OwnedFd {
    let file = fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an ifreq is plain numbers.
    #[expect(unsafe_code, reason = "zeroed")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the kernel reads and fills the request, which is of the size that it expects.
    #[expect(unsafe_code, reason = "ioctl")]
    let result = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::c_ulong, &raw mut request)
    };
    assert_eq!(result, 0);
    file.into()
}

/// The script by which udhcpc sets what it was given, and prints it.
const DHCP_SCRIPT: &str = "#!/bin/sh
[ \"$1\" = bound ] || exit 0
ip addr add $ip/$mask dev $interface && ip route add default via $router
echo nameserver $dns >/etc/resolv.conf
echo lease $ip via $router dns ${dns:+there}
";

/// A user without any right to networks: an address by DHCP, a file from the host, a way in from the
/// host's loopback; and a link that goes down when passt does.
pub fn a_plain_user_has_a_network_without_any_right() {
    let host = Host::enter();
    host.with_default_route();
    let folder = everyone_may_use_kvm();
    let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    serve_file(content.clone());
    let script = format!(
        "ip link set eth0 up
         udhcpc -i eth0 -n -q -s /dhcp || exit 1
         [ $(wget -O - http://10.0.2.2:8000/file | wc -c) = {} ] || exit 2
         wget -q -O - http://10.0.2.2:8000/file | md5sum
         echo ready
         while true; do nc -l -p 80 -e sh -c 'read line; cat /etc/hostname'; done &
         while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.2; done
         exit 42",
        content.len()
    );
    let dhcp = DHCP_SCRIPT.as_bytes().to_vec();
    let image = initramfs(&script, &[("dhcp", dhcp), ("etc/hostname", b"guest".to_vec())]);
    let mut command = as_plain_user(folder.path(), image.path());
    command.args(["--net", "user,forward=tcp:8080:80"]);
    let mut guest = Running::start(command);

    guest.wait_for("lease 10.0.2.15 via 10.0.2.2 dns there");
    guest.wait_for("ready");
    assert_eq!(answer((Ipv4Addr::LOCALHOST, 8080)), "guest");
    assert!(TcpStream::connect((Ipv4Addr::new(192, 0, 2, 2), 8080)).is_err(), "loopback only");
    kill_child(guest.child.id(), "passt");

    guest.expect(42);
}

/// In a mount namespace of this thread's own, /dev/kvm is everybody's; the folder has an alcove that
/// everybody may run.
fn everyone_may_use_kvm() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    let node = folder.path().join("kvm");
    let mknod = Command::new("mknod").arg(&node).args(["c", "10", "232"]).status().unwrap();
    assert!(mknod.success());
    fs::set_permissions(&node, PermissionsExt::from_mode(0o666)).unwrap();
    mount(Some(&node), "/dev/kvm", none, MsFlags::MS_BIND, none).unwrap();
    for (from, to) in [(binary(), "alcove"), (guest_file("vmlinux"), "vmlinux")] {
        fs::copy(from, folder.path().join(to)).unwrap();
    }
    folder
}

fn as_plain_user(folder: &Path, initrd: &Path) -> Command {
    const NOBODY_IN_PARTICULAR: u32 = 4242;
    fs::copy(initrd, folder.join("initrd")).unwrap();
    fs::set_permissions(folder.join("initrd"), PermissionsExt::from_mode(0o644)).unwrap();
    let mut command = Command::new(folder.join("alcove"));
    command.args(["run", "--kernel"]).arg(folder.join("vmlinux"));
    command.arg("--initrd").arg(folder.join("initrd")).current_dir("/");
    command.uid(NOBODY_IN_PARTICULAR).gid(NOBODY_IN_PARTICULAR);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Serves `content` by HTTP on port 8000 of the loopback, for ever.
fn serve_file(content: Vec<u8>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 8000)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while reader.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", content.len()).unwrap();
            // A guest that goes away is its own test's concern.
            let _ = stream.write_all(&content);
        }
    });
}

/// Kills the child of `parent` that is called `name`.
#[track_caller]
fn kill_child(parent: u32, name: &str) {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let child = processes.filter_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (id, rest) = stat.split_once(" (")?;
        let (comm, rest) = rest.rsplit_once(") ")?;
        let is_it = comm.starts_with(name) && rest.split(' ').nth(1)? == parent.to_string();
        is_it.then(|| id.parse::<i32>().ok()).flatten()
    });
    let child = child.last().expect("there is no such child");
    let child = nix::unistd::Pid::from_raw(child);
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Frames for a guest that takes none pile up nowhere, and the console goes on.
pub fn a_flood_into_a_guest_that_reads_nothing_is_survived() {
    let host = Host::enter();
    host.tap("tap0", "10.9.0.1/24", "");
    // The driver goes away and leaves its buffers; then it comes back.
    let script = with_address(
        "ip link set eth0 down
         echo ready
         read line </dev/ttyS0 || exit 2
         echo heard $line
         ip link set eth0 up
         ping -c 2 -W 20 10.9.0.1 || exit 3
         exit 42",
    );
    ip(&format!("neigh add {GUEST} lladdr 02:00:00:00:00:09 dev tap0 nud permanent"));
    let image = initramfs(&script, &[]);
    let net = "tap=tap0,mac=02:00:00:00:00:09";
    let mut command = script_command(&image, &["--net", net]);
    command.stdin(Stdio::piped());
    let mut guest = Running::start(command);
    guest.wait_for("ready");
    let before = resident_kib(guest.child.id());

    let socket = UdpSocket::bind((Ipv4Addr::new(10, 9, 0, 1), 0)).unwrap();
    for _ in 0..200_000 {
        // It fails while the interface's queue is full.
        let _ = socket.send_to(&[0x5a; 1400], (GUEST, 9));
    }

    let grown = resident_kib(guest.child.id()).saturating_sub(before);
    assert!(grown < 4096, "it grew by {grown} KiB");
    guest.child.stdin.as_mut().unwrap().write_all(b"you\n").unwrap();
    guest.wait_for("heard you");
    guest.expect(42);
}

/// The memory of a process that is in RAM.
pub fn resident_kib(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What a user may do wrong is told with its remedy.
pub fn networks_that_cannot_be_had_are_refused() {
    let host = Host::enter();
    host.tap("tap0", "", "");
    host.tap("tap8", "", "user 4243");
    ip("link add dummy type veth peer name other");
    let mut code = iced_x86::code_asm::CodeAssembler::new(64).unwrap();
    code.hlt().unwrap();
    let kernel = bare_metal::kernel(&mut code);
    let command = |nets: &[&str]| {
        let mut command = alcove(["run", "--memory", "16M", "--kernel"]);
        command.arg(kernel.path());
        nets.iter().for_each(|net| {
            command.args(["--net", net]);
        });
        command
    };
    let run = |nets: &[&str]| finish(command(nets));

    assert_refused(run(&["tap=a/b"]), &["--net tap=a/b", "15 characters"]);
    assert_refused(run(&["tap=dummy"]), &["--net tap=dummy", "no tap interface"]);
    assert_refused(run(&["tap=tap0,queues=2"]), &["--net tap=tap0", "multi_queue"]);
    assert_refused(run(&["tap=tap0", "tap=tap0"]), &["--net tap=tap0", "its own"]);
    assert_refused(run(&["fd=99"]), &["--net fd=99", "tap interface nor"]);
    assert_refused(run(&["fd=0"]), &["--net fd=0", "tap interface nor"]);
    assert_refused(run(&["tap=tap0,mac=01:00:00:00:00:00"]), &["--net", "station's address"]);
    assert_refused(run(&["user,forward=80"]), &["--net", "tcp:8080:80"]);
    assert_refused(run(&["tap=tap0,bandwith=1M"]), &["--net", "\"bandwidth\""]);
    let mut without_passt = command(&["user"]);
    without_passt.env("PATH", "/nonexistent");
    assert_refused(finish(without_passt), &["--net user", "apt install passt"]);
    host.with_default_route();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 8081)).unwrap();
    let ended = run(&["user,forward=tcp:8081:80"]);
    assert_refused(ended, &["--net user", "passt ended", "8081"]);
    drop(taken);
    // Root of a user namespace of its own has no say in the host's networks.
    for (net, part) in [("tap=tap9", "CAP_NET_ADMIN"), ("tap=tap8", "belongs to another user")] {
        let mut command = command(&[net]);
        let leave = || unshare(CloneFlags::CLONE_NEWUSER).map_err(std::io::Error::from);
        // SAFETY: unshare may be called between fork and exec.
        #[expect(unsafe_code, reason = "pre_exec")]
        unsafe {
            command.pre_exec(leave);
        }
        assert_refused(finish(command), &["--net tap=", part, "--net user"]);
    }
}
