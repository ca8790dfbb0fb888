//! Many requests at a time, woken by the eventfd.

use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

const BLOCK: usize = 4096;
const DEPTH: u16 = 32;

/// Waits as a device does: for the eventfd, and only when nothing is there.
fn wait_by_eventfd(queue: &mut dyn DiskQueue, wake: &EventFd) {
    if queue.arm() {
        return;
    }
    // SAFETY: the eventfd is open for as long as it is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(wake)) };
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "a completion was not told");
    wake.read().unwrap();
}

/// Writes every block of the thread's part with its own content in batches of varying size, then
/// reads all of it back.
fn exercise(disk: &RawDisk, part: u64, blocks: u64) {
    let wake = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut queue = open_queue(disk, DEPTH, &wake);
    let mut memory: Vec<Vec<u8>> = (0..DEPTH).map(|_| vec![0; BLOCK]).collect();
    let lists: Vec<[Buffer; 2]> = memory
        .iter_mut()
        .map(|block| {
            let (front, back) = block.split_at_mut(512);
            [buffer(front), buffer(back)]
        })
        .collect();
    let content = |block: u64| (part * 37 + block * 11) as u8;
    for writing in [true, false] {
        let mut free: Vec<u16> = (0..DEPTH).collect();
        let mut at = vec![0u64; DEPTH.into()];
        let (mut next, mut done) = (0, 0);
        while done < blocks {
            let batch = 1 + next % 7;
            for _ in 0..batch.min(blocks - next) {
                let Some(tag) = free.pop() else { break };
                let slot = usize::from(tag);
                let buffers = &lists[slot];
                let fill = if writing { content(next) } else { !content(next) };
                // SAFETY: no request is under way on this memory, which outlives the queue's.
                unsafe { std::ptr::write_bytes(buffers[0].start(), fill, BLOCK) };
                at[slot] = next;
                let operation = match writing {
                    true => Operation::Write { buffers, durable: false },
                    false => Operation::Read(buffers),
                };
                let offset = (part * blocks + next) * BLOCK as u64;
                // SAFETY: the memory is left alone until the completion.
                unsafe {
                    queue.submit(&Request { tag, offset, len: BLOCK as u64, operation });
                }
                next += 1;
            }
            queue.start();
            wait_by_eventfd(queue.as_mut(), &wake);
            while let Some(completion) = queue.next_completion() {
                completion.result.unwrap();
                let slot = usize::from(completion.tag);
                // SAFETY: the request is done.
                let data = unsafe { std::slice::from_raw_parts(lists[slot][0].start(), BLOCK) };
                assert!(data.iter().all(|byte| *byte == content(at[slot])));
                free.push(completion.tag);
                done += 1;
            }
        }
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn queues_on_many_threads_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    const BLOCKS: u64 = 120;
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(THREADS * BLOCKS * BLOCK as u64).unwrap();
        for direct in [false, true] {
            let options = DiskOptions { direct, ..options(file.path(), engine) };
            let disk = match RawDisk::open(&options) {
                Err(OpenError::DirectUnsupported) => continue,
                disk => disk.unwrap(),
            };
            thread::scope(|scope| {
                for part in 0..THREADS {
                    let disk = &disk;
                    scope.spawn(move || exercise(disk, part, BLOCKS));
                }
            });
        }
    }
}

#[test]
fn a_file_cut_off_under_load_fails_requests_and_nothing_else() {
    for engine in ENGINES {
        let file = image(4 << 20);
        let mut rig = Rig::new(&options(file.path(), engine));
        let mut memory = vec![0u8; BLOCK * 64];
        let lists: Vec<[Buffer; 1]> = memory.chunks_mut(BLOCK).map(|c| [buffer(c)]).collect();
        thread::scope(|scope| {
            let cutter = scope.spawn(|| {
                for round in 0..200u64 {
                    file.as_file().set_len((round % 2) << 22).unwrap();
                    thread::yield_now();
                }
            });
            let (mut good, mut cut) = (0, 0);
            while !cutter.is_finished() || good == 0 {
                for (tag, buffers) in lists.iter().enumerate() {
                    let offset = (tag * 16 * BLOCK) as u64 % (4 << 20);
                    let operation = Operation::Read(buffers);
                    let request = Request { tag: tag as u16, offset, len: BLOCK as u64, operation };
                    // SAFETY: the memory outlives the requests, which are waited for below.
                    unsafe { rig.queue.submit(&request) };
                }
                while rig.queue.in_flight() > 0 {
                    rig.queue.wait();
                    match rig.queue.next_completion().unwrap().result {
                        Ok(()) => good += 1,
                        Err(Failure::Truncated) => cut += 1,
                        Err(other) => panic!("{other}"),
                    }
                }
                if cutter.is_finished() {
                    file.as_file().set_len(4 << 20).unwrap();
                }
            }
            assert!(good > 0, "{engine:?}: {cut} cut off");
        });
    }
}

#[test]
fn dropping_a_queue_waits_for_what_is_under_way() {
    let file = image(8 << 20);
    let mut rig = Rig::new(&options(file.path(), Engine::IoUring));
    let mut memory = vec![0u8; 8 << 20];
    let lists: Vec<[Buffer; 1]> = memory.chunks_mut(1 << 17).map(|c| [buffer(c)]).collect();
    for (tag, buffers) in lists.iter().enumerate() {
        let (offset, len) = ((tag as u64) << 17, 1 << 17);
        let operation = Operation::Read(buffers);
        // SAFETY: the memory outlives the queue.
        unsafe { rig.queue.submit(&Request { tag: tag as u16, offset, len, operation }) };
    }
    rig.queue.start();

    let started = Instant::now();
    drop(rig);

    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(memory, fs::read(file.path()).unwrap());
}

#[test]
fn an_idle_queue_leaves_its_eventfd_alone() {
    let file = image(1 << 16);
    let mut rig = Rig::new(&options(file.path(), Engine::IoUring));
    rig.read(0, &mut [0; 4096]).unwrap();

    assert!(!rig.queue.arm());
    assert!(rig.wake.read().is_err(), "what is done before anyone waits needs no wake-up");
    assert!(rig.disk.as_fd().try_clone_to_owned().is_ok());
}
