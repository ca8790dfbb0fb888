//! Limits on how often, and how much, a device works: token buckets.
//!
//! [`Bucket`] and [`Limiter`] are pure logic over instants that the caller names; [`Throttle`] adds
//! the clock and a timer descriptor that becomes readable when it is worth another try. Nothing
//! here sleeps. [`LogLimit`] keeps what a guest can cause out of the log.

use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

/// Tokens are counted in billionths, so that a nanosecond's worth of any rate is a whole number.
const PARTS: i128 = 1_000_000_000;

const SUFFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// So much a second, and so much at once after a rest.
///
/// Written `RATE` or `RATE:BURST`, plain numbers or with K, M, G or T for powers of 1024
/// (`500`, `10M:64M`). Without a burst, it is what one second allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate {
    /// Tokens a second, in the long run.
    pub per_second: NonZeroU64,
    /// Tokens that may be taken at once.
    pub burst: NonZeroU64,
}

/// A text that is no [`Rate`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a rate; write how much a second, and after a colon how much at once, such as 10M or 10M:64M"
)]
pub struct ParseRateError(String);

impl Rate {
    /// `per_second`, and as much at once.
    pub fn new(per_second: NonZeroU64) -> Self {
        Self { per_second, burst: per_second }
    }
}

impl FromStr for Rate {
    type Err = ParseRateError;

    fn from_str(text: &str) -> Result<Self, ParseRateError> {
        let (rate, burst) = match text.split_once(':') {
            Some((rate, burst)) => (rate, Some(burst)),
            None => (text, None),
        };
        let parsed = || {
            let per_second = parse_amount(rate)?;
            let burst = burst.map_or(Some(per_second), parse_amount)?;
            Some(Self { per_second, burst })
        };
        parsed().ok_or_else(|| ParseRateError(text.to_owned()))
    }
}

fn parse_amount(text: &str) -> Option<NonZeroU64> {
    let last = text.chars().next_back()?.to_ascii_uppercase();
    let suffix = SUFFIXES.iter().find(|(letter, _)| *letter == last);
    let digits = suffix.map_or(Some(text), |_| text.get(..text.len().checked_sub(1)?))?;
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let unit = 1u64 << suffix.map_or(0, |(_, shift)| *shift);
    NonZeroU64::new(digits.parse::<u64>().ok()?.checked_mul(unit)?)
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_amount(f, self.per_second)?;
        if self.burst == self.per_second {
            return Ok(());
        }
        f.write_str(":")?;
        write_amount(f, self.burst)
    }
}

fn write_amount(f: &mut fmt::Formatter<'_>, amount: NonZeroU64) -> fmt::Result {
    let whole = |shift: &u32| amount.trailing_zeros() >= *shift;
    match SUFFIXES.iter().rev().find(|(_, shift)| whole(shift)) {
        Some((suffix, shift)) => write!(f, "{}{suffix}", amount.get() >> shift),
        None => write!(f, "{amount}"),
    }
}

impl TryFrom<String> for Rate {
    type Error = ParseRateError;

    fn try_from(text: String) -> Result<Self, ParseRateError> {
        text.parse()
    }
}

impl From<Rate> for String {
    fn from(rate: Rate) -> Self {
        rate.to_string()
    }
}

/// A token bucket. It starts full.
///
/// What costs more than there is passes as soon as there is anything and leaves a debt, so that no
/// request waits for others to leave it enough and the long-run rate still holds.
#[derive(Clone, Debug)]
pub struct Bucket {
    per_second: i128,
    /// The most the bucket holds, in parts.
    capacity: i128,
    /// What it holds, in parts; below zero is a debt.
    level: i128,
    filled_at: Instant,
}

impl Bucket {
    /// A full bucket at `now`.
    pub fn new(rate: Rate, now: Instant) -> Self {
        let capacity = i128::from(rate.burst.get()) * PARTS;
        let per_second = i128::from(rate.per_second.get());
        Self { per_second, capacity, level: capacity, filled_at: now }
    }

    /// How long after `now` `amount` may be taken; zero when it may at once. That is when there is
    /// one token, or when nothing is asked for.
    pub fn wait(&mut self, amount: u64, now: Instant) -> Duration {
        self.fill(now);
        if amount == 0 {
            return Duration::ZERO;
        }
        let wanted = PARTS.min(self.capacity);
        let missing = wanted.saturating_sub(self.level).max(0);
        let nanoseconds = missing.saturating_add(self.per_second - 1) / self.per_second;
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Takes `amount`, into debt if need be.
    pub fn take(&mut self, amount: u64) {
        self.level = self.level.saturating_sub(i128::from(amount) * PARTS);
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at);
        self.filled_at = self.filled_at.max(now);
        // A second's worth is per_second * PARTS parts, so a nanosecond's is per_second.
        let elapsed = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let gained = elapsed.saturating_mul(self.per_second);
        self.level = self.level.saturating_add(gained).min(self.capacity);
    }
}

