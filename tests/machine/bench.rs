//! `alcove bench`, from the command line to the page.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use alcove::bench::report::{Report, Summary};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::alcove::{Finished, alcove, finish, patience};
use crate::host::{guest_file, has_hardware_kvm};
use crate::sandbox::of_nobody;

/// alcove bench with `arguments`, for the guest of these tests.
fn bench(arguments: &[&str]) -> Command {
    let mut command = alcove(["bench", "--guest"]);
    command.arg(guest_file("vmlinux").parent().unwrap()).args(arguments);
    command
}

/// Measures once and gives the report.
fn measure(folder: &Path, name: &str, arguments: &[&str]) -> (Finished, Report) {
    let json = folder.join(name);
    let mut command = bench(arguments);
    command.args(["--runs", "1", "--warm-up", "0", "--json"]).arg(&json);
    let ended = finish(command).expect(0);
    let report = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    (ended, report)
}

#[track_caller]
fn median(report: &Report, case: &str, name: &str, vmm: &str) -> f64 {
    let found = report.figures.iter().find(|f| (&*f.case, &*f.name, &*f.vmm) == (case, name, vmm));
    let figure = found.unwrap_or_else(|| panic!("no {case}: {name} of {vmm} in {report:?}"));
    Summary::of(&figure.values).unwrap().median
}

/// What bare guests measure, on any KVM.
pub fn starts_exits_memory_and_density_are_measured() {
    let folder = TempDir::new().unwrap();
    let cases = ["start", "exits", "memory", "density", "--guests", "3"];

    let (ended, report) = measure(folder.path(), "a.json", &cases);

    let own = |case: &str, name: &str| median(&report, case, name, "alcove");
    assert!(own("start", "exec to first output") > 0.0);
    for name in ["port read", "MMIO write"] {
        // Two measurements of microseconds on a busy host; the limit is within reach of neither.
        let limit = median(&report, "exits", name, "bare KVM_RUN");
        assert!(own("exits", name) > limit / 2.0, "{report:?}");
    }
    assert!(own("memory", "1 vCPU, no device") > 100.0);
    // A thread's stack, at the least.
    assert!(own("memory", "each vCPU more") >= 4.0, "{report:?}");
    assert!(own("memory", "each disk") >= 4.0, "{report:?}");
    assert_eq!(own("density", "guests of 128 MiB"), 3.0);
    assert!(own("density", "memory of each, touched RAM included") > 100.0);
    assert!(ended.stdout.contains("exec to first output"), "{}", ended.stdout);
    assert_eq!(ended.stderr, "", "no progress bar where there is no terminal");
}

/// What Linux measures, beside another VMM, and the page.
pub fn a_linux_guest_measures_disk_network_and_boot() {
    let folder = TempDir::new().unwrap();
    let html = folder.path().join("page.html");
    let peer = format!(
        "{} run --kernel {{kernel}} --initrd {{initrd}} --memory {{memory_mib}}M --cmdline {{cmdline}}",
        crate::alcove::binary().display()
    );
    // Where guest kernels are interpreted, each of the others takes minutes.
    let more: &[&str] =
        if has_hardware_kvm() { &["disk", "net", "--vs-command", &peer] } else { &[] };
    let arguments = [&["boot", "--html", html.to_str().unwrap()], more].concat();

    let (_, report) = measure(folder.path(), "a.json", &arguments);

    assert_eq!(report.missing, [], "{report:?}");
    let figures = |case: &str| report.figures.iter().filter(|f| f.case == case).count();
    let expected = if has_hardware_kvm() { (4, 9, 4) } else { (2, 0, 0) };
    assert_eq!((figures("boot"), figures("disk"), figures("net")), expected, "{report:?}");
    assert!(report.figures.iter().all(|figure| figure.values.iter().all(|value| *value > 0.0)));
    assert!(median(&report, "boot", "exec to init", "alcove") > 0.0);
    if has_hardware_kvm() {
        // Another one of the same name.
        assert!(median(&report, "boot", "exec to init", "alcove'") > 0.0);
    }
    let page = fs::read_to_string(html).unwrap();
    assert_eq!(page.matches("<circle").count(), report.figures.len());
}

