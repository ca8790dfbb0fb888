//! Several requests and queues at a time, pauses, resets, limits.

use std::sync::atomic::AtomicUsize;

use super::*;

#[test]
fn many_requests_are_in_flight_and_each_gets_its_own_data() {
    for engine in ENGINES {
        for direct in [false, true] {
            let mut guest = Guest::new(|config| {
                config.engine = Some(engine);
                config.direct = direct;
            });
            for round in 0..20u64 {
                let sector = |at: u64| (at * 7 + round * 31) % SECTORS;
                let placed: Vec<Placed> = (0..60u64)
                    .map(|at| {
                        let first = at as u16 * 4;
                        guest.put(0, first, &header(VIRTIO_BLK_T_IN, sector(at)), 512)
                    })
                    .collect();
                guest.kick(0);
                guest.wait(0, 60);
                for (at, placed) in (0..).zip(placed) {
                    assert_eq!(guest.status(placed), OK);
                    assert_eq!(guest.data(placed, 512), [sector(at) as u8; 512]);
                }
                guest.forget();
            }
            assert_eq!(guest.metrics.reads.get(), 1200);
        }
    }
}

#[test]
fn queues_work_side_by_side() {
    let mut guest = Guest::new(|config| config.queues = 4);
    for round in 0..10u64 {
        let mut placed = Vec::new();
        for queue in 0..4 {
            for at in 0..8 {
                let sector = queue as u64 * 100 + at + round;
                let request = header(VIRTIO_BLK_T_IN, sector);
                placed.push((sector, guest.put(queue, at as u16 * 4, &request, 512)));
            }
        }
        (0..4).for_each(|queue| guest.kick(queue));
        (0..4).for_each(|queue| drop(guest.wait(queue, 8)));
        for (sector, placed) in placed {
            assert_eq!(guest.status(placed), OK);
            assert_eq!(guest.data(placed, 512), [sector as u8; 512]);
        }
        guest.forget();
    }
}

#[test]
fn what_waits_during_a_pause_is_done_after_it_without_a_kick() {
    let mut guest = Guest::new(|config| config.queues = 2);
    for _ in 0..20 {
        let early = guest.put(1, 0, &header(VIRTIO_BLK_T_IN, 4), 512);
        guest.kick(1);
        guest.driver.transport.pause();
        let late = guest.put(1, 8, &header(VIRTIO_BLK_T_IN, 6), 512);
        let before = guest.driver.used_index(&guest.queues[1]);
        assert_eq!(guest.status(late), UNTOUCHED);
        assert_eq!(guest.driver.used_index(&guest.queues[1]), before, "nothing is in flight");
        guest.driver.transport.resume();

        guest.wait(1, 2);
        assert_eq!((guest.status(early), guest.status(late)), (OK, OK));
        assert_eq!(guest.data(late, 512), [6; 512]);
        guest.forget();
    }
}

#[test]
fn the_rate_is_kept_over_all_queues() {
    let limited = [
        Guest::new(|config| {
            config.queues = 2;
            config.iops = Some("100:10".parse().unwrap());
        }),
        Guest::new(|config| {
            config.queues = 2;
            config.bandwidth = Some("51200:5120".parse().unwrap());
        }),
    ];
    for mut guest in limited {
        let start = Instant::now();
        for queue in 0..2 {
            for at in 0..15 {
                guest.put(queue, at * 4, &header(VIRTIO_BLK_T_IN, at.into()), 512);
            }
            guest.kick(queue);
        }
        (0..2).for_each(|queue| drop(guest.wait(queue, 15)));

        // 30 requests, 10 at once, the rest at 100 a second.
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(190), "{elapsed:?}");
        assert!(guest.metrics.throttled.get() > 0);
        assert_eq!(guest.metrics.reads.get(), 30);
    }
}

#[test]
fn a_throttled_device_resets_and_pauses_at_once() {
    let mut guest = Guest::new(|config| config.iops = Some("1:1".parse().unwrap()));
    for at in 0..10 {
        guest.put(0, at * 4, &header(VIRTIO_BLK_T_IN, at.into()), 512);
    }
    guest.kick(0);
    guest.wait(0, 1);
    let start = Instant::now();

    guest.driver.transport.pause();
    guest.driver.transport.resume();
    guest.driver.reset();

    assert!(start.elapsed() < Duration::from_millis(900));
    assert_eq!(guest.metrics.reads.get(), 1);
}

