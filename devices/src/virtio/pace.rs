//! When a thread that was woken lets others run first.

/// How many times a thread is woken before it is tried whether work comes in batches.
const WAKES_PER_TRIAL: u32 = 64;

/// Lets whoever fills a queue fill it where it wants to.
///
/// What wakes the thread may run it at once in place of who woke it, on a host whose processors are
/// all busy: many requests would then be served one by one, with a switch and an interrupt each. After
/// a time that found several requests the thread therefore first lets others run, and now and then to
/// find out. On a host with processors to spare that changes nothing.
#[derive(Debug, Default)]
pub(super) struct Pace {
    wakes: u32,
    /// Since the thread was last woken, several requests were there at once.
    batches: bool,
}

impl Pace {
    /// Before the work is begun that the thread was woken for.
    pub fn woken(&mut self) {
        self.wakes = self.wakes.wrapping_add(1);
        if std::mem::take(&mut self.batches) || self.wakes.is_multiple_of(WAKES_PER_TRIAL) {
            std::thread::yield_now();
        }
    }

    /// So many requests were there at once.
    pub fn saw(&mut self, requests: usize) {
        self.batches |= requests > 1;
    }
}
