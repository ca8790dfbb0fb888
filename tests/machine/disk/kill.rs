//! What a file system holds after alcove was killed under it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::{Images, MIB, disk, read_file};
use crate::alcove::{initramfs, patience, script_command};

/// The guest names each file once fsync has returned for it; what it named has to be there after
/// alcove was killed, whatever it was doing.
#[expect(clippy::print_stdout, reason = "shown when the test fails")]
pub fn what_was_synced_survives_a_kill() {
    const MOMENTS: u64 = 10;
    let seed = RandomState::new().build_hasher().finish();
    println!("the moments come from seed {seed:#x}");
    let mut random = seed | 1;
    let images = Images::new();
    let script = "mount -t ext4 /dev/vda /tmp || exit 1
                  n=0
                  while :; do
                      n=$((n + 1))
                      yes \"file $n\" | head -c $((n * 977 % 30000)) >/tmp/$n
                      sync /tmp/$n && echo synced $n
                      rm -f /tmp/$((n - 50))
                  done";
    let initramfs = initramfs(script, &[]);
    for _ in 0..MOMENTS {
        // xorshift
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let image = images.ext4("running.ext4", 64 * MIB, None);
        let arguments = ["--memory", "64M", "--disk", &disk(&image, "")];
        let mut guest = Journaling::boot(script_command(&initramfs, &arguments));
        std::thread::sleep(Duration::from_millis(100 + random % 2000));
        assert_synced(&image, &guest.kill());
    }
}

/// Fails unless the file system in `image` can be repaired by itself and then holds the files of
/// these numbers, of which the guest removes those that are 50 behind the last.
#[track_caller]
fn assert_synced(image: &Path, synced: &[u64]) {
    let check = Command::new("e2fsck").arg("-p").arg(image).output().unwrap();
    assert!(matches!(check.status.code(), Some(0 | 1)), "{check:?}");
    let last = synced.last().unwrap();
    for number in synced.iter().filter(|number| **number + 48 > *last) {
        let content = read_file(image, &format!("/{number}"));
        let line = format!("file {number}\n");
        assert_eq!(content.len() as u64, number * 977 % 30000, "file {number}");
        let right = content.chunks(line.len()).all(|part| line.as_bytes().starts_with(part));
        assert!(right, "file {number} differs");
    }
}

/// An alcove whose guest writes files and names those that it has synced.
struct Journaling {
    alcove: Child,
    said: Vec<u8>,
}

impl Journaling {
    /// Returns when the guest has named its first file.
    fn boot(mut command: Command) -> Self {
        let alcove = command.spawn().unwrap();
        let output = alcove.stdout.as_ref().unwrap();
        rustix::fs::fcntl_setfl(output, rustix::fs::OFlags::NONBLOCK).unwrap();
        let mut guest = Self { alcove, said: Vec::new() };
        let deadline = Instant::now() + patience();
        while guest.synced().is_empty() {
            let ended = guest.alcove.try_wait().unwrap();
            let said = String::from_utf8_lossy(&guest.said);
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}: {said}");
            std::thread::sleep(Duration::from_millis(5));
        }
        guest
    }

    /// The numbers of the files that the guest has named so far.
    fn synced(&mut self) -> Vec<u64> {
        let output = self.alcove.stdout.as_mut().unwrap();
        if let Err(error) = output.read_to_end(&mut self.said) {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        }
        let said = String::from_utf8_lossy(&self.said);
        // The last line may be cut off.
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let numbers = whole.lines().filter_map(|line| line.trim().strip_prefix("synced "));
        numbers.map(|number| number.parse().unwrap()).collect()
    }

    /// Kills alcove; the files that were named by then.
    fn kill(&mut self) -> Vec<u64> {
        self.alcove.kill().unwrap();
        self.alcove.wait().unwrap();
        self.synced()
    }
}

impl Drop for Journaling {
    fn drop(&mut self) {
        let _ = self.alcove.kill();
        let _ = self.alcove.wait();
    }
}