/// A disk whose requests stay under way until the test lets them go.
struct SlowDisk {
    gate: Arc<Barrier>,
    submitted: Arc<AtomicUsize>,
}

struct SlowQueue {
    gate: Arc<Barrier>,
    submitted: Arc<AtomicUsize>,
    waiting: Vec<u16>,
    done: Vec<Completion>,
}

impl Disk for SlowDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: 1 << 20,
            logical_block: 4096,
            physical_block: 8192,
            optimal_io: 65536,
            aligned_only: false,
            read_only: false,
        }
    }

    fn open_queue(&self, _: u16, _: BorrowedFd<'_>) -> io::Result<Box<dyn DiskQueue>> {
        let (gate, submitted) = (self.gate.clone(), self.submitted.clone());
        Ok(Box::new(SlowQueue { gate, submitted, waiting: Vec::new(), done: Vec::new() }))
    }
}

#[expect(unsafe_code, reason = "implements a trait with an unsafe method")]
impl DiskQueue for SlowQueue {
    unsafe fn submit(&mut self, request: &DiskRequest<'_>) {
        self.waiting.push(request.tag);
        self.submitted.fetch_add(1, Ordering::Relaxed);
    }

    fn start(&mut self) {}

    fn next_completion(&mut self) -> Option<Completion> {
        self.done.pop()
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.done.len()
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn wait(&mut self) {
        self.gate.wait();
        let done = self.waiting.drain(..).map(|tag| Completion { tag, result: Ok(()) });
        self.done.extend(done);
    }
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let gate = Arc::new(Barrier::new(2));
    let submitted = Arc::new(AtomicUsize::new(0));
    let disk = SlowDisk { gate: gate.clone(), submitted: submitted.clone() };
    let device = VirtioBlk::new("slow", &DiskConfig::new("unused"), &disk).unwrap();
    let mut guest = Guest::of(device, u64::MAX, image());
    guest.put(0, 0, &header(VIRTIO_BLK_T_IN, 0), 4096);
    guest.put(0, 4, &header(VIRTIO_BLK_T_IN, 8), 4096);
    guest.kick(0);
    crate::virtio::testing::wait_until("both are in flight", || {
        submitted.load(Ordering::Relaxed) == 2
    });
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, blk_size)), 4096);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, physical_block_exp)), 1 | 2 << 16);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, opt_io_size)), 16);

    let reset_at = Mutex::new(None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            *reset_at.lock().unwrap() = Some(Instant::now());
            gate.wait();
        });
        guest.driver.reset();
        let released = reset_at.lock().unwrap();
        assert!(released.is_some(), "the reset returned with requests in flight");
    });
}

#[test]
fn what_is_on_its_way_to_the_host_is_bounded() {
    let gate = Arc::new(Barrier::new(2));
    let submitted = Arc::new(AtomicUsize::new(0));
    let disk = SlowDisk { gate: gate.clone(), submitted: submitted.clone() };
    let device = VirtioBlk::new("slow", &DiskConfig::new("unused"), &disk).unwrap();
    let mut guest = Guest::of(device, u64::MAX, image());
    let sectors = request::MAX_ZEROES_SECTORS;
    for first in [0, 4] {
        let zeroes = header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
        guest.put(0, first, &[zeroes, range(0, sectors, 0)].concat(), 0);
    }

    guest.kick(0);

    let count = || submitted.load(Ordering::Relaxed);
    crate::virtio::testing::wait_until("the first is in flight", || count() == 1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(count(), 1, "the second waits for it");
    std::thread::scope(|scope| {
        scope.spawn(|| gate.wait());
        guest.driver.reset();
    });
    assert_eq!(count(), 1, "a reset does not wait for the second");
}

#[test]
fn threads_end_with_the_device() {
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")));
        names.filter_map(Result::ok).filter(|name| name.starts_with("ends-q")).count()
    };
    let file = image();
    let config = DiskConfig { queues: 3, ..DiskConfig::new(file.path()) };

    let device = VirtioBlk::open("ends", &config).unwrap();
    crate::virtio::testing::wait_until("the threads have their names", || threads() == 3);
    drop(device);

    crate::virtio::testing::wait_until("the threads are gone", || threads() == 0);
}
