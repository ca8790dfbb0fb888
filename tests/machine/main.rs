//! Whole machines: the built `alcove` runs guests, on this host's /dev/kvm.
//!
//! A test that needs what the host lacks is listed as ignored, which the runner counts as skipped,
//! and says on standard error what it lacks.

mod alcove;
mod bad_input;
mod bare_metal;
mod bench;
mod boot;
mod cli;
mod console;
mod cpus;
mod disk;
mod host;
mod hostile;
mod lab;
mod net;
mod pause;
mod power;
mod sandbox;
mod terminal;

use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use host::{Need, has_hardware_kvm};

/// One test: its name, what it needs, what it does. It fails by panicking.
struct Test {
    name: &'static str,
    needs: &'static [Need],
    body: fn(),
}

/// Lists tests by the path of their function.
macro_rules! tests {
    ($($module:ident::$name:ident $([$($need:ident),+])?),* $(,)?) => {
        &[$(Test {
            name: concat!(stringify!($module), "::", stringify!($name)),
            needs: &[$($(Need::$need),+)?],
            body: $module::$name,
        }),*]
    };
}

const TESTS: &[Test] = tests![
    bad_input::a_command_line_over_the_limit_is_refused,
    bad_input::a_kernel_that_is_none_is_refused,
    bad_input::a_missing_kernel_tells_what_was_tried,
    bad_input::an_initrd_that_does_not_fit_is_refused,
    bad_input::an_unwritable_serial_file_is_refused,
    bad_input::impossible_cpus_and_memory_are_refused,
    bad_input::more_cpus_than_kvm_offers_are_refused[Kvm],
    bad_input::no_kvm_is_told_with_its_remedy[Root],
    bad_input::unknown_keys_are_told_with_the_nearest,
    bare_metal::a_guest_that_spins_is_ended_by_the_time_limit[Kvm],
    bare_metal::a_hypercall_does_not_hang_the_guest[Kvm],
    bare_metal::a_reset_by_the_i8042_ends_the_guest[Kvm],
    bare_metal::a_triple_fault_is_a_crash_with_registers[Kvm],
    bare_metal::an_instruction_that_nobody_completes_is_named[SoftwareKvm],
    bare_metal::the_assist_can_be_left_out[SoftwareKvm],
    bare_metal::the_assist_does_not_harm_where_it_is_not_needed[Kvm],
    bare_metal::pvpanic_is_a_panic[Kvm],
    bare_metal::signals_end_alcove_with_their_number[Kvm],
    bare_metal::string_output_reaches_the_port_element_by_element[Kvm],
    bare_metal::the_debug_exit_port_gives_the_status[Kvm],
    bare_metal::unknown_addresses_read_as_ones[Kvm],
    bench::a_case_says_what_it_lacks[Kvm, Guest],
    bench::a_linux_guest_measures_disk_network_and_boot[Kvm, Guest, NetworkTools],
    bench::a_plain_user_measures_memory_and_has_a_network[Kvm, Root],
    bench::an_interrupted_benchmark_cleans_up[Kvm],
    bench::starts_exits_memory_and_density_are_measured[Kvm],
    bench::two_measurements_are_compared[Kvm],
    boot::a_kernel_panic_gives_126[Kvm, Guest],
    boot::a_script_gives_its_status[Kvm, Guest],
    boot::debian_6_1_reaches_user_space[HardwareKvm, Guest, DebianKernels],
    boot::debian_6_12_reaches_user_space[HardwareKvm, Guest, DebianKernels],
    boot::avx_programs_side_by_side_compute_right[Kvm, Guest, GuestXcr0],
    boot::bzimage_reports_and_ends[Kvm, Guest],
    boot::bzimage_runs_in_64_mib[Kvm, Guest],
    boot::bzimage_runs_in_8_gib[Kvm, Guest],
    boot::system_calls_and_traps_arrive_as_what_they_are[Kvm, Guest],
    boot::vmlinux_reports_and_ends[Kvm, Guest],
    boot::vmlinux_runs_in_64_mib[Kvm, Guest],
    boot::vmlinux_runs_in_8_gib[Kvm, Guest],
    cli::a_reader_that_leaves_hears_nothing_more,
    cli::completions_are_there_for_every_shell,
    cli::doctor_says_what_works[Kvm],
    cli::help_and_manual_name_every_flag,
    cli::printed_settings_read_back,
    console::a_mebibyte_goes_both_ways_through_a_slow_guest[Kvm, FastPorts],
    console::a_paste_into_linux_arrives_whole[Kvm, Guest],
    console::a_pty_is_a_console[Kvm],
    console::a_reader_that_leaves_does_not_disturb_the_guest[Kvm],
    console::a_socket_is_a_console[Kvm],
    console::a_terminal_is_put_back_whatever_ends_alcove[Kvm],
    console::the_escape_key_helps_and_ends[Kvm],
    console::the_shell_takes_commands[Kvm, Guest],
    disk::a_full_host_is_an_io_error_in_the_guest[Kvm, Guest, Root],
    disk::a_read_only_disk_refuses_writes[Kvm, Guest],
    disk::an_image_that_another_writes_is_refused_with_its_owner[Kvm],
    disk::bad_disks_are_refused[Kvm],
    disk::every_engine_writes_what_the_host_finds[HardwareKvm, Guest, FileSystemTools],
    disk::linux_boots_from_a_disk_without_an_initramfs[Kvm, Guest, FileSystemTools],
    disk::registers_are_read_and_written_without_linux[Kvm],
    disk::sixteen_disks_have_sixteen_names[Kvm, Guest],
    disk::the_entropy_device_gives_what_differs[Kvm, Guest],
    disk::trimming_gives_space_back[Kvm, Guest, FileSystemTools],
    disk::what_linux_writes_is_what_the_host_finds[Kvm, Guest, FileSystemTools],
    disk::what_was_synced_survives_a_kill[Kvm, Guest, FileSystemTools],
    disk::without_an_entropy_device_there_is_none[Kvm],
    hostile::registers_and_rings_of_garbage_harm_nobody[Kvm],
    hostile::two_cpus_that_race_the_devices_harm_nobody[Kvm, Root, NetworkTools],
    net::a_flood_into_a_guest_that_reads_nothing_is_survived[Kvm, Guest, Root, NetworkTools],
    net::a_guest_and_its_host_talk_over_a_tap[Kvm, Guest, Root, NetworkTools],
    net::a_plain_user_has_a_network_without_any_right[Kvm, Guest, Root, NetworkTools],
    net::a_tap_that_goes_down_comes_up_again[Kvm, Guest, Root, NetworkTools],
    net::an_inherited_interface_is_a_network[Kvm, Guest, Root, NetworkTools],
    net::networks_that_cannot_be_had_are_refused[Kvm, Root, NetworkTools],
    net::several_queues_and_long_frames_work_on_an_interface_made_on_the_spot[Kvm, Guest, Root, NetworkTools],
    net::two_guests_talk_on_a_bridge[Kvm, Guest, Root, NetworkTools],
    pause::pausing_loses_no_access_and_repeats_none[Kvm],
    power::a_guest_that_ignores_its_power_button_is_ended[Kvm],
    power::a_second_sigterm_ends_at_once[Kvm],
    cpus::linux_finds_its_cpus[Kvm, Guest],
    cpus::a_storm_of_interrupts_leaves_two_cpus_consistent[Kvm, Guest],
    cpus::a_storm_of_interrupts_leaves_three_cpus_consistent[HardwareKvm, Guest],
    cpus::a_storm_of_interrupts_leaves_four_cpus_consistent[HardwareKvm, Guest],
    power::linux_powers_off_by_its_button[Kvm, Guest],
    power::linux_resets_by_acpi[Kvm, Guest],
    power::linux_without_acpi_runs_on_one_cpu_and_is_told_of[Kvm, Guest],
    power::sigterm_presses_the_power_button[Kvm],
    power::soft_off_by_the_sleep_register_ends_the_guest[Kvm],
    power::the_reset_register_ends_the_guest[Kvm],
    power::vcpus_that_the_guest_never_starts_are_told[Kvm],
    sandbox::a_jail_holds_one_process_without_privileges_in_an_empty_root[Kvm, Root],
    sandbox::a_jail_passes_signals_in_and_the_status_out[Kvm, Root],
    sandbox::a_jailed_console_leaves_no_socket_behind[Kvm, Root],
    sandbox::a_plain_run_has_no_privileges_and_hides_its_memory[Kvm, Root],
    sandbox::a_plain_user_gets_a_jail_too[Kvm, Root],
    sandbox::behind_the_filters_there_are_more_barriers[Kvm, DebugBuild, Landlock],
    sandbox::every_thread_is_refused_what_it_has_no_use_for[Kvm, DebugBuild],
    sandbox::flags_that_do_not_fit_are_told_with_their_remedy[Kvm, Root],
    sandbox::guest_memory_stays_out_of_core_dumps[Kvm, Root],
    sandbox::linux_boots_in_a_jail[Kvm, Guest, Root],
    sandbox::root_gives_a_jail_its_user_and_group[Kvm, Root],
    sandbox::root_limits_what_a_jail_uses[Kvm, Root, ControlGroups],
    sandbox::stray_descriptors_are_closed_and_named_ones_kept[Kvm, Root],
    sandbox::the_sandbox_can_be_left_out_with_a_warning[Kvm],
];

fn main() -> ExitCode {
    if std::env::var_os(console::PANIC_CHILD).is_some() {
        console::panic_in_raw_mode();
    }
    if lab::is_inside() {
        return lab::agent::main(TESTS);
    }
    let arguments = Arguments::from_args();
    // What is only for the other kind of KVM is not missing here: it runs in the lab.
    let only_lab = |test: &&Test| test.needs.contains(&Need::HardwareKvm) && !has_hardware_kvm();
    let plain = TESTS.iter().filter(|test| !only_lab(test));
    let plain = plain.map(|test| trial(test, !arguments.list));
    let trials = plain.chain(lab::trials(TESTS, &arguments)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(test: &'static Test, tell: bool) -> Trial {
    let missing = test.needs.iter().find_map(|need| need.missing());
    if let Some(reason) = missing.filter(|_| tell) {
        let _ = writeln!(io::stderr(), "skipped: {}: {reason}", test.name);
    }
    let run = || panic::catch_unwind(test.body).map_err(|_| "it panicked, see above".into());
    Trial::test(test.name, run).with_ignored_flag(missing.is_some())
}