/// Who is not root sees alcove's memory, and has a network, in namespaces of its own.
pub fn a_plain_user_measures_memory_and_has_a_network() {
    let folder = tempfile::Builder::new().prefix("alcove").tempdir().unwrap();
    let mut command = of_nobody(folder.path());
    command.args(["bench", "memory", "net", "--runs", "1", "--warm-up", "0"]).current_dir("/");

    let said = finish(command).expect(0).stdout;

    assert!(said.contains("each vCPU more"), "{said}");
    // The guest is what is missing, and not the network.
    assert!(said.contains("not run: net: there is no target/guest/vmlinux"), "{said}");
}

/// Ended by a signal, it leaves nothing behind.
pub fn an_interrupted_benchmark_cleans_up() {
    let folder = TempDir::new().unwrap();
    let mut command = bench(&["density", "--runs", "1000"]);
    command.env("TMPDIR", folder.path());
    let mut running = command.spawn().unwrap();
    let deadline = Instant::now() + patience();
    let guests = || fs::read_dir(folder.path()).unwrap().count();
    while guests() == 0 {
        assert!(Instant::now() < deadline, "it made no folder");
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(200));

    kill(Pid::from_raw(running.id() as i32), Signal::SIGTERM).unwrap();

    let (status, said) = wait_for(&mut running);
    assert_eq!(status, Some(125), "{said}");
    assert!(said.contains("interrupted by a signal"), "{said}");
    assert_eq!(guests(), 0);
}

/// The status and the error output of `running`.
fn wait_for(running: &mut Child) -> (Option<i32>, String) {
    let mut said = String::new();
    // Its guests have the other end as well: it ends when they do.
    running.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (running.wait().unwrap().code(), said)
}

pub fn two_measurements_are_compared() {
    let folder = TempDir::new().unwrap();
    let (_, mut report) = measure(folder.path(), "a.json", &["start"]);
    let compare = |arguments: &[&str]| {
        let mut command = alcove(["bench", "compare"]);
        command.current_dir(folder.path()).args(arguments);
        finish(command)
    };
    for figure in &mut report.figures {
        figure.values.iter_mut().for_each(|value| *value *= 2.0);
    }
    fs::write(folder.path().join("b.json"), serde_json::to_vec(&report).unwrap()).unwrap();

    let same = compare(&["a.json", "a.json", "--fail-if-worse"]).expect(0);
    let slower = compare(&["a.json", "b.json", "--fail-if-worse"]).expect(1);
    let told = compare(&["a.json", "b.json"]).expect(0);

    assert!(same.stdout.contains("nothing changed beyond noise"), "{}", same.stdout);
    assert!(slower.stdout.contains("2.000  WORSE"), "{}", slower.stdout);
    assert_eq!(slower.stdout, told.stdout);
    fs::write(folder.path().join("c.json"), "{}").unwrap();
    let refused = compare(&["a.json", "c.json"]).expect(125);
    assert!(refused.stderr.contains("c.json is no report"), "{}", refused.stderr);
}

/// What is missing is told, with what is measured or instead of it.
pub fn a_case_says_what_it_lacks() {
    let folder = TempDir::new().unwrap();
    let command = |arguments: &[&str]| {
        let mut command = alcove(["bench"]);
        command.current_dir(folder.path()).args(["--runs", "1", "--warm-up", "0"]).args(arguments);
        command
    };

    let some = finish(command(&["start", "disk"])).expect(0).stdout;
    let none = finish(command(&["boot"])).expect(125);
    let mut without_qemu = bench(&["boot", "--vs", "qemu"]);
    without_qemu.env("PATH", "/nonexistent");
    let without_qemu = finish(without_qemu).expect(125).stderr;
    // It ends at once, and says nothing.
    let mut broken = bench(&["boot", "--runs", "1", "--warm-up", "0", "--kernel"]);
    broken.arg(folder.path().join("none"));
    let broken = finish(broken).expect(125).stderr;

    assert!(some.contains("not run: disk: there is no target/guest/vmlinux"), "{some}");
    assert!(some.contains("make guest"), "{some}");
    assert!(none.stderr.contains("none of the cases could be run: boot: there"), "{none:?}");
    assert!(without_qemu.contains("qemu-system-x86"), "{without_qemu}");
    assert!(broken.contains("there is no"), "{broken}");
}
