//! Ways to switch a machine off and on: ACPI's registers, the power button, SIGTERM.

use std::io::{BufRead, BufReader, Read};
use std::process::Child;
use std::time::{Duration, Instant};

use devices::legacy::generic_event::{GENERIC_EVENT_BASE, POWER_BUTTON};
use devices::legacy::power::{POWER_BASE, RESET, RESET_VALUE, SLEEP_CONTROL};
use iced_x86::code_asm::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::alcove::{Finished, alcove, finish, initramfs, run_script, wait};
use crate::bare_metal::{command, kernel};
use crate::host::guest_file;

const COM1: u32 = 0x3f8;
const SIGTERM_STATUS: i32 = 128 + Signal::SIGTERM as i32;
/// SLP_EN with the SLP_TYP of S5.
const SOFT_OFF: i32 = 1 << 5 | 5 << 2;

fn assembler() -> CodeAssembler {
    CodeAssembler::new(64).unwrap()
}

fn write_port(a: &mut CodeAssembler, port: u16, value: i32) {
    a.mov(dx, u32::from(port)).unwrap();
    a.mov(al, value).unwrap();
    a.out(dx, al).unwrap();
}

/// Never returns, without an exit from the guest.
fn spin(a: &mut CodeAssembler) {
    let mut forever = a.create_label();
    a.set_label(&mut forever).unwrap();
    a.pause().unwrap();
    a.jmp(forever).unwrap();
}

/// Says on the console that the guest is up.
fn greet(a: &mut CodeAssembler) {
    write_port(a, COM1 as u16, i32::from(b'\n'));
}

/// Waits until the guest has printed a line that ends with `mark`; the rest of its output goes
/// nowhere.
fn wait_for(child: &mut Child, mark: &str) {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if line.trim_end().ends_with(mark) {
            std::thread::spawn(move || output.read_to_end(&mut Vec::new()));
            return;
        }
        line.clear();
    }
    panic!("the guest ended before it printed {mark:?}");
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

pub fn soft_off_by_the_sleep_register_ends_the_guest() {
    let mut a = assembler();
    write_port(&mut a, POWER_BASE + SLEEP_CONTROL, SOFT_OFF);
    spin(&mut a);

    finish(command(&kernel(&mut a), &[])).expect(0);
}

pub fn the_reset_register_ends_the_guest() {
    let mut a = assembler();
    write_port(&mut a, POWER_BASE + RESET, RESET_VALUE.into());
    spin(&mut a);

    finish(command(&kernel(&mut a), &[])).expect(0);
}

pub fn sigterm_presses_the_power_button() {
    let mut a = assembler();
    let mut again = a.create_label();
    greet(&mut a);
    a.mov(dx, u32::from(GENERIC_EVENT_BASE)).unwrap();
    a.set_label(&mut again).unwrap();
    a.in_(al, dx).unwrap();
    a.test(al, i32::from(POWER_BUTTON)).unwrap();
    a.je(again).unwrap();
    write_port(&mut a, POWER_BASE + SLEEP_CONTROL, SOFT_OFF);
    spin(&mut a);
    let kernel = kernel(&mut a);
    let mut child = command(&kernel, &[]).spawn().unwrap();
    wait_for(&mut child, "");

    send(&child, Signal::SIGTERM);

    wait(child).expect(0);
}

pub fn a_guest_that_ignores_its_power_button_is_ended() {
    let mut a = assembler();
    greet(&mut a);
    spin(&mut a);
    let kernel = kernel(&mut a);
    let mut child = command(&kernel, &["--shutdown-timeout", "1s"]).spawn().unwrap();
    wait_for(&mut child, "");
    let start = Instant::now();

    send(&child, Signal::SIGTERM);

    let Finished { stderr, .. } = wait(child).expect(SIGTERM_STATUS);
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    let told = ["took no notice", "--shutdown-timeout", "ACPI", "ended by signal 15"];
    assert!(told.iter().all(|part| stderr.contains(part)), "{stderr}");
}

pub fn a_second_sigterm_ends_at_once() {
    let mut a = assembler();
    greet(&mut a);
    spin(&mut a);
    let kernel = kernel(&mut a);
    let mut child = command(&kernel, &["--shutdown-timeout", "1h"]).spawn().unwrap();
    wait_for(&mut child, "");

    send(&child, Signal::SIGTERM);
    // Two signals of a kind that wait at the same time become one.
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none(), "the first ended it");
    send(&child, Signal::SIGTERM);

    wait(child).expect(SIGTERM_STATUS);
}

pub fn vcpus_that_the_guest_never_starts_are_told() {
    let mut a = assembler();
    write_port(&mut a, POWER_BASE + SLEEP_CONTROL, SOFT_OFF);
    spin(&mut a);

    let ended = finish(command(&kernel(&mut a), &["--cpus", "3"])).expect(0);

    let told = ["started 1 of the 3 vCPUs", "--cpus", "ACPI"];
    assert!(told.iter().all(|part| ended.stderr.contains(part)), "{}", ended.stderr);
}

/// Linux hears the button through the generic event device and signals whom cad_pid names.
pub fn linux_powers_off_by_its_button() {
    let script = "\
        echo $$ >/proc/sys/kernel/cad_pid
        trap 'poweroff -f' PWR
        echo waiting
        while :; do sleep 1; done";
    let image = initramfs(script, &[]);
    let mut command = alcove(["run", "--shutdown-timeout", "100s"]);
    command.arg("--kernel").arg(guest_file("vmlinux")).arg("--initrd").arg(image.path());
    let mut child = command.spawn().unwrap();
    wait_for(&mut child, "waiting");

    send(&child, Signal::SIGTERM);

    wait(child).expect(0);
}

pub fn linux_resets_by_acpi() {
    let script = "[ -d /sys/firmware/acpi ] || exit 1; reboot -f";

    run_script(script, &[], &["--append", "reboot=acpi"]).expect(0);
}

pub fn linux_without_acpi_runs_on_one_cpu_and_is_told_of() {
    let script = "[ $(nproc) = 1 ] || exit 1; reboot -f";

    let ended = run_script(script, &[], &["--cpus", "2", "--append", "acpi=off"]).expect(0);

    assert!(ended.stderr.contains("started 1 of the 2 vCPUs"), "{}", ended.stderr);
}