/// Limits on operations and on bytes, each if there is one.
#[derive(Clone, Debug)]
pub struct Limiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    /// Limits at `now`; `None` stands for no limit.
    pub fn new(operations: Option<Rate>, bytes: Option<Rate>, now: Instant) -> Self {
        let bucket = |rate: Rate| Bucket::new(rate, now);
        Self { operations: operations.map(bucket), bytes: bytes.map(bucket) }
    }

    /// Takes one operation of `bytes` out of both buckets.
    ///
    /// # Errors
    /// How long after `now` it is worth another try; nothing is taken then.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let wait = |bucket: &mut Option<Bucket>, amount| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(amount, now))
        };
        let wait = wait(&mut self.operations, 1).max(wait(&mut self.bytes, bytes));
        if !wait.is_zero() {
            return Err(wait);
        }
        self.charge(bytes);
        Ok(())
    }

    /// How long after `now` an operation of unknown size may start; zero when it may at once.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let buckets = [&mut self.operations, &mut self.bytes].into_iter().flatten();
        buckets.map(|bucket| bucket.wait(1, now)).max().unwrap_or_default()
    }

    /// Takes one operation of `bytes` out of both buckets, into debt if need be.
    pub fn charge(&mut self, bytes: u64) {
        for (bucket, amount) in [(&mut self.operations, 1), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.take(amount);
            }
        }
    }
}

/// A [`Limiter`] on the clock, with a timer that tells when to try again. Clones made by
/// [`Throttle::try_clone`] share the limits and have a timer each.
#[derive(Debug)]
pub struct Throttle {
    limiter: Arc<Mutex<Limiter>>,
    timer: TimerFd,
}

impl Throttle {
    /// Limits from now on.
    ///
    /// # Errors
    /// No timer could be had.
    pub fn new(operations: Option<Rate>, bytes: Option<Rate>) -> io::Result<Self> {
        let limiter = Limiter::new(operations, bytes, Instant::now());
        Ok(Self { limiter: Arc::new(Mutex::new(limiter)), timer: TimerFd::new()? })
    }

    /// The same limits, with a timer of its own for another thread.
    ///
    /// # Errors
    /// No timer could be had.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { limiter: self.limiter.clone(), timer: TimerFd::new()? })
    }

    /// Whether one operation of `bytes` may start now. If not, the timer is set for when to ask
    /// again; it is unset otherwise.
    ///
    /// # Errors
    /// The timer could not be set; the operation may start, since no one would ask again.
    pub fn admit(&mut self, bytes: u64) -> io::Result<bool> {
        let taken = self.limiter().take(bytes, Instant::now());
        match taken {
            Ok(()) => Ok(true),
            // Setting the timer takes back an earlier expiry.
            Err(wait) => self.timer.reset(wait, None).map(|()| false).map_err(io::Error::from),
        }
    }

    /// Whether an operation may start whose size is not known yet, see [`Throttle::charge`]. If not,
    /// the timer is set for when to ask again.
    ///
    /// # Errors
    /// As [`Throttle::admit`].
    pub fn is_open(&mut self) -> io::Result<bool> {
        let wait = self.limiter().wait(Instant::now());
        if wait.is_zero() {
            return Ok(true);
        }
        self.timer.reset(wait, None).map(|()| false).map_err(io::Error::from)
    }

    /// An operation that was let through by [`Throttle::is_open`] turned out to have `bytes`.
    pub fn charge(&self, bytes: u64) {
        self.limiter().charge(bytes);
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unsets the timer and takes back its expiry.
    ///
    /// # Errors
    /// The timer could not be set.
    pub fn clear(&mut self) -> io::Result<()> {
        self.timer.clear().map_err(io::Error::from)
    }
}

impl AsRawFd for Throttle {
    /// The timer: readable once it is worth another [`Throttle::admit`].
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// Lets a log line through once in a while and counts those it kept back.
#[derive(Debug)]
pub struct LogLimit {
    every: Duration,
    state: Mutex<LogState>,
}

#[derive(Debug, Default)]
struct LogState {
    last: Option<Instant>,
    kept_back: u64,
}

impl LogLimit {
    /// At most one line in `every`.
    pub const fn new(every: Duration) -> Self {
        Self { every, state: Mutex::new(LogState { last: None, kept_back: 0 }) }
    }

    /// Whether to write a line at `now`: if so, how many were kept back since the one before.
    pub fn pass(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = state.last.is_none_or(|last| now.saturating_duration_since(last) >= self.every);
        if !due {
            state.kept_back = state.kept_back.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.kept_back))
    }
}

#[cfg(test)]
mod tests;
