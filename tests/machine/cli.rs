//! What alcove says without running a guest.

use crate::alcove::{alcove, finish};

pub fn printed_settings_read_back() {
    let flags = [
        "run",
        "--kernel",
        "a kernel",
        "--initrd",
        "i.cpio",
        "--append",
        "quiet -- x \"y\"",
        "--cpus",
        "1",
        "--memory",
        "size=300M",
        "--serial",
        "file=/tmp/x",
        "--timeout",
        "90",
        "--assist",
        "off",
        "--print-config",
    ];
    let first = finish(alcove(flags)).expect(0).stdout;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &first).unwrap();

    let mut again = alcove(["run", "--print-config", "--config"]);
    again.arg(file.path());
    let second = finish(again).expect(0).stdout;

    assert_eq!(first, second);
    for part in ["a kernel", "300M", "file=/tmp/x", "1m 30s", "quiet -- x", "off"] {
        assert!(first.contains(part), "{part} in {first}");
    }
}

pub fn completions_are_there_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = finish(alcove(["completions", shell])).expect(0).stdout;

        assert!(script.contains("print-config"), "{shell}");
    }
}

pub fn help_and_manual_name_every_flag() {
    let help = finish(alcove(["run", "--help"])).expect(0).stdout;
    let manual = finish(alcove(["man"])).expect(0).stdout.replace('\\', "");

    for flag in [
        "--kernel",
        "--initrd",
        "--append",
        "--cmdline",
        "--cpus",
        "--memory",
        "--serial",
        "--timeout",
        "--assist",
        "--sandbox",
        "--jail",
        "--uid",
        "--gid",
        "--cpu-quota",
        "--memory-max",
        "--config",
        "--print-config",
        "--log",
    ] {
        assert!(help.contains(flag), "{flag} in the help");
        assert!(manual.contains(flag), "{flag} in the manual");
    }
    for status in ["124", "125", "126", "127"] {
        assert!(help.contains(status), "{status} in the help");
    }
}

pub fn a_reader_that_leaves_hears_nothing_more() {
    for command in ["man", "doctor"] {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut alcove = alcove([command]);
        alcove.stdout(writer);
        drop(reader);

        let ended = finish(alcove).expect(128 + libc::SIGPIPE);

        assert_eq!(ended.stderr, "", "{command}");
    }
}

pub fn doctor_says_what_works() {
    let said = finish(alcove(["doctor"])).expect(0).stdout;

    let topics = ["kvm", "virtualisation", "vcpus", "tun", "passt", "seccomp", "landlock", "jail"];
    for topic in topics.into_iter().chain(["control groups", "io_uring", "huge pages"]) {
        assert!(said.lines().any(|line| line[4..].starts_with(topic)), "{topic} in {said}");
    }
    assert_eq!(said.contains("TCG"), alcove::host::is_translated(), "{said}");
    assert!(alcove::host::is_translated() || !crate::lab::is_inside());
}
